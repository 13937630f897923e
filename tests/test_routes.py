"""Routes of methods of one's own: what contradicts itself, or the model that was made ready for them, is refused.

Shape letters: L layers.
"""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from helpers import llama

import tokendrop as td
from tokendrop.errors import MethodError, UnsupportedError
from tokendrop.roles import LayerRoute, Merge, Queries, Role, Select
from tokendrop.routes import needs, present, route_of

A, C, B, G, T = (LayerRoute(role) for role in (Role.ACTIVE, Role.CONTEXT, Role.BYPASS, Role.GONE, Role.ATTEND))


def first(scoring):
    return scoring.image.float()


def merged(scoring, kept):
    return Merge(scoring.image.float(), scoring.image.float())


@dataclass
class Unfrozen:
    def __call__(self, *given):
        return None


SELECT = Select(2, first, 1)
CHOSEN = LayerRoute(Role.BYPASS, select=SELECT)


class Mine:
    """Gives `route` at strength 1, and `weak` below."""

    def __init__(self, route, weak=None, separate="none"):
        self.given, self.weak, self.separate = route, route if weak is None else weak, separate

    def __repr__(self):
        return "Mine()"

    def route(self, num_layers, strength=1.0):
        return self.given if strength == 1 else self.weak


@pytest.mark.parametrize("made", [tuple, list, iter])
def test_a_route_in_whatever_form(made):
    assert route_of(Mine(made([A, B, B, A])), 4) == (A, B, B, A)


@pytest.mark.parametrize(
    "route", [(A, B), (A, B, B, A, A), (), None, 3, (Role.BYPASS,) * 4, (A, B, None, A)], ids=lambda one: repr(one)[:20]
)
def test_no_route_of_a_layer_each(route):
    model = llama()
    with pytest.raises(MethodError, match=r"Mine\(\) gave the route .*; expected 4 LayerRoutes, one for each layer"):
        td.apply(model, Mine(route))
    assert not hasattr(model, "tokendrop")


@pytest.mark.parametrize("strength", [-0.1, 1.5, math.nan, True, None, "1"])
def test_no_strength(strength):
    drop = td.apply(llama(), td.HiMix("1:"))
    drop.strength = strength
    with pytest.raises(MethodError, match=r"strength=.*: expected a number from 0, dense, to 1, the whole method"):
        drop.plan(td.TokenLayout(torch.arange(6).view(1, 6) < 3))


def chosen(role=Role.BYPASS, **more):
    return LayerRoute(role, select=replace(SELECT, **more))


@pytest.mark.parametrize("weak", [False, True], ids=["whole", "weak"])
@pytest.mark.parametrize(
    ("route", "message"),
    [
        ((A, G, A, A), "makes image tokens ACTIVE in layer 2, behind GONE, which is for good; use BYPASS before"),
        ((A, chosen(Role.GONE), B, B), "makes image tokens BYPASS in layer 2, behind GONE"),
        (
            (A, replace(C, renumber=True), C, A),
            "numbers tokens anew in layer 1, where image tokens are CONTEXT; use GONE",
        ),
        (
            (A, replace(T, renumber=True), A, A),
            "numbers tokens anew in layer 1, where image tokens are ATTEND; use GONE",
        ),
        ((A, chosen(Role.ACTIVE), A, A), "selects image tokens in layer 1, and the others are ACTIVE, too; use BYPASS"),
        ((A, CHOSEN, A, CHOSEN), "that enter layer 3, but the selection is of layer 1; say 3"),
        ((A, A, CHOSEN, A), "that enter layer 2, but the selection is of layer 1; say 2"),
        (
            (A, *[chosen(learned=True)] * 2, A),
            "by a router of layer 1 in layer 2, too; give each layer a selection of its",
        ),
        ((A, chosen(Role.CONTEXT, learned=True, gate=0.5), A, A), "weighs what image tokens get in layer 1, where the"),
    ],
)
def test_roles_and_selections_that_contradict_one_another(route, message, weak):
    method = Mine((A,) * 4, route) if weak else Mine(route)
    with pytest.raises(UnsupportedError, match=message):
        route_of(method, 4, 0.5)
    if not weak:
        model = llama()
        with pytest.raises(UnsupportedError, match=message):
            td.apply(model, method)
        assert not hasattr(model, "tokendrop")


