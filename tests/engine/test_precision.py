"""Autocast and half-precision weights: as near to double precision as the untouched model is.

Shape letters: B batch, T tokens.
"""

import pytest
import torch
from device import DEVICE
from helpers import MIXED, batch, dropped, llama, loss_of, reference_step

import tokendrop as td

MADE = batch(*MIXED, side="left")
METHODS = {
    "himix": {"u": td.HiMix("1:"), "g": None},
    "hmgen": {"u": None, "g": td.HMGen("1:3")},
    "separate": {"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task")},
    "drop": {"u": td.Drop("1:", 0.5, "uniform", "gone"), "g": td.Drop("0:2", 0.5, "uniform")},
}
# Of the largest value: a few roundings of each type.
TOLERANCES = {torch.bfloat16: 0.08, torch.float16: 0.01}


def run(model, drop, autocast):
    with drop.layout(MADE.layout(), step=(0, 0)):
        with torch.autocast(DEVICE.type, autocast, enabled=autocast is not None):
            logits = model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits
        loss_of(logits.float(), MADE.labels).backward()
    grads = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return logits.detach(), grads


def near(found, expected, tolerance):
    real = MADE.real
    error = (found[0].double() - expected[0])[real].abs().max() / expected[0][real].abs().max()
    pairs = [(found[1][name], grad) for name, grad in expected[1].items() if grad is not None]
    apart = sum(((a.double() - b) ** 2).sum() for a, b in pairs)
    return error < tolerance and (apart / sum((b**2).sum() for _, b in pairs)).sqrt() < 2 * tolerance


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", METHODS)
def test_autocast(name, dtype, attention):
    model, drop = dropped(llama(attention, spread=0.15), METHODS[name], multiple=4)
    # transformers' eager attention takes its softmax in single precision, whose range the mask of a double exceeds.
    double, handle = dropped(llama("sdpa", torch.float64, spread=0.15), METHODS[name], multiple=4)
    expected = run(double, handle, None)
    with drop.disabled():
        dense = model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits
    found = run(model, drop, dtype)
    assert found[0].dtype == dtype
    assert all(grad.dtype == torch.float32 for grad in found[1].values() if grad is not None)
    assert near(found, expected, TOLERANCES[dtype])
    # Another method would be seen.
    real = MADE.real
    assert (dense - expected[0])[real].abs().max() > 3 * TOLERANCES[dtype] * expected[0][real].abs().max()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("name", METHODS)
def test_weights_of_half_precision(name, dtype):
    base = llama(dtype=dtype, spread=0.15)
    model, drop = dropped(base, METHODS[name], multiple=4)
    found = run(model, drop, None)
    assert found[0].dtype == dtype
    assert all(grad.dtype == dtype for grad in found[1].values() if grad is not None)
    # The reference on the same rounded weights, in double precision.
    _, handle = dropped(base.double(), METHODS[name], multiple=4)
    handle.layers.load_state_dict(drop.layers.state_dict())
    assert near(found, reference_step(base, METHODS[name], handle, MADE), TOLERANCES[dtype])
