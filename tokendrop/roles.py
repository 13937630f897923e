"""Roles of image tokens per decoder layer: which layers, which role, since when.

Shape letters: B batch, T tokens, L layers.
"""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from tokendrop.errors import MethodError, check_hashable
from tokendrop.ranges import Layers as Layers
from tokendrop.ranges import check_layers as check_layers
from tokendrop.ranges import deepest as deepest
from tokendrop.ranges import layer_indices as layer_indices
from tokendrop.scoring import Attention as Attention
from tokendrop.scoring import Encoded as Encoded
from tokendrop.scoring import Merge, Scoring

Separate = Literal["none", "shared", "per-task"]
Per = Literal["sample", "image", "frame"]


class Role(IntEnum):
    """What a token does in one decoder layer."""

    ACTIVE = 0  # computes, and is seen as key and value
    CONTEXT = 1  # is seen as key and value, from a state frozen at the entry of the range
    BYPASS = 2  # is carried past the layer, neither computing nor seen
    GONE = 3  # has left for good
    ATTEND = 4  # attends, and is seen as key and value, but has no FFN: x + attention(norm x)


def check_keep(keep: int | float) -> None:
    """Refuse what is neither a share nor a count of tokens.

    Raises:
        MethodError: with the value.
    """
    share = isinstance(keep, float) and 0 < keep <= 1
    count = isinstance(keep, int) and not isinstance(keep, bool) and keep >= 0
    if not share and not count:
        raise MethodError(f"keep={keep!r}: expected a share in (0, 1] as a float, or a count of 0 or more")


def check_per(per: object) -> None:
    """Refuse what image tokens have no budget of.

    Raises:
        MethodError: with the value.
    """
    if not isinstance(per, str) or per not in ("sample", "image", "frame"):
        raise MethodError(f"per={per!r} is unknown; use 'sample', 'image' or 'frame'")


def check_strength(strength: object) -> None:
    """Refuse what is no strength of a schedule.

    Raises:
        MethodError: with the value.
    """
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise MethodError(f"strength={strength!r}: expected a number from 0, dense, to 1, the whole method")


@dataclass(frozen=True)
class Queries:
    """The rows whose attention a score looks at.

    Args:
        rows: "answer" for the row before each answer begins, which is the last of the prompt where there are no
            labels; "prompt" for all text without labels behind the last image.
        layer: whose attention: the layer being entered, or the one before it.
    """

    rows: Literal["answer", "prompt"]
    layer: int


@dataclass(frozen=True)
class Select:
    """Which image tokens stay ACTIVE in a span: those with the highest scores at its entry.

    Args:
        keep: a share of the sample's image tokens, or a count.
        score: `Scoring` -> (B, T) float, higher is kept.
        layer: the layer at whose entry the selection is made.
        seed: for scores that draw.
        strength: 1 for the whole method; below, more are kept.
        queries: the rows whose attention `score` looks at; None where it looks at none.
        floor: whether a share is rounded down.
        of: an earlier selection; shares are of what it kept.
        encoder: layers of the vision encoder that `score` and `merge` look at.
        merge: from `Scoring` and the kept (B, T), how those that leave are merged into them.
        gate: above 0, the router r has a bias and begins at 0, and 1 + gate tanh(r) scales what the FFN gives to a
            token that is kept and the state of one that is not, in place of what the layer adds.
        restore: whether they are given, where the range ends, what those that they were merged into have been given.
        learned: whether the layer has a router, whose output also scales what the layer adds to the tokens it keeps.
        per: what keeps so many: a sample, each of its images, or each of their frames.
        frames: whether `score` sees which image and frame a token belongs to.
        fuse: whether, where the range ends, image tokens are given a learned projection of what they are then, of a
            mask token for one that is not kept, and of what they were at its entry; others than these are BYPASS.

    Raises:
        MethodError: queries of a layer that is neither entered nor the one before; a fusion beside a merge or a router;
            a gate without a router, or what to restore without a merge; a `keep`, `per` or strength that is none; a
            score or merge that is no function, or cannot be hashed.
    """

    keep: int | float
    score: Callable[[Scoring], Tensor]
    layer: int
    seed: int = 0
    strength: float = 1.0
    queries: Queries | None = None
    floor: bool = False
    of: "Select | None" = None
    encoder: tuple[int, ...] = ()
    merge: Callable[[Scoring, Tensor], Merge] | None = None
    learned: bool = False
    restore: bool = False
    gate: float = 0.0
    per: Per = "sample"
    frames: bool = False
    fuse: bool = False

    def __post_init__(self) -> None:
        check_hashable("score", self.score, "scoring")
        if self.merge is not None:
            check_hashable("merge", self.merge, "scoring", "kept")
        check_keep(self.keep)
        check_per(self.per)
        check_strength(self.strength)
        if self.gate < 0 or (self.gate > 0 and not self.learned) or (self.restore and self.merge is None):
            raise MethodError(
                f"a selection at layer {self.layer} has gate={self.gate}, learned={self.learned}, "
                f"restore={self.restore}, merge={self.merge}; a gate above 0 takes learned=True, restore=True a merge"
            )
        if self.fuse and (self.merge is not None or self.learned):
            raise MethodError(
                f"a selection at layer {self.layer} fuses where its range ends, and merges or has a router too; do one"
            )
        if self.queries is not None and self.queries.layer not in (self.layer, max(0, self.layer - 1)):
            raise MethodError(
                f"a selection at layer {self.layer} looks at the attention of layer {self.queries.layer}; it can look "
                "at that layer, or at the one before"
            )

    @property
    def adds(self) -> bool:
        """Whether it comes with parameters: a router, or those of a fusion."""
        return self.learned or self.fuse

    def count(self, images: int) -> int:
        """How many of a sample's image tokens are kept: the share rounded and at least 1, or the count.

        Example:
            >>> Select(0.5, lambda scoring: scoring.states, layer=2).count(5)
            2
        """
        images = images if self.of is None else self.of.count(images)
        rounded = int(self.keep * images + 1e-9) if self.floor else round(self.keep * images)
        least = min(images, max(1, rounded) if isinstance(self.keep, float) else self.keep)
        return images - int(self.strength * (images - least) + 1e-9)


