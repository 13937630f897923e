"""Routes as the engine takes them from a method, at whatever strength: of the right form, without contradictions.

Shape letters: L layers.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from tokendrop.errors import MethodError, UnsupportedError
from tokendrop.roles import LayerRoute, Method, Role, Route, Select, check_strength


def route_of(method: Method, num_layers: int, strength: float = 1.0) -> Route:
    """The route of a method through L layers.

    Args:
        method: shipped, or of one's own.
        num_layers: L.
        strength: of the schedule.

    Raises:
        MethodError: a strength outside [0, 1], or no `LayerRoute` for each layer.
        UnsupportedError: roles and selections that cannot be combined.
    """
    check_strength(strength)
    found: Any = method.route(num_layers, strength)
    route = tuple(found) if isinstance(found, Iterable) else ()
    if len(route) != num_layers or not all(isinstance(one, LayerRoute) for one in route):
        raise MethodError(
            f"{method} gave the route {found!r:.200}; expected {num_layers} LayerRoutes, one for each layer"
        )
    if refusal := _refusal(route):
        raise UnsupportedError(f"{method} {refusal}")
    return route


Needs = tuple[frozenset[str], ...]


def needs(methods: Mapping[str | None, Method | None], num_layers: int) -> dict[str | None, Needs]:
    """What each of L layers is made ready for, for the whole method of each task that has one.

    Args:
        methods: by task; None for the dense model.
        num_layers: L.
    """
    given = {task: method for task, method in methods.items() if method is not None}
    return {task: tuple(map(_needs, route_of(method, num_layers))) for task, method in given.items()}


def present(
    method: Method | None, ready: Sequence[frozenset[str]], strength: float, trained: Callable[[], bool]
) -> Route:
    """The route of a method now; every image token is ACTIVE where there is none, or it is for training only.

    Args:
        method: None for the dense model.
        ready: from `needs` when it was applied.
        strength: of the schedule.
        trained: whether methods for training only hold.

    Raises:
        MethodError: it needs in some layer what that is not ready for.
    """
    if method is None:
        return (LayerRoute(),) * len(ready)
    route = route_of(method, len(ready), strength)
    _check_ready(method, route, ready, strength)
    if not getattr(method, "training_only", False) or trained():
        return route
    return tuple(
        LayerRoute(one.image, select=replace(one.select, strength=0.0))
        if one.select is not None and one.select.fuse
        else LayerRoute(separate=one.separate)
        for one in route
    )


def _check_ready(method: Method, route: Route, ready: Sequence[frozenset[str]], strength: float) -> None:
    # A model is made ready, and looked at, once: for the whole method, as it was then.
    for index, (one, able) in enumerate(zip(route, ready, strict=True)):
        if lost := sorted(_needs(one) - able):
            raise MethodError(
                f"{method} needs {', '.join(lost)} in layer {index} at strength {strength:g}, and did not at strength "
                "1 when it was applied, for which models are made ready; let its route have it there, too, and do not "
                "change a method that is applied"
            )


def _needs(layer: LayerRoute) -> frozenset[str]:
    select = layer.select
    found = {f"{part!r} of image tokens' own" for part in layer.separate}
    found |= {layer.image.name} & {Role.CONTEXT.name, Role.ATTEND.name}
    found |= {"new positions"} if layer.renumber else set()
    if select is not None:
        found |= {"a router"} if select.learned else set()
        found |= {"a fusion"} if select.fuse else set()
        found |= {f"the attention of layer {select.queries.layer}"} if select.queries is not None else set()
        found |= {f"layer {at} of the vision encoder" for at in select.encoder}
    return frozenset(found)


def _refusal(route: Route) -> str | None:
    # What cannot be combined, in a layer or with those before it.
    gone = False
    for index, layer in enumerate(route):
        role = layer.image.name
        if layer.renumber and layer.image in (Role.CONTEXT, Role.ATTEND):
            return f"numbers tokens anew in layer {index}, where image tokens are {role}; use GONE or BYPASS"
        if layer.select is None and gone and layer.image is not Role.GONE:
            return f"makes image tokens {role} in layer {index}, behind GONE, which is for good; use BYPASS before"
        if layer.select is not None and (refusal := _chosen_refusal(route, index, layer.select, gone)):
            return refusal
        gone = gone or layer.image is Role.GONE
    return None


def _chosen_refusal(route: Route, index: int, select: Select, gone: bool) -> str | None:
    # What a selection cannot be combined with.
    layer, begins = route[index], index == 0 or route[index - 1].select != select
    role = layer.image.name
    looks = None if select.queries is None else select.queries.layer
    if layer.image is Role.ACTIVE:
        return f"selects image tokens in layer {index}, and the others are ACTIVE, too; use BYPASS for those"
    if layer.separate:
        return f"selects image tokens in layer {index} and has projections of their own there; do one of them"
    if looks is not None and route[looks].separate:
        return f"scores by attention of layer {looks}, where image tokens have own projections; do one"
    if select.gate and layer.image is not Role.BYPASS:
        return f"weighs what image tokens get in layer {index}, where the others are {role}; use BYPASS"
    if select.fuse and layer.image is not Role.BYPASS:
        return f"fuses image tokens behind layer {index}, where the others are {role}; use BYPASS"
    if begins and select.layer != index:
        return (
            f"selects image tokens that enter layer {index}, but the selection is of layer {select.layer}; say {index}"
        )
    if select.learned and not begins:
        return f"selects by a router of layer {index - 1} in layer {index}, too; give each layer a selection of its own"
    if layer.image in (Role.CONTEXT, Role.ATTEND) and gone:
        return f"selects image tokens in layer {index}, the others {role}, behind others that are GONE; use BYPASS"
    return None
