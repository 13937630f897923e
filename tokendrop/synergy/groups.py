"""Parameters by layer and by kind, from their names.

Shape letters: P parameters, G groups, S samples of gradients.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from tokendrop.errors import TaskLossError

KINDS = ("norm", "embedding", "attention", "mlp", "other")
_WORDS = {
    "norm": ("norm", "ln_", "layernorm"),
    "embedding": ("embed", "wte", "wpe", "lm_head", "output"),
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "feed_forward", "ffn", "expert", "fc"),
}


def group_of(name: str) -> str:
    """The group of a parameter: the path of its layer, if it is in one, and its kind.

    Args:
        name: dotted name.

    Example:
        >>> group_of("model.layers.3.self_attn.q_proj.weight"), group_of("model.layers.3.input_layernorm.weight")
        ('model.layers.3/attention', 'model.layers.3/norm')
        >>> group_of("lm_head.weight")
        'embedding'

    Source: ours.
    """
    layer = re.match(r"(.*?\.\d+)\.", name)
    rest = name[layer.end() :] if layer else name
    # A norm inside an attention is a norm: the last word that says a kind decides.
    kind = next(
        (kind for part in reversed(rest.split(".")) for kind, words in _WORDS.items() if any(w in part for w in words)),
        "other",
    )
    return f"{layer[1]}/{kind}" if layer else kind


def groups_of(names: Sequence[str]) -> dict[str, list[int]]:
    """The positions of the parameters of each group, in order of appearance."""
    found: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        found.setdefault(group_of(name), []).append(index)
    return found


def by_group(
    names: Sequence[str], sizes: Sequence[int], gram: Tensor, opposed: Tensor, tasks: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """Products, and shares of opposed coordinates, summed over the parameters of each group that all tasks touch.

    Args:
        names: of P parameters.
        sizes: how many coordinates each has.
        gram: (P, S, S) products.
        opposed: (P, S, S) numbers of opposed coordinates.
        tasks: whose samples these are, for messages.

    Returns:
        (G, S, S) sums, and (G, S, S) shares of all coordinates that count.

    Raises:
        TaskLossError: a gradient that is not finite, or no parameter that all touch.
    """
    if not gram.isfinite().all():
        raise TaskLossError(f"a gradient of the tasks {tasks} is not finite; expected finite numbers")
    # A parameter that one task does not touch is not shared, and would only lengthen the other's gradient.
    shared = (gram.diagonal(dim1=1, dim2=2) > 0).all(1)
    if not shared.any():
        raise TaskLossError(f"the tasks {tasks} share no parameter with a gradient; expected one that all touch")
    weight = shared / (torch.tensor(sizes) * shared).sum()
    gram, opposed = gram * shared[:, None, None], opposed * weight[:, None, None]
    groups = list(groups_of(names).values())
    return torch.stack([gram[at].sum(0) for at in groups]), torch.stack([opposed[at].sum(0) for at in groups])
