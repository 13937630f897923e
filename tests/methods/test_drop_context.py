"""`Drop(then="context")`: those not chosen stay visible, by a Llama written by hand, by the reference and by HiMix.

Shape letters: B batch, T tokens.
"""

from dataclasses import replace

import pytest
import torch
from helpers import (
    MIXED,
    batch,
    checkpointed,
    close,
    dropped,
    earlier,
    engine_step,
    llama,
    oracle_step,
    reference_step,
    routed,
    same,
    step,
)
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.errors import UnsupportedError
from tokendrop.roles import LayerRoute, Role, Select

BASES = {dtype: llama(dtype=dtype, spread=0.2) for dtype in (torch.float32, torch.float64)}
RAGGED = ["ttiiitittt", "tiitttiiitt", "iittiitit", "ttttttt", "tttiiiiii"]
TOLERANCES = [(torch.float32, 1e-5), (torch.float64, 1e-9)]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 2, 4])
def test_kept_tokens_are_text_to_a_llama_written_by_hand(side, keep, dtype, tolerance):
    """In the range those chosen do what text does, and the others what HiMix lets image tokens do."""
    made, base = batch(RAGGED, "uuuuu", side), BASES[dtype]
    found, _ = routed(base, {"u": td.Drop("1:3", keep, earlier, "context")}, made)
    kept = made.image & (made.image.cumsum(1) <= keep)
    himix = {"u": td.HiMix("1:3")}
    _, drop = dropped(base, himix)
    expected = oracle_step(base, himix, drop, replace(made, image=made.image & ~kept))
    assert close(found, expected, made.real, tolerance)


@given(
    st.lists(st.text("ti", min_size=1, max_size=12), min_size=1, max_size=4),
    st.sampled_from([1, 3, 0.3, 0.5, 1.0]),
    st.sampled_from(["norm", "random", "attention"]),
    st.sampled_from(["1:3", "0:2", (0, 2)]),
    st.sampled_from(["left", "right"]),
    st.sampled_from([1, 4, 64]),
    st.sampled_from(TOLERANCES),
)
def test_the_engine_equals_the_reference(samples, keep, score, layers, side, multiple, kind):
    """Image rows are trained where they are ACTIVE in the last layer; tasks of other methods cut the range."""
    dtype, tolerance = kind
    made = batch(samples, ("g" + "hu" * 2)[: len(samples)], side)
    methods = {"g": td.Drop(layers, keep, score, "context"), "h": td.HMGen("2:3"), "u": td.HiMix("2:")}
    found, drop = routed(BASES[dtype], methods, made, multiple)
    assert close(found, reference_step(BASES[dtype], methods, drop, made), made.real, tolerance)


def test_a_range_that_another_task_cuts_keeps_its_tokens_and_their_states():
    made = batch(RAGGED, "ghghg", "left")
    methods = {"g": td.Drop("0:3", 0.5, "norm", "context"), "h": td.Drop("1:2", 1, "random", "context")}
    base = BASES[torch.float64]
    found, drop = routed(base, methods, made)
    assert close(found, reference_step(base, methods, drop, made), made.real, 1e-9)


def test_recomputed_layers_see_the_same_context():
    made, base = batch(RAGGED, "ggggg", "left"), BASES[torch.float64]
    methods = {"g": td.Drop("1:3", 0.5, "random", "context")}
    plain, _ = routed(base, methods, made)
    again, _ = routed(base, methods, made, change=lambda model, _: checkpointed(model))
    assert close(again, plain, made.real, 1e-12)
    with pytest.raises(UnsupportedError, match=r"re-entrant backward.*CONTEXT"):
        routed(base, methods, made, change=lambda model, _: checkpointed(model, reentrant=True))


