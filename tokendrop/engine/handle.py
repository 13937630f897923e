"""The handle of a dropped model: its methods, its image-only projections, and the way to run it.

Shape letters: B batch, T tokens, L layers.
"""

import uuid
import warnings
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokendrop.engine.doubts import doubts
from tokendrop.engine.forward import head
from tokendrop.engine.forward.ids import SeenIds
from tokendrop.engine.forward.order import listened
from tokendrop.engine.forward.state import Frame, frames, pair_of, this_thread
from tokendrop.engine.model import own, sets
from tokendrop.engine.model.decoder import LayerSpec, find_layers
from tokendrop.engine.model.vision import Encoder, Seen
from tokendrop.engine.plan.labelled import LabelledRows
from tokendrop.engine.plan.plan import Plan, Planner
from tokendrop.engine.summary import Described
from tokendrop.engine.support import sharded_together
from tokendrop.engine.undo import check_swapped, undo
from tokendrop.errors import (
    AppliedError,
    LayoutError,
    LayoutTypeError,
    MissingLayoutError,
    NoEffectWarning,
    check_integer,
)
from tokendrop.layout import TokenLayout
from tokendrop.roles import Method, Route
from tokendrop.routes import needs, present


class Handle(Described, nn.Module):
    """A dropped model's methods, its image-only projections, and the way to run it; made by `apply`.

    Args:
        model: the module that `apply` was given; the handle is its child `tokendrop`.
        path: dotted path of the decoder's layer list.
        specs: how its layers are made.
        methods: by task name; the key None serves every task.
        multiple: row counts are rounded up to it.
        added: image-only projections and router of each layer.
        labelled_logits: whether the output head runs on rows with a label only.
        encoder: the vision encoder, where a method looks at it.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        specs: Sequence[LayerSpec],
        methods: dict[str | None, Method | None],
        multiple: int,
        added: nn.ModuleList,
        labelled_logits: bool = False,
        encoder: Encoder | None = None,
    ) -> None:
        super().__init__()
        self.key, self.path, self.specs, self.methods, self.multiple = uuid.uuid4().hex, path, specs, methods, multiple
        self.names, self._ready = sets.set_names(methods), needs(methods, len(added))
        self.strength, self.entered, self._sharded, self.hint, self.listened = 1.0, 0, False, "", False
        self.source: object = None  # of layouts where none is entered: "auto", or a function
        self.in_training = False  # whether layers in eval mode are trained all the same, as pretrained ones may be
        self.progress: object | None = None  # of the training that set the strength, for the callback
        self._training_only = any(getattr(one, "training_only", False) for one in methods.values())
        self.layers, self.labelled_logits, self.encoder = added, labelled_logits, encoder
        self._owner, self._said = [model], set[str]()  # in a list: a module attribute would be a child
        self.splits = own.splits([one for one in methods.values() if one is not None], len(added))
        self._hook = model.register_load_state_dict_pre_hook(_fill) if any(True for _ in added.parameters()) else None

    @property
    def spec(self) -> LayerSpec:
        """How the first layer is made."""
        return self.specs[0]

    @property
    def backend(self) -> str:
        """The attention implementation of the first layer that has attention."""
        pairs = zip(self.specs, self.decoder_layers, strict=True)
        return next((spec.backend(layer) for spec, layer in pairs if spec.attention is not None), "sdpa")

    @property
    def owner(self) -> nn.Module:
        """The module that `apply` was given."""
        return self._owner[0]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's L layers."""
        return find_layers(self.owner, self.path)[1]

    @contextmanager
    def layout(self, layout: TokenLayout, step: tuple[int, int] | None = None, first: int = 0) -> Generator[Plan]:
        """Say what the tokens of the batch are, for the forwards and backwards inside.

        Args:
            layout: of (B, T) tokens.
            step: the optimiser step and the micro-batch, which random selections depend on; by default the number of
                layouts entered before this one with gradients, `handle.entered`, and 0.
            first: the index of the first sample in the global batch, likewise.

        Raises:
            LayoutTypeError: not a layout.
            LayoutError: a task is missing, or a trained row would hold a stale state.
        """
        if self.owner._modules.get("tokendrop") is not self:
            raise AppliedError(f"this handle was removed from {type(self.owner).__name__}, which runs dense without it")
        self.check_sharding()
        self.settle()
        check_integer("first", first, 0, LayoutTypeError)
        for part in (0, 0) if step is None else pair_of(step):
            check_integer("step", part, 0, LayoutTypeError)
        plan = self.plan(layout)
        if torch.is_grad_enabled() and self.owner.training and not plan.dense:
            for doubt in doubts(layout, lambda: self.served(layout)[0], self.decoder_layers, self.layers):
                self.say_once(*doubt, 2)
        at = torch.tensor((self.entered, 0) if step is None else step, device=layout.image.device)
        seen = Seen()
        encode = None if self.encoder is None else partial(self.encoder.encoded, seen)
        trained = self.trained(self.decoder_layers[0])
        frame = Frame(layout, plan, at, first, trained=trained, seen=seen, encode=encode)
        if self.labelled_logits:
            frame.labelled = LabelledRows.of(layout, plan, self.multiple)
        self.entered += torch.is_grad_enabled()  # evaluations change no draw of the training
        with ExitStack() as stack:
            if layout.labels is None:
                frame.given = SeenIds(lambda: (frames(self.key) or [None])[-1] is frame)
                stack.enter_context(frame.given.watching(self.owner, self.path))
            stack.enter_context(self._entered(frame))
            yield plan

    def say_once(self, kind: str, message: str, category: type[Warning], level: int) -> None:
        """Warn, the first time for each kind, at `level` frames above the caller."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(message, category, stacklevel=level + 2)

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Run dense on purpose inside."""
        with self._entered(None):
            yield

    @contextmanager
    def expecting(self, hint: str) -> Generator[None]:
        """Inside, a forward without a layout is also told this."""
        before, self.hint = self.hint, hint
        try:
            yield
        finally:
            self.hint = before

    def auxiliary_loss(self) -> Tensor:
        """The loss of the routers in the last forward of the entered layout, to be added to the model's own.

        mean over routed layers of mean over image tokens of BCE(router, kept)

        Returns:
            () float32; 0 where no router ran.

        Raises:
            MissingLayoutError: no layout is entered.

        Source: arXiv 2404.02258 section 3.5.
        """
        entered = frames(self.key)
        if not entered:
            raise MissingLayoutError("the auxiliary loss is that of an entered layout; take it inside drop.layout(...)")
        losses = [] if entered[-1] is None else entered[-1].losses
        return torch.stack(losses).mean() if losses else torch.zeros((), device=next(self.owner.parameters()).device)

    def settle(self) -> None:
        """Follow linears and an output head that an adapter wrapped, or that were exchanged, since `apply`.

        Raises:
            UnsupportedError: something that is no linear stands in such a place now.
        """
        if self.splits:
            own.settle_all(self.decoder_layers, self.layers)
        if self.labelled_logits:
            head.settle(self.owner)

    def check_sharding(self) -> None:
        """Refuse image-only projections that a sharded decoder leaves out; nothing would average their gradients.

        Raises:
            UnsupportedError: the decoder is sharded, and they are not.
        """
        # Once is enough, and all there is: after a forward the root's parameters look as if they were not sharded.
        self._sharded = self._sharded or sharded_together(self.owner, self.decoder_layers, self.layers)

    @contextmanager
    def _entered(self, frame: Frame | None) -> Generator[None]:
        entered, self.listened = frames(self.key), listened(self.owner)
        entered.append(frame)
        try:
            yield
        finally:
            entered.pop()
            if frame is not None:
                frame.forward = None
                frame.seen.clear()
                frame.ran.clear()

    def sets(self, index: int) -> nn.ModuleDict:
        """The image-only projections of layer `index`."""
        return cast(nn.ModuleDict, self.layers[index])

    def key_of(self, task: str | None) -> str | None:
        """The key of `methods` that serves a task.

        Raises:
            LayoutError: no task is given, and there are several.
        """
        if None in self.methods:
            return None
        if task is None:
            if len(self.methods) == 1:
                return next(iter(self.methods))
            raise LayoutError(
                f"task: found none, the methods are for {_named(self.methods)}; name the task (collators drop text)"
            )
        if task not in self.methods:
            message = (
                f"no method for task {task!r}, which runs dense; methods are for {_named(self.methods)}. Give it None "
                "to run it dense without this warning"
            )
            self.say_once(f"task {task}", message, NoEffectWarning, 5)
        return task

    def trained(self, layer: nn.Module) -> bool:
        """Whether methods for training only hold now, by the mode of a decoder layer; True where there are none."""
        return not self._training_only or self.in_training or layer.training

    def route_of(self, key: str | None) -> Route:
        """The route of image tokens through the L layers, at the schedule's present strength."""
        ready = self._ready.get(key) or (frozenset[str](),) * len(self.layers)
        return present(self.methods.get(key), ready, self.strength, lambda: self.trained(self.decoder_layers[0]))

    def plan(self, layout: TokenLayout, caching: bool = False) -> Plan:
        """What each layer computes on such tokens; `layout()` makes and enters it."""
        if not isinstance(layout, TokenLayout):
            raise LayoutTypeError(f"layout: expected a TokenLayout; found {type(layout).__name__}")
        if layout.image.is_meta:
            raise LayoutError("image: expected a tensor with values; found one on the meta device")
        routes, names = self.served(layout)
        return Planner(layout, routes, names, self.multiple, caching).plan()

    def served(self, layout: TokenLayout) -> tuple[list[Route], list[str | None]]:
        """For each of the B samples, the route of its task and the projection set of its image tokens."""
        keys: dict[str | None, str | None] = {}
        for task in layout.tasks:
            keys[task] = self.key_of(task)
        routes = {task: self.route_of(key) for task, key in keys.items()}
        return [routes[task] for task in layout.tasks], [self.names.get(keys[task]) for task in layout.tasks]

    def dense_state_dict(self) -> dict[str, Tensor]:
        """The state dict of the model without what was added to it."""
        return {key: value for key, value in self.owner.state_dict().items() if not key.startswith("tokendrop.")}

    def remove(self) -> None:
        """Make the model exactly what it was.

        Raises:
            AppliedError: already removed, or sharded since it was applied.
        """
        model, layers = self.owner, self.decoder_layers
        if model._modules.get("tokendrop") is not self:
            raise AppliedError(f"this handle is not on {type(model).__name__} any more; it was removed before")
        check_swapped(model, layers, self.encoder)
        self.undo()
        if not frames(self.key):  # those of a copy have the same key
            this_thread.by_key.pop(self.key, None)

    def undo(self) -> None:
        """Take back what `apply` did, or began to do."""
        undo(self.owner, self.decoder_layers, self.encoder)
        if self._hook is not None:
            self._hook.remove()
        self.owner._modules.pop("tokendrop", None)


def _fill(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    added = cast(Handle, model.tokendrop)
    path, layers = f"{prefix}{added.path}", added.decoder_layers
    sets.fill_missing(added.layers, f"{prefix}tokendrop.layers.", path, layers, added.specs, state)


def _named(methods: Mapping[Any, object]) -> str:
    return ", ".join(repr(name) for name in methods)
