"""Attention allocation equals what the eager model's probabilities say, in every family.

Shape letters: B batch, T tokens, H heads, S segments.
"""

import collections
import copy
import dataclasses
import math
from dataclasses import replace

import families
import pytest
import torch
from helpers import batch, llama, snapshot

import tokendrop as td
from tokendrop.analysis import attention_seen as seen_by
from tokendrop.analysis.allocation import SEGMENTS, borders, of_all, segments_of
from tokendrop.analysis.allocation_report import share_table
from tokendrop.layout import Segment

BASE = llama(spread=0.2)
MADE = batch(["ttiiitttt", "tiittiit", "ttttt", "tttiii"], "uudg", side="left")


def run(model):
    return lambda made: model(made.ids, attention_mask=made.mask, use_cache=False)


def probabilities(made):
    """What the untouched eager model returns, for each layer (B, H, T, T)."""
    with torch.no_grad():
        model = llama("eager", spread=0.2)
        return model(made.ids, attention_mask=made.mask, use_cache=False, output_attentions=True).attentions


def by_hand(attentions, made, segments, counted):
    """Alpha by the paper's formula, in Python's own loops: task -> layer -> segment."""
    found = {}
    for task in dict.fromkeys(made.tasks):
        layers = []
        for seen in attentions:
            sums, rows = [0.0] * len(SEGMENTS), 0
            for sample, name in enumerate(made.tasks):
                for i in range(seen.shape[2]) if name == task else ():
                    if counted[sample, i]:
                        rows += 1
                        for j in range(seen.shape[3]):
                            sums[segments[sample, j]] += seen[sample, :, i, j].sum().item()
            layers.append([one / (rows * seen.shape[1]) for one in sums])
        found[task] = layers
    return found


