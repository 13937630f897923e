"""The state of one forward, by thread and handle.

Shape letters: B batch, T tokens, M context rows, D hidden.
"""

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokendrop.engine.forward.calls import Made
from tokendrop.engine.forward.ids import SeenIds
from tokendrop.engine.forward.positions import Positions
from tokendrop.engine.forward.step import Step
from tokendrop.engine.model.vision import Seen
from tokendrop.engine.plan.labelled import LabelledRows
from tokendrop.engine.plan.plan import Plan, Span
from tokendrop.engine.plan.selection import Encode, Selections
from tokendrop.errors import LayoutError, LayoutTypeError, UnsupportedError
from tokendrop.layout import TokenLayout


@dataclass(eq=False)
class Forward:
    """The state of one forward.

    Args:
        plan: what each layer computes.
        selections: those made so far.
        cache: the cache that it fills or reads, if any.
        step: the new tokens, where the cache is not empty.
        next_layer: the layer that runs next.
        span: the one that runs, its selections made.
        full: (B, T, D), the hidden states as they entered it.
        context: for each group, (B, M, D) states of its context rows in it.
        made: compact arguments made so far.
        positions: as the rows of the span are numbered.
        cut: masks made for a cache of a fixed length that grows now, and what is left of them.
        passed: what layers returned beside their hidden states, and in which span.
    """

    plan: Plan
    selections: Selections
    positions: Positions
    cache: Any = None
    step: Step | None = None
    next_layer: int = 0
    span: Span | None = None
    full: Tensor | None = None
    context: tuple[Tensor | None, ...] = ()
    made: Made = field(default_factory=dict)
    cut: list[tuple[Any, Any]] = field(default_factory=list)
    passed: list[tuple[Tensor, Span]] = field(default_factory=list)


@dataclass(eq=False)
class Frame:
    """An entered `drop.layout(...)`.

    Args:
        layout: what the tokens are.
        plan: what each layer computes on them.
        step: (2,) int64, of training, the optimiser step and the micro-batch.
        first: the index of the first sample in the global batch.
        trained: whether the plan is that of training, for methods that hold in training only.
        forward: the forward under way.
        caches: those that generations inside have filled, and the sample that each of their rows came from.
        given: sees the vocabulary ids that a forward is given, where the layout has no labels.
        ids: those of the forward under way; None where nobody saw them.
        saw_ids: whether somebody saw those of any forward.
        reach: tokens of a row up to which the last forward went.
        returns_tuple: whether the layers return one.
        labelled: the rows that the output head runs on; None for all.
        losses: of the routers in the last forward.
        seen: what was seen of the vision encoder, when it last ran.
        encode: what it says of the image tokens; None where no method looks at it.
        ran: the span of each layer that ran in the last forward, its rows chosen.
        mask: the padding mask (B, T) that a model is given while its loss for experts is to see none.
        routed: router logits of all rows that ran, by layer, for its output.
    """

    layout: TokenLayout
    plan: Plan
    step: Tensor
    first: int
    trained: bool = True
    forward: Forward | None = None
    caches: "weakref.WeakKeyDictionary[Any, list[int]]" = field(default_factory=weakref.WeakKeyDictionary)
    given: SeenIds = field(default_factory=SeenIds)
    ids: Tensor | None = None
    saw_ids: bool = False
    reach: int = 0
    returns_tuple: bool = False
    labelled: LabelledRows | None = None
    losses: list[Tensor] = field(default_factory=list)
    seen: Seen = field(default_factory=dict)
    encode: Encode | None = None
    ran: list[Span] = field(default_factory=list)
    mask: Tensor | None = None
    routed: tuple[Tensor, ...] | None = None

    def start(self, plan: Plan, cache: Any = None, step: Step | None = None, prompt: Plan | None = None) -> Forward:
        """Begin a forward on rows of `prompt`, by default of the layout's own plan, and on what follows them."""
        self.ran = []
        times = plan.shape[0] // len(self.layout.image)
        selections = Selections(plan, prompt or self.plan, self.step, self.first, times, self.encode)
        return Forward(plan, selections, Positions(plan), cache, step)

    def one_by_one(self, reach: int) -> bool:
        """Whether a forward up to token `reach` of each row goes one token further than the last did, at most."""
        before, self.reach = max(self.reach, self.plan.shape[1]), reach
        return reach - before <= 1

    @property
    def generates(self) -> bool:
        """Whether a forward may fill or read a cache, and go on behind the layout's tokens."""
        return self.layout.labels is None and not torch.is_grad_enabled()

    @property
    def dense(self) -> bool:
        """Whether layers run as they are called."""
        return not self.plan.routed if self.generates else self.plan.dense

    def check(self, hidden: Tensor, stored: int) -> None:
        """Begin with this forward's ids; refuse hidden states of another batch, and a filled cache in training.

        Raises:
            LayoutError: they are not (B, T, D).
            UnsupportedError: the cache is not empty.
        """
        self.ids = self.given.taken()
        self.saw_ids |= self.ids is not None
        if self.generates:
            return
        same, gradients = tuple(hidden.shape[:2]) == self.plan.shape, self.layout.labels is None
        if stored and not (same and self.dense):
            way = "gradients are on; continue under torch.no_grad(), or pass" if gradients else "the layout has labels;"
            raise UnsupportedError(
                f"a cache with {stored} tokens reached a training forward: {way}{'' if gradients else ' pass'} "
                f"use_cache=False to train{self._hint()}"
            )
        if not same:
            raise LayoutError(
                f"the hidden states are {tuple(hidden.shape)}, but the layout is for (B, T) = {self.plan.shape}; enter "
                "the layout of this very batch, as the decoder sees it, image features included (layout=fn makes one)"
                f"{', and generate under torch.no_grad()' if gradients else self._hint()}"
            )

    def _hint(self) -> str:
        if self.layout.labels is None or torch.is_grad_enabled():
            return ""
        return (
            ". To generate under a batch's layout with labels, enter that of the prompt inside: "
            "with tokendrop.handle(model).layout(tokendrop.TokenLayout.from_ids(prompt, image_ids)):"
        )


class _Entered(threading.local):
    """The layouts that a thread has entered, by handle."""

    def __init__(self) -> None:
        self.by_key: dict[str, list[Frame | None]] = {}


this_thread = _Entered()


def frames(key: str) -> list[Frame | None]:
    """This thread's entered layouts of the handle `key`, innermost last; None for an entered `drop.disabled()`."""
    return this_thread.by_key.setdefault(key, [])


def in_thread() -> str:
    """What to know of layouts in a thread that is not the main one."""
    thread = threading.current_thread()
    if thread is threading.main_thread():
        return ""
    return (
        f". This is thread {thread.name!r}, and a layout holds in the thread that enters it: enter it inside the "
        "function that the thread runs, around model.generate(..., streamer=streamer) for one that streams"
    )


def pair_of(step: object) -> tuple[object, ...]:
    """The optimiser step and the micro-batch.

    Raises:
        LayoutTypeError: no pair.
    """
    if not isinstance(step, tuple) or len(step) != 2:
        raise LayoutTypeError(f"step: expected the optimiser step and the micro-batch, two numbers; found {step!r}")
    return step
