"""The history of a monitor: JSON lines, and alignment by layer over steps as a picture."""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendrop.errors import BatchError
from tokendrop.synergy.estimates import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def append_history(path: str | Path, event: dict[str, Any]) -> None:
    """Write an event at the end of a history."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a+b") as file:
        if file.tell():
            file.seek(-1, io.SEEK_END)
            # A run that was killed may have left its last line unfinished.
            file.write(b"" if file.read() == b"\n" else b"\n")
        file.write(json.dumps(_plain(event)).encode() + b"\n")


def read_history(path: str | Path) -> list[dict[str, Any]]:
    """The events of a history, oldest first.

    A line that a broken run left unfinished is passed over. A run that goes on from a checkpoint repeats the steps
    after it: only the last event of a step is given, and none that a run went back behind.
    """
    events: list[dict[str, Any]] = []
    for line in Path(path).read_text(errors="replace").splitlines():
        try:
            event = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(event, dict):
            continue
        while "step" in event and events and events[-1].get("step", -1) >= event["step"]:
            events.pop()
        events.append(event)
    return events


def heat_map(events: list[dict[str, Any]], pair: str) -> "Figure":
    """Alignment of a pair of tasks: a row for each group of parameters, a column for each event.

    Args:
        events: of `read_history`.
        pair: such as "understanding/generation".

    Raises:
        BatchError: no event with such a pair.
    """
    from matplotlib.figure import Figure

    held = [event for event in events if pair in event.get("groups", {}).get("alignment", {})]
    if not held:
        known = sorted({name for event in events for name in event.get("groups", {}).get("alignment", {})})
        raise BatchError(f"pair {pair!r}: expected one of {known} in the {len(events)} events; found none")
    names = held[-1]["groups"]["names"]
    values = [[_number(x) for x in event["groups"]["alignment"][pair]] for event in held]
    figure = Figure(figsize=(max(4.0, 0.25 * len(held) + 3), max(2.5, 0.22 * len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(list(zip(*values, strict=True)), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    every = max(1, len(held) // 8)
    axes.set_xticks(range(0, len(held), every), [str(event["step"]) for event in held[::every]])
    axes.set_xlabel("optimiser step")
    axes.set_title(f"alignment of {pair}")
    figure.colorbar(image, ax=axes, label="cosine")
    return figure


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _plain(value: Any) -> Any:
    """A value of an entry as JSON: NaN is null, an estimate its three figures."""
    if isinstance(value, Estimate):
        return _plain({"value": value.value, "low": value.low, "high": value.high}) | {"resolved": value.resolved}
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
