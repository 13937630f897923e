"""A layout for each forward of a model, made from the forward's own arguments.

Shape letters: B batch, T tokens.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.state import frames
from tokendrop.engine.handle import Handle
from tokendrop.engine.model.batch import IMAGES, batch_layout
from tokendrop.engine.model.swap import Swapped, swap
from tokendrop.errors import (
    BatchError,
    LayoutTypeError,
    MethodError,
    MissingLayoutError,
    UnsupportedError,
    check_callable,
)
from tokendrop.layout import OURS, TokenLayout, unnamed

Layouts = Literal["auto"] | Callable[[tuple[Any, ...], dict[str, Any]], TokenLayout | None]
_Function = Callable[..., Any]


class _OwnLayouts(Swapped):
    """Mixin of the module that `apply` was given: its forward and `generate` enter a layout where none is entered.

    Both `__call__` and `forward` do: some callers go past the one, and what others hang on an instance past the other.
    """

    _tokendrop_ours: ClassVar[frozenset[str]]
    _tokendrop_within: ClassVar[_Function]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        base: Any = vars(cls).get("_tokendrop_base")
        if base is None:  # what FSDP2 makes of a swapped class
            return
        own: Any = base
        while "_tokendrop_base" in vars(
            own
        ):  # swapped for several reasons, and only its author's class names arguments
            own = vars(own)["_tokendrop_base"]
        cls._tokendrop_ours = unnamed(own.forward)
        # What a batch says costs a look at its values, so a compiler has nothing to trace before the model's own code.
        cls._tokendrop_within = staticmethod(torch.compiler.disable(_within, recursive=False))
        for name in ("forward", "generate"):
            if callable(getattr(own, name, None)):
                setattr(cls, name, _entering(name, getattr(base, name), getattr(own, name), cls._tokendrop_ours))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run(self, "forward", super().__call__, args, kwargs)


def check_layouts(layout: object) -> None:
    """Refuse what no layout can be had from.

    Raises:
        MethodError: neither None, nor "auto", nor a function of two arguments.
    """
    if layout is None or (isinstance(layout, str) and layout == "auto"):
        return
    if not callable(layout) or isinstance(layout, type):
        raise MethodError(f"layout: expected None, 'auto', or a function of (args, kwargs); found {layout!r}")
    check_callable("layout", layout, "args", "kwargs")


def enter_own(model: nn.Module, handle: Handle, layout: Layouts) -> None:
    """Make each outermost forward of a dropped model enter a layout of its own."""
    handle.source = layout
    handle.hint = (
        f". layout={layout!r} holds inside the forward and generate of the {type(model).__name__} that apply was "
        "given, and something else runs here: call that, or apply to the module that is called; recompute by the "
        "model's own activation checkpointing"
    )
    swap(model, _OwnLayouts)


def _entering(name: str, proceed: _Function, own: _Function, ours: frozenset[str]) -> _Function:
    @functools.wraps(own)
    def method(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _run(self, name, functools.partial(proceed, self), args, kwargs)

    # Trainers keep the columns that a forward names. By signature alone: what is "wrapped", accelerate unwraps.
    del method.__wrapped__
    signature = inspect.signature(own)
    parameters = list(signature.parameters.values())
    last = [parameters.pop()] if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    named = [inspect.Parameter(one, inspect.Parameter.KEYWORD_ONLY, default=None) for one in OURS if one in ours]
    method.__dict__["__signature__"] = signature.replace(parameters=[*parameters, *named, *last])
    return method


def _run(model: nn.Module, name: str, proceed: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    handle: Any = model._modules.get("tokendrop")
    if handle is None:  # of a class that was made of a dropped model's
        return proceed(*args, **kwargs)
    swapped: Any = type(model)
    given = {key: value for key, value in kwargs.items() if key not in swapped._tokendrop_ours}
    if frames(handle.key):
        return proceed(*args, **given)
    return swapped._tokendrop_within(model, name, proceed, args, kwargs, given)


def _within(
    model: nn.Module,
    name: str,
    proceed: _Function,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    given: dict[str, Any],
) -> Any:
    with _untraced()(model, name, args, kwargs):
        return proceed(*args, **given)


@functools.cache
def _untraced() -> _Function:
    return torch.compiler.disable(_entered)


def _entered(model: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ExitStack:
    if torch._C._current_graph_task_id() != -1:
        raise UnsupportedError(
            f"a backward recomputes the whole forward of {type(model).__name__}, whose selections would then be drawn "
            "anew; enter the layout around forward and backward, `with drop.layout(layout):`, or use the model's own "
            "activation checkpointing"
        )
    if getattr(model, "_is_replica", False):
        raise UnsupportedError(
            f"nn.DataParallel runs copies of {type(model).__name__}, which methods do not follow; start one process "
            "for each device, as by torchrun or accelerate launch, or let the process see one device only, by "
            "CUDA_VISIBLE_DEVICES=0"
        )
    handle: Any = model._modules["tokendrop"]
    generates, named = name == "generate", _named(getattr(type(model), name), args, kwargs)
    if generates and "inputs" in named:
        named["input_ids"] = named.pop("inputs")
    if generates:  # a function is given what the forward of the prompt will be given, in which nothing is learnt
        named.pop("labels", None)
        args, kwargs = (), named
    layout = _derived(model, named) if handle.source == "auto" else _of_function(handle.source, args, kwargs)
    stack = ExitStack()
    with torch.no_grad() if generates else nullcontext():  # a prompt without labels is nothing to warn of
        stack.enter_context(handle.disabled() if layout is None else handle.layout(layout))
    return stack


def _named(method: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    parameters = list(inspect.signature(method).parameters.values())[1:]
    positional = [one.name for one in parameters if one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    return _said(dict(zip(positional, args, strict=False)) | kwargs)


def _said(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def _derived(model: nn.Module, named: dict[str, Any]) -> TokenLayout:
    batches = [one for one in named.values() if isinstance(one, Mapping) and any(key in one for key in IMAGES)]
    if len(batches) == 1 and not any(key in named for key in IMAGES):  # a forward of one batch
        named = named | _said(batches[0])
    try:
        return batch_layout(named, model)
    except BatchError as error:
        found = [f"{key} {tuple(x.shape)}" if isinstance(x, Tensor) else str(key) for key, x in named.items()]
        raise MissingLayoutError(
            f"{type(model).__name__} was called with {', '.join(found) or 'no arguments'}, from which layout='auto' "
            f"makes no layout: {error}; or call it inside `with drop.layout(layout):`, or inside `with "
            "drop.disabled():` to run it dense on purpose"
        ) from error


def _of_function(function: _Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> TokenLayout | None:
    layout = function(args, kwargs)
    if layout is not None and not isinstance(layout, TokenLayout):
        raise LayoutTypeError(
            f"layout: expected {getattr(function, '__name__', function)!r} to return a TokenLayout, or None to run "
            f"dense; found {type(layout).__name__}"
        )
    return layout
