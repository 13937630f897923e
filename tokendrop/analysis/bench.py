"""What methods save on somebody's own model and batches, the dense model beside each in one process.

    capture = FLOPs ratio / time ratio

Both over the dense model's: 1 where every saved FLOP saved its time; and once more by computed FLOPs, which leave out
the pairs of attention that no query sees.
Shape letters: B batch, T tokens.
"""

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from tokendrop.analysis import bench_report
from tokendrop.analysis.bench_setup import ROWS, environment_of, known_rows, setup_of
from tokendrop.analysis.bench_work import PARTS, Measured, computed_row, untouched, work
from tokendrop.analysis.equality import check_equal
from tokendrop.analysis.report import Section, Table
from tokendrop.analysis.subject import Subject
from tokendrop.analysis.timing import spread
from tokendrop.engine.handle import Handle
from tokendrop.engine.support import Methods, check_methods
from tokendrop.errors import (
    AppliedError,
    MethodError,
    UnsupportedError,
    check_callable,
    check_flag,
    check_integer,
)
from tokendrop.layout import TokenLayout
from tokendrop.synergy.evaluate import shared_parameters
from tokendrop.synergy.history import append_history

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What methods save; made by `benchmark`.

    Args:
        rows: for each method its "forward", its "backward" and its "step", in order; plain values. Each holds the
            dense model's figures beside the method's: `flops`, `seconds` (of a batch), `samples_per_second`, and
            `memory` of a step (bytes), their ratios to the dense ones (`flops_ratio`, `time_ratio`, `memory_ratio`),
            `kept_ratio` and `capture`. `flops` has causal attention in full; `computed_flops`, their ratio and
            `computed_capture` are without the pairs that no query sees, None where nobody knows. What was repeated is
            a mapping of median, p20, p80 and n.
    """

    rows: tuple[Row, ...]

    def table(self) -> Table:
        """A line for each method and part of its step."""
        return bench_report.table(self.rows)

    def notes(self) -> list[str]:
        """What the figures of the table mean, and on how many rounds they stand."""
        return bench_report.notes(self.rows)

    def sections(self) -> list[Section]:
        """The sections of a report, for `tokendrop.analysis.report.render`."""
        return bench_report.sections(self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {"rows": [dict(row) for row in self.rows]}


def benchmark(
    model: nn.Module,
    batches: Iterable[Any],
    layout: Callable[[Any], TokenLayout],
    methods: Methods | Sequence[Methods],
    loss: Callable[[Any], Any] | None = None,
    *,
    rounds: int = 7,
    optimizer: Callable[..., Optimizer] | None = torch.optim.AdamW,
    unchecked: bool = False,
    layers: str | None = None,
    multiple: int = 64,
    labelled_logits: bool = False,
    out: str | Path | None = None,
    progress: Callable[[int, int, str], Any] | None = None,
) -> Benchmark:
    """FLOPs, seconds, memory and capture of forward, backward and step under methods, the dense model beside each.

    FLOPs are counted, as a counter sees them, over all batches. In each round the dense and the dropped model take
    turns, in changing order, each after one step that warms up. Weights, gradients, buffers, modes and random state
    are given back as they were. A model in eval mode is timed in training mode.

    Args:
        model: an untouched one with trained parameters, where it is to run: batches are put on its device.
        batches: a few, as it is trained on.
        layout: batch -> TokenLayout.
        methods: what `apply` takes, or a list of such: each is measured beside the dense model.
        loss: batch -> scalar; by default a LightningModule's `training_step`, and of another model the loss of its
            forward. Of a batch that is a mapping neither gets `image_mask`, `segments` and `task`.
        rounds: how often each is timed.
        optimizer: parameters -> optimizer, whose update ends a step; None for a step without update.
        unchecked: leave out the comparison of loss and gradients with the reference, on the first batch of each task.
        layers: as in `apply`.
        multiple: as in `apply`.
        labelled_logits: as in `apply`.
        out: a folder; rows are appended to its rows.jsonl as they come, and a method that has its rows there, of the
            same setup and versions, is not run again. Weights, pixels and code are not looked at.
        progress: called with methods done, methods due, and the one that is done.

    Raises:
        AppliedError: a dropped model.
        LayoutError: no batches.
        LayoutTypeError: batches or a layout that are none.
        MethodError: no methods, or something that is none; another argument that makes no sense.
        TaskLossError: no trained parameter, or a loss of which nothing can be said.
        UnsupportedError: the dropped model is not equal to the reference; a compiled model.

    Source: ours.
    """
    chosen = _chosen(methods)
    _check(rounds, optimizer, unchecked, out, progress)
    options = {"layers": layers, "multiple": multiple, "labelled_logits": labelled_logits}
    subject = Subject(model, batches, layout, loss)
    _check_model(model)
    with untouched(model):
        held = list(subject.held())
        setup = setup_of(subject, held, optimizer, {"rounds": rounds, "checked": not unchecked, **options})
        shared = {"setup": setup} | environment_of(subject)
        known = known_rows(out, shared)
        missing = {name: one for name, one in chosen.items() if name not in known}
        gaps: dict[str, float | None] = dict.fromkeys(missing)
        for name, one in missing.items() if not unchecked else ():  # all of them before the first is timed
            gaps[name] = _checked(subject, held, one, options)
        for done, (name, one) in enumerate(missing.items(), start=1):
            found = _rows(_measure(subject, held, one, options, optimizer, rounds), name, gaps[name], held)
            known[name] = [row | shared for row in found]
            for row in known[name] if out is not None else ():
                append_history(Path(out or "") / ROWS, row)
            if progress is not None:
                progress(done, len(missing), name)
    return Benchmark(tuple(row for name in chosen for row in known[name]))


def named(methods: Methods) -> str:
    """Methods as a command line takes them, without what is a default; tasks parted by commas."""
    if isinstance(methods, Mapping):
        return ", ".join(f"{task}={named(one) if one is not None else 'dense'}" for task, one in methods.items())
    if not is_dataclass(methods):
        return str(methods)
    given = [one for one in fields(methods) if getattr(methods, one.name) != one.default]
    return f"{type(methods).__name__}({', '.join(f'{one.name}={getattr(methods, one.name)!r}' for one in given)})"


def _chosen(methods: Methods | Sequence[Methods]) -> dict[str, Methods]:
    each: list[Any] = list(methods) if isinstance(methods, list | tuple) else [methods]
    if not each:
        raise MethodError(f"methods: expected a method, or several in a list; found {methods!r}")
    for one in each:
        check_methods(one)
    return {named(one): one for one in each}


def _check(rounds: Any, optimizer: Any, unchecked: Any, out: Any, progress: Any) -> None:
    check_integer("rounds", rounds, 1)
    check_flag("unchecked", unchecked)
    if optimizer is not None:
        check_callable("optimizer", optimizer, "parameters")
    if progress is not None:
        check_callable("progress", progress, "done", "due", "method")
    if out is not None and (not isinstance(out, str | Path) or not str(out)):
        raise MethodError(f"out={out!r}: expected a folder, or None")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise MethodError(f"out={str(out)!r}: found a file there; give a folder")


def _check_model(model: nn.Module) -> None:
    if any(isinstance(one, Handle) for one in model.modules()):
        raise AppliedError(f"{type(model).__name__} is dropped already; call remove() on its handle first")
    if any(hasattr(one, "_orig_mod") or one._compiled_call_impl is not None for one in model.modules()):
        raise UnsupportedError(
            f"{type(model).__name__} is compiled, and would be compiled anew in every turn until torch gives up and "
            "runs it uncompiled in silence; give the model before torch.compile"
        )
    shared_parameters(model)


def _checked(subject: Subject, held: Sequence[Any], methods: Methods, options: Mapping[str, Any]) -> float:
    first = {layout.tasks: (batch, layout) for batch, layout in reversed(held)}
    return max(check_equal(subject, batch, layout, methods, options) for batch, layout in first.values())


def _measure(
    subject: Subject,
    held: Sequence[Any],
    methods: Methods,
    options: Mapping[str, Any],
    optimizer: Callable[..., Optimizer] | None,
    rounds: int,
) -> dict[bool, Measured]:
    """What was measured of the dense model (False) and under methods (True)."""
    found = {False: Measured(), True: Measured()}
    order, shuffle = [False, True], random.Random(0)
    for turn in range(1 + rounds):
        shuffle.shuffle(order)
        for dropped in order:
            with work(subject, held, methods if dropped else None, options, optimizer) as one:
                one.warm_up()
                found[dropped].count(one) if turn == 0 else found[dropped].time(one)
    return found


def _rows(found: Mapping[bool, Measured], name: str, gap: float | None, held: Sequence[Any]) -> list[Row]:
    samples = sum(len(layout.image) for _, layout in held)
    dense, own = found[False], found[True]
    rows = []
    for part in PARTS:
        ratios = [a / b for a, b in zip(own.seconds[part], dense.seconds[part], strict=True)]
        flops, step = own.flops[part] / dense.flops[part], part == "step"
        row: Row = {"method": name, "part": part}
        for prefix, one in (("", own), ("dense_", dense)):
            row[f"{prefix}flops"] = one.flops[part]
            row[f"{prefix}seconds"] = spread([each / len(held) for each in one.seconds[part]])
            row[f"{prefix}samples_per_second"] = spread([samples / each for each in one.seconds[part]])
            row[f"{prefix}memory"] = one.memory if step else None
        row |= {"flops_ratio": flops, "kept_ratio": own.kept_ratio, "time_ratio": spread(ratios)}
        row["capture"] = spread([flops / ratio for ratio in ratios])
        row |= computed_row(found, part, ratios)
        row["memory_ratio"] = own.memory / dense.memory if step else None
        rows.append(row | {"gradient_gap": gap})
    return rows
