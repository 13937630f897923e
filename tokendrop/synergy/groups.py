"""Parameters by layer and by kind, from their names."""

import re
from collections.abc import Sequence

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