NEEDS = [
    (LayerRoute(separate=frozenset({"k", "ffn"})), "'ffn' of image tokens' own, 'k' of image tokens' own"),
    (T, "ATTEND"),
    (LayerRoute(Role.CONTEXT), "CONTEXT"),
    (LayerRoute(Role.BYPASS, renumber=True), "new positions"),
    (chosen(learned=True), "a router"),
    (chosen(fuse=True), "a fusion"),
    (chosen(queries=Queries("prompt", 1)), "the attention of layer 1"),
    (chosen(encoder=(2,)), "layer 2 of the vision encoder"),
]


@pytest.mark.parametrize(("weak", "what"), NEEDS)
def test_what_a_model_was_not_made_ready_for(weak, what):
    method, layout = Mine((A,) * 4, (A, weak, A, A)), td.TokenLayout(torch.arange(6).view(1, 6) < 3)
    drop = td.apply(llama(), method)
    drop.strength = 0.5
    with pytest.raises(
        MethodError,
        match=rf"Mine\(\) needs {what} in layer 1 at strength 0.5, and did not at strength 1 when it was ap",
    ):
        drop.plan(layout)
    drop.strength = 1.0
    drop.plan(layout)


@pytest.mark.parametrize(("changed", "what"), NEEDS)
def test_a_method_that_is_changed_after_apply(changed, what):
    method, layout = Mine((A,) * 4), td.TokenLayout(torch.arange(6).view(1, 6) < 3)
    drop = td.apply(llama(), method)
    method.given = A, changed, A, A
    with pytest.raises(MethodError, match=rf"needs {what} in layer 1 at strength 1, .* do not change a method that is"):
        drop.plan(layout)
    method.given = A, LayerRoute(Role.BYPASS), A, A  # needs nothing
    drop.plan(layout)
    drop.methods["added"] = Mine((A, T, A, A))
    with pytest.raises(MethodError, match="needs ATTEND in layer 1 at strength 1"):
        drop.route_of("added")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score": 3}, "score: expected a function; found 3"),
        ({"score": lambda: None}, r"score: expected a function of \(scoring\)"),
        ({"merge": lambda scoring: None}, r"merge: expected a function of \(scoring, kept\)"),
        (
            {"score": Unfrozen()},
            r"score=Unfrozen\(\): expected a function that can be hashed, such as a frozen dataclass",
        ),
        ({"merge": Unfrozen()}, r"merge=Unfrozen\(\): expected a function that can be hashed"),
        ({"keep": -3}, r"keep=-3: expected a share in \(0, 1\] as a float, or a count of 0 or more"),
        ({"per": "images"}, "per='images' is unknown; use 'sample', 'image' or 'frame'"),
        ({"strength": 2.0}, "strength=2.0: expected a number from 0"),
        ({"gate": 0.5}, r"gate=0.5, learned=False, .*; a gate above 0 takes learned=True"),
        ({"gate": -0.5, "learned": True}, r"gate=-0.5, learned=True"),
        ({"restore": True}, r"restore=True, merge=None; .* restore=True a merge"),
    ],
)
def test_selections_that_are_none(given, message):
    with pytest.raises(MethodError, match=message):
        replace(SELECT, **given)
    assert replace(SELECT, learned=True, gate=0.5).gate == 0.5
    assert replace(SELECT, merge=merged, restore=True).restore


def test_a_method_for_training_only_keeps_its_parts_where_it_does_not_hold():
    own = LayerRoute(separate=frozenset("kv"))
    method = Mine((A, own, LayerRoute(Role.CONTEXT, frozenset("kv")), chosen(layer=3)), separate="shared")
    method.training_only = True
    ready = needs({None: method}, 4)[None]
    assert present(method, ready, 1.0, lambda: True) == method.given
    assert present(method, ready, 1.0, lambda: False) == (A, own, own, A)