@pytest.mark.parametrize("rows", ["all", "output"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("chunk", [1, 4, 256])
def test_it_is_the_papers_formula(rows, attention, chunk, monkeypatch):
    monkeypatch.setattr(seen_by, "CHUNK", chunk)
    made = batch(["ttiiitttt", "tiittiit", "tttiii"], "uug", side="left")
    model = llama(attention, spread=0.2)
    found = td.attention_allocation(model, [made], lambda one: one.layout(), rows, loss=run(model))
    trained = torch.zeros_like(made.image)
    trained[:, :-1] = made.labels[:, 1:] != -100
    counted = made.real if rows == "all" else trained
    expected = by_hand(probabilities(made), made, segments_of(made.layout()), counted)
    assert found.tasks == tuple(expected)
    assert found.segments == ("system", "image", "instruction", "output")
    for task, share in zip(found.tasks, found.share, strict=True):
        assert torch.allclose(share, torch.tensor(expected[task], dtype=torch.float64), atol=1e-6)
    assert torch.allclose(found.share.sum(-1), torch.ones(2, 4, dtype=torch.float64), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "attention", "padding"),
    [
        (name, *pair) for name in families.NAMES for pair in families.FAMILIES[name].pairs() if name != "falcon"
    ],  # its eager attention adds its biases twice, its sdpa once
)
def test_every_family_equals_its_eager_model(name, attention, padding):
    data = families.batch(name, padding)
    layout = td.TokenLayout(data.image, "u", padding=data.real)
    with torch.no_grad():
        # A copy: transformers leaves hooks on a model whose attention it was asked for.
        true = copy.deepcopy(families.model(name, "eager"))(**data.inputs, output_attentions=True).attentions
    into = torch.nn.functional.one_hot(segments_of(layout), len(SEGMENTS)).float()
    true = [one.masked_fill(~data.real[:, None, :, None], 0).sum(2) for one in true]
    expected = torch.stack([torch.einsum("bht,bts->hs", one, into) / data.real.sum() for one in true])
    model = copy.deepcopy(families.model(name, attention))
    found = td.attention_allocation(model, [data.inputs], lambda _: layout, heads=True)
    assert torch.allclose(found.heads[0].float(), expected, atol=1e-5)
    assert torch.equal(found.share, found.heads.mean(2))


def test_several_batches_are_one():
    one, two = batch(["ttiiitttt", "tiittiitt"], "uu"), batch(["tiiittttt"], "u", seed=3)
    whole = batch(["ttiiitttt", "tiittiitt", "tiiittttt"], "uuu")
    whole.ids = torch.cat([one.ids, two.ids])
    model = copy.deepcopy(BASE)
    apart, together = (
        td.attention_allocation(model, made, lambda given: given.layout(), loss=run(model))
        for made in ([one, two], [whole])
    )
    assert torch.allclose(apart.share, together.share, atol=1e-7)


def test_a_kernel_that_cannot_be_seen_is_run_as_sdpa():
    expected = td.attention_allocation(BASE, [MADE], lambda made: made.layout(), loss=run(BASE))
    model = copy.deepcopy(BASE)
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "flash_attention_2"
    found = td.attention_allocation(model, [MADE], lambda made: made.layout(), loss=run(model))
    assert torch.equal(found.share, expected.share)
    assert model.config._attn_implementation == "flash_attention_2"


def test_a_dropped_model_is_measured_dense():
    expected = td.attention_allocation(BASE, [MADE], lambda made: made.layout(), loss=run(BASE))
    model = copy.deepcopy(BASE)
    td.apply(model, {"u": td.HiMix(), "g": td.HMGen("1:3")})
    found = td.attention_allocation(model, [MADE], lambda made: made.layout(), loss=run(model))
    assert torch.equal(found.share, expected.share)


def test_nothing_is_left_on_the_model():
    model = copy.deepcopy(BASE).train()
    before, state = snapshot(model), torch.get_rng_state()
    td.attention_allocation(model, [MADE], lambda made: made.layout(), loss=run(model))

    def fails(made):
        torch.rand(3)
        model(made.ids)
        raise KeyError("user")

    with pytest.raises(KeyError, match="user"):
        td.attention_allocation(model, [MADE], lambda made: made.layout(), loss=fails)
    assert snapshot(model) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert torch.equal(run(model)(MADE).logits, run(BASE)(MADE).logits)


def test_an_exception_inside_a_layer_ends_the_watching():
    model = copy.deepcopy(BASE)
    before = snapshot(model)
    broken = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        td.attention_allocation(model, [MADE], lambda made: made.layout(), loss=run(model))
    broken.remove()
    assert len(torch.overrides._get_current_function_mode_stack()) == 0
    assert snapshot(model) == before


def test_memory_grows_with_a_chunk_of_rows(monkeypatch):
    monkeypatch.setattr(seen_by, "CHUNK", 8)
    sizes = []

    def sink(layer, start, seen):
        sizes.append(seen.shape)

    made = batch(["t" * 10 + "i" * 40 + "t" * 14], "u")
    with torch.no_grad(), seen_by.attention_seen(BASE.model.layers, 64, sink):
        run(BASE)(made)
    assert sizes == [(1, 4, 8, 64)] * (8 * 4)


@pytest.mark.parametrize("blocks", [1, 3, 8])
def test_heat_maps_are_means_of_blocks(blocks):
    made = batch(["ttiiitttt"], "u")
    labels = torch.full_like(made.labels, -100).index_fill(1, torch.tensor([7, 8]), 3)
    layout = made.layout(labels=labels)
    found = td.attention_allocation(BASE, [made], lambda _: layout, blocks=blocks, loss=run(BASE))
    seen = torch.stack([one[0].mean(0) for one in probabilities(made)])
    tokens = seen.shape[1]
    cut = [[t for t in range(tokens) if t * blocks // tokens == block] for block in range(blocks)]
    for layer in range(4):
        for i, rows in enumerate(cut):
            for j, columns in enumerate(cut):
                expected = seen[layer][rows][:, columns].mean()
                assert found.maps["u"].values[layer, i, j] == pytest.approx(expected.item(), abs=1e-6)
    assert [name for _, name in found.maps["u"].borders] == ["system", "image", "instruction", "output"]


def test_each_task_has_the_heat_map_of_its_first_sample():
    made = batch(["ttiiitttt", "tiittiitt", "tttiiittt", "ttttiittt"], "ugud")
    later = batch(["tttttiiit"] * 2, "gz", seed=5)
    found = td.attention_allocation(BASE, [made, later], lambda one: one.layout(), blocks=9, loss=run(BASE))
    assert found.maps.keys() == {"u", "g", "d", "z"}
    for task, (one, sample) in {"u": (made, 0), "g": (made, 1), "d": (made, 3), "z": (later, 1)}.items():
        seen = torch.stack([layer[sample].mean(0) for layer in probabilities(one)])
        assert torch.allclose(found.maps[task].values, seen, atol=1e-6)
    assert len([axes for axes in found.plot().axes if axes.images]) == 2 * 4


class Encoding(collections.UserDict):
    """A batch as processors return it: no dict, and moved by its own method."""

    moved = ()

    def to(self, device):
        self.moved = (*self.moved, device)
        return self


def test_batches_are_put_on_the_models_device():
    made = batch(["ttiiitttt"], "u")
    given = Encoding(input_ids=made.ids, attention_mask=made.mask)
    found = td.attention_allocation(BASE, [given], lambda _: made.layout())
    assert given.moved == (BASE.device,)
    assert torch.equal(
        found.share, td.attention_allocation(BASE, [made], lambda _: made.layout(), loss=run(BASE)).share
    )


def test_keys_that_are_ours_do_not_reach_the_model():
    made = batch(["ttiiitttt"], "u")
    inputs = {"input_ids": made.ids, "attention_mask": made.mask}
    ours = {"image_mask": made.image, "task": "u", "segments": torch.zeros_like(made.ids)}
    found = td.attention_allocation(BASE, [inputs | ours], lambda _: made.layout())
    assert torch.equal(found.share, td.attention_allocation(BASE, [inputs], lambda _: made.layout()).share)


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda made: run(BASE)(made) and run(BASE)(made), td.UnsupportedError, "layer 0 ran twice on one batch"),
        (lambda made: None, td.UnsupportedError, r"the layers \[0, 1, 2, 3\] did not run"),
        (lambda made: BASE(made.ids[:, :-1]), td.LayoutError, "layer 0's attention has 8 rows, and the layout 9"),
        (
            lambda made: BASE(made.ids.repeat(2, 1)),
            td.LayoutError,
            r"looks at 2 x 9 tokens, and the layout has \(1, 9\)",
        ),
        (None, td.LayoutTypeError, "a batch of Batch"),
        (lambda made, more: None, td.MethodError, r"loss: expected a function of \(batch\); found .*made, more"),
    ],
)
def test_a_run_that_is_not_that_of_the_layout_is_refused(loss, error, message):
    made = batch(["ttiiitttt"], "u")
    before = snapshot(BASE)
    with pytest.raises(error, match=message):
        td.attention_allocation(BASE, [made], lambda one: one.layout(), loss=loss)
    assert snapshot(BASE) == before


