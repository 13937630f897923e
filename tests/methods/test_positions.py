"""positions="renumber": tokens that stay take the positions of those that left.

What it is, the peers' recorded numbers say, in test_peers.py. Shape letters: B batch, T tokens.
"""

import copy

import families
import pytest
import torch
from helpers import batch, close, dropped, engine_step, llama, reference_step
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.engine.reference import reference

EXACT = llama(dtype=torch.float64)
SAMPLES = st.lists(st.text("ti", min_size=2, max_size=9), min_size=1, max_size=3)
METHODS = st.sampled_from(
    [
        td.PyramidDrop((1, 2, 3), (0.8, 0.5, 0.3), "renumber"),
        td.PyramidDrop((0, 2), (0.5, 1), "renumber"),
        td.DuetVLM((1, 3), (0.5, 0), positions="renumber"),
    ]
)


@given(
    SAMPLES, METHODS, st.sampled_from(["left", "right"]), st.sampled_from([None, "keep", "bypass"]), st.integers(0, 9)
)
@settings(max_examples=10)
def test_engine_equals_reference(samples, method, side, other, seed):
    """Alone, and beside tasks whose positions stay and whose layers cut the spans."""
    others = {None: method, "keep": td.PyramidDrop((2,), (0.5,)), "bypass": td.HMGen("1:3")}
    methods = {"u": method, "g": others[other]} if other else {"u": method}
    made = batch(samples, "uguu"[: len(samples)] if other == "bypass" else "uuu"[: len(samples)], side, seed)
    model, drop = dropped(EXACT, methods, multiple=4)
    assert close(engine_step(model, drop, made), reference_step(EXACT, methods, drop, made), made.real, 1e-9)


@pytest.mark.parametrize(
    "name", ["qwen3", "gemma3", "phi3", "gpt_neox", "falcon_7b", "deepseek_v3", "llava", "mixtral"]
)
def test_families_equal_the_reference(name):
    base, data = families.model(name), families.batch(name, "left")
    methods = {"u": td.PyramidDrop((1, 2, 4), (0.7, 0.5, 0.3), "renumber")}
    layout = td.TokenLayout(data.image, "u", padding=data.real, labels=data.trained([False, False]))
    found = []
    for way in ("engine", "reference"):
        module = copy.deepcopy(base)
        entered = reference(module, methods, layout)
        if way == "engine":
            entered = td.apply(module, methods, multiple=4).layout(layout, step=(0, 0))
        with entered:
            found.append(module(**data.inputs, use_cache=False).logits[data.real])
        found[-1].float().logsumexp(-1).sum().backward()
        found.append({name: p.grad for name, p in module.named_parameters() if p.grad is not None})
    logits, grads, expected, theirs = found
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    scale = max(grad.abs().max() for grad in theirs.values())
    assert all((grads[name] - grad).abs().max() <= 1e-4 * scale for name, grad in theirs.items())


def test_kept_positions_are_others():
    made, module = batch(["ttiiiiiittt"], "u"), llama()
    found = []
    for positions in ("keep", "renumber"):
        drop = td.apply(module, td.PyramidDrop((1,), (0.5,), positions))
        with drop.layout(made.layout()), torch.no_grad():
            found.append(module(made.ids, use_cache=False).logits)
        drop.remove()
    assert not torch.allclose(*found, atol=1e-2)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_mrope_is_refused(name):
    base = families.model(name)
    with pytest.raises(td.UnsupportedError, match=r"M-RoPE.*positions='keep'"):
        td.apply(base, td.PyramidDrop((2,), (0.5,), "renumber"))
    assert not hasattr(base, "tokendrop")


@pytest.mark.parametrize("name", ["gpt2", "falcon"])
def test_learned_positions_and_biases_are_refused(name):
    module, data = copy.deepcopy(families.model(name)).eval(), families.batch(name, None)
    drop = td.apply(module, td.PyramidDrop((2,), (0.5,), "renumber"))
    with (
        pytest.raises(td.UnsupportedError, match=r"learned positions and linear biases.*positions='keep'"),
        drop.layout(td.TokenLayout(data.image)),
        torch.no_grad(),
    ):
        module(**data.inputs, use_cache=False)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_second_turn_of_several_tokens(side):
    """Fed at once, one by one, or as one sequence without a cache."""
    method, made = td.PyramidDrop((1, 2), (0.5, 0.25), "renumber"), batch(["ttiiiiiitt", "tiiiit"], "uu", side)
    model, drop = dropped(EXACT, method, multiple=1)
    new = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    layout, found = td.TokenLayout(made.image, padding=made.real), []
    mask = torch.cat([made.real, torch.ones_like(new, dtype=torch.bool)], 1).long()
    at = (mask.cumsum(1) - 1).clamp(min=0)
    for parts in ([4], [1, 1, 1, 1], [1, 3]):
        with drop.layout(layout), torch.no_grad():
            out = model(made.ids, attention_mask=mask[:, :10], position_ids=at[:, :10], use_cache=True)
            start, logits = 10, []
            for one in new.split(parts, 1):
                stop = start + one.shape[1]
                more = {"attention_mask": mask[:, :stop], "position_ids": at[:, start:stop]}
                logits.append(model(one, past_key_values=out.past_key_values, **more).logits)
                start = stop
        found.append(torch.cat(logits, 1))
    with drop.layout(layout), torch.no_grad():
        whole = torch.cat([made.ids, new], 1)
        found.append(model(whole, attention_mask=mask, position_ids=at, use_cache=False).logits[:, 10:])
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-6, atol=1e-6)


def test_tasks_that_do_and_do_not_generate_apart():
    methods = {"u": td.PyramidDrop((1,), (0.5,), "renumber"), "g": td.PyramidDrop((1,), (0.5,))}
    made, (model, drop) = batch(["tiiiitt", "tiiiitt"], "ug"), dropped(llama(), methods)
    with drop.layout(td.TokenLayout(made.image, ("u", "g"))):
        with pytest.raises(td.UnsupportedError, match="renumbers those of others"):
            model.generate(made.ids, max_new_tokens=2, do_sample=False)
        assert model.generate(made.ids, max_new_tokens=2, do_sample=False, use_cache=False).shape == (2, 9)
