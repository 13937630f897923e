"""The plans whose quality is set against their FLOPs: what image tokens do in which layers, for each task, and when.

Shape letters: L layers.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from tokendrop.errors import TokenDropError
from tokendrop.methods import Drop, HiMix, HMGen, RandomLTD, SkipVision
from tokendrop.roles import USED, Method, Route, Separate
from tokendrop.schedule import Schedule
from tokendrop.study.study import Run
from tokendrop.unified.data import TASKS

ALONE, JOINT, PLACEBO = ("U alone", "G alone"), "dense", "placebo G"


class FrontierError(TokenDropError, ValueError):
    """A run or a scale that the study of the frontier does not have."""


@dataclass(frozen=True)
class Plan(Run):
    """What is trained, and under what.

    Args:
        tasks: one or both.
        methods: task -> method; a task without one is dense.
        schedule: from the number of optimiser updates of the run; None drops throughout.
        placebo: captions of generation are shuffled among images.
        labelled: share of the image tokens of generation, drawn anew for each batch, that are learnt from.
        distil: in every so many-th batch of a task the dense forward learns the labels, and the dropped one from it.
    """

    schedule: Callable[[int], Schedule] | None = None
    placebo: bool = False
    labelled: float = 1.0
    distil: int = 0


@dataclass(frozen=True)
class Owned(Method):
    """A method under which image tokens have norms of their own wherever they compute, and an FFN where they run one.

    Args:
        base: the method.
        separate: whose they are, as everywhere.

    Example:
        >>> [sorted(layer.separate) for layer in Owned(HiMix("1:")).route(2)]
        [['ffn', 'norm'], ['norm']]

    Source: ours, after arXiv 2411.04996 and 2509.24365.
    """

    base: Method
    separate: Separate = "shared"

    @property
    def training_only(self) -> bool:
        """Whether the method is for training only."""
        return getattr(self.base, "training_only", False)

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """The roles of the method, and the parts that image tokens use both now and under the whole method."""
        own, routes = frozenset({"norm", "ffn"}), (self.base.route(num_layers, at) for at in (strength, 1.0))
        return tuple(
            replace(one, separate=own & USED[one.image] & USED[whole.image]) for one, whole in zip(*routes, strict=True)
        )


def _joint(u: Method | None, g: Method | None, schedule: Callable[[int], Schedule] | None = None) -> Plan:
    found = {task: one for task, one in zip(TASKS, (u, g), strict=True) if one is not None}
    return Plan(TASKS, found, schedule)


def _tail(share: float) -> Callable[[int], Schedule]:
    return lambda updates: Schedule(dense_tail=round(share * updates))


def _twice(one: Method, schedule: Callable[[int], Schedule] | None = None) -> Plan:
    return _joint(one, one, schedule)


def _range(layers: int, start: int, stop: int | None = None, step: int = 1) -> str:
    # Of the layers that have such numbers among 6.
    deep = layers // 6
    last = "" if stop is None else str(layers - deep * (6 - stop))
    return f"{deep * start}:{last}" + (f":{step}" if step > 1 else "")


def _controls() -> dict[str, Plan]:
    alone = {name: Plan((task,), {}) for name, task in zip(ALONE, TASKS, strict=True)}
    return alone | {JOINT: Plan(TASKS, {}), PLACEBO: Plan(TASKS, {}, placebo=True)}


def _without_ffn(at: Callable[..., str]) -> dict[str, Plan]:
    # Image tokens of G attend in every layer. A random few of U compute, the others are visible.
    late, early = HiMix(at(2)), HiMix(at(1))
    fifth, tenth = (Drop(at(1), share, then="context") for share in (0.2, 0.1))
    return {
        "U 1:, G 1:5 no FFN": _joint(early, SkipVision(at(1, 5), 0)),
        "U 2:, G 1:5 no FFN": _joint(late, SkipVision(at(1, 5), 0)),
        "U 2:, G 2: no FFN": _joint(late, SkipVision(at(2), 0)),
        "U 2:, G 2:5 no FFN": _joint(late, SkipVision(at(2, 5), 0)),
        "U 1:, G 1: no FFN": _joint(early, SkipVision(at(1), 0)),
        "U 2:, G :5 no FFN": _joint(late, SkipVision(at(0, 5), 0)),
        # Image tokens attend in every layer in both tasks.
        "U : and G :5 no FFN": _joint(SkipVision(at(0), 0), SkipVision(at(0, 5), 0)),
        "U : and G 2:5 no FFN": _joint(SkipVision(at(0), 0), SkipVision(at(2, 5), 0)),
        "U fifth visible, G 1:5:2 skipped": _joint(fifth, HMGen(at(1, 5, 2))),
        "U tenth visible, G 1:5:2 skipped": _joint(tenth, HMGen(at(1, 5, 2))),
        "U fifth visible, G 2:5 no FFN": _joint(fifth, SkipVision(at(2, 5), 0)),
        "U tenth visible, G 1:5 no FFN": _joint(tenth, SkipVision(at(1, 5), 0)),
    }


def _dense_ends(at: Callable[..., str]) -> dict[str, Plan]:
    # Cheap at first, and a dense end, which brings the first ones to 0.60 of the FLOPs of dense training.
    late, early = HiMix(at(2)), HiMix(at(1))
    return {
        "U 2:, G 2:5 skipped, dense end": _joint(late, HMGen(at(2, 5)), _tail(0.15)),
        "U 1:, G 1:5:2 skipped, dense end": _joint(early, HMGen(at(1, 5, 2)), _tail(0.14)),
        "U 1:, G 1:5 skipped, dense end": _joint(early, HMGen(at(1, 5)), _tail(0.34)),
        "U 1:, G quarter rejoins, dense end": _joint(early, Drop(at(1, 5), 0.25), _tail(0.27)),
        "U 2:, G 2:5 no FFN, dense end": _joint(late, SkipVision(at(2, 5), 0), _tail(0.1)),
        # A random quarter over the middle range in both tasks.
        "quarter rejoins, dense end": _twice(Drop(at(1, 5), 0.25), _tail(0.2)),
        "quarter, rest visible, dense end": _twice(Drop(at(1, 5), 0.25, then="context"), _tail(0.2)),
        "RandomLTD quarter, dense end": _twice(RandomLTD(at(1, 5), 0.25), _tail(0.2)),
    }


def _learnt(at: Callable[..., str]) -> dict[str, Plan]:
    # What else may keep a task: weights of images' own, fewer labels, lessons of the dense forward, changing strength.
    late, early, without = HiMix(at(2)), HiMix(at(1)), SkipVision(at(2, 5), 0)
    drawn: Callable[[int], Schedule] = lambda updates: Schedule(drawn=True)  # noqa: E731
    best = _joint(late, without)
    return {
        "U 2:, G 2:5 no FFN, own FFN and norms": _joint(Owned(late), Owned(without)),
        "U 2:, G 2:5 no FFN, half of the labels": replace(best, labelled=0.5),
        "U 2:, G 2:5 no FFN, each 5th dense": replace(best, schedule=lambda updates: Schedule(dense_every=5)),
        "U 2:, G 2:5 no FFN, distilled each 10th": replace(best, distil=10),
        "U 1:, G 1: no FFN, drawn": _joint(early, SkipVision(at(1), 0), drawn),
        "Share All, drawn": _joint(HiMix(), HMGen(at(1, 5, 2)), drawn),
    }


def plans(layers: int) -> dict[str, Plan]:
    """Every plan by name, for a decoder of L layers, a multiple of 6; names give layers as those of 6.

    Example:
        >>> plans(6)["U 2:, G 2:5 skipped"].methods["generation"]
        HMGen(shallow='2:5', separate='none')
    """
    if layers % 6:
        raise FrontierError(f"layers: found {layers}; plans are written for 6 layers or a multiple of it")

    at = partial(_range, layers)
    late, alternate, middle = HiMix(at(2)), HMGen(at(1, 5, 2)), HMGen(at(2, 5))

    return _controls() | {
        "Share All": _joint(HiMix(), alternate),
        "Share Partial": _joint(HiMix(separate="per-task"), HMGen(at(1, 5, 2), "per-task")),
        # Where in depth, for each task: U reads its image in the first layers, G needs the last ones.
        "U 2:, G 1:5:2 skipped": _joint(late, alternate),
        "U 2:, G 2:5 skipped": _joint(late, middle),
        # Image tokens of G compute in all layers in which those of U do, and skip some of the others.
        "U 2:, G 2:5:2 skipped": _joint(late, HMGen(at(2, 5, 2))),
        "U 1:, G 1:5:2 skipped": _joint(HiMix(at(1)), alternate),
        "U 3:, G 1:5 skipped": _joint(HiMix(at(3)), HMGen(at(1, 5))),
        "U 1:, G 2:4 skipped": _joint(HiMix(at(1)), HMGen(at(2, 4))),
        "U 2:, G dense": _joint(late, None),
        # Image tokens that stay visible for G, too, in its own layers or in those of U.
        "U 2:, G 2:5 visible": _joint(late, HiMix(at(2, 5))),
        "both 2:5 visible": _twice(HiMix(at(2, 5))),
        **_without_ffn(at),
        **_dense_ends(at),
        **_learnt(at),
        # Severe at first, dense at the end; or dense now and then, an odd number so that both tasks have their turn.
        "Share All, growing": _joint(
            HiMix(), alternate, lambda updates: Schedule(steps=round(0.9 * updates), direction="out")
        ),
        "both 1:5 visible, dense end": _twice(HiMix(at(1, 5)), _tail(0.2)),
        "U 2:, G 2:5 skipped, growing": _joint(
            late, middle, lambda updates: Schedule(steps=round(0.8 * updates), direction="out")
        ),
        "U 2:, G 2:5 skipped, each 5th dense": _joint(late, middle, lambda updates: Schedule(dense_every=5)),
    }
