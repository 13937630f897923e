"""The callback that drops tokens in a Lightning trainer.

Shape letters: B batch, T tokens, L layers.
"""

from collections.abc import Callable, MutableMapping
from contextlib import ExitStack
from typing import Any

import lightning as L
from typing_extensions import override

from tokendrop.callbacks.averages import renew_averages
from tokendrop.callbacks.batch import batch_layout, sub_batches
from tokendrop.callbacks.costs import FlopsPerBatch, log_costs
from tokendrop.callbacks.late import followed
from tokendrop.callbacks.launched import BeforeLaunch, check_home
from tokendrop.callbacks.optimizers import check_optimizers
from tokendrop.callbacks.saved import check_added, tell_of_added, warn_of_difference
from tokendrop.callbacks.standing import begin, count, differs, end, evaluated_strength, progress_state, saved_progress
from tokendrop.callbacks.strategies import check_strategy
from tokendrop.callbacks.summary import log_methods, show_summary
from tokendrop.callbacks.tuners import kept_in_tuners
from tokendrop.config import STATE_KEY, described, saved_state
from tokendrop.engine.handle import Handle
from tokendrop.engine.inject import apply
from tokendrop.engine.model.decoder import find_layers, has_decoder
from tokendrop.engine.summary import task_lines, text
from tokendrop.engine.support import Methods, check_methods
from tokendrop.errors import (
    AppliedError,
    DecoderError,
    LayoutTypeError,
    MethodError,
    TokenDropError,
    check_flag,
    check_integer,
)
from tokendrop.layout import OURS, TokenLayout, id_tensor
from tokendrop.schedule import Schedule


