"""Somebody's model with a few batches of theirs, as an analysis runs them.

Shape letters: none.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from tokendrop.engine.model.decoder import check_module, uncompiled
from tokendrop.errors import LayoutError, LayoutTypeError, TaskLossError, UnsupportedError, check_callable
from tokendrop.layout import OURS, TokenLayout, unnamed, without


class Subject:
    """A model, batches, their layout and their loss, checked before anything runs.

    Args:
        model: any module.
        batches: a few, in a list or a loader.
        layout: batch -> TokenLayout.
        loss: batch -> scalar; by default a LightningModule's `training_step`, and of another model the loss that its
            forward returns. Of a batch that is a mapping neither gets `image_mask`, `segments` and `task`.
        layers: dotted path of the decoder's layer list, where inspection finds several.

    Raises:
        DecoderError: no module.
        LayoutError: no batches.
        LayoutTypeError: batches that are none.
        MethodError: a layout or a loss that is no function of one batch.
        UnsupportedError: a model without weights, or a LightningModule that optimises by hand, without a `loss`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        layout: Callable[[Any], TokenLayout],
        loss: Callable[[Any], Any] | None = None,
        layers: str | None = None,
    ) -> None:
        check_module(model)
        check_callable("layout", layout, "batch")
        if loss is not None:
            check_callable("loss", loss, "batch")
        if not isinstance(batches, Iterable) or isinstance(batches, Mapping | str | Tensor):
            one = "; for one batch give [batch]" if isinstance(batches, Mapping | Tensor) else ""
            raise LayoutTypeError(f"batches: expected a list of them, or a loader; found {_short(batches)}{one}")
        self.model, self.layout, self.loss, self.layers = model, layout, loss, layers
        self.batches: Sequence[Any] = list(batches)
        if not self.batches:
            kind = type(batches).__name__
            raise LayoutError(f"no batches: found no row to count in 0 batches of a {kind}; give a few of each task")
        if isinstance(model, L.LightningModule) and loss is None and not model.automatic_optimization:
            raise UnsupportedError(
                f"{type(model).__name__} optimises by hand, so its training_step would train it; give the loss of a "
                "batch as loss=fn(batch)"
            )
        self.device = _device(model)

    def held(self) -> Iterator[tuple[Any, TokenLayout]]:
        """Each batch on the model's device, with its layout.

        Raises:
            LayoutError: tensors without values.
            LayoutTypeError: a layout that is none.
        """
        for one in self.batches:
            batch = tree_map(self._moved, one)
            layout = self.layout(batch)
            if not isinstance(layout, TokenLayout):
                raise LayoutTypeError(f"layout(batch): expected a TokenLayout; found {type(layout).__name__}")
            yield batch, layout

    def _moved(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and leaf.is_meta:
            raise LayoutError(f"a batch holds a tensor of shape {tuple(leaf.shape)} on the meta device, without values")
        # A processor's BatchEncoding is no dict, and moves itself.
        movable = isinstance(leaf, Tensor | Mapping) and hasattr(leaf, "to")
        return leaf.to(self.device) if movable and self.device is not None else leaf

    def run(self, batch: Any) -> Any:
        """What the loss, the training step or the forward returns for a batch.

        Raises:
            LayoutTypeError: a batch that is no mapping, where nothing says how the model takes it.
        """
        if self.loss is not None:
            return self.loss(batch)
        if isinstance(self.model, L.LightningModule):
            return _training_step(self.model, without(batch, frozenset(OURS)))
        if not isinstance(batch, Mapping):
            raise LayoutTypeError(
                f"batches: found a batch of {type(batch).__name__}, and the model is called with a mapping's keywords; "
                "give loss=fn(batch)"
            )
        return self.model(**without(batch, unnamed(uncompiled(self.model).forward)))

    def loss_of(self, batch: Any) -> Tensor:
        """The loss of a batch.

        Raises:
            TaskLossError: something else was returned.
        """
        found = self.run(batch)
        value = found.get("loss") if isinstance(found, Mapping) else getattr(found, "loss", found)
        if found is not value and value is None:
            raise TaskLossError(
                f"a batch gave {type(found).__name__} without a loss; put labels into it, or give loss=fn(batch)"
            )
        if not isinstance(value, Tensor) or value.numel() != 1:
            shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else _short(value)
            raise TaskLossError(f"the loss of a batch is {shown}; expected a tensor of one number")
        return value


def _training_step(module: L.LightningModule, batch: Any) -> Any:
    # What a step logs belongs to a trainer's run, and there is none here.
    kept = {name: vars(module)[name] for name in ("log", "log_dict") if name in vars(module)}
    module.log = module.log_dict = lambda *_, **__: None
    indexed = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
    try:
        return module.training_step(batch, *([0] if indexed else []))
    finally:
        del module.log, module.log_dict
        vars(module).update(kept)


def _device(model: nn.Module) -> torch.device | None:
    devices = {one.device for one in model.parameters()}
    offloaded = any(hasattr(one, "_hf_hook") for one in model.modules())
    if devices == {torch.device("meta")} and not offloaded:
        raise UnsupportedError(
            f"{type(model).__name__} is on the meta device, without weights; load them to see what its layers do"
        )
    return devices.pop() if len(devices) == 1 and not offloaded else None


def _short(value: Any) -> str:
    shown = " ".join(repr(value).split())
    return shown if len(shown) < 80 else f"{type(value).__name__} {shown[:60]}..."
