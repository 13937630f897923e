"""Recipes meet their budget by `flops`, as mildly as they can, and say what they are.

Shape letters: none.
"""

import logging
import math
import re

import pytest
from helpers import config, llama
from torch import nn
from transformers import MixtralConfig

import tokendrop as td
from tokendrop.analysis import recipe as module

UNDERSTANDING, GENERATION = module.TASKS


def ratio(layers, method, text=64, image=576):
    return td.flops(config(layers=layers), method, text, image).ratio


@pytest.mark.parametrize(("depth", "budget"), [(2, 0.9), (3, 1), (3, 0.9), (6, 1), (6, 0.9), (6, 0.6), (32, 0.6)])
def test_generation_is_the_fewest_shallow_layers_that_meet_it(depth, budget):
    method = td.recipe(config(layers=depth), GENERATION, budget)
    assert isinstance(method, td.HMGen)
    shallow = {at for at, one in enumerate(method.route(depth)) if one.image is td.Role.BYPASS}
    assert {0, depth - 1}.isdisjoint(shallow) or (depth, shallow) == (2, {1})
    assert ratio(depth, method) <= budget
    if len(shallow) > 1:
        fewer = td.HMGen(tuple(sorted(shallow)[1:]))
        assert ratio(depth, fewer) > budget


@pytest.mark.parametrize(("depth", "budget"), [(2, 1.0), (2, 0.6), (6, 1.0), (6, 0.9), (6, 0.6), (32, 0.9)])
def test_understanding_is_himix_from_the_latest_layer_that_meets_it(depth, budget):
    method = td.recipe(config(layers=depth), UNDERSTANDING, budget)
    assert isinstance(method, td.HiMix)
    start = int(method.layers.removesuffix(":"))
    assert ratio(depth, method) <= budget
    assert start == depth - 1 or ratio(depth, td.HiMix(f"{start + 1}:")) > budget


