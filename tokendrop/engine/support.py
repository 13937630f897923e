"""What a model must be for methods to be applied to it: all checks, made before anything changes.

Shape letters: L layers.
"""

from collections.abc import Mapping, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tokendrop.engine.model import own
from tokendrop.engine.model.decoder import LayerSpec, attention_of, is_sharded
from tokendrop.engine.model.deepstack import deepstack_layers
from tokendrop.engine.model.wiring import skip_refusal
from tokendrop.errors import MethodError, UnsupportedError
from tokendrop.roles import Method, Role, Route, check_separate
from tokendrop.routes import route_of

Methods = Method | Mapping[str, Method | None]


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
        raise MethodError(
            f"methods: expected a method such as HiMix(), or a mapping of task name to method; found {methods!r}"
        )
    for task, method in methods.items():
        if not isinstance(task, str) or not task or "." in task:
            raise MethodError(f"methods: expected task names without dots; found {task!r}")
        if method is not None and (not isinstance(method, Method) or isinstance(method, type)):
            raise MethodError(f"methods[{task!r}]: expected a method such as HiMix(), or None; found {method!r}")
    return dict(methods)


def attending(method: Method, num_layers: int) -> list[int]:
    """The layers in which image tokens are ATTEND."""
    return [index for index, layer in enumerate(route_of(method, num_layers)) if layer.image is Role.ATTEND]


def weighing(method: Method, num_layers: int) -> list[int]:
    """The layers in which a router weighs what the FFN gives."""
    selects = [layer.select for layer in route_of(method, num_layers)]
    return [index for index, select in enumerate(selects) if select is not None and select.gate]


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
        MethodError: an unknown `separate`, or parts of a layer beside "none".
    """
    added = deepstack_layers(model, layers)
    for method in methods.values():
        route = route_of(method, len(layers))
        context = [index for index, layer in enumerate(route) if layer.image is Role.CONTEXT]
        _check_skipping(layers, specs, method)
        _check_weighing(layers, specs, method)
        if refusal := _numbered_refusal(route, layers):
            raise UnsupportedError(f"{method} {refusal}")
        if refusal := _refusal(layers, specs, context):
            raise UnsupportedError(f"{method} makes image tokens CONTEXT, but {refusal}; or use HMGen")
        looked = {one.select.queries.layer for one in route if one.select is not None and one.select.queries}
        if refusal := _refusal(layers, specs, sorted(looked), looks=True):
            raise UnsupportedError(
                f"{method} scores by attention, but {refusal}; or use a score that needs none, such as Drop with 'norm'"
            )
        _check_owned(layers, specs, method, route)
        adds = any(layer.adds for layer in route)
        if adds and any(isinstance(module, DistributedDataParallel) for module in model.modules()):
            raise UnsupportedError(
                f"{method} adds parameters, whose gradients DistributedDataParallel would not average, since it is "
                "there already; apply it to the module inside, before DistributedDataParallel is made"
            )
        if adds and is_sharded(model):
            raise UnsupportedError(
                f"{method} adds parameters, and {type(model).__name__} is sharded already; apply it before fully_shard"
            )
        for index in added:
            if route[index].image is not Role.ACTIVE and route[index + 1].image is not Role.ACTIVE:
                raise UnsupportedError(
                    f"{method} would be compact across layers {index} and {index + 1}, between which "
                    f"{type(model).__name__} adds visual features at full length (deepstack); start at layer "
                    f"{max(added) + 1}: layers='{max(added) + 1}:'"
                )


def _check_skipping(layers: nn.ModuleList, specs: Sequence[LayerSpec], method: Method) -> None:
    for index in attending(method, len(layers)):
        if refusal := skip_refusal(layers[index], specs[index]):
            raise UnsupportedError(
                f"{method} makes image tokens ATTEND, without an FFN, but {refusal}; use BYPASS, as Drop with "
                "then='rejoin'"
            )


def _check_owned(layers: nn.ModuleList, specs: Sequence[LayerSpec], method: Method, route: Route) -> None:
    check_separate(method.separate)
    parts = sorted({part for layer in route for part in layer.separate})
    if parts and method.separate == "none":
        raise MethodError(
            f"{method} has separate='none', and gives image tokens {parts} of their own; use 'shared' or 'per-task'"
        )
    for index, layer in enumerate(route):
        if refusal := own.refusal(layers[index], specs[index], layer.separate):
            what = "parts" if layer.separate - set("qkv") else "projections"
            raise UnsupportedError(f"{method} needs image-only {what}, but {refusal}; use separate='none'")


def _check_weighing(layers: nn.ModuleList, specs: Sequence[LayerSpec], method: Method) -> None:
    for index in weighing(method, len(layers)):
        if refusal := skip_refusal(layers[index], specs[index], adds=0.5):
            raise UnsupportedError(f"{method} weighs what an FFN gives, but {refusal}; use MixtureOfDepths")


def _numbered_refusal(route: Route, layers: nn.ModuleList) -> str | None:
    config = next((one.config for one in map(attention_of, layers) if hasattr(one, "config")), None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if not any(layer.renumber for layer in route) or not isinstance(rope, dict) or "mrope_section" not in rope:
        return None
    return "numbers tokens anew, but under M-RoPE those of an image have a row and a column; use positions='keep'"


def _refusal(
    layers: nn.ModuleList, specs: Sequence[LayerSpec], wanted: Sequence[int], looks: bool = False
) -> str | None:
    # Why rows of some layer cannot be keys and values only, or look at others, and in which layers they can.
    for index in wanted:
        refusal = specs[index].context_refusal(layers[index], looks)
        if refusal is not None:
            able = [at for at, spec in enumerate(specs) if spec.context_refusal(layers[at], looks) is None]
            where = f"; layers {able} can" if able else ""
            return refusal if all(one == specs[0] for one in specs) else f"in layer {index} {refusal}{where}"
    return None


def sharded_together(owner: nn.Module, layers: nn.ModuleList, added: nn.ModuleList) -> bool:
    """Whether a decoder is sharded, and what `apply` added to it too.

    Raises:
        UnsupportedError: the decoder is, and what was added is not.
    """
    if not any(True for _ in added.parameters()) or not is_sharded(layers):
        return False
    if not is_sharded(added):
        raise UnsupportedError(
            f"fully_shard took the decoder of {type(owner).__name__} without the image-only projections, "
            "whose gradients would then differ between ranks; call tokendrop.apply on the module that is the root "
            "of fully_shard, before it"
        )
    return True