PARTS = ("o", "norm", "ffn")
USED: dict[Role, frozenset[str]] = dict.fromkeys(Role, frozenset()) | {
    Role.ACTIVE: frozenset({*"qkv", *PARTS}),
    Role.CONTEXT: frozenset({"k", "v", "norm"}),
    Role.ATTEND: frozenset({*"qkv", *PARTS}) - {"ffn"},
}


@dataclass(frozen=True)
class LayerRoute:
    """What image tokens do in one layer.

    Args:
        image: their role; with `select`, that of the tokens it does not keep.
        separate: what is their own, of what their role uses: the projections "q", "k", "v", that of the output "o",
            "norm" and "ffn".
        select: which of them stay ACTIVE; None for none.
        renumber: whether the rows that compute take the first positions of their sample.

    Raises:
        MethodError: no role, or parts that are no set, unknown, or not used by image tokens of this role.

    Example:
        >>> LayerRoute(Role.CONTEXT, {"k", "v"}).separate == frozenset("kv")
        True
    """

    image: Role = Role.ACTIVE
    separate: frozenset[str] = frozenset()
    select: Select | None = None
    renumber: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.image, Role):
            raise MethodError(f"found image={self.image!r} in a layer's route; expected a Role, such as Role.CONTEXT")
        if isinstance(self.separate, str) or not isinstance(self.separate, Collection):
            raise MethodError(f"found separate={self.separate!r} in a layer's route; expected a set as {{'k', 'v'}}")
        found = frozenset(self.separate)
        used = USED[self.image] if self.select is None else USED[Role.ACTIVE]
        if lost := sorted(found - used, key=str):
            has = ", ".join(map(repr, sorted(used))) or "no parts"
            raise MethodError(
                f"found separate={lost} in a layer's route for image tokens that are {self.image.name}; they use {has}"
            )
        object.__setattr__(self, "separate", found)

    @property
    def adds(self) -> bool:
        """Whether the layer is given parameters: parts of image tokens' own, a router or a fusion."""
        return bool(self.separate) or (self.select is not None and self.select.adds)


Route = tuple[LayerRoute, ...]


def selections(routes: Iterable[Route]) -> list[Select]:
    """Every selection of some routes."""
    return [layer.select for route in routes for layer in route if layer.select is not None]


@runtime_checkable
class Method(Protocol):
    """A rule that gives image tokens a role in each of L layers; any class with these two is one.

    Where it also has `training_only = True`, image tokens are ACTIVE while the decoder's layers are in eval mode, and
    are fused still where a range ends that fuses. As a dataclass with fields of plain data it is written into
    checkpoints and read back; see `td.to_config`.
    """

    @property
    def separate(self) -> Separate:
        """Whether image tokens get projections of their own, and whose."""
        return "none"

    def route(self, num_layers: int, strength: float = 1.0) -> Route:
        """The L routes, with the schedule at `strength` (0 dense, 1 the whole method)."""
        ...


def owned(parts: str, separate: str, role: Role = Role.ACTIVE, default: str = "qkv") -> frozenset[str]:
    """What `parts` names of a layer, joined by "+": projections as letters of "qkv", "o", "norm", "ffn".

    Args:
        parts: as a method is given it.
        separate: likewise; with "none" nothing is image tokens' own.
        role: of image tokens that use them; letters that it does not use are left out.
        default: the method's own `parts`.

    Raises:
        MethodError: unknown parts, those that image tokens do not use, or others than `default` with nothing separate.

    Example:
        >>> sorted(owned("qkv+ffn", "shared"))
        ['ffn', 'k', 'q', 'v']
    """
    found: set[str] = set()
    for part in parts.split("+") if isinstance(parts, str) else [""]:
        letters = set(part)
        if part not in PARTS and (not part or letters - set("qkv") or len(letters) < len(part)):
            raise MethodError(
                f"parts={parts!r} is unknown; join letters of 'qkv', 'o', 'norm' and 'ffn' by '+', as in "
                "'qkv+o+norm+ffn'"
            )
        found |= {part} if part in PARTS else letters
    able = USED[role]
    if lost := sorted(found - able - set("qkv") if found & able else found):
        raise MethodError(
            f"parts={parts!r}: image tokens use no {' and no '.join(map(repr, lost))} under this method; they use "
            f"{', '.join(map(repr, sorted(able)))}"
        )
    if separate == "none" and parts != default:
        raise MethodError(f"parts={parts!r} has no effect with separate='none'; use separate='shared' or 'per-task'")
    return frozenset(found & able if separate != "none" else ())


def shown(method: object) -> str:
    """The `repr` of a dataclass, without its `parts` where they are the default."""
    kind = type(method)
    told = [name for name in vars(method) if name != "parts" or getattr(method, name) != kind.parts]  # ty: ignore
    return f"{kind.__qualname__}({', '.join(f'{name}={getattr(method, name)!r}' for name in told)})"


def check_separate(separate: str) -> None:
    """Refuse an unknown sharing mode.

    Raises:
        MethodError: not "none", "shared" or "per-task".
    """
    if separate not in ("none", "shared", "per-task"):
        raise MethodError(f"separate={separate!r} is unknown; use 'none', 'shared' or 'per-task'")