def test_below_himix_come_hidrop_and_svd_prune():
    # With one key and value head for each query head, keys and values of an image are dear.
    wide = config(layers=32, num_key_value_heads=4)
    costs = {one: td.flops(wide, one, 64, 576).ratio for one in (td.HiMix(), td.HiDrop(), td.SVDPrune(0.0556))}
    himix, hidrop, few = costs.values()
    assert himix > hidrop > few
    found = td.recipe(wide, UNDERSTANDING, hidrop + 0.001)
    assert (found.entry, found.layers, found.exit) == (8, (10, 14, 16, 18), 24)
    assert [one.select.count(576) for one in found.route(32)[10:24] if one.select] == (
        [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6
    )
    assert td.recipe(wide, UNDERSTANDING, few + 0.001) == td.SVDPrune(0.0556)
    assert td.SVDPrune(0.0556).route(32)[0].select.count(576) == 32


@pytest.mark.parametrize("depth", range(1, 50))
def test_every_setting_fits_its_depth(depth):
    for task in module.TASKS:
        kinds = module._kinds(task, depth)
        for method in [method for kind in kinds for method in kind.methods]:
            route = method.route(depth)
            assert len(route) == depth
            if task == GENERATION:
                assert route[0].image is td.Role.ACTIVE
                assert depth < 3 or route[-1].image is td.Role.ACTIVE
    shallow = [sum(one.image is td.Role.BYPASS for one in method.route(depth)) for method in module._shallow(depth)]
    assert shallow == list(range(1, len(shallow) + 1))


def test_the_published_settings_come_out_at_their_depth():
    assert module._stages(32, (10, 14, 16, 18), 215) == td.HiDrop(keep=(0.3733, 0.0174, 0.0087, 0.0018))
    assert module._shallow(32)[2] == td.HMGen("13:18:2")
    assert module._shallow(32)[9] == td.HMGen("6:25:2")
    assert module._shallow(32)[-1] == td.HMGen("1:31")
    assert module._stages(6, (10, 14, 16, 18), 215) == td.HiDrop(2, (2, 3), (0.3733, 0.0018), 4)


@pytest.mark.parametrize("published", [(453, (10, 13, 16, 19)), (215, (10, 14, 16, 18)), (87, (10, 14, 16, 18))])
def test_hidrop_keeps_the_published_counts(published):
    """Shares of 576 tokens, of which HiDrop rounds the counts down."""
    first, layers = published
    route = module._stages(32, layers, first).route(32)
    assert [route[layer].select.count(576) for layer in layers] == [first, 10, 5, 1]


def test_an_impossible_budget_is_told_the_least():
    with pytest.raises(td.MethodError) as caught:
        td.recipe(config(layers=6), GENERATION, 0.1)
    least = math.ceil(1000 * ratio(6, td.HMGen("1:5"))) / 1000
    assert str(caught.value).startswith(
        f"budget=0.1: the least for generation with 64 text and 576 image tokens is {least}, by HMGen(shallow='1:5'"
    )
    assert td.recipe(config(layers=6), GENERATION, least) == td.HMGen("1:5")
    with pytest.raises(td.MethodError, match=r"budget=0\.01: the least for understanding .* by SVDPrune\(keep=0\.0278"):
        td.recipe(config(layers=6), UNDERSTANDING, 0.01)


def test_it_says_where_it_is_from_and_that_it_was_not_measured(caplog):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        method = td.recipe(llama(), UNDERSTANDING, 0.9, text=32, image=96)
    (said,) = [one.message for one in caplog.records if "tokendrop.recipe" in one.message]
    cost = td.flops(llama(), method, 32, 96).ratio
    assert said.startswith(f"tokendrop.recipe: {method} costs {cost:.2f} of the dense FLOPs of LlamaForCausalLM")
    assert "32 text and 96 image tokens" in said
    assert "arXiv 2606.01503" in said
    assert said.endswith("it was not measured on this model")
    assert "nobody measured it on the model" in td.recipe.__doc__


@pytest.mark.parametrize(
    ("shallow", "words"),
    [("2:3", "one shallow layer"), ("1:4:2", "alternating shallow layers"), ("1:5", "adjacent .* no figures")],
)
def test_it_says_which_of_hmgens_layers_are_the_papers(caplog, shallow, words):
    with caplog.at_level(logging.INFO, "lightning.pytorch"):
        assert td.recipe(config(layers=6), GENERATION, ratio(6, td.HMGen(shallow))) == td.HMGen(shallow)
    (said,) = [one.message for one in caplog.records if "tokendrop.recipe" in one.message]
    assert re.search(rf"those of arXiv 2606\.01503 \(HMGen\), .*{words}", said)


def test_what_cannot_be_had_is_left_out():
    # An attention that nobody knows cannot have CONTEXT.
    own, known = llama(), llama()
    own.config._attn_implementation, known.config._attn_implementation = "of_their_own", "flash_attention_2"
    assert isinstance(td.recipe(own, UNDERSTANDING, 0.5), td.HiDrop)
    assert isinstance(td.recipe(known, UNDERSTANDING, 0.5), td.HiMix)


def test_layers_of_unknown_cost_are_refused():
    experts = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    with pytest.raises(td.UnsupportedError, match=r"no recipe for generation in MixtralForCausalLM: .* experts"):
        td.recipe(experts, GENERATION, 0.9)


def test_a_single_layer_has_no_middle():
    with pytest.raises(td.UnsupportedError, match="its decoder has 1 layers, and some must stay full"):
        td.recipe(config(layers=1), GENERATION, 0.9)


def test_a_model_stays_as_it_is_dropped_or_not():
    model = llama()
    drop = td.apply(model, td.HMGen("1:3"))
    before = dict(nn.Module.named_parameters(model))
    assert td.recipe(model, GENERATION, 0.9) == td.recipe(config(), GENERATION, 0.9)
    assert model.tokendrop is drop
    assert all(one is before[name] for name, one in model.named_parameters())
