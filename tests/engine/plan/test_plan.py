"""From layouts and routes to index tensors."""

import pytest
import torch
from helpers import MIXED, batch, dropped, llama
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.engine.plan.plan import Planner
from tokendrop.engine.plan.rows import round_up
from tokendrop.roles import LayerRoute, Role

BASE = llama()


def planned(methods, made, layout=None, **kwargs):
    _, drop = dropped(BASE, methods, **kwargs)
    return drop.plan(layout or made.layout())


@given(st.integers(1, 3000), st.integers(0, 3000), st.sampled_from([1, 2, 3, 4, 64, 100, 4096]))
def test_round_up(tokens, count, multiple):
    count = min(count, tokens)
    rounded = round_up(count, tokens, multiple)
    assert max(1, count) <= rounded <= tokens
    assert rounded - count < max(2, min(multiple, max(1, tokens / 16)))


def test_round_up_gives_few_shapes():
    assert len({round_up(count, 4096, 64) for count in range(1, 4097)}) == 64


def test_rows_are_ascending_and_unique():
    made = batch(*MIXED, side="left")
    plan = planned({"u": td.HiMix("1:"), "g": td.HMGen("1:3")}, made)
    text = ~made.image & made.real
    for span in plan.spans:
        for group in span.groups:
            for rows, of in ((group.active, text), (group.context, made.image)):
                if rows is None:
                    continue
                for sample, row in enumerate(group.members):
                    expected = of[row].nonzero()[:, 0].tolist()
                    count = len(expected)
                    assert rows.index[sample, :count].tolist() == expected
                    assert len(set(rows.index[sample].tolist())) == rows.index.shape[1]
                    valid = rows.valid[sample] if rows.valid is not None else torch.ones(rows.index.shape[1])
                    assert int(valid.sum()) == count


def test_spans_cover_the_layers_in_order():
    plan = planned({"u": td.HiMix("1:"), "g": td.HMGen("1:3:2")}, batch(*MIXED))
    assert [(span.start, span.stop) for span in plan.spans] == [(0, 1), (1, 2), (2, 4)]
    assert [plan.spans.index(span) for span in plan.span_of] == [0, 1, 2, 2]
    assert [span.folded for span in plan.spans] == [False, True, True]
    assert sorted(m for group in plan.spans[1].groups for m in group.members) == [0, 1, 2, 3, 4]


def test_one_role_is_one_span_without_folding():
    (span,) = planned({"u": td.HiMix()}, batch(MIXED[0][:3], "uuu")).spans
    assert (span.start, span.stop, span.folded) == (0, 4, False)
    assert span.groups[0].whole


@pytest.mark.parametrize("methods", [{"u": td.HiMix()}, {"u": None}])
def test_without_images_the_plan_is_dense(methods):
    plan = planned(methods, batch(["tttt", "ttt"], "uu"))
    assert plan.dense
    assert not plan.has_context


def test_image_only_projections_are_not_dense():
    """Also where every role is ACTIVE."""
    made = batch(MIXED[0], "ggggg")
    _, drop = dropped(BASE, {"g": td.HMGen("1:3", "shared")})
    drop.strength = 0.0
    plan = drop.plan(made.layout())
    assert all(group.active is None for span in plan.spans for group in span.groups)
    assert not plan.dense


@pytest.mark.parametrize("hints", [True, False])
def test_padding_rows_compute_only_where_their_output_may_be_used(hints):
    made = batch(["ttitt", "tit"], "uu", "right")
    layout = made.layout() if hints else made.layout(labels=None)
    (span,) = planned({"u": td.HiMix()}, made, layout).spans
    rows = span.groups[0].active
    counts = [rows.index.shape[1]] * 2 if rows.valid is None else rows.valid.sum(1).tolist()
    assert counts == ([4, 2] if hints else [4, 4])


def test_a_padding_row_that_is_trained_computes():
    """Left padding: the row before the first real token predicts it, where its label says so."""
    made = batch(["ttitt", "tit"], "uu", "left")
    labels = made.labels.clone()
    labels[1, 2] = 5
    (span,) = planned({"u": td.HiMix()}, made, made.layout(labels=labels)).spans
    rows = span.groups[0].active
    assert rows.index[1][rows.valid[1]].tolist() == [1, 2, 4]


@pytest.mark.parametrize("label", [1, 2, 3, 4])
def test_row_t_is_trained_by_label_t_plus_one(label):
    image = torch.tensor([[False, True, True, True, False, False]])
    labels = torch.full((1, 6), -100)
    labels[0, label] = 3
    layout = td.TokenLayout(image, labels=labels)
    _, drop = dropped(BASE, td.HiMix())
    if label == 1:
        drop.plan(layout)
    else:
        with pytest.raises(td.NeededRowError, match=r"sample 0 .*trains 1 image rows.*CONTEXT.*HMGen"):
            drop.plan(layout)


def test_trained_image_rows_may_come_back():
    """BYPASS in the last layer and CONTEXT before an ACTIVE one leave no stale state."""
    made = batch(MIXED[0], "ggggg")
    for method in (td.HMGen(":"), td.HMGen("3:"), td.HiMix(":-1"), td.HiMix((0, 2))):
        planned({"g": method}, made)


def test_gone_rows_may_not_be_trained():
    made = batch(["ttiit"], "g")
    route = (LayerRoute(), LayerRoute(Role.GONE))
    with pytest.raises(td.NeededRowError, match="GONE"):
        Planner(made.layout(), [route], [None], 64).plan()


def test_equal_roles_share_their_group():
    plan = planned({"g": td.HMGen((0, 2))}, batch(MIXED[0], "ggggg"))
    assert len(plan.spans) == 4
    assert plan.spans[0].groups[0] is plan.spans[2].groups[0]
    assert plan.spans[1].groups[0] is plan.spans[3].groups[0]


def test_splits_put_every_row_back():
    plan = planned({"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task")}, batch(*MIXED))
    for span in plan.spans:
        for group in span.groups:
            for split in filter(None, (group.split, group.context_split)):
                rows = torch.cat(split.rows)
                assert torch.equal(rows[split.inverse], torch.arange(len(rows)))
    assert plan.spans[0].groups[0].split is not None
