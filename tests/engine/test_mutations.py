"""Mutations of the engine that the comparison with the oracle must see."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from helpers import batch, close, dropped, engine_step, llama, oracle_step

import tokendrop as td
from tokendrop.engine.forward import arguments, calls, groups, span
from tokendrop.engine.model import context, ffn, norms, projections, using
from tokendrop.engine.plan import plan
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import NeededRowError

METHODS = {"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task")}
BASE = llama(dtype=torch.float64)
SAMPLES = ["ttiiittitt", "iittiitit", "tiiiiiitt", "tttttt"]


def agrees(tasks="uggu", side="left", hints=True):
    """Whether the engine, as it is now, equals the oracle."""
    made = batch(SAMPLES, tasks, side)
    model, drop = dropped(BASE, METHODS)
    layout = made.layout() if hints else made.layout(labels=None, padding=None)
    return close(engine_step(model, drop, made, layout), oracle_step(BASE, METHODS, drop, made), made.real, 1e-9)


CASES = [{"side": side, "hints": hints} for side in ("left", "right") for hints in (True, False)]


@pytest.mark.parametrize("case", CASES)
def test_unmutated(case):
    assert agrees(**case)


@pytest.mark.parametrize("case", CASES)
def test_context_order_reversed(monkeypatch, case):
    update = context.ContextKeys.update

    def reversed_update(self, keys, values, *_):
        k, v = update(self, keys, values)
        rows = keys.shape[2]
        return (torch.cat([x[:, :, :-rows].flip(2), x[:, :, -rows:]], 2) for x in (k, v))

    monkeypatch.setattr(context.ContextKeys, "update", reversed_update)
    assert not agrees(**case)


@pytest.mark.parametrize("case", CASES)
def test_context_behind_the_text(monkeypatch, case):
    update = context.ContextKeys.update

    def swapped(self, keys, values, *_):
        rows = keys.shape[2]
        return (torch.cat([x[:, :, -rows:], x[:, :, :-rows]], 2) for x in update(self, keys, values))

    monkeypatch.setattr(context.ContextKeys, "update", swapped)
    assert not agrees(**case)


@pytest.mark.parametrize("case", CASES)
def test_positions_renumbered(monkeypatch, case):
    select = arguments.select

    def renumbered(value, group, rows, shape, name):
        if isinstance(value, tuple) and rows is not None:
            order = torch.arange(rows.index.shape[1]).expand_as(rows.index)
            return select(value, group, Rows(order, rows.valid), shape, name)
        return select(value, group, rows, shape, name)

    monkeypatch.setattr(arguments, "select", renumbered)
    monkeypatch.setattr(calls, "select", renumbered)
    assert not agrees(**case)


@pytest.mark.parametrize("shift", [0, 2])
def test_needed_rows_shifted(monkeypatch, shift):
    """Row t is trained by labels[t + 1]: with another shift good batches are refused or bad ones accepted."""

    def shifted(layout):
        needed = torch.zeros_like(layout.image)
        needed[:, : needed.shape[1] - shift] = layout.labels[:, shift:] != -100
        return needed

    made, (_, drop) = batch(["ttiitt"], "u"), dropped(BASE, METHODS)
    bad = made.labels.clone()
    bad[0, 4] = 1  # trains row 3, an image token

    def refused(labels):
        try:
            drop.plan(made.layout(labels=labels))
        except NeededRowError:
            return True
        return False

    assert (refused(made.labels), refused(bad)) == (False, True)
    monkeypatch.setattr(plan, "needed_rows", shifted)
    assert (refused(made.labels), refused(bad)) != (False, True)


def test_padding_mask_dropped(monkeypatch):
    """Without labels the padding rows are computed, so that only the mask hides them."""
    compact_mask = arguments.compact_mask
    monkeypatch.setattr(arguments, "compact_mask", lambda mask, *rest: compact_mask(None, *rest))
    assert not agrees(side="left", hints=False)


def test_rows_that_fill_are_seen(monkeypatch):
    places = arguments.places

    def all_seen(group, form):
        return replace(places(group, form), valid=None)

    monkeypatch.setattr(arguments, "places", all_seen)
    assert not all(agrees(**case) for case in CASES)


def test_context_from_the_evolving_state(monkeypatch):
    """Context rows of the wrong samples, as far as the engine can mistake them."""
    of = span._context
    monkeypatch.setattr(span, "_context", lambda full, group: of(full.roll(1, 0), group))
    assert not agrees()


def test_rows_that_fill_overwrite_theirs(monkeypatch):
    full = span._full

    def careless(forward, states):
        rows = forward.span.rows
        rows = rows and Rows(rows.index, torch.ones_like(rows.valid))
        return full(replace(forward, span=replace(forward.span, rows=rows)), states)

    monkeypatch.setattr(span, "_full", careless)
    assert not all(agrees(tasks="gggg", **case) for case in CASES)


@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_image_projection_left_out(monkeypatch, letter):
    of = projections._SplitLinear._letter
    monkeypatch.setattr(
        projections._SplitLinear,
        "_letter",
        lambda self, x, own, one, more: of(self, x, {} if one == letter else own, one, more),
    )
    assert not agrees()


ATTEND = {"a": td.Drop("1:", 0, then="attend"), "g": td.HMGen("1:3", "per-task")}


def attends(tasks="aaga", side="left"):
    """Whether ATTEND, as the engine has it now, equals the oracle."""
    made = batch(SAMPLES, tasks, side)
    model, drop = dropped(BASE, ATTEND, multiple=1)
    return close(engine_step(model, drop, made), oracle_step(BASE, ATTEND, drop, made), made.real, 1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_attend_unmutated(side):
    assert attends(side=side)
    assert attends("aaaa", side)


def test_the_ffn_of_all_rows(monkeypatch):
    monkeypatch.setattr(groups, "some_rows", lambda rows, tokens: nullcontext())
    assert not attends()


def test_the_ffn_of_rows_that_fill(monkeypatch):
    """Rows of samples with less text than the others."""
    scatter = ffn.scatter_tokens
    monkeypatch.setattr(ffn, "scatter_tokens", lambda full, kept, index, valid: scatter(full, kept, index))
    assert not attends()


def test_the_ffn_of_other_rows(monkeypatch):
    gather = ffn.gather_tokens
    monkeypatch.setattr(ffn, "gather_tokens", lambda x, index: gather(x, index.roll(1, 1)))
    assert not attends()


@pytest.mark.parametrize("other", [td.Drop("1:", 0), td.HiMix("1:"), None])
def test_no_other_role_is_attend(other):
    made = batch(SAMPLES, "uuuu", "left")
    model, drop = dropped(BASE, {"u": other, "a": ATTEND["a"]})
    expected = oracle_step(BASE, {"u": ATTEND["a"]}, drop, made)
    assert not close(engine_step(model, drop, made), expected, made.real, 1e-3)
    assert close(engine_step(model, drop, made, made.layout(task="a")), expected, made.real, 1e-9)


OWN = {"u": td.HiMix("1:", "per-task", "qkv+norm"), "g": td.HMGen("1:3", "per-task", "qkv+o+norm+ffn")}


def owns(side="left"):
    """Whether parts of their own, as the engine has them now, equal the oracle."""
    made = batch(SAMPLES, "uggu", side)
    model, drop = dropped(BASE, OWN)
    return close(engine_step(model, drop, made), oracle_step(BASE, OWN, drop, made), made.real, 1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_parts_unmutated(side):
    assert owns(side)


@pytest.mark.parametrize(("room", "part"), [(norms, "norm"), (ffn, "ffn"), (projections, "o")])
def test_a_part_left_out(monkeypatch, room, part):
    of = using.own
    monkeypatch.setattr(room, "own", lambda name: {key: one for key, one in of(name).items() if key != part})
    assert not owns()


def test_another_norm_in_the_place_of_one(monkeypatch):
    name = "_tokendrop_key"
    monkeypatch.setattr(norms._SplitNorm, name, property(lambda _: "input_layernorm", lambda *_: None), raising=False)
    assert not owns()


def test_rows_of_parts_in_another_order(monkeypatch):
    run = using.split_run

    def careless(split, flat, make):
        return run(replace(split, inverse=torch.arange(len(split.inverse))), flat, make)

    for room in (norms, ffn):
        monkeypatch.setattr(room, "split_run", careless)
    assert not owns()
