"""What the vision encoder's attention looks at, seen while the encoder runs.

Shape letters: B batch, T tokens, N images, P patches of an image, V image tokens, E encoder layers, D hidden.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tokendrop.engine.model.decoder import attention_of, decoders
from tokendrop.engine.model.logits import SOFTMAX, products
from tokendrop.engine.model.swap import Swapped, swap
from tokendrop.errors import LayerRangeError, UnsupportedError
from tokendrop.layout import places, window_by_window
from tokendrop.roles import Encoded

_ROWS = 256  # attention rows at once
_INSTEAD = "use SVDPrune or Drop(score='leverage'), which need no vision encoder"

# By encoder layer, of each attention that ran in it: (N * P,) how much a patch is looked at, and (N * P, D) its keys.
Seen = dict[Any, Any]


class _Looks(TorchFunctionMode):
    """Keeps what [CLS], or the mean row, looks at in each attention that runs inside, and the keys."""

    def __init__(self, cls: bool) -> None:
        super().__init__()
        self.cls, self.found, self.factors = cls, [], (None, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and kwargs.get("attn_mask") is None:
            scale = kwargs.get("scale")
            self._keep(args[1], args[0].shape[2], lambda rows: products(args[0][:, :, rows], *args[1:3], scale=scale))
        elif func is torch.matmul:
            self.factors = args
        elif func in SOFTMAX and self.factors[1] is not None:  # of eager attention, behind queries times keys
            self._keep(self.factors[1].transpose(-1, -2), args[0].shape[2], lambda rows: args[0][:, :, rows])
        return func(*args, **kwargs)

    @torch.no_grad()
    def _keep(self, keys: Tensor, count: int, logits: Callable[[slice], Tensor]) -> None:
        looked, count = torch.zeros((), device=keys.device), 1 if self.cls else count
        for start in range(0, count, _ROWS):
            looked = looked + logits(slice(start, min(start + _ROWS, count))).float().softmax(-1).mean(1).sum(1) / count
        self.found.append((looked[:, self.cls :].flatten(), keys.float().mean(1)[:, self.cls :].flatten(0, 1)))


class _Watched(Swapped):
    """Mixin of a vision encoder, and of the attention of its layers."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        find, layer, cls = self.__dict__["_tokendrop"]
        if (seen := find()) is None:
            return super().__call__(*args, **kwargs)
        if layer is None:
            seen["grid"] = kwargs.get("grid_thw"), (args[0] if args else kwargs["pixel_values"]).shape
            return super().__call__(*args, **kwargs)
        with _Looks(cls) as looks:
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
        UnsupportedError: no such list, or several.
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
        self.watched: dict[int | None, nn.Module] = {None: self.tower, **attentions}

    def watch(self, find: Callable[[], Seen | None]) -> None:
        """Write what is seen into what `find` returns, wherever the encoder runs."""
        names = {name.rpartition(".")[2] for name, _ in self.tower.named_parameters()}
        for layer, module in self.watched.items():
            module.__dict__["_tokendrop"] = find, layer, bool(names & {"class_embedding", "cls_token"})
            swap(module, _Watched)

    def encoded(self, seen: Seen, layers: tuple[int, ...], image: Tensor, times: int = 1) -> Encoded:
        """What was seen in some layers, at the image tokens (B, T).

        A search repeats each row `times`; where the encoder ran before that, the result has each once.

        Raises:
            UnsupportedError: the encoder did not run, or made other tokens than these.
        """
        found = [seen.get(self.layers[layer], ()) for layer in layers]
        config, unit = self.config, (side := getattr(self.config, "spatial_merge_size", 1)) ** 2
        grid, pixels = seen.get("grid", (None, (0, 0, 0)))
        high, wide = config.patch_size if isinstance(config.patch_size, Sequence) else [config.patch_size] * 2
        sizes = [(1, pixels[-2] // high, pixels[-1] // wide)] * pixels[0] if grid is None else grid.tolist()
        place = places([(frames, rows // side, columns // side) for frames, rows, columns in sizes], image.device)
        image = image[::times] if len(place) * times == int(image.sum()) else image
        count = int(image.sum())
        counts = {len(place) * unit, *(sum(len(looked) for looked, _ in parts) for parts in found)}
        if counts != {count * unit}:
            raise UnsupportedError(
                f"the attention of the vision encoder was seen for {min(counts) // unit} tokens, expected one for each "
                f"of {count} image tokens; give pixel values to a model loaded with attn_implementation='sdpa', or "
                f"{_INSTEAD}"
            )
        # An encoder with window attention runs the tokens window by window.
        window = config.window_size // side // wide if hasattr(config, "fullatt_block_indexes") else 1 << 20
        order = window_by_window(place, window)

        def tokens(x: Tensor) -> Tensor:
            raster = torch.empty_like(x[::unit]).index_copy(0, order, x.unflatten(0, (-1, unit)).mean(1))
            return x.new_zeros(*image.shape, *x.shape[1:]).index_put((image,), raster)

        pairs = [[torch.cat(parts) for parts in zip(*one, strict=True)] for one in found]
        looked, keys = (torch.stack([tokens(x) for x in both]) for both in zip(*pairs, strict=True))
        return Encoded(looked, keys, place.new_zeros(*image.shape, 3).index_put((image,), place))


def _tower(model: nn.Module, path: str) -> nn.Module | None:
    parts = path.split(".")
    above = (model.get_submodule(".".join(parts[:count])) for count in range(len(parts)))
    return next((one for one in above if hasattr(getattr(one, "config", None), "patch_size")), None)
