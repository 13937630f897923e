"""The callback that tells whether the tasks' gradients still agree.

Shape letters: N tasks, S = 2 N samples, P parameters, G groups.
"""

import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from typing_extensions import override

from tokendrop.callbacks.evaluation import Evaluation, as_given, model_loss
from tokendrop.callbacks.loggers import check_loggers, log_figure, warn_of_unknown
from tokendrop.callbacks.progress import Progress
from tokendrop.callbacks.standing import evaluating, uncounted
from tokendrop.callbacks.tasks import Recent, TaskBatch, batch_tasks, check_names
from tokendrop.callbacks.token_drop import TokenDrop
from tokendrop.errors import MethodError, SynergyWarning, TaskLossError, UnsupportedError, check_flag, check_integer
from tokendrop.layout import OURS, without
from tokendrop.synergy.estimates import RANGES, UNKNOWN, affinities
from tokendrop.synergy.evaluate import local, preserved, shared_parameters, summed
from tokendrop.synergy.gradients import products
from tokendrop.synergy.groups import by_group, groups_of
from tokendrop.synergy.history import append_history, heat_map, read_history
from tokendrop.synergy.window import Window

OVERHEAD = 0.03


class SynergyMonitor(L.Callback):
    """How the gradients of several tasks lie to one another, measured while they train.

    At an event, two recent batches of each task are evaluated at the same weights, each isolated from other tasks; what
    they say is averaged over the last events. Logged, with /low and /high where an interval is known:
    `synergy/alignment/<a>/<b>` (cosine), `synergy/conflict/<a>/<b>` (share of opposed coordinates),
    `synergy/magnitude/<a>/<b>`, `synergy/fidelity/<task>` (cosine of the gradient with and without dropping) and
    `synergy/affinity/<from>/<to>` (1 - loss of <to> after a step of <from> / its loss); NaN where a figure is unknown:
    a norm lost in noise, an estimate outside the range of such figures, an event that could not be measured. Loggers
    that take figures get alignment by layer over steps, every `window` events and at the end.
    Training is the same to the bit with and without it.

    Args:
        tasks: names, as batches and layouts call them.
        every_n_steps: optimiser steps between events; None keeps the monitor's share of the time under 3 %.
        loss: (pl_module, batch) -> scalar, without side effects; by default `pl_module.model(**batch).loss`, or that of
            the outermost module that holds the decoder, whatever its name.
        params: prefixes of the names of the parameters to look at; all trained ones by default.
        fidelity: compare each task's gradient with that of the dense model, under `TokenDrop` only.
        affinity: learning rate of the look-ahead; None leaves it out.
        sketch: coordinates kept of each parameter's gradient, as a count sketch; None keeps all 2 N gradients.
        window: events that an estimate is made of.
        history: file of JSON lines; by default synergy.jsonl in the trainer's log directory.
        seed: of dropout in the monitor's own forwards, and of sketches.

    Raises:
        MethodError: arguments that make no sense.

    Example:
        >>> SynergyMonitor(("understanding", "generation")).tasks
        ('understanding', 'generation')

    Source: ours.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        every_n_steps: int | None = None,
        loss: Callable[[L.LightningModule, Any], Tensor] | None = None,
        params: Sequence[str] | None = None,
        fidelity: bool = True,
        affinity: float | None = None,
        sketch: int | None = None,
        window: int = 20,
        history: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        names, params = check_names("tasks", tasks), None if params is None else check_names("params", params)
        if len(names) < 2 or len(set(names)) < len(names):
            raise MethodError(f"tasks={tasks!r}: expected two or more different names")
        for name, value in (("every_n_steps", every_n_steps), ("sketch", sketch), ("window", window)):
            if value is not None or name == "window":
                check_integer(name, value, 1)
        if affinity is not None and not (type(affinity) in (int, float) and 0 < affinity < math.inf):
            raise MethodError(f"affinity={affinity!r}: expected a learning rate above 0")
        if loss is not None and not callable(loss):
            raise MethodError(f"loss: expected a function of the module and the batch, or None; found {loss!r}")
        if history is not None and not isinstance(history, str | Path):
            raise MethodError(f"history: expected the path of a file, or None; found {history!r}")
        check_integer("seed", seed)
        check_flag("fidelity", fidelity)
        self.tasks, self.every_n_steps, self.loss, self.params = names, every_n_steps, loss or model_loss, params
        self.fidelity, self.affinity, self.sketch, self.history, self.seed = fidelity, affinity, sketch, history, seed
        self.figures, self.recent = Window(names, window), Recent(names)
        self._drop: TokenDrop | None = None
        self._seen: set[str | None] = set()
        self._warned, self._logged = set[str](), set[str]()
        self._given: Any = None  # this step's batch, before the step
        self._begin()

    def _begin(self) -> None:
        self.figures.reset()
        self.recent.clear()
        self.progress, self.next_step, self.events = Progress(), self.every_n_steps or 1, 0
        self._clock: tuple[float, int] | None = None
        self._undrawn = False  # whether events have come since the last picture

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        strategy = type(trainer.strategy).__name__
        if strategy in ("FSDPStrategy", "DeepSpeedStrategy"):
            raise UnsupportedError(
                f"SynergyMonitor cannot take gradients beside {strategy}, which owns the parameters; use DDP, or "
                "FSDP2 by ModelParallelStrategy"
            )
        self._drop = next((one for one in trainer.callbacks if isinstance(one, TokenDrop)), None)  # ty: ignore
        if stage == "fit":
            check_loggers(trainer, f"synergy/alignment/{next(iter(self.figures.products.pairs))}")
            warn_of_unknown(trainer, "synergy/")

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step < self.progress.seen:
            self._begin()  # another training than the one before
        self.next_step = min(self.next_step, self.progress.steps + (self.every_n_steps or self.next_step))

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._given = as_given(batch)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        batch, self._given = batch if self._given is None else self._given, None
        layout = None if self._drop is None else self._drop.current
        tasks = batch_tasks(batch) if layout is None else layout.tasks
        self._seen.update(tasks)
        consumed = self._drop is not None and self._drop.consume
        self.recent.add(without(batch, frozenset(OURS)) if consumed else batch, layout, tasks)
        self.progress = self.progress.now(trainer)
        if self.progress.steps >= self.next_step:
            self._event(trainer, pl_module)

    def _event(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        step, start = self.progress.steps, time.perf_counter()
        batches = self.recent.gathered(trainer, pl_module.device)
        if any(len(held) < 2 for held in batches.values()):
            self.next_step = step + (self.every_n_steps or 1)
            return
        entry: dict[str, Any] = {"step": step, "tasks": self.tasks}
        try:
            entry |= self._measured(trainer, pl_module, batches)
            self.events, self._undrawn = self.events + 1, True
        except TaskLossError as gap:
            entry["gap"] = str(gap)
            self._warn(f"the monitor left out step {step}: {gap}", "gap")
        self._log(pl_module, entry)
        entry["seconds"] = time.perf_counter() - start
        path = self._path(trainer)
        if trainer.is_global_zero:
            append_history(path, entry)
        if self.events % self.figures.products.window == 0:
            self._draw(trainer, path)
        self._schedule(trainer, step, start)

    def _measured(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batches: dict[str, list[TaskBatch]]
    ) -> dict[str, Any]:
        handle = None if self._drop is None else self._drop.handle
        parameters, every = shared_parameters(pl_module, self.params), list(pl_module.parameters())
        step, sketch = self.progress.steps, self.sketch
        one = Evaluation(trainer, pl_module, self.loss, handle, parameters, every, sketch, self.seed, step)
        with (
            preserved(pl_module),
            uncounted(pl_module),
            evaluating(handle, None if self._drop is None else self._drop.schedule),
        ):
            found = one.measured(batches, self.affinity, self.fidelity)
        tensors = list(parameters.values())
        gram, opposed = products(found.samples)
        sizes = torch.tensor([local(x).numel() for x in tensors], dtype=torch.float64)[:, None, None]
        gram, opposed = summed(gram, tensors), summed(opposed * sizes, tensors)
        names = list(parameters)
        known = self.figures.products
        self.figures.measuring(names)
        known.update(*by_group(names, [x.numel() for x in tensors], gram, opposed, self.tasks))
        entry: dict[str, Any] = {"losses": found.losses, **known.compute(), "noise_floor": known.floor()}
        entry["products"] = known.parts()
        entry["groups"] = {"names": list(groups_of(names)), "alignment": known.by_group()}
        if found.fidelity:
            entry["fidelity"] = self.figures.over_events("fidelity", found.fidelity)
            entry["norm_ratio"] = found.norm_ratio
        if self.affinity is not None:
            direct, first = affinities(self.tasks, self.affinity, found.ahead, found.losses, gram.sum(0))
            entry["affinity"], entry["affinity_first_order"] = self.figures.over_events("affinity", direct), first
        return entry

    def _log(self, pl_module: L.LightningModule, entry: dict[str, Any]) -> None:
        names = {kind: list(self.figures.products.pairs) for kind in ("alignment", "conflict", "magnitude")}
        if self.fidelity and self._drop is not None and self._drop.handle is not None:
            names["fidelity"] = list(self.tasks)
        if self.affinity is not None:
            names["affinity"] = list(map("/".join, product(self.tasks, repeat=2)))
        # What is unknown is logged as such: loggers, and callbacks that look at a figure, would go on with the last.
        for kind, name in ((kind, name) for kind, named in names.items() for name in named):
            found = entry.get(kind, {}).get(name, UNKNOWN).within(*RANGES[kind])
            for end, value in {"": found.value, "/low": found.low, "/high": found.high}.items():
                key = f"synergy/{kind}/{name}{end}"
                if not end or math.isfinite(value) or key in self._logged:
                    self._logged.add(key)
                    pl_module.log(key, value, on_step=True, on_epoch=False)
            if kind == "alignment" and found.high < 0:
                self._warn(f"the gradients of {name} point away from each other: cosine {found}", name)

    def _draw(self, trainer: L.Trainer, path: Path) -> None:
        pairs, self._undrawn = self.figures.products.pairs if self._undrawn else (), False
        for pair in pairs:
            log_figure(trainer, f"synergy/alignment/{pair}", lambda pair=pair: heat_map(read_history(path), pair))

    def _warn(self, message: str, cause: str) -> None:
        if cause not in self._warned:
            self._warned.add(cause)
            warnings.warn(message, SynergyWarning, stacklevel=2)

    def _schedule(self, trainer: L.Trainer, step: int, start: float) -> None:
        if self.every_n_steps is not None:
            self.next_step = step + self.every_n_steps
            return
        now = time.perf_counter()
        before, self._clock = self._clock, (now, step)
        if before is None:
            # The first event also warms up; a second one shortly after tells its cost and the steps'.
            self.next_step = step + 5
            return
        per_step = (start - before[0]) / max(1, step - before[1])
        wait = trainer.strategy.broadcast(math.ceil((now - start) / (OVERHEAD * per_step)))
        self.next_step = step + max(1, wait)

    def _path(self, trainer: L.Trainer) -> Path:
        """The history's; to be asked for on every rank, since `log_dir` is broadcast."""
        return Path(self.history or Path(trainer.log_dir or trainer.default_root_dir) / "synergy.jsonl")

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        missing = [task for task in self.tasks if task not in self._seen]
        if missing:
            self._warn(
                f"no batch of the tasks {missing} was seen, only of {sorted(map(str, self._seen))}; nothing was "
                "measured. Name the tasks as the batches do",
                "missing",
            )
        self._draw(trainer, self._path(trainer))

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._given = None

    @override
    def state_dict(self) -> dict[str, Any]:
        more = {**self.figures.state_dict(), "seen": sorted(self._seen, key=str)}
        return {"next_step": self.next_step, "events": self.events, **more}

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        # Here and not in state_dict, which knows no ranks: each has batches of its own, and one file holds them all.
        state = checkpoint["callbacks"][self.state_key]
        state |= {"recent": self.recent.saved(trainer), "progress": asdict(self.progress.now(trainer))}

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["callbacks"].get(self.state_key, {})
        self._begin()
        self.recent.load(trainer, state.get("recent", []))
        self.progress = Progress(**state.get("progress", {}))

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.next_step, self.events = state_dict["next_step"], state_dict["events"]
        self._seen.update(state_dict.get("seen", ()))
        self.figures.load_state_dict(state_dict)