def test_every_task_has_the_map_of_its_first_sample():
    """Also one without a name, whose later batches do not replace it, and one that is never first in its batch."""
    made = [batch(["ttiiitttt", "tiittiitt"], tasks) for tasks in ("ug", "gg", "ug")]
    alone = td.attention_allocation(BASE, made[:1], lambda one: one.layout(), blocks=4, loss=run(BASE))
    every = td.attention_allocation(BASE, made, lambda one: one.layout(), blocks=4, loss=run(BASE))
    seen = [torch.stack([one[sample].mean(0) for one in probabilities(made[0])]) for sample in range(2)]
    for task, whole in zip("ug", seen, strict=True):
        # Blocks of nine tokens: 0-2, 3-4, 5-6, 7-8.
        assert every.maps[task].values[:, 3, 3] == pytest.approx(whole[:, 7:, 7:].mean((1, 2)), abs=1e-6)
        assert torch.equal(every.maps[task].values, alone.maps[task].values)
    others = [batch(["ttiiitttt"], "u"), batch(["tiittiitt"], "u")]
    nameless = [dataclasses.replace(one.layout(), task=None) for one in others]
    found = td.attention_allocation(
        BASE, list(zip(others, nameless, strict=True)), lambda pair: pair[1], blocks=4, loss=lambda p: run(BASE)(p[0])
    )
    first = torch.stack([one[0].mean(0) for one in probabilities(others[0])])
    assert found.maps["all"].values[:, 3, 3] == pytest.approx(first[:, 7:, 7:].mean((1, 2)), abs=1e-6)
    assert found.maps["all"].borders == borders(segments_of(nameless[0])[0], 4)


def test_borders_lie_where_a_segment_begins():
    assert borders(torch.tensor([0, 0, 1, 1, 3, 3, 3, 3]), 4) == ((0.0, "system"), (1.0, "image"), (2.0, "output"))


def test_segments_follow_from_images_and_labels():
    made = batch(["ttiiitttt", "ttttiiiii", "ttttttttt"], "ugd")
    labels = torch.full_like(made.labels, -100)
    labels[0, 7:], labels[1, 4:], labels[2, 6:] = 1, 2, 3
    said = ["".join("SIQO"[one] for one in row) for row in segments_of(made.layout(labels=labels)).tolist()]
    assert said == ["SSIIIQQOO", "QQQQOOOOO", "QQQQQQOOO"]
    own = torch.full_like(made.labels, int(Segment.SYSTEM))
    assert torch.equal(segments_of(made.layout(segments=own)), own)


