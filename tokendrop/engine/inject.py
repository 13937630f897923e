"""Apply methods to a model and take them off again: all checks first, then a class swap.

Shape letters: B batch, T tokens, L layers.
"""

import uuid
import warnings
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, SupportsIndex, cast

from torch import Tensor, nn

from tokendrop.engine import projections
from tokendrop.engine.decoder import LayerSpec, find_layers, is_sharded, layer_spec
from tokendrop.engine.forward import run
from tokendrop.engine.plan import Plan, Planner
from tokendrop.engine.span import WORK, Binding, Frame, call, frames
from tokendrop.errors import AppliedError, LayoutError, MethodError, NoEffectWarning, UnsupportedError
from tokendrop.layout import TokenLayout
from tokendrop.roles import LayerRoute, Method, Role, Route

Methods = Method | Mapping[str, Method | None]


class _RoutedLayer(nn.Module):
    """Mixin of a decoder layer whose tokens are routed."""

    _tokendrop_base: ClassVar[type[nn.Module]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self, super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward, work = self._tokendrop_base.forward, kwargs.pop(WORK, None)
        if work is None:
            return forward(self, *args, **kwargs)
        return run(self, forward, args, kwargs, work)

    def __reduce_ex__(self, protocol: SupportsIndex, /) -> tuple[Any, ...]:
        return _rebuild, (self._tokendrop_base,), self.__dict__


@lru_cache
def _routed_class(base: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__, "_tokendrop_base": base}
    return type(base.__name__, (_RoutedLayer, base), names)


def _rebuild(base: type[nn.Module]) -> nn.Module:
    routed = _routed_class(base)
    return routed.__new__(routed)


class Handle(nn.Module):
    """A dropped model's methods, its image-only projections, and the way to run it; made by `apply`.

    Args:
        model: the module that `apply` was given; the handle is its child `tokendrop`.
        path: dotted path of the decoder's layer list.
        spec: how its layers are made.
        methods: by task name; the key None serves every task.
        multiple: row counts are rounded up to it.
        sets: image-only projections of each layer.
    """

    def __init__(
        self,
        model: nn.Module,
        path: str,
        spec: LayerSpec,
        methods: dict[str | None, Method | None],
        multiple: int,
        sets: nn.ModuleList,
    ) -> None:
        super().__init__()
        self.key, self.path, self.spec, self.methods, self.multiple = uuid.uuid4().hex, path, spec, methods, multiple
        self.names = projections.set_names({task: m for task, m in methods.items() if m is not None})
        self.strength = 1.0
        self.layers = sets
        self._owner = [model]  # in a list: a module attribute would be a child
        self._unknown: set[str] = set()
        self._hook = self.register_load_state_dict_pre_hook(_fill) if any(True for _ in sets.parameters()) else None

    @property
    def owner(self) -> nn.Module:
        """The module that `apply` was given."""
        return self._owner[0]

    @property
    def decoder_layers(self) -> nn.ModuleList:
        """The decoder's L layers."""
        return find_layers(self.owner, self.path)[1]

    @contextmanager
    def layout(self, layout: TokenLayout) -> Generator[Plan]:
        """Say what the tokens of the batch are, for the forwards and backwards inside.

        Args:
            layout: of (B, T) tokens.

        Raises:
            LayoutTypeError: not a layout.
            LayoutError: a task is missing, or a trained row would hold a stale state.
        """
        plan = self.plan(layout)
        with self._entered(Frame(plan)):
            yield plan

    @contextmanager
    def disabled(self) -> Generator[None]:
        """Run dense on purpose inside."""
        with self._entered(Frame(None)):
            yield

    @contextmanager
    def _entered(self, frame: Frame) -> Generator[None]:
        entered = frames(self.key)
        entered.append(frame)
        try:
            yield
        finally:
            entered.remove(frame)
            frame.reset()

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
            raise LayoutError(f"task: found none, and the methods are for {_named(self.methods)}; name the task")
        if task not in self.methods and task not in self._unknown:
            self._unknown.add(task)
            warnings.warn(
                f"no method for task {task!r}, which runs dense; methods are for {_named(self.methods)}. Give it None "
                "to run it dense without this warning",
                NoEffectWarning,
                stacklevel=4,
            )
        return task

    def route_of(self, key: str | None) -> Route:
        """The route of image tokens through the L layers, at the schedule's present strength."""
        method = self.methods.get(key)
        return (LayerRoute(),) * len(self.layers) if method is None else method.route(len(self.layers), self.strength)

    def plan(self, layout: TokenLayout) -> Plan:
        """What each layer computes on such tokens; `layout()` makes and enters it."""
        if not isinstance(layout, TokenLayout):
            raise LayoutError(f"layout: expected a TokenLayout; found {type(layout).__name__}")
        keys = {task: self.key_of(task) for task in dict.fromkeys(layout.tasks)}
        routes = {task: self.route_of(key) for task, key in keys.items()}
        names = [self.names.get(keys[task]) for task in layout.tasks]
        return Planner(layout, [routes[task] for task in layout.tasks], names, self.multiple).plan()

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
        if any("_tokendrop_base" not in vars(type(layer)) for layer in layers):
            raise AppliedError(
                f"{type(layers[0]).__name__} was wrapped after apply (fully_shard does that); remove before sharding"
            )
        for layer in layers:
            del layer.__dict__["_tokendrop"]
            layer.__class__ = cast(_RoutedLayer, layer)._tokendrop_base
        projections.restore(layers)
        del model._modules["tokendrop"]


def _fill(handle: Handle, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    root = prefix.removesuffix("tokendrop.")
    projections.fill_missing(handle.layers, f"{prefix}layers.", f"{root}{handle.path}", handle.spec, state)


def _named(methods: Mapping[Any, object]) -> str:
    return ", ".join(repr(name) for name in methods)


def apply(model: nn.Module, methods: Methods, layers: str | None = None, multiple: int = 64) -> Handle:
    """Make the image tokens of a model skip work; call it before `fully_shard`, `torch.compile` or DDP.

    Args:
        model: any module with one decoder.
        methods: a method for whatever task, or task name -> method; None runs a task dense.
        layers: dotted path of the decoder's layer list, where inspection finds several.
        multiple: row counts are rounded up to it (or to T / 16 where that is less), so that shapes stay few.

    Returns:
        The handle, which is also `model.tokendrop`.

    Raises:
        AppliedError: the model, or a part of it, is dropped already.
        DecoderError: no decoder, or several.
        LayerRangeError: a method's range does not fit the decoder.
        MethodError: no methods, or something that is no method.
        UnsupportedError: a role or projections that such layers cannot have.

    Example:
        >>> import tokendrop as td
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
        ...                      num_attention_heads=2)
        >>> drop = td.apply(LlamaForCausalLM(config), td.HiMix())
        >>> drop.path
        'model.layers'

    Source: ours.
    """
    checked = check_methods(methods)
    if any(isinstance(module, Handle) for module in model.modules()):
        raise AppliedError(f"{type(model).__name__} is dropped already; call remove() on its handle first")
    if not isinstance(multiple, int) or multiple < 1:
        raise MethodError(f"multiple={multiple!r}: expected a row count, 1 or more")
    path, found = find_layers(model, layers)
    if any("_tokendrop" in layer.__dict__ for layer in found):
        raise AppliedError(f"the layers of {path!r} are dropped already, through another module; remove that first")
    if hasattr(model, "tokendrop"):
        raise AppliedError(f"{type(model).__name__} has an attribute 'tokendrop' of its own; rename it")
    spec = layer_spec(found[0], type(found[0]))
    given = {task: method for task, method in checked.items() if method is not None}
    _check_support(model, found, spec, given)
    sets = projections.make_sets(found, spec, given, projections.set_names(given))
    handle = Handle(model, path, spec, checked, multiple, sets)
    for index, layer in enumerate(found):
        layer.__dict__["_tokendrop"] = Binding(handle, index, spec)
        layer.__class__ = _routed_class(type(layer))
    projections.swap(found, spec, sets)
    model.tokendrop = handle
    return handle


def check_methods(methods: Methods) -> dict[str | None, Method | None]:
    """Methods by task name; the key None serves whatever task.

    Raises:
        MethodError: no methods, or something that is none.
    """
    if isinstance(methods, Method):
        if methods.separate == "per-task":
            raise MethodError(f"{methods} has separate='per-task' and no task; give a mapping of task name to method")
        return {None: methods}
    if not isinstance(methods, Mapping) or not methods:
        raise MethodError(f"methods: expected a method, or a mapping of task name to method; found {methods!r}")
    for task, method in methods.items():
        if not isinstance(task, str) or not task or "." in task:
            raise MethodError(f"methods: expected task names without dots; found {task!r}")
        if method is not None and not isinstance(method, Method):
            raise MethodError(f"methods[{task!r}]: expected a method such as HiMix(), or None; found {method!r}")
    return dict(methods)


def _check_support(
    model: nn.Module, layers: nn.ModuleList, spec: LayerSpec, methods: Mapping[str | None, Method]
) -> None:
    for method in methods.values():
        route = method.route(len(layers))
        refusal = spec.context_refusal()
        if any(layer.image is Role.CONTEXT for layer in route):
            backend = spec.backend(layers[0])
            if backend not in ("sdpa", "eager"):
                refusal = f"the {backend!r} attention takes no rectangular mask; use 'sdpa' or 'eager'"
            if refusal:
                raise UnsupportedError(f"{method} makes image tokens CONTEXT, but {refusal}")
        if method.separate != "none":
            if refusal:
                raise UnsupportedError(f"{method} needs image-only projections, but {refusal}")
            if is_sharded(model):
                raise UnsupportedError(
                    f"{method} adds parameters, and {type(model).__name__} is sharded already; apply it before "
                    "fully_shard"
                )


def handle(model: nn.Module) -> Handle:
    """The handle of a dropped model, also after `copy.deepcopy` or unpickling.

    Args:
        model: the module that was given to `apply`, or one around it.

    Raises:
        AppliedError: the model is not dropped.
    """
    for module in model.modules():
        if isinstance(module, Handle):
            return module
    raise AppliedError(f"{type(model).__name__} is not dropped; call tokendrop.apply on it first")
