"""The history of a monitor: JSON lines, and alignment by layer over steps as a picture."""

import io
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendrop.errors import BatchError
from tokendrop.synergy.estimates import RANGES, ROUNDING, Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDEST = 20.0  # inches, of a picture of many events


def append_history(path: str | Path, event: dict[str, Any]) -> None:
    """Write an event at the end of a history.

    Estimates are written as they came out, with whether they are `known`: within the range of such figures; and
    `resolved`: known, with an interval that does not hold zero.
    """
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a+b") as file:
        if file.tell():
            file.seek(-1, io.SEEK_END)
            # A run that was killed may have left its last line unfinished.
            file.write(b"" if file.read() == b"\n" else b"\n")
        line = {key: _plain(value, *RANGES.get(key, (-math.inf, math.inf))) for key, value in event.items()}
        file.write(json.dumps(line).encode() + b"\n")


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

    Blank where it is not known: a norm lost in noise, or an estimate outside [-1, 1]. Events that looked at other
    parameters than the last one are left out.

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
    held = [event for event in held if event["groups"]["names"] == names]
    values = [[_cosine(x) for x in event["groups"]["alignment"][pair]] for event in held]
    # A column for each event, wide enough for the steps below them; names on the left, the scale on the right.
    width = max(0.25 * len(held), 3.4) + 1.5 + 0.058 * max(map(len, names))
    figure = Figure(figsize=(min(width, WIDEST), max(2.5, 0.22 * len(names) + 1)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(list(zip(*values, strict=True)), cmap="RdBu", vmin=-1, vmax=1, aspect="auto")
    axes.set_yticks(range(len(names)), names, fontsize=7)
    every = -(-len(held) // 8)
    axes.set_xticks(range(0, len(held), every), [str(event["step"]) for event in held[::every]], fontsize=8)
    axes.set_xlabel("optimiser step")
    axes.set_title(f"alignment of {pair}")
    figure.colorbar(image, ax=axes, label="cosine")
    return figure


def _cosine(value: float | None) -> float:
    return math.nan if value is None or abs(value) > 1 + ROUNDING else value


def _plain(value: Any, least: float, most: float) -> Any:
    """A value of an entry as JSON: NaN is null, an estimate of a figure of that range its three figures."""
    if isinstance(value, Estimate):
        said = value.within(least, most)
        plain = {key: _plain(one, least, most) for key, one in value._asdict().items()}
        return plain | {"resolved": said.resolved, "known": not math.isnan(said.value)}
    if isinstance(value, dict):
        return {key: _plain(one, least, most) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, least, most) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
