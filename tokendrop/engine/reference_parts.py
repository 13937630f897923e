"""The definition of parts of their own: each runs on all rows, and image rows get what theirs makes of the same input.

Shape letters: B batch, T tokens, D hidden, H heads, W width of a head.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.ffn import ffn_of
from tokendrop.engine.model.norms import key_of, norms_of


def own_hooks(layer: nn.Module, spec: LayerSpec, image: Tensor, rows: list[tuple[int, Any]]) -> Iterator[Any]:
    """Hooks on the parts of an untouched layer.

    Args:
        layer: the layer.
        spec: how it is made.
        image: (B, T) bool.
        rows: a sample, and the parts that its image rows have of their own.

    Source: ours.
    """
    for _, letters in spec.linears:
        yield spec.linear(layer, letters[0]).register_forward_hook(_replace(layer, spec, letters, image, rows))
    whole: list[tuple[str, nn.Module, Callable[[Any], Any]]] = []
    if spec.output is not None:
        whole.append(("o", spec.linear(layer, "o"), lambda one: one["o"]))
    if (ffn := ffn_of(layer)) is not None:
        whole.append(("ffn", ffn, lambda one: one["ffn"]))
    for path, norm in norms_of(layer, spec).items():
        whole.append(("norm", norm, partial(lambda key, one: one["norm"][key], key_of(path))))
    for part, module, own in whole:
        if having := [(sample, own(one)) for sample, one in rows if part in one]:
            yield module.register_forward_hook(_instead(image, having))


def _instead(image: Tensor, rows: list[tuple[int, Any]]) -> Callable[..., Any]:
    batch, tokens = image.shape

    def hook(module: nn.Module, args: tuple[Tensor, ...], out: Any) -> Any:
        made, (x,) = out[0] if isinstance(out, tuple) else out, args
        for sample, own in rows:
            theirs = own(x)
            theirs = (theirs[0] if isinstance(theirs, tuple) else theirs).reshape(made.shape)
            mine = torch.zeros_like(image)
            mine[sample] = image[sample]
            if made.shape[:2] == (batch, tokens):
                mine = mine.view(batch, tokens, *[1] * (made.dim() - 2))
            elif made.dim() == 4 and made.shape[2] == tokens:  # (B, H, T, W)
                mine = mine[:, None, :, None]
            else:
                mine = mine.view(-1, *[1] * (made.dim() - 1))
            made = torch.where(mine, theirs, made)
        return (made, *out[1:]) if isinstance(out, tuple) else made

    return hook


def _replace(
    layer: nn.Module, spec: LayerSpec, letters: str, image: Tensor, own: list[tuple[int, Any]]
) -> Callable[..., Tensor]:
    widths = [spec.widths(layer)[letter] for letter in letters]
    groups = spec.groups(layer)

    def hook(module: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        (x,) = args
        for sample, by_letter in own:
            # In a grouped linear each letter is a slice within each group; else within the whole.
            pieces = list(out[sample].unflatten(-1, (groups, -1)).split([width // groups for width in widths], -1))
            for at, letter in enumerate(letters):
                if letter in by_letter:
                    pieces[at] = by_letter[letter](x[sample]).unflatten(-1, (groups, -1))
            replaced = torch.where(image[sample][:, None], torch.cat(pieces, -1).flatten(-2), out[sample])
            out = torch.cat([out[:sample], replaced[None], out[sample + 1 :]])
        return out

    return hook