def test_the_figure_stacks_every_task_and_layer():
    found = td.attention_allocation(BASE, [MADE], lambda made: made.layout(), blocks=4, loss=run(BASE))
    figure = found.plot()
    drawn = [axes for axes in figure.axes if axes.containers]
    assert [axes.get_title(loc="left") for axes in drawn] == list(found.tasks)
    for axes, share in zip(drawn, found.share, strict=True):
        heights = torch.tensor([[bar.get_height() for bar in bars] for bars in axes.containers], dtype=torch.float64)
        assert torch.allclose(heights, share.T)
        assert {bar.get_y() for bar in axes.containers[0]} == {0.0}
        tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]
        assert all(math.isclose(top, 1, rel_tol=1e-5) for top in tops)
    heat = {
        axes.get_title(loc="left"): axes.images[0].get_array() for axes in figure.axes if axes.images and axes.title
    }
    for task in found.tasks:
        for layer in (1, 3):
            values = heat[f"{task}, layer {layer}"]
            assert values.mask.tolist() == torch.ones(4, 4).triu(1).bool().tolist()
    assert len(td.attention_allocation(BASE, [MADE], lambda made: made.layout(), loss=run(BASE)).plot().axes) == 3


def test_an_output_of_image_tokens_is_called_the_tasks_own_image():
    made = batch(["ttiiitt", "tttiiii"], "ug")
    made.labels[0, :6], made.labels[1, 3:] = -100, made.ids[1, 3:]
    found = td.attention_allocation(BASE, [made], lambda made: made.layout(), blocks=4, loss=run(BASE))
    assert found.own_images == ("g",)
    said = {axes.get_title(loc="left"): {text.get_text() for text in axes.texts} for axes in found.plot().axes}
    assert {"own image", "output"} & said["g"] == {"own image"}
    assert {"own image", "output"} & said["u"] == {"output"}
    assert {"own image", "output"} & said["g, layer 3"] == {"own image"}
    table = share_table(found)
    rows = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert rows["g, layer 0"]["output"] == rows["u, layer 0"]["own image"] == "-"
    assert float(rows["g, layer 0"]["own image"]) > 0
    assert replace(found, own_images=()) != found
    assert of_all([found, replace(found, tasks=("u", "g"))]).own_images == ("g",)
    alone = td.attention_allocation(BASE, [batch(["ttiiitt"], "u")], lambda made: made.layout(), loss=run(BASE))
    assert share_table(alone).header == ("attention to", *alone.segments)


def test_it_is_plain_values():
    found = td.attention_allocation(BASE, [MADE], lambda made: made.layout(), loss=run(BASE)).to_dict()
    assert set(found["share"]) == {"u", "d", "g"}
    assert all(math.isclose(sum(layer), 1, rel_tol=1e-5) for layers in found["share"].values() for layer in layers)


def test_advice_is_that_of_the_advisor():
    made = [batch(["tt" + "i" * 12 + "tttt"] * 2, "uu"), batch(["tttt" + "i" * 12] * 2, "gg")]
    model = copy.deepcopy(BASE)

    def loss(one):
        logits = model(one.ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), one.labels[:, 1:].flatten())

    found = td.attention_allocation(model, made, lambda one: one.layout(task=one.tasks[0]), loss=loss)
    advice = found.advise(budget=0.7)
    assert set(advice.plans) == {"u", "g"}
    assert all(plan.flops_ratio <= 0.7 for plans in advice.plans.values() for plan in plans)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"rows": "some"}, td.MethodError, "rows='some'"),
        ({"batches": []}, td.LayoutError, "no row to count in 0 batches"),
        ({"rows": "output", "labels": None}, td.LayoutError, "give batches with labels"),
    ],
)
def test_bad_input(given, error, message):
    def layout(made):
        return made.layout(labels=given.get("labels", made.labels))

    with pytest.raises(error, match=message):
        td.attention_allocation(BASE, given.get("batches", [MADE]), layout, given.get("rows", "all"), loss=run(BASE))


def test_attention_that_cannot_be_seen_is_refused():
    model = copy.deepcopy(BASE)
    model.model.layers[1].forward = lambda hidden, **_: hidden
    with pytest.raises(td.UnsupportedError, match="layer 1 ran without"):
        td.attention_allocation(model, [MADE], lambda made: made.layout(), loss=run(model))
