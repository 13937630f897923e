"""What HiMix and HMGen say about roles and projections, layer by layer."""

import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.roles import Role

LAYERS = st.sampled_from([":", "1:", "1:3", "::2", "-2:", (0, 3), [1], range(1, 3), slice(0, 2)])
METHODS = [(td.HiMix, Role.CONTEXT), (td.HMGen, Role.BYPASS)]


def inside(layers, count):
    if isinstance(layers, str):
        layers = slice(*(int(part) if part else None for part in layers.split(":")))
    return list(range(count))[layers] if isinstance(layers, slice) else list(layers)


@pytest.mark.parametrize(("kind", "role"), METHODS)
@given(LAYERS, st.sampled_from(["none", "shared", "per-task"]), st.integers(4, 9))
def test_routes(kind, role, layers, separate, count):
    chosen = inside(layers, count)
    route = kind(layers, separate).route(count)
    assert [layer.image for layer in route] == [role if n in chosen else Role.ACTIVE for n in range(count)]
    own, where = ("kv", chosen) if kind is td.HiMix else ("qkv", [n for n in range(count) if n not in chosen])
    expected = [own if separate != "none" and n in where else "" for n in range(count)]
    assert [layer.separate for layer in route] == [frozenset(letters) for letters in expected]


@pytest.mark.parametrize(("kind", "role"), METHODS)
@given(LAYERS, st.floats(0, 1), st.integers(4, 9))
def test_a_schedule_changes_roles_and_no_projections(kind, role, layers, strength, count):
    method = kind(layers, "shared")
    whole, part = method.route(count), method.route(count, strength)
    assert [layer.separate for layer in part] == [layer.separate for layer in whole]
    on = [n for n, layer in enumerate(part) if layer.image is role]
    all_on = [n for n, layer in enumerate(whole) if layer.image is role]
    assert on == all_on[len(all_on) - len(on) :]
    assert abs(len(on) - strength * len(all_on)) < 1


@pytest.mark.parametrize("kind", [td.HiMix, td.HMGen])
def test_methods_are_frozen_values(kind):
    method = kind("1:3", separate="shared")
    assert method == kind("1:3", "shared") == copy.deepcopy(method) == pickle.loads(pickle.dumps(method))  # noqa: S301
    assert hash(method) == hash(kind("1:3", "shared"))
    assert kind([1, 2]) == kind((1, 2)) == kind(range(1, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.separate = "none"


@pytest.mark.parametrize("kind", [td.HiMix, td.HMGen])
def test_methods_refuse(kind):
    with pytest.raises(td.LayerRangeError, match="'2-4'"):
        kind("2-4")
    with pytest.raises(td.MethodError, match="separate='both'"):
        kind("2:4", separate="both")
    with pytest.raises(td.LayerRangeError, match="has 4 layers"):
        kind("2:24").route(4)


def test_fields_and_defaults():
    shared = [("separate", "none"), ("parts", "qkv")]
    assert [(f.name, f.default) for f in dataclasses.fields(td.HiMix)] == [("layers", ":"), *shared]
    assert [f.name for f in dataclasses.fields(td.HMGen)] == ["shallow", "separate", "parts"]
    with pytest.raises(TypeError):
        td.HMGen()


def test_random_ltd_chooses_anew_in_each_layer():
    route = td.RandomLTD("1:4", keep=2, seed=5).route(5)
    assert [layer.image for layer in route] == [Role.ACTIVE, *[Role.BYPASS] * 3, Role.ACTIVE]
    assert [layer.select.layer for layer in route[1:4]] == [1, 2, 3]
    assert len({layer.select for layer in route[1:4]}) == 3
    assert td.RandomLTD() == td.RandomLTD("1:-1", 0.5, 0)


@pytest.mark.parametrize("keep", [0.0, 1.5, -1, True, "half"])
def test_random_ltd_refuses(keep):
    with pytest.raises(td.MethodError, match=f"keep={keep!r}: expected a share"):
        td.RandomLTD(keep=keep)
