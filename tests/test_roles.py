"""Layer ranges, schedules, roles."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokendrop.errors import LayerRangeError, MethodError
from tokendrop.methods import HiMix, HMGen
from tokendrop.roles import LayerRoute, Method, Role, check_layers, check_separate, deepest, layer_indices
from tokendrop.schedule import Schedule

BOUND = st.none() | st.integers(-12, 12)


@given(BOUND, BOUND, st.none() | st.integers(1, 5), st.integers(1, 12))
def test_ranges_are_python_slices(start, stop, step, count):
    expected = list(range(count))[slice(start, stop, step)]
    outside = any(bound is not None and not -count <= bound <= count for bound in (start, stop))
    text = ":".join("" if part is None else str(part) for part in (start, stop, *([step] if step else [])))
    for layers in (text, slice(start, stop, step)):
        if outside or not expected:
            with pytest.raises(LayerRangeError, match="the layer range"):
                layer_indices(check_layers(layers), count)
        else:
            assert list(layer_indices(check_layers(layers), count)) == expected


@given(st.lists(st.integers(-8, 7), min_size=1, max_size=6))
def test_lists_are_sorted_and_unique(layers):
    chosen = [index % 8 for index in layers]
    if len(set(chosen)) < len(chosen):
        with pytest.raises(LayerRangeError, match="twice"):
            layer_indices(check_layers(layers), 8)
    else:
        assert layer_indices(check_layers(layers), 8) == tuple(sorted(chosen))


@pytest.mark.parametrize(
    "layers", ["", "1", "a:b", "1:2:0", "1:2:-1", "1:2:3:4", "1.5:", " 1:2", None, 3, 1.5, [True], [0.5], ["1"], {1}]
)
def test_malformed_ranges(layers):
    with pytest.raises(LayerRangeError) as caught:
        check_layers(layers)
    assert repr(layers) in str(caught.value)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("layers", [slice(0, 4, -1), slice(0, 4, 0), slice("a", None), slice(1.5, 3)])
def test_malformed_slices(layers):
    with pytest.raises(LayerRangeError):
        layer_indices(check_layers(layers), 8)


@pytest.mark.parametrize(
    ("layers", "named"), [("2:24", "24"), ("-9:", "-9"), ((0, 8), "8"), ((-9,), "-9"), ("9:", "9"), (":9", "9")]
)
def test_ranges_outside_the_model(layers, named):
    with pytest.raises(LayerRangeError, match=rf"reaches layer {named}, but the decoder has 8 layers"):
        layer_indices(layers, 8)


@pytest.mark.parametrize("layers", ["8:", "3:3", "4:2", (), ":0", "-2:-4"])
def test_empty_ranges(layers):
    with pytest.raises(LayerRangeError, match="names none of the decoder's 8 layers"):
        layer_indices(layers, 8)


@given(st.integers(1, 9), st.floats(0, 1))
def test_deepest_layers_come_first(count, strength):
    layers = tuple(range(0, 2 * count, 2))
    on = deepest(layers, strength)
    assert on == frozenset(layers[len(layers) - len(on) :])
    assert abs(len(on) - strength * count) < 1
    assert deepest(layers, 0.0) == frozenset()
    assert deepest(layers, 1.0) == frozenset(layers)


@pytest.mark.parametrize("count", [3, 6, 7, 12, 28])
def test_each_layer_switches_on_at_its_share(count):
    for on in range(count + 1):
        assert len(deepest(tuple(range(count)), on / count)) == on


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 30), st.integers(1, 120))
def test_schedule(start, steps, tail, total):
    schedule = Schedule(start, steps, tail)
    strengths = [schedule.strength(step, total) for step in range(total)]
    grown = strengths[: max(0, total - tail)]
    assert all(value == 0 for value in strengths[max(0, total - tail) :])
    assert grown == sorted(grown)
    assert all(value == 0 for value in grown[:start])
    assert all(value == 1 for value in grown[start + steps :])
    assert schedule.final == (0.0 if tail else 1.0)


def test_schedule_without_an_end():
    assert Schedule(2, 4).strength(4) == 0.5
    with pytest.raises(MethodError, match=r"dense_tail=3.*max_steps"):
        Schedule(dense_tail=3).strength(0)


@pytest.mark.parametrize("field", ["start", "steps", "dense_tail"])
@pytest.mark.parametrize("value", [-1, 1.5, True, None, "3"])
def test_schedule_refuses(field, value):
    with pytest.raises(MethodError, match=f"{field}="):
        Schedule(**{field: value})


@pytest.mark.parametrize("separate", ["", "all", None, True, "per_task", []])
def test_unknown_separate(separate):
    with pytest.raises(MethodError) as caught:
        check_separate(separate)
    assert repr(separate) in str(caught.value)


@pytest.mark.parametrize(
    ("role", "own", "message"),
    [
        (Role.ACTIVE, {"mlp", "q"}, r"separate=\['mlp'\] .* ACTIVE; they use 'ffn', 'k', 'norm', 'o', 'q', 'v'$"),
        (Role.ACTIVE, {3, "q"}, r"separate=\[3\] in a layer's route for image tokens that are ACTIVE; they use"),
        (Role.ACTIVE, "qkv", r"separate='qkv' in a layer's route; expected a set as \{'k', 'v'\}"),
        (Role.ACTIVE, None, "separate=None in a layer's route; expected a set"),
        (1, (), "found image=1 in a layer's route; expected a Role, such as Role.CONTEXT"),
        ("context", (), "found image='context' in a layer's route; expected a Role"),
        (Role.ATTEND, {"ffn", "q"}, r"separate=\['ffn'\] .* ATTEND; they use 'k', 'norm', 'o', 'q', 'v'$"),
        (Role.CONTEXT, {"q", "k", "o"}, r"separate=\['o', 'q'\] .* CONTEXT; they use 'k', 'norm', 'v'$"),
        (Role.BYPASS, {"norm"}, r"separate=\['norm'\] .* BYPASS; they use no parts$"),
        (Role.GONE, {"v"}, r"separate=\['v'\] .* GONE; they use no parts$"),
    ],
)
def test_parts_that_image_tokens_of_a_role_do_not_use(role, own, message):
    with pytest.raises(MethodError, match=message):
        LayerRoute(role, own)


@pytest.mark.parametrize("made", [set, list, tuple, frozenset])
def test_parts_in_whatever_collection(made):
    assert LayerRoute(separate=made(["q"])).separate == frozenset("q")


def test_protocol():
    assert isinstance(HiMix(), Method)
    assert isinstance(HMGen("1:3"), Method)
    assert not isinstance("HiMix", Method)
    assert LayerRoute().image is Role.ACTIVE
    assert [role.name for role in Role] == ["ACTIVE", "CONTEXT", "BYPASS", "GONE", "ATTEND"]
