"""Stages: image tokens leave for good at some layers, scored by attention.

Shape letters: L layers.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from tokendrop.errors import LayerRangeError, MethodError
from tokendrop.methods.drop import SCORES
from tokendrop.roles import LayerRoute, Per, Queries, Role, Route, Select, check_keep


class Stage(NamedTuple):
    """A layer at whose entry image tokens leave.

    Args:
        layer: the first without them.
        keep: share of the sample's original image tokens, or a count.
    """

    layer: int
    keep: int | float


def check_stage_layers(layers: Sequence[int], name: str) -> None:
    """Refuse what are no ascending layer indices.

    Raises:
        LayerRangeError: with the value.
    """
    indices = all(isinstance(one, int) and not isinstance(one, bool) and one >= 0 for one in layers)
    if not indices or list(layers) != sorted(set(layers)):
        raise LayerRangeError(f"{name}={layers!r}: expected layer indices, 0 or more, ascending")


def check_count(value: Any, name: str) -> None:
    """Refuse what is no number of 1 or more.

    Raises:
        MethodError: with the value.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise MethodError(f"{name}={value!r}: expected 1 or more")


def check_positions(positions: Any) -> None:
    """Refuse what says nothing of positions.

    Raises:
        MethodError: with the value.
    """
    if not isinstance(positions, str) or positions not in ("keep", "renumber"):
        raise MethodError(f"positions={positions!r} is unknown; use 'keep' or 'renumber'")


def check_stages(method: Any, layers: str, keep: str, first: int = 0) -> None:
    """Make two fields of a method tuples, and refuse stages that do not fit together.

    Args:
        method: a frozen dataclass.
        layers: name of the field with the first layer of each stage.
        keep: name of the field with what each stage keeps.
        first: the first layer that may be one; 1 where tokens leave before layer 0, and there may be no stage then.

    Raises:
        LayerRangeError: layers that do not ascend.
        MethodError: another number of values than of layers, or one that makes no sense.
    """
    for name in (layers, keep):
        value = getattr(method, name)
        if not isinstance(value, Sequence) or isinstance(value, str) or not (value or first):
            raise MethodError(f"{name}={value!r}: expected a list with one value for each stage")
        object.__setattr__(method, name, tuple(value))
    found, kept = getattr(method, layers), getattr(method, keep)
    check_stage_layers(found, layers)
    if found and found[0] < first:
        raise LayerRangeError(f"{layers}={found!r}: tokens leave before layer 0 already; begin at {first} or later")
    if len(found) != len(kept):
        raise MethodError(f"{keep}={kept!r}: expected one value for each of {layers}={found!r}")
    for one in kept:
        check_keep(one)


def staged(
    stages: Sequence[Stage],
    num_layers: int,
    strength: float,
    rows: Literal["answer", "prompt"],
    back: int = 0,
    floor: bool = False,
    first: Select | None = None,
    renumber: bool = False,
    per: Per = "sample",
) -> Route:
    """The L routes of image tokens that are ACTIVE until the first stage, then GONE but for those each stage keeps.

    Args:
        stages: ascending.
        num_layers: L.
        strength: of the schedule.
        rows: which rows score, see `Queries`.
        back: 1 to score with the attention of the layer before the stage.
        floor: whether shares are rounded down.
        first: the selection at layer 0 before the stages, whose shares are of what it keeps.
        renumber: whether rows are numbered anew after each of these.
        per: what keeps so many.

    Raises:
        LayerRangeError: a stage outside the model.
    """
    if stages and stages[-1].layer >= num_layers:
        raise LayerRangeError(
            f"a stage at layer {stages[-1].layer}, but the decoder has {num_layers} layers; use 0 to {num_layers - 1}"
        )
    routes = [LayerRoute() if first is None else LayerRoute(Role.GONE, select=first, renumber=renumber)] * num_layers
    for layer, keep in stages:
        queries = Queries(rows, layer - back)
        select = Select(keep, SCORES["attention"], layer, 0, strength, queries, floor, first, per=per)
        # Where all leave, nothing is to be scored.
        none = keep == 0 and strength == 1
        whole = LayerRoute(Role.GONE, select=None if none else select, renumber=renumber)
        routes[layer:] = [whole] * (num_layers - layer)
    return tuple(routes)