class TokenDrop(BeforeLaunch):
    """Image tokens of each batch skip the work that their task's method says they do not need.

    Logged for each task of a batch, without unit, 1 = dense:
    `tokendrop/kept_ratio/<task>` (computed token-layers over dense ones) and
    `tokendrop/flops_ratio/<task>` (FLOPs of decoder and head, forward and backward, over dense ones).

    Args:
        methods: a method for whatever task, or task name -> method; None runs a task dense.
        layout: batch -> TokenLayout; by default `tokendrop.callbacks.batch.batch_layout`. For a batch of several
            batches (`CombinedLoader`), none: the step enters one for each, by `tokendrop.handle(self).layout`.
        schedule: when dropping sets in and ends; whole from the first step by default. An evaluation has the strength
            at which training is, or, where no training or checkpoint says it, `schedule.final`.
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
        methods: Methods,
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
        self.tuned_strength: float | None = None
        self._entered, self._wrapped, self._tuned = ExitStack(), ExitStack(), ExitStack()
        self._told = False  # how a checkpoint with added parameters is loaded
        self._alone = self._removed = self._restored = False
        self._said: set[str] = set()
        self._flops = FlopsPerBatch()

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        others = [one for one in getattr(trainer, "callbacks", ()) if isinstance(one, TokenDrop) and one is not self]
        if others:
            raise AppliedError(f"the trainer has {len(others) + 1} TokenDrop callbacks; put all methods into one")
        self._alone, self._removed, self._restored = True, False, False
        self._tuned.close()
        self._tuned.enter_context(kept_in_tuners(trainer, self, stage))
        before = self._existing(pl_module)
        if not self._inject(pl_module, trainer):
            for name in ("setup", "configure_model"):
                self._wrapped.enter_context(followed(pl_module, name, lambda: self._inject_late(pl_module, trainer)))
        elif before is None and self.handle is not None:
            check_home(trainer, self.handle)

    @override
    def before_launch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._inject(pl_module, trainer)

    def _inject(self, pl_module: L.LightningModule, trainer: L.Trainer) -> bool:
        handle = self._existing(pl_module)
        if handle is not None:
            check_strategy(trainer.strategy, handle.methods.values(), len(handle.layers), handle.decoder_layers)
        elif has_decoder(pl_module, self.layers):
            layers = find_layers(pl_module, self.layers)[1]
            check_strategy(trainer.strategy, check_methods(self.methods).values(), len(layers), layers)
            handle = apply(pl_module, self.methods, self.layers, self.multiple, self.labelled_logits)
            try:
                renew_averages(trainer, pl_module, handle)
            except TokenDropError:
                handle.remove()
                raise
        other, self.handle = handle is not self.handle, handle
        if handle is not None and other and (self.schedule is not None or handle.progress is not None):
            handle.strength = evaluated_strength(handle, self.schedule)
        return handle is not None

    def _inject_late(self, pl_module: L.LightningModule, trainer: L.Trainer) -> None:
        if self.handle is None and self._inject(pl_module, trainer):
            self._wrapped.close()

    def _existing(self, pl_module: L.LightningModule) -> Handle | None:
        found = next((module for module in pl_module.modules() if isinstance(module, Handle)), None)
        if found is not None and (refusal := differs(found, pl_module, self)):
            raise AppliedError(f"{refusal}; remove the first with its handle's remove()")
        return found

    @override
    def __repr__(self) -> str:
        heads = ["not applied yet"] if self.handle is None else self.handle.heads()
        lines = task_lines(check_methods(self.methods), None if self.handle is None else len(self.handle.layers))
        return text("TokenDrop", heads if self.schedule is None else [*heads, str(self.schedule)], lines)

    def remove(self) -> None:
        """Make the model exactly what it was.

        Raises:
            AppliedError: nothing was dropped.
        """
        if self.handle is None:
            raise AppliedError("TokenDrop has dropped nothing yet; it does so in setup, when a Trainer runs")
        self._entered.close()
        self.handle.remove()
        self.handle, self._removed = None, True

    def _start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._wrapped.close()
        if self.handle is not None and trainer.ckpt_path and not self._restored:
            self.handle.progress = None  # weights were loaded, and nothing says how far their training was
        if self.handle is None:
            raise DecoderError(
                f"{type(pl_module).__name__} has no decoder at the start of the stage; make it in __init__, setup or "
                "configure_model, or give its layer list as layers='...'"
            )
        self.handle.check_sharding()

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._start(trainer, pl_module)
        if self.handle is not None:
            check_optimizers(trainer, pl_module, self.handle)
            show_summary(trainer, self.handle, self.schedule)
            log_methods(trainer, pl_module, self.methods, self.schedule)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Not earlier: asking for the number of steps makes the loaders, whose place a checkpoint still has to restore.
        if self.schedule is not None and self.handle is not None:
            self.schedule.strength(0, count(self.handle, trainer).ending(trainer, 0).total)

    def _enter(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        self._entered.close()
        if self.handle is None:
            raise AppliedError("TokenDrop has no handle; was it removed while the trainer runs?")
        done = begin(self.handle, self.schedule, trainer, batch_idx)
        if self.schedule is not None and self.tuned_strength is not None:
            self.handle.strength = self.tuned_strength
        if self.layout is None and (hint := sub_batches(batch)):
            self.current = None
            self._entered.enter_context(self.handle.expecting(hint))
            self._flops.enter(pl_module, self.handle, None)
            return
        layout = self.layout(batch) if self.layout else batch_layout(batch, pl_module, self.image_ids)
        if not isinstance(layout, TokenLayout):
            raise LayoutTypeError(f"layout: expected a TokenLayout; found {type(layout).__name__}")
        self.current = layout
        # No rank packs more samples than it has tokens.
        samples = len(layout.image) if layout.packs is None else layout.image.numel()
        step, first = (done, batch_idx), trainer.global_rank * samples
        plan = self._entered.enter_context(self.handle.layout(layout, step, first))
        if self.consume and isinstance(batch, MutableMapping):
            for key in OURS:
                batch.pop(key, None)
        training = bool(trainer.training)
        costs = self._flops.enter(pl_module, self.handle, plan, layout.tasks, training)
        if trainer.state.fn != "predict":
            log_costs(pl_module, self.handle, costs, training)

    @property
    @override
    def state_key(self) -> str:
        # Lightning refuses two equal keys when it is made, before setup can say what to do instead.
        return STATE_KEY if self._alone else f"{STATE_KEY} {id(self)}"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._removed else described(self.methods, self.schedule)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Here and not in state_dict, which knows no trainer to count the steps of.
        state = checkpoint["callbacks"].get(self.state_key)
        if state and self.handle is not None:
            state |= progress_state(self.handle, trainer)
        self._told = self._told or tell_of_added(checkpoint)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state, self._restored = saved_state(checkpoint), True
        if self.handle is not None:
            self.handle.progress = saved_progress(state)
        if state is not None and trainer.is_global_zero:
            self._said |= warn_of_difference(state, self.methods, self.schedule, trainer.state.fn == "fit", self._said)
        if trainer.state.fn == "fit":
            check_added(pl_module, checkpoint, self.methods)

    def _leave(self, *_: Any, **__: Any) -> None:
        self._entered.close()

    def _stop(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any, **__: Any) -> None:
        self._flops.remove(pl_module)
        self._entered.close()
        self._wrapped.close()
        self._tuned.close()
        if self.handle is not None:
            end(self.handle, self.schedule, trainer)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._enter(trainer, pl_module, batch, batch_idx)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._entered.close()
        if self.handle is not None:
            count(self.handle, trainer)

    @override
    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._enter(trainer, pl_module, batch, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start
    on_validation_start = on_test_start = on_predict_start = _start
    on_validation_batch_end = on_test_batch_end = on_predict_batch_end = _leave
    on_train_epoch_end = _leave
    on_exception = teardown = _stop
