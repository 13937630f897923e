"""What rows of a benchmark must share to be of one, so that a folder's rows are gone on with.

Shape letters: none.
"""

import hashlib
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tokendrop.analysis.bench_work import PARTS, Held
from tokendrop.analysis.subject import Subject
from tokendrop.analysis.timing import clock
from tokendrop.analysis.where import made_where
from tokendrop.layout import TokenLayout
from tokendrop.synergy.history import read_history

Row = dict[str, Any]
ROWS = "rows.jsonl"
PACKAGES = ("tokendrop", "torch", "transformers", "lightning")


def setup_of(
    subject: Subject, held: Held, optimizer: Callable[..., Optimizer] | None, options: Mapping[str, Any]
) -> Row:
    """What was measured and how, in plain values: rows that differ here are of two benchmarks.

    Not in it: weights, numbers of a batch that are no integers, and the code of a loss or an optimizer.

    Args:
        subject: its model as it is measured, in training mode.
        held: batches with their layouts.
        optimizer: parameters -> optimizer.
        options: plain values.
    """
    model = subject.model
    trained = [one for one in model.parameters() if one.requires_grad]
    made = None if optimizer is None else optimizer(trained)
    groups = [len(group["params"]) for group in getattr(made, "param_groups", ())]
    return {
        "model": f"{type(model).__qualname__} {_digest(_parts(model))}",
        "parameters": sum(one.numel() for one in model.parameters()),
        "batches": [_described(batch, layout) for batch, layout in held],
        "optimizer": None if optimizer is None else type(made).__qualname__,
        "update": _digest([repr(made), groups]),  # its settings, group by group
        "precision": _precision(next(model.parameters()).device.type),
        "threads": torch.get_num_threads(),
        **options,
    }


def environment_of(subject: Subject) -> Row:
    """The device, its clock, and the versions of what runs there."""
    device = next(subject.model.parameters()).device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}"
    return {"device": name, "clock": clock(), **made_where(PACKAGES)}


def known_rows(out: str | Path | None, shared: Row) -> dict[str, list[Row]]:
    """The rows that a folder holds of the same setup, device and versions, of methods that have them all."""
    path = None if out is None else Path(out) / ROWS
    if path is None or not path.exists():
        return {}
    found: dict[str, dict[str, Row]] = {}
    for row in read_history(path):
        same = all(row.get(key) == shared[key] for key in ("setup", "device", "clock", "versions"))
        if same and "computed_flops" in row:  # an older tokendrop's rows have none
            found.setdefault(row["method"], {})[row["part"]] = row
    return {name: [by[part] for part in PARTS] for name, by in found.items() if set(by) == set(PARTS)}


def _described(batch: Any, layout: TokenLayout) -> list[Any]:
    tasks = sorted(map(str, set(layout.tasks)))
    return [*layout.image.shape, int(layout.image.sum()), *tasks, _digest([*_leaves(layout), *_leaves(batch)])]


def _leaves(value: Any, name: str = "") -> Iterator[tuple[Any, ...]]:
    """Integers and flags of a batch as they are, what else it holds by shape or kind; each with its place."""
    if isinstance(value, Tensor):
        whole = not (value.is_floating_point() or value.is_complex()) and value.layout is torch.strided
        numbers = hashlib.sha256(value.cpu().contiguous().numpy().tobytes()).hexdigest() if whole else ""
        yield name, tuple(value.shape), str(value.dtype), numbers
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield from _leaves(one, f"{name}.{key}")
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for index, one in enumerate(value):
            yield from _leaves(one, f"{name}.{index}")
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name), f"{name}.{field.name}")
    else:
        yield name, type(value).__qualname__, value if isinstance(value, str | int | float) else ""


def _parts(model: nn.Module) -> list[Any]:
    # Shapes, precision, what is trained, which parts run how, and what a Hugging Face config says: not the weights.
    parameters = [(name, tuple(p.shape), str(p.dtype), p.requires_grad) for name, p in model.named_parameters()]
    modules = [(name, type(one).__qualname__, one.training, _recomputed(one)) for name, one in model.named_modules()]
    configs = [one.config for one in model.modules() if hasattr(one, "config")]
    said = {(str(one), str(getattr(one, "_attn_implementation", ""))) for one in configs}
    return [parameters, modules, sorted(said)]


def _recomputed(module: nn.Module) -> tuple[bool, Any]:
    function = getattr(module, "_gradient_checkpointing_func", None)
    how = getattr(function, "keywords", {}).get("use_reentrant")
    return bool(getattr(module, "gradient_checkpointing", False)), how


def _precision(device: str) -> list[str]:
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return [f"autocast {cast}", f"matmul {torch.get_float32_matmul_precision()}"]


def _digest(parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]
