"""What the vision encoder's attention looks at, seen while the encoder runs.

Shape letters: B batch, T tokens, N images, P patches of an image, V image tokens, E encoder layers, D hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokendrop.engine.model import patches
from tokendrop.engine.model.attention import choosing, follows, settle, settled, unseen
from tokendrop.engine.model.decoder import attention_of, decoders
from tokendrop.engine.model.logits import SOFTMAX, products
from tokendrop.engine.model.swap import Swapped, swap
from tokendrop.errors import LayerRangeError, UnsupportedError
from tokendrop.layout import places, window_by_window
from tokendrop.roles import Encoded

_ROWS = 256  # attention rows at once
# Names of what stands between encoder and decoder, in the field's models.
_BETWEEN = ("projector", "connector", "resampler", "qformer", "perceiver", "aligner")
_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.MaxPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d)
_INSTEAD = "use SVDPrune or Drop(score='leverage'), which need no vision encoder"

# By encoder layer, of each attention that ran in it: (N * P,) how much a patch is looked at, and (N * P, D) its keys.
Seen = dict[Any, Any]


class _Looks(TorchFunctionMode):
    """Keeps what [CLS], or the mean of the rows that see a patch, looks at in each attention inside, and the keys."""

    def __init__(self, cls: bool) -> None:
        super().__init__()
        self.cls, self.found, self.factors = cls, [], (None, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            scale, mask = kwargs.get("scale"), kwargs.get("attn_mask")

            def some(rows: slice) -> Tensor:
                cut = mask if mask is None or mask.shape[-2] == 1 else mask[..., rows, :]
                return products(args[0][:, :, rows], *args[1:3], cut, scale=scale)

            self._keep(args[1], args[0].shape[2], some, mask is not None)
        elif func is torch.matmul:
            self.factors = args
        elif func in SOFTMAX and self.factors[1] is not None:  # of eager attention, behind queries times keys
            self._keep(self.factors[1].transpose(-1, -2), args[0].shape[2], lambda rows: args[0][:, :, rows], True)
        return func(*args, **kwargs)

    @torch.no_grad()
    def _keep(self, keys: Tensor, count: int, logits: Callable[[slice], Tensor], masked: bool) -> None:
        parts = [slice(start, min(start + _ROWS, count)) for start in range(0, count, _ROWS)]
        if self.cls:
            looked = logits(slice(0, 1)).float().softmax(-1).mean(1)[:, 0]
        elif not masked:
            looked = sum(
                (logits(rows).float().softmax(-1).mean(1).sum(1) / count for rows in parts), keys.new_zeros(())
            )
        else:
            looked = _mean_of_those_that_see(logits, parts)
        self.found.append((looked[:, self.cls :].flatten(), keys.float().mean(1)[:, self.cls :].flatten(0, 1)))


def _mean_of_those_that_see(logits: Callable[[slice], Tensor], parts: list[slice]) -> Tensor:
    # Of the rows that a mask lets see a patch; those of padding, which nobody sees, do not count.
    def seen(x: Tensor) -> Tensor:
        return (x > torch.finfo(x.dtype).min / 2).any(1)  # whichever way the mask is written

    real = torch.stack([seen(logits(rows)).any(1) for rows in parts]).any(0)
    total = times = torch.zeros_like(real, dtype=torch.float32)
    for rows in parts:
        x, unseen = logits(rows), ~real[:, rows, None]
        total = total + x.float().softmax(-1).mean(1).masked_fill(unseen, 0).sum(1)
        times = times + seen(x).masked_fill(unseen, value=False).sum(1)
    return total / times.clamp(min=1)


class _Watched(Swapped):
    """Mixin of a vision encoder, and of the attention of its layers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        find, layer, cls = self.__dict__["_tokendrop"]
        if (seen := find()) is None:
            return super().__call__(*args, **kwargs)
        if layer is None:
            seen.clear()
            seen["grid"] = kwargs.get("grid_thw"), (args[0] if args else kwargs["pixel_values"]).shape
            return super().__call__(*args, **kwargs)
        ours = unseen(self)
        if ours and not torch.compiler.is_compiling():  # the attention may have been exchanged since apply
            settle(self)
        with _Looks(cls) as looks, choosing(ours):
            out = super().__call__(*args, **kwargs)
        seen[layer] = looks.found
        return out


