"""Router logits of a mixture of experts, and the loss that balances it: of the rows that compute, layer by layer.

Hugging Face collects what each gate gives at each of its calls, of which there is one for each group of samples, and
counts all of it under one padding mask (B, T). Here that loss sees no mask and those rows only that compute and are no
padding; the model's own forward gets its mask all the same, and the output has all rows that ran.

Shape letters: B batch, T tokens, K computing rows of a group, N rows of all groups, E experts.
"""

import inspect
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.state import Frame, frames
from tokendrop.engine.model.swap import Swapped, swap
from tokendrop.engine.plan.plan import Group, Span
from tokendrop.errors import UnsupportedError

_LOSS, _MASK, _LOGITS = "load_balancing_loss_func", "attention_mask", "router_logits"


class _Balanced(Swapped):
    """Mixin of a model with the loss that balances experts: it gives no padding mask to that loss."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame, names = _entered(self), self.__dict__["_tokendrop"][1]
        if frame is None:
            return super().forward(*args, **kwargs)
        named = dict(zip(names, args, strict=False)) | kwargs
        frame.mask, frame.routed = named.pop(_MASK, None), None
        try:
            out = super().forward(**named)
        finally:
            frame.mask = None
        if frame.routed is not None and getattr(out, _LOGITS, None) is not None:
            out[_LOGITS] = frame.routed
        frame.routed = None
        return out


class _Routed(Swapped):
    """Mixin of the model inside it: it takes the mask, and gives the logits of the rows that count."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        frame, gates = _entered(self), self.__dict__["_tokendrop"][1]
        if frame is None:
            return super().forward(*args, **kwargs)
        frame.ran = []
        out = super().forward(*args, **kwargs | ({} if frame.mask is None else {_MASK: frame.mask}))
        given = getattr(out, _LOGITS, None)
        if not given:
            return out
        if not frame.ran:  # it ran dense after all, or on new tokens only
            frame.routed = given
            out[_LOGITS] = tuple(_real(logits, frame.mask) for logits in given)
            return out
        every = _by_layer(given, frame.ran, gates)
        frame.routed = tuple(torch.cat([logits for _, logits in layer]) for layer in every)
        kept = [[logits[_counts(group, len(logits), frame.mask)] for group, logits in layer] for layer in every]
        out[_LOGITS] = tuple(torch.cat(layer) for layer in kept)
        return out


def _entered(module: nn.Module) -> Frame | None:
    entered = frames(module.__dict__["_tokendrop"][0])
    frame = entered[-1] if entered else None
    return None if frame is None or frame.dense else frame


def _by_layer(given: tuple[Tensor, ...], ran: list[Span], gates: list[int]) -> list[list[tuple[Group, Tensor]]]:
    # What each gate gave, of every group; a layer may have several, each run for one group after another.
    calls = [
        (layer, gate, group) for layer, span in enumerate(ran) for group in span.groups for gate in range(gates[layer])
    ]
    rows = [len(group.samples) * group.ffn_rows for _, _, group in calls]
    if rows != [len(logits) for logits in given]:
        raise UnsupportedError(
            f"router logits of {[len(logits) for logits in given]} rows were collected, expected {rows}: one for each "
            "gate and group of samples; pass output_router_logits=False"
        )
    found: dict[tuple[int, int], list[tuple[Group, Tensor]]] = {}
    for (layer, gate, group), logits in zip(calls, given, strict=True):
        found.setdefault((layer, gate), []).append((group, logits))
    return list(found.values())


def _real(logits: Tensor, mask: Tensor | None) -> Tensor:
    return logits[mask.flatten().bool()] if mask is not None and mask.numel() == len(logits) else logits


def _counts(group: Group, rows: int, mask: Tensor | None) -> Tensor:
    # (B * K,) bool: a row that only fills up does not count, nor does padding.
    active, samples = group.ffn or group.active, group.samples
    counts = torch.ones(len(samples), group.ffn_rows, dtype=torch.bool, device=samples.device)
    if active is not None:
        counts = active.valid
    if mask is not None and mask.dim() == 2:
        real = mask.bool()[samples]
        counts = counts & (real if active is None else real.gather(1, active.index))
    return counts.flatten()


def inject(model: nn.Module, path: str, key: str) -> None:
    """Make the loss that balances the experts of a decoder count the rows that compute; nothing without experts.

    Args:
        model: the module given to `apply`.
        path: of the decoder's layer list.
        key: of the handle.
    """
    above = [model.get_submodule(".".join(path.split(".")[:count])) for count in range(path.count(".") + 1)]
    decoder = next((one for one in reversed(above) if _recorders(one)), None)
    if decoder is None:
        return
    layers = cast(nn.ModuleList, model.get_submodule(path))
    gates = [sum(_is_gate(*named, decoder) for named in layer.named_modules()) for layer in layers]
    outer = next((one for one in above if _balances(one)), None)
    inner = decoder if outer is None else outer.base_model
    _swap(inner, _Routed, key, gates)
    if outer is not None:
        _swap(outer, _Balanced, key, list(inspect.signature(outer.forward).parameters))


def _swap(module: Any, mixin: type[Swapped], key: str, more: list[Any]) -> None:
    swap(module, mixin)
    module.__dict__["_tokendrop"] = key, more


def injected(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that `inject` changed."""
    return (one for one in model.modules() if isinstance(one, _Balanced | _Routed))


def _recorders(module: nn.Module) -> list[Any]:
    # As transformers declares what it collects: classes, their names, or records of one.
    given = (getattr(type(module), "_can_record_outputs", None) or {}).get(_LOGITS, ())
    return given if isinstance(given, list) else [given] if given else []


def _is_gate(name: str, module: nn.Module, decoder: nn.Module) -> bool:
    for one in _recorders(decoder):
        target, place = getattr(one, "target_class", one), getattr(one, "layer_name", None)
        if isinstance(target, type) and isinstance(module, target) and (not place or f".{place}." in f".{name}."):
            return True
    return False


def _balances(module: nn.Module) -> bool:
    forward = inspect.unwrap(type(module).forward)
    return _LOSS in getattr(getattr(forward, "__code__", None), "co_names", ())
