"""What the advisor proposes, and how it is said.

Shape letters: L layers.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

import yaml

from tokendrop.analysis.report import Table
from tokendrop.roles import Method


@dataclass(frozen=True)
class Plan:
    """A method for a task, and what it does to the batches it was tried on.

    Args:
        method: what to give to `TokenDrop`.
        flops_ratio: FLOPs over dense ones, by formula.
        loss_gap: loss under the method minus the dense loss, mean over batches.
        fidelity: cosine of the loss's gradient under the method and the dense one, mean over batches; NaN where the
            gradient under the method is zero.
        seconds_ratio: seconds of a step over those of a dense one, side by side on the first batch.
        memory_ratio: bytes that a forward keeps for the backward, over the dense one's.
    """

    method: Method
    flops_ratio: float
    loss_gap: float
    fidelity: float
    seconds_ratio: float
    memory_ratio: float


@dataclass(frozen=True)
class Advice:
    """What is proposed for each task, and why.

    Args:
        budget: FLOPs ratio asked for.
        plans: task -> plans that meet it, the one that moves the loss least first; that one is proposed.
        redundancy: task -> for each of L layers, the mean cosine of an image token's state before and behind it.
        layers: dotted path of the decoder's layer list, where it was given.
    """

    budget: float
    plans: Mapping[str, tuple[Plan, ...]]
    redundancy: Mapping[str, tuple[float, ...]]
    layers: str | None = None

    @property
    def methods(self) -> dict[str, Method]:
        """The proposed method of each task."""
        return {task: plans[0].method for task, plans in self.plans.items()}

    def code(self) -> str:
        """Python to paste."""
        lines = [f"    {task!r}: td.{method!r}," for task, method in self.methods.items()]
        end = "})" if self.layers is None else f"}}, layers={self.layers!r})"
        return "\n".join(["import tokendrop as td", "", "callback = td.TokenDrop({", *lines, end, ""])

    def yaml(self) -> str:
        """The same for a LightningCLI configuration."""
        methods = {
            task: {"class_path": f"tokendrop.{type(method).__name__}", "init_args": _plain(asdict(method))}  # ty: ignore
            for task, method in self.methods.items()
        }
        where = {} if self.layers is None else {"layers": self.layers}
        callback = {"class_path": "tokendrop.TokenDrop", "init_args": {"methods": methods, **where}}
        return yaml.safe_dump({"trainer": {"callbacks": [callback]}}, sort_keys=False)

    def table(self) -> Table:
        """Every plan with its figures, the proposed one of each task first."""
        rows = [
            (
                task,
                repr(one.method),
                *(f"{value:.2f}" for value in (one.flops_ratio, one.seconds_ratio, one.memory_ratio)),
                f"{one.loss_gap:+.3f}",
                "-" if isnan(one.fidelity) else f"{one.fidelity:+.2f}",
            )
            for task, plans in self.plans.items()
            for one in plans
        ]
        starts = [sum(map(len, list(self.plans.values())[:at])) for at in range(len(self.plans))]
        header = ("task", "plan", "FLOPs", "seconds", "memory", "loss gap", "fidelity")
        return Table(header, rows, starts, "the plan proposed for each task")

    def evidence(self) -> str:
        """Why, a line for each task."""
        return "\n".join(self._why(task, *plans) for task, plans in self.plans.items())

    def _why(self, task: str, best: Plan, *others: Plan) -> str:
        cosines = self.redundancy[task]
        calm = max(range(len(cosines)), key=lambda index: cosines[index])
        kept = "is zero" if isnan(best.fidelity) else f"keeps a cosine of {best.fidelity:+.2f}"
        next_best = f"; next is {others[0].method} with {others[0].loss_gap:+.3f}" if others else ""
        slow = [f"{one.method} ({one.seconds_ratio:.2f})" for one in (best, *others) if round(one.seconds_ratio, 2) > 1]
        slower = f" Slower than a dense step here: {', '.join(slow)}." if slow else ""
        return (
            f"{task}: {best.method} costs {best.flops_ratio:.2f} of the FLOPs, {best.seconds_ratio:.2f} of the "
            f"seconds and {best.memory_ratio:.2f} of the memory. Before any training under it the loss moves by "
            f"{best.loss_gap:+.3f} and its gradient {kept}{next_best}. Image tokens "
            f"change least in layer {calm} (cosine {cosines[calm]:.2f}).{slower}"
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        plans = {
            task: [{**asdict(one), "method": repr(one.method)} for one in found] for task, found in self.plans.items()
        }
        return _plain({**vars(self), "plans": plans})


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and isnan(value) else value  # JSON has no NaN