class Encoder:
    """The vision encoder of a model, found by inspection.

    Args:
        model: any module with one list of layers whose attention is not causal, in a module with a patch size.
        looked: indices of the layers to look at.

    Raises:
        LayerRangeError: a layer outside it, or one that attends within windows.
        UnsupportedError: no such list, or several; an attention that nobody can look into; a module between encoder
            and decoder that makes image tokens of patches all over the image.
    """

    def __init__(self, model: nn.Module, looked: Iterable[int]) -> None:
        found = [(_tower(model, path), layers) for path, layers in decoders(model, causal=False)]
        found = [(tower, layers) for tower, layers in found if tower is not None]
        if len(found) != 1:
            raise UnsupportedError(
                f"inspection finds {len(found)} vision encoders in {type(model).__name__}, expected one to score image "
                f"tokens with; {_INSTEAD}"
            )
        self.tower, layers = found[0]
        self.config: Any = self.tower.config
        self.layers = {index: index % len(layers) for index in looked}
        whole = list(getattr(self.config, "fullatt_block_indexes", range(len(layers))))
        for index, layer in self.layers.items():
            if layer not in whole or not -len(layers) <= index < len(layers):
                raise LayerRangeError(
                    f"layer {index} of a vision encoder with {len(layers)} layers: expected one whose attention sees "
                    f"the whole image, of {whole}"
                )
        attentions = {at: cast(nn.Module, attention_of(layers[at])) for at in self.layers.values()}
        if len(set(attentions.values())) < len(attentions):
            raise UnsupportedError(
                f"layers {sorted(attentions)} of the vision encoder share an attention, so they cannot be told apart; "
                "look at one layer"
            )
        _check_attention(attentions.values())
        _check_between(model, self.tower)
        self.attentions: dict[int | None, nn.Module] = {None: self.tower, **attentions}
        self.arranging = list(patches.arranging(model))

    @property
    def watched(self) -> list[nn.Module]:
        """The modules that `watch` swaps, one as often as it is swapped."""
        twice = (one for one in self.attentions.values() if settled(one))
        return [*self.attentions.values(), *twice, *(module for module, _ in self.arranging)]

    def watch(self, find: Callable[[], Seen | None]) -> None:
        """Write what is seen into what `find` returns, wherever the encoder runs."""
        names = {name.rpartition(".")[2] for name, _ in self.tower.named_parameters()}
        for layer, module in self.attentions.items():
            if layer is not None and unseen(module):
                settle(module)
            module.__dict__["_tokendrop"] = find, layer, bool(names & {"class_embedding", "cls_token"})
            swap(module, _Watched)
        patches.watch(self.arranging, find)

    def encoded(self, seen: Seen, layers: tuple[int, ...], image: Tensor, times: int = 1) -> Encoded:
        """What was seen in some layers, at the image tokens (B, T).

        A search repeats each row `times`; where the encoder ran before that, the result has each once.

        Raises:
            UnsupportedError: the encoder did not run, or made other tokens than these.
        """
        found = [seen.get(self.layers[layer], ()) for layer in layers]
        counts = {sum(len(looked) for looked, _ in parts) for parts in found}
        said, place = self._of_tokens(seen, found, image, times) if len(counts) == 1 and counts != {0} else (None, None)
        count = int(image.sum())
        image = image[::times] if place is not None and len(place) * times == count else image
        if said is None or place is None or len(place) != int(image.sum()):
            seen_of = 0 if said is None else len(said)
            raise UnsupportedError(
                f"the attention of the vision encoder was seen for {seen_of} tokens, expected one for each of {count} "
                "image tokens; give pixel values, of images or of videos, to a model whose image tokens are patches, "
                f"or squares of them, loaded with attn_implementation='sdpa', or {_INSTEAD}"
            )
        by_layer = said.unflatten(-1, (len(layers), -1)).movedim(1, 0)
        whole = torch.stack([one.new_zeros(*image.shape, one.shape[-1]).index_put((image,), one) for one in by_layer])
        return Encoded(whole[..., 0], whole[..., 1:], place.new_zeros(*image.shape, 3).index_put((image,), place))

    def _of_tokens(self, seen: Seen, found: list[Any], image: Tensor, times: int) -> tuple[Tensor, Tensor]:
        # The attention and the keys of each layer behind each other, (V, C), and the place of each token (V, 3).
        pairs = [[torch.cat(parts) for parts in zip(*one, strict=True)] for one in found]
        said = torch.cat([torch.cat([looked[:, None], keys], -1) for looked, keys in pairs], -1)
        config, (grid, pixels) = self.config, seen["grid"]
        high, wide = config.patch_size if isinstance(config.patch_size, Sequence) else [config.patch_size] * 2
        if grid is None:
            rows, columns, count = pixels[-2] // high, pixels[-1] // wide, int(image.sum())
            if len(said) != pixels[0] * rows * columns:
                return said, places([], said.device)
            maps = said.view(pixels[0], rows * columns, -1)
            arrange = seen.get(patches.ARRANGED, patches.plain)
            return arrange(patches.Grid(maps, rows, columns, (count, count // times)))
        unit = (side := getattr(config, "spatial_merge_size", 1)) ** 2
        sizes = [(frames, rows // side, columns // side) for frames, rows, columns in grid.tolist()]
        place = places(sizes, said.device)
        if len(said) != len(place) * unit:
            return said, places([], said.device)
        # An encoder with window attention runs the tokens window by window.
        window = config.window_size // side // wide if hasattr(config, "fullatt_block_indexes") else 1 << 20
        order = window_by_window(place, window)
        mean = said.unflatten(0, (-1, unit)).mean(1)
        return torch.empty_like(mean).index_copy(0, order, mean), place


def _check_attention(attentions: Iterable[nn.Module]) -> None:
    for module in attentions:
        if unseen(module) and not follows(module):
            backend = cast(Any, module.config)._attn_implementation
            raise UnsupportedError(
                f"the vision encoder runs the {backend!r} attention, which shows nothing of what it looks at; load it "
                f"with attn_implementation='sdpa', or {_INSTEAD}"
            )


def _check_between(model: nn.Module, tower: nn.Module) -> None:
    inside = set(tower.modules())
    for name, module in model.named_modules():
        if module in inside or not any(word in name for word in _BETWEEN):
            continue
        if isinstance(module, _POOLS) or attention_of(module) is not None:
            raise UnsupportedError(
                f"{name!r}, a {type(module).__name__}, makes image tokens of patches in a way that inspection cannot "
                f"follow, so nothing is known of a token's attention in the vision encoder; {_INSTEAD}"
            )


def _tower(model: nn.Module, path: str) -> nn.Module | None:
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts)))
    return next((one for one in above if hasattr(getattr(one, "config", None), "patch_size")), None)
