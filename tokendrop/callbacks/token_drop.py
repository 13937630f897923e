"""The callback that drops tokens in a Lightning trainer.

Shape letters: B batch, T tokens, L layers.
"""

import functools
from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from typing import Any

import lightning as L
from torch import nn
from typing_extensions import override

from tokendrop.analysis.flops import task_costs
from tokendrop.callbacks.batch import OURS, batch_layout
from tokendrop.callbacks.strategies import check_strategy
from tokendrop.engine.handle import Handle
from tokendrop.engine.inject import apply, check_methods
from tokendrop.engine.model.decoder import decoders, find_layers
from tokendrop.errors import (
    AppliedError,
    DecoderError,
    LayoutTypeError,
    MethodError,
    UnsupportedError,
    check_flag,
    check_integer,
)
from tokendrop.layout import TokenLayout, id_tensor
from tokendrop.roles import Method
from tokendrop.schedule import Schedule


class TokenDrop(L.Callback):
    """Image tokens of each batch skip the work that their task's method says they do not need.

    Logged for each task of a batch, without unit, 1 = dense:
    `tokendrop/kept_ratio/<task>` (computed token-layers over dense ones) and
    `tokendrop/flops_ratio/<task>` (FLOPs of decoder and head, forward and backward, over dense ones).

    Args:
        methods: a method for whatever task, or task name -> method; None runs a task dense.
        layout: batch -> TokenLayout; by default `tokendrop.callbacks.batch.batch_layout`.
        schedule: when dropping sets in; whole from the first step by default.
        image_ids: vocabulary ids of image tokens, where neither batch nor config says.
        consume: remove 'image_mask', 'segments' and 'task' from the batch before the user's step.
        layers: dotted path of the decoder's layer list, where inspection finds several.
        multiple: row counts are rounded up to it (or to T / 16 where that is less).
        labelled_logits: run the output head and the loss of a Hugging Face model on rows with a label only; its logits
            are then (1, N, V), of the N labelled rows.

    Raises:
        MethodError: no methods, or something that is none; another argument that makes no sense.
        LayoutTypeError: `image_ids` that are none.

    Example:
        >>> from tokendrop import HiMix
        >>> TokenDrop({"understanding": HiMix()}).methods
        {'understanding': HiMix(layers=':', separate='none')}

    Source: ours.
    """

    def __init__(
        self,
        methods: Method | dict[str, Method | None],
        layout: Callable[[Any], TokenLayout] | None = None,
        schedule: Schedule | None = None,
        image_ids: list[int] | None = None,
        consume: bool = False,
        layers: str | None = None,
        multiple: int = 64,
        labelled_logits: bool = False,
    ) -> None:
        super().__init__()
        check_methods(methods)
        if layout is not None and not callable(layout):
            raise MethodError(f"layout: expected a function of the batch, or None; found {layout!r}")
        if schedule is not None and not isinstance(schedule, Schedule):
            raise MethodError(f"schedule: expected a Schedule, or None; found {schedule!r}")
        if layers is not None and not isinstance(layers, str):
            raise MethodError(f"layers: expected the dotted path of a layer list, or None; found {layers!r}")
        check_flag("consume", consume)
        check_flag("labelled_logits", labelled_logits)
        check_integer("multiple", multiple, 1)
        image_ids = id_tensor(image_ids).tolist() if image_ids else []
        self.methods, self.layout, self.schedule = methods, layout, schedule
        self.image_ids, self.consume, self.layers, self.multiple = tuple(image_ids), consume, layers, multiple
        self.labelled_logits = labelled_logits
        self.handle: Handle | None = None
        self.current: TokenLayout | None = None  # of the last batch, for other callbacks
        self._entered, self._wrapped = ExitStack(), ExitStack()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        others = [one for one in getattr(trainer, "callbacks", ()) if isinstance(one, TokenDrop) and one is not self]
        if others:
            raise AppliedError(f"the trainer has {len(others) + 1} TokenDrop callbacks; put all methods into one")
        if not self._inject(pl_module, trainer):
            for name in ("setup", "configure_model"):
                self._inject_after(pl_module, name, trainer)

    def _inject(self, pl_module: L.LightningModule, trainer: L.Trainer) -> bool:
        handle = self._existing(pl_module)
        if handle is not None:
            check_strategy(trainer.strategy, handle.methods.values(), len(handle.layers))
        elif self._has_decoder(pl_module):
            num_layers = len(find_layers(pl_module, self.layers)[1])
            check_strategy(trainer.strategy, check_methods(self.methods).values(), num_layers)
            handle = apply(pl_module, self.methods, self.layers, self.multiple, self.labelled_logits)
        if handle is not None and handle is not self.handle and self.schedule is not None:
            handle.strength = self.schedule.final
        self.handle = handle
        return handle is not None

    def _existing(self, pl_module: L.LightningModule) -> Handle | None:
        found = next((module for module in pl_module.modules() if isinstance(module, Handle)), None)
        if found is not None and found.methods != check_methods(self.methods):
            raise AppliedError(
                f"{type(pl_module).__name__} is dropped already with {found.methods}, and TokenDrop was given "
                f"{self.methods}; remove the first with its handle's remove()"
            )
        return found

    def _has_decoder(self, pl_module: L.LightningModule) -> bool:
        if self.layers is None:
            return bool(decoders(pl_module))
        try:
            find_layers(pl_module, self.layers)
        except DecoderError:
            return False
        return True

    def _inject_after(self, pl_module: L.LightningModule, name: str, trainer: L.Trainer) -> None:
        # No hook lies between configure_model and the optimizers, so the method itself is wrapped on the instance.
        original = getattr(pl_module, name)

        @functools.wraps(original)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            if self.handle is None and self._inject(pl_module, trainer):
                self._wrapped.close()
            return out

        self._wrapped.callback(_restore, pl_module, name, pl_module.__dict__.get(name))
        pl_module.__dict__[name] = wrapped

    def remove(self) -> None:
        """Make the model exactly what it was.

        Raises:
            AppliedError: nothing was dropped.
        """
        if self.handle is None:
            raise AppliedError("TokenDrop has dropped nothing yet; it does so in setup, when a Trainer runs")
        self._entered.close()
        self.handle.remove()
        self.handle = None

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._wrapped.close()
        if self.handle is None:
            raise DecoderError(
                f"{type(pl_module).__name__} has no decoder at the start of the stage; make it in __init__, setup or "
                "configure_model, or give its layer list as layers='...'"
            )
        self.handle.check_sharding()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: asking for the number of steps makes the loaders, whose place a checkpoint still has to restore.
        if self.schedule is not None:
            self.schedule.strength(0, _total_steps(trainer, self.schedule))

    def _enter(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._entered.close()
        if self.handle is None:
            raise AppliedError("TokenDrop has no handle; was it removed while the trainer runs?")
        if self.schedule is not None and trainer.state.fn == "fit":
            self.handle.strength = self.schedule.strength(trainer.global_step, _total_steps(trainer, self.schedule))
        layout = self.layout(batch) if self.layout else batch_layout(batch, pl_module, self.image_ids)
        if not isinstance(layout, TokenLayout):
            raise LayoutTypeError(f"layout: expected a TokenLayout; found {type(layout).__name__}")
        self.current = layout
        # No rank packs more samples than it has tokens.
        samples = len(layout.image) if layout.packs is None else layout.image.numel()
        step, first = (trainer.global_step, batch_idx), trainer.global_rank * samples
        plan = self._entered.enter_context(self.handle.layout(layout, step, first))
        if self.consume and isinstance(batch, MutableMapping):
            for key in OURS:
                batch.pop(key, None)
        if trainer.state.fn == "predict":
            return
        for task, cost in task_costs(self.handle, plan, layout.tasks).items():
            name = task or next((key for key in self.handle.methods if key is not None), "all")
            for kind, value in (("kept_ratio", cost.kept_ratio), ("flops_ratio", cost.flops_ratio)):
                training = bool(trainer.training)
                pl_module.log(
                    f"tokendrop/{kind}/{name}", value, on_step=training, on_epoch=not training, batch_size=plan.shape[0]
                )

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        added = [name for name, _ in pl_module.named_parameters() if "tokendrop." in name]
        saved = checkpoint.get("state_dict", {})
        # Weights are filled in from the text's; what an optimiser remembers of weights that were not there is not.
        if trainer.state.fn == "fit" and added and saved and not any("tokendrop." in name for name in saved):
            raise UnsupportedError(
                f"the checkpoint was made without the {len(added)} image-only projections that {self.methods} adds, so "
                f"its optimiser states do not fit, from {added[0]!r} on; load its weights only, by "
                "load_state_dict(checkpoint['state_dict']), and fit without ckpt_path"
            )

    def _leave(self, *_: Any, **__: Any) -> None:
        self._entered.close()

    def _stop(self, *_: Any, **__: Any) -> None:
        self._entered.close()
        self._wrapped.close()

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter(trainer, pl_module, batch, batch_idx)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._enter(trainer, pl_module, batch, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_fit_start = on_validation_start = on_test_start = on_predict_start = _start
    on_train_batch_end = on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _leave
    on_train_epoch_end = _leave
    on_exception = teardown = _stop


def _restore(pl_module: nn.Module, name: str, before: Any) -> None:
    pl_module.__dict__.pop(name, None)
    if before is not None:
        pl_module.__dict__[name] = before


def _total_steps(trainer: L.Trainer, schedule: Schedule) -> int | None:
    if not schedule.dense_tail:
        return None
    steps = trainer.estimated_stepping_batches
    # Lightning says -1 or infinity for training without an end.
    return int(steps) if 0 <= steps < float("inf") else None