@pytest.mark.parametrize("keep", [1.0, 6, 100])
def test_all_kept_is_dense_to_the_bit(keep):
    made, base = batch(*MIXED, "left"), BASES[torch.float32]
    found, drop = routed(
        base, td.Drop(":", keep, "norm", "context"), replace(made, tasks=("u",) * 5, labels=no_image(made))
    )
    dense = step(base, replace(made, labels=no_image(made)))
    assert same(found, dense)
    assert drop.plan(made.layout(labels=None)).dense


def no_image(made):
    return made.labels.masked_fill(made.image.roll(1, 1), -100)


@pytest.mark.parametrize("layers", ["1:3", ":"])
def test_none_kept_is_himix_to_the_bit(layers):
    made, base = batch(RAGGED, "uuuuu", "left"), BASES[torch.float32]
    found, drop = routed(base, {"u": td.Drop(layers, 0, "attention", "context")}, made)
    expected, himix = routed(base, {"u": td.HiMix(layers)}, made)
    assert same(found, expected)
    shapes = [
        [
            (group.size, group.context_size, group.pairs)
            for span in one.plan(made.layout()).spans
            for group in span.groups
        ]
        for one in (drop, himix)
    ]
    assert shapes[0] == shapes[1]


def test_a_schedule_lets_more_compute():
    made, base = batch(RAGGED, "uuuuu"), BASES[torch.float64]
    weak = {"u": td.Drop("1:3", 0, "norm", "context")}
    found, _ = routed(base, weak, made, change=lambda _, drop: setattr(drop, "strength", 0.5))
    dense, whole = step(base, made), routed(base, weak, made)[0]
    assert not close(found, dense, made.real, 1e-3)
    assert not close(found, whole, made.real, 1e-3)
    none, _ = routed(base, weak, made, change=lambda _, drop: setattr(drop, "strength", 0.0))
    assert close(none, dense, made.real, 1e-12)


def test_image_rows_that_end_stale_may_not_be_trained():
    model, drop = dropped(BASES[torch.float32], td.Drop("1:", 0.5, then="context"))
    made = batch(["tiiit"], "g")
    with pytest.raises(td.NeededRowError, match=r"trains 3 image rows.*CONTEXT in the last layer"):
        engine_step(model, drop, made)


def test_shares_of_what_computes():
    """By hand: 3 text and 4 of 6 image tokens compute in two of four layers, and see two more."""
    model, drop = dropped(BASES[torch.float32], td.Drop("1:3", 4, "norm", "context"), multiple=1)
    made = batch(["tiiiiiitt"], "u")
    plan = drop.plan(made.layout())
    assert [(s.start, s.stop, s.groups[0].size, s.groups[0].context_size) for s in plan.spans] == [
        (0, 1, 9, 0),
        (1, 3, 7, 2),
        (3, 4, 9, 0),
    ]
    assert plan.spans[1].groups[0].pairs == 7 * 9
    assert plan.has_context
    with drop.layout(made.layout()) as plan:
        model(made.ids, use_cache=False)
    assert plan.spans[1].groups[0].context is None  # the plan is not changed by a forward


class Custom:
    """A route written out."""

    separate = "none"

    def __init__(self, *layers):
        self.layers = layers

    def route(self, num_layers, strength=1.0):
        return self.layers


SELECT = Select(2, earlier, 1)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([LayerRoute(), LayerRoute(Role.CONTEXT, frozenset("k"), SELECT)], "in layer 1 and has projections"),
        ([LayerRoute(), LayerRoute(Role.BYPASS, frozenset("q"), SELECT)], "in layer 1 and has projections"),
        (
            [LayerRoute(), LayerRoute(Role.GONE, select=SELECT), LayerRoute(Role.CONTEXT, select=SELECT)],
            "in layer 2, the others CONTEXT, behind others that are GONE",
        ),
    ],
)
def test_what_a_selection_cannot_be_combined_with(layers, message):
    method = Custom(*layers, *[LayerRoute()] * (4 - len(layers)))
    with pytest.raises(UnsupportedError, match=message):
        td.apply(llama(), method)
