"""Apply methods to a model: all checks first, then a class swap.

Shape letters: T tokens, L layers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokendrop.engine.forward import head, routers
from tokendrop.engine.forward.binding import Binding
from tokendrop.engine.forward.groups import run
from tokendrop.engine.forward.span import WORK, call
from tokendrop.engine.forward.state import frames
from tokendrop.engine.handle import Handle
from tokendrop.engine.model import projections
from tokendrop.engine.model.decoder import (
    LayerSpec,
    check_module,
    deepstack_layers,
    find_layers,
    is_sharded,
    layer_specs,
    uncompiled,
)
from tokendrop.engine.model.swap import Swapped, swapped_class
from tokendrop.engine.model.vision import Encoder, Seen
from tokendrop.errors import AppliedError, MethodError, UnsupportedError, check_flag, check_integer
from tokendrop.roles import Method, Role, selections

Methods = Method | Mapping[str, Method | None]


class _RoutedLayer(Swapped):
    """Mixin of a decoder layer whose tokens are routed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return call(self, super().__call__, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward, work = self._tokendrop_base.forward, kwargs.pop(WORK, None)
        if work is None:
            return forward(self, *args, **kwargs)
        return run(self, forward, args, kwargs, work)


def apply(
    model: nn.Module, methods: Methods, layers: str | None = None, multiple: int = 64, labelled_logits: bool = False
) -> Handle:
    """Make the image tokens of a model skip work; call it before `fully_shard`, `torch.compile` or DDP.

    Args:
        model: any module with one decoder.
        methods: a method for whatever task, or task name -> method; None runs a task dense.
        layers: dotted path of the decoder's layer list, where inspection finds several.
        multiple: row counts are rounded up to it (or to T / 16 where that is less), so that shapes stay few.
        labelled_logits: run the output head and the loss of a Hugging Face model on the N rows with a label only; the
            logits of a forward with labels are then (1, N, V).

    Returns:
        The handle, which is also `model.tokendrop`.

    Raises:
        AppliedError: the model, or a part of it, is dropped already.
        DecoderError: no decoder, or several.
        LayerRangeError: a method's range does not fit the decoder, or the vision encoder that it looks at.
        MethodError: no methods, or something that is no method.
        UnsupportedError: a role or projections that such layers cannot have; no vision encoder, and a method needs one.

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
    check_module(model)
    model = uncompiled(model)
    check_flag("labelled_logits", labelled_logits)
    if any(isinstance(module, Handle) for module in model.modules()):
        raise AppliedError(f"{type(model).__name__} is dropped already; call remove() on its handle first")
    check_integer("multiple", multiple, 1)
    if isinstance(model, nn.ModuleList | nn.Sequential):
        raise UnsupportedError(
            f"{type(model).__name__} is a container whose every child counts as a part of it; apply to the module that "
            "holds it, or run its layers with DropLayers"
        )
    path, found = find_layers(model, layers)
    if any(uncompiled(layer) is not layer for layer in found):
        raise UnsupportedError(
            f"the layers of {path!r} are compiled one by one; call apply before torch.compile(layer), or compile them "
            "in place by layer.compile()"
        )
    if any("_tokendrop" in layer.__dict__ for layer in found):
        raise AppliedError(f"the layers of {path!r} are dropped already, through another module; remove that first")
    check_shared(found, path)
    if hasattr(model, "tokendrop"):
        raise AppliedError(f"{type(model).__name__} has an attribute 'tokendrop' of its own; rename it")
    specs = layer_specs(found)
    given = {task: method for task, method in checked.items() if method is not None}
    check_support(model, found, specs, given)
    headed = head.find_head(model) if labelled_logits else None
    selects = selections(method.route(len(found)) for method in given.values())
    looked = {index for select in selects for index in select.encoder}
    encoder = Encoder(model, looked) if looked else None
    sets = projections.make_sets(found, specs, given, projections.set_names(given))
    handle = Handle(model, path, specs, checked, multiple, sets, labelled_logits, encoder)
    try:
        _swap(handle, found, headed)
    except BaseException:
        handle.undo()  # somebody else's class may refuse to be derived from, or its instances to change
        raise
    return handle


def _swap(handle: Handle, layers: nn.ModuleList, headed: tuple[nn.Module, nn.Module] | None) -> None:
    if handle.encoder is not None:
        handle.encoder.watch(partial(_seen, handle.key))
    for index, (layer, spec) in enumerate(zip(layers, handle.specs, strict=True)):
        layer.__class__ = swapped_class(_RoutedLayer, type(layer))
        layer.__dict__["_tokendrop"] = Binding(handle, index, spec)
    routes = [(m, m.route(len(layers))) for m in handle.methods.values() if m is not None]
    if any(m.separate != "none" or any(one.image is Role.CONTEXT for one in route) for m, route in routes):
        projections.swap(layers, handle.specs)
    if headed is not None:
        head.inject(*headed, handle.key)
    routers.inject(handle.owner, handle.path, handle.key)
    handle.owner.tokendrop = handle


def _seen(key: str) -> Seen | None:
    frame = (frames(key) or [None])[-1]
    return None if frame is None else frame.seen


def check_methods(methods: Methods) -> dict[str | None, Method | None]:
    """Methods by task name; the key None serves whatever task.

    Raises:
        MethodError: no methods, or something that is none.
    """
    if isinstance(methods, Method) and not isinstance(methods, type):
        if methods.separate == "per-task":
            raise MethodError(f"{methods} has separate='per-task' and no task; give a mapping of task name to method")
        return {None: methods}
    if not isinstance(methods, Mapping) or not methods:
        raise MethodError(f"methods: expected a method, or a mapping of task name to method; found {methods!r}")
    for task, method in methods.items():
        if not isinstance(task, str) or not task or "." in task:
            raise MethodError(f"methods: expected task names without dots; found {task!r}")
        if method is not None and (not isinstance(method, Method) or isinstance(method, type)):
            raise MethodError(f"methods[{task!r}]: expected a method such as HiMix(), or None; found {method!r}")
    return dict(methods)


def check_shared(layers: nn.ModuleList, path: str) -> None:
    """Refuse a layer that stands in the list twice: it would not know which of its calls comes when.

    Raises:
        UnsupportedError: with the first two places.
    """
    places: dict[nn.Module, int] = {}
    for index, layer in enumerate(layers):
        first = places.setdefault(layer, index)
        if first != index:
            raise UnsupportedError(
                f"layers {first} and {index} of {path!r} are one {type(layer).__name__}, and a layer has one place in "
                "a route; put a module of its own at each place, which may share its parameters with another's"
            )


def check_support(
    model: nn.Module, layers: nn.ModuleList, specs: Sequence[LayerSpec], methods: Mapping[str | None, Method]
) -> None:
    """Refuse roles and projections that such layers cannot have.

    Raises:
        UnsupportedError: with the reason, and what to use instead.
    """
    deepstack = deepstack_layers(model)
    for method in methods.values():
        route = method.route(len(layers))
        context = [index for index, layer in enumerate(route) if layer.image is Role.CONTEXT]
        if refusal := _refusal(layers, specs, context):
            raise UnsupportedError(f"{method} makes image tokens CONTEXT, but {refusal}; or use HMGen")
        looked = {one.select.queries.layer for one in route if one.select is not None and one.select.queries}
        if refusal := _refusal(layers, specs, sorted(looked)):
            raise UnsupportedError(
                f"{method} scores by attention, but {refusal}; or use a score that needs none, such as Drop with 'norm'"
            )
        own = [specs[index].separate_refusal() for index, layer in enumerate(route) if layer.separate]
        if refusal := next(filter(None, own), None):
            raise UnsupportedError(f"{method} needs image-only projections, but {refusal}; use separate='none'")
        learned = any(layer.select is not None and layer.select.learned for layer in route)
        adds = learned or method.separate != "none"
        if adds and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise UnsupportedError(
                f"{method} adds parameters, whose gradients DistributedDataParallel would not average, since it is "
                "there already; apply it to the module inside, before DistributedDataParallel is made"
            )
        if adds and is_sharded(model):
            raise UnsupportedError(
                f"{method} adds parameters, and {type(model).__name__} is sharded already; apply it before fully_shard"
            )
        for index in range(min(deepstack, len(layers) - 1)):
            if route[index].image is not Role.ACTIVE and route[index + 1].image is not Role.ACTIVE:
                raise UnsupportedError(
                    f"{method} would be compact across layers {index} and {index + 1}, between which "
                    f"{type(model).__name__} adds visual features at full length (deepstack); start at layer "
                    f"{deepstack}: layers='{deepstack}:'"
                )


def _refusal(layers: nn.ModuleList, specs: Sequence[LayerSpec], wanted: Sequence[int]) -> str | None:
    # Why rows of some layer cannot be keys and values only, and in which layers they can.
    for index in wanted:
        refusal = specs[index].context_refusal(layers[index])
        if refusal is not None:
            able = [at for at, spec in enumerate(specs) if spec.context_refusal(layers[at]) is None]
            where = f"; layers {able} can" if able else ""
            return refusal if all(one == specs[0] for one in specs) else f"in layer {index} {refusal}{where}"
    return None
