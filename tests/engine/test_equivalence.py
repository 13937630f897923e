"""The engine equals the package's reference and the hand-written oracle, in logits and gradients."""

import copy

import pytest
import torch
from helpers import (
    MIXED,
    SIZES,
    batch,
    checkpointed,
    close,
    dropped,
    engine_step,
    llama,
    loss_of,
    oracle_step,
    reference_step,
    same,
    step,
)
from hypothesis import given
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.engine.reference import reference

# Labels are optional, and left out on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:the layout has no labels:tokendrop.LayoutWarning")
BASES = {
    ("sdpa", torch.float32): llama(spread=0.2),
    ("eager", torch.float32): llama("eager", spread=0.2),
    ("sdpa", torch.float64): llama(dtype=torch.float64),
}
RANGES = st.sampled_from([":", "1:", "1:3", "-2:", "::2", "1:-1", (0, 3), (2,), [1, 2]])
SEPARATE = st.sampled_from(["none", "shared", "per-task"])
RUN = st.tuples(st.sampled_from("ti"), st.integers(1, 6)).map(lambda run: run[0] * run[1])
SAMPLE = st.lists(RUN, min_size=1, max_size=5).map("".join)
METHODS = st.fixed_dictionaries(
    {"u": st.builds(td.HiMix, RANGES, SEPARATE), "g": st.builds(td.HMGen, RANGES, SEPARATE), "d": st.none()}
)


@st.composite
def batches(draw):
    samples = draw(st.lists(SAMPLE, min_size=1, max_size=4))
    tasks = draw(st.lists(st.sampled_from("uugd"), min_size=len(samples), max_size=len(samples)))
    if draw(st.booleans()):  # no padding at all: the decoder then makes no mask
        longest = max(map(len, samples))
        samples = [sample.ljust(longest, "t") for sample in samples]
    return batch(samples, tasks, side=draw(st.sampled_from(["left", "right"])), seed=draw(st.integers(0, 99)))


def check(base, methods, made, tolerance, multiple=4, checkpoint=False, hints=True):
    """Compare the three; `hints` is whether the layout knows labels and padding, which are optional."""
    model, drop = dropped(base, methods, multiple=multiple)
    if checkpoint:
        checkpointed(model)
    layout = made.layout() if hints else made.layout(labels=None, padding=None)
    ours = engine_step(model, drop, made, layout)
    reference, oracle = reference_step(base, methods, drop, made), oracle_step(base, methods, drop, made)
    assert close(reference, oracle, made.real, tolerance), "the reference differs from the oracle"
    assert close(ours, reference, made.real, tolerance), "the engine differs from the reference"
    assert close(ours, oracle, made.real, tolerance), "the engine differs from the oracle"


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@given(batches(), METHODS, st.sampled_from([1, 4, 64]), st.booleans(), st.booleans())
def test_float32(attn, made, methods, multiple, checkpoint, hints):
    check(BASES[attn, torch.float32], methods, made, 1e-5, multiple, checkpoint, hints)


@given(batches(), METHODS, st.sampled_from([1, 4, 64]), st.booleans(), st.booleans())
def test_float64_gradients(made, methods, multiple, checkpoint, hints):
    check(BASES["sdpa", torch.float64], methods, made, 1e-9, multiple, checkpoint, hints)


@pytest.mark.parametrize("separate", ["none", "shared", "per-task"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_batch(side, checkpoint, separate):
    methods = {"u": td.HiMix("1:", separate), "g": td.HMGen("1:3:2", separate)}
    check(BASES["sdpa", torch.float64], methods, batch(*MIXED, side), 1e-9, checkpoint=checkpoint)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("multiple", [1, 4, 64])
def test_counts_that_are_rounded_up(attn, multiple):
    """Only from 64 tokens on do counts go up to more than themselves."""
    samples = ["ttt" + "i" * 37 + "t" * 11 + "i" * 9 + "t" * 8, "t" * 5 + "i" * 21 + "t" * 13, "i" * 30 + "t" * 33]
    methods = {"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task")}
    for side, tasks in (("left", "ugu"), ("right", "uuu"), ("right", "ggg")):
        check(BASES[attn, torch.float32], methods, batch(samples, tasks, side), 1e-5, multiple)


@pytest.mark.parametrize("sample", ["i", "t", "iiii", "tttt", "it", "ti", "tiiit", "iitii", "ititititit"])
@pytest.mark.parametrize("task", ["u", "g"])
def test_edges_of_one_sample(task, sample):
    made = batch([sample], [task])
    methods = {"u": td.HiMix(":", "per-task"), "g": td.HMGen(":", "per-task")}
    check(BASES["sdpa", torch.float64], methods, made, 1e-9)
    check(BASES["eager", torch.float32], methods, made, 1e-5)


@pytest.mark.parametrize("layers", [":", "1:", "1:3"])
@pytest.mark.parametrize("kind", [td.HiMix, td.HMGen])
def test_one_method_for_whatever_task(kind, layers):
    """Without task names, with the one task's name, and with any other name."""
    method, base = kind(layers, separate="shared"), BASES["sdpa", torch.float64]
    made = batch(MIXED[0], "uuuuu", "left")
    model, drop = dropped(base, method)
    expected = oracle_step(base, {"u": method}, drop, made)
    for task in (None, "u", "whatever"):
        assert close(engine_step(model, drop, made, made.layout(task=task)), expected, made.real, 1e-9)


@pytest.mark.parametrize("config", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"rope_theta": 100.0}])
def test_other_decoders(config):
    base = llama(dtype=torch.float64, **config)
    sizes = SIZES._replace(kv_heads=config.get("num_key_value_heads", 2), theta=config.get("rope_theta", 10000.0))
    methods = {"u": td.HiMix(":", "shared"), "g": td.HMGen("1:3", "shared")}
    made = batch(*MIXED, side="left")
    model, drop = dropped(base, methods)
    assert close(engine_step(model, drop, made), oracle_step(base, methods, drop, made, sizes), made.real, 1e-9)


def test_biases_of_projections():
    base, made = llama(dtype=torch.float64, attention_bias=True), batch(*MIXED, side="left")
    methods = {"u": td.HiMix(":", "shared"), "g": td.HMGen("1:3", "per-task")}
    model, drop = dropped(base, methods)
    assert close(engine_step(model, drop, made), reference_step(base, methods, drop, made), made.real, 1e-9)


@pytest.mark.parametrize(("strength", "first"), [(0.5, 2), (0.25, 3), (1.0, 0)])
def test_schedule_switches_on_the_deep_end(strength, first):
    base, made = BASES["sdpa", torch.float64], batch(MIXED[0], "uuuuu")
    model, drop = dropped(base, td.HiMix())
    drop.strength = strength
    expected = oracle_step(base, {"u": td.HiMix(f"{first}:")}, drop, made)
    assert close(engine_step(model, drop, made), expected, made.real, 1e-9)


def test_a_routed_model_differs_from_the_dense_one():
    """What the comparisons above would miss if the roles changed nothing."""
    base, made = BASES["sdpa", torch.float32], batch(*MIXED)
    for methods in ({"u": td.HiMix("3:"), "g": None}, {"u": None, "g": td.HMGen("2:3")}):
        model, drop = dropped(base, methods)
        assert not close(engine_step(model, drop, made), step(base, made), made.real, 1e-2)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("separate", ["none", "per-task"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_nothing_dropped_is_bit_identical(side, separate, checkpoint, attn):
    base, made = BASES[attn, torch.float32], batch(MIXED[0], "ddddd", side)
    methods = {"u": td.HiMix("1:", separate), "g": td.HMGen("1:3", separate), "d": None}
    model, drop = dropped(base, methods)
    if checkpoint:
        checkpointed(model)
    text = batch(["ttttttt", "ttt", "tttttttttt"], "ugd", side)
    expected, expected_text = step(base, made), step(base, text)
    assert same(engine_step(model, drop, made), expected)
    assert same(engine_step(model, drop, text), expected_text)
    with drop.disabled():
        assert same(step(model, made), expected)
    drop.remove()
    assert same(step(model, made), expected)


def test_strength_zero_without_separate_is_bit_identical():
    base, made = BASES["sdpa", torch.float32], batch(*MIXED)
    model, drop = dropped(base, {"u": td.HiMix(), "g": td.HMGen("1:3")})
    drop.strength = 0.0
    assert same(engine_step(model, drop, made), step(base, made))


MADE = batch(*MIXED, side="left")
SPLIT = {"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task"), "d": None}


def causal():
    tokens = MADE.ids.shape[1]
    seen = torch.ones(tokens, tokens, dtype=torch.bool).tril() & MADE.real[:, None, None, :]
    return seen | torch.eye(tokens, dtype=torch.bool)


ARGUMENTS = {
    "positions of each sample": {"position_ids": (MADE.real.long().cumsum(1) - 1).clamp(min=0)},
    "positions with gaps": {"position_ids": torch.arange(MADE.ids.shape[1])[None] * 3},
    "bool mask": {"attention_mask": causal()},
    "additive mask": {"attention_mask": torch.zeros(causal().shape).masked_fill(~causal(), -3e38)},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_from_outside(name):
    def run(model):
        given = {"attention_mask": MADE.mask, "use_cache": False} | ARGUMENTS[name]
        logits = model(input_ids=MADE.ids, **given).logits
        loss_of(logits, MADE.labels).backward()
        return logits.detach(), {name: p.grad for name, p in model.named_parameters()}

    model, drop = dropped(BASES["sdpa", torch.float32], SPLIT)
    dense = copy.deepcopy(BASES["sdpa", torch.float32])
    methods, sets = {task: method for task, method in SPLIT.items() if method}, copy.deepcopy(drop.layers)
    with reference(dense, methods, MADE.layout(), sets, drop.names):
        expected = run(dense)
    with drop.layout(MADE.layout()):
        assert close(run(model), expected, MADE.real, 1e-5)


def test_image_flags_on_padding_change_nothing():
    model, drop = dropped(BASES["sdpa", torch.float32], SPLIT)
    flagged = engine_step(model, drop, MADE, MADE.layout(image=MADE.image | ~MADE.real))
    assert close(flagged, engine_step(model, drop, MADE), MADE.real, 1e-5)


def test_evaluation_without_gradients():
    model, drop = dropped(BASES["sdpa", torch.float32], SPLIT)
    expected, _ = engine_step(model, drop, MADE)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode(), drop.layout(MADE.layout()):
            assert torch.equal(model(MADE.ids, attention_mask=MADE.mask).logits, expected)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_backward_after_the_layout_and_other_forwards(checkpoint):
    model, drop = dropped(BASES["sdpa", torch.float32], SPLIT)
    if checkpoint:
        checkpointed(model)
    expected = engine_step(model, drop, MADE)
    with drop.layout(MADE.layout()):
        logits = model(MADE.ids, attention_mask=MADE.mask, use_cache=False).logits
    for layout in (MADE.layout(task="d"), MADE.layout(task="g")):
        with drop.layout(layout):
            model(MADE.ids, attention_mask=MADE.mask, use_cache=False)
    loss_of(logits, MADE.labels).backward()
    assert same((logits.detach(), {name: p.grad for name, p in model.named_parameters()}), expected)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_two_forwards_before_one_backward(checkpoint):
    model, drop = dropped(BASES["sdpa", torch.float32], SPLIT)
    if checkpoint:
        checkpointed(model)
    _, expected = engine_step(model, drop, MADE)
    with drop.layout(MADE.layout()):
        losses = [
            loss_of(model(MADE.ids, attention_mask=MADE.mask, use_cache=False).logits, MADE.labels) for _ in range(2)
        ]
        sum(losses).backward()
    assert all(torch.allclose(p.grad, 2 * expected[n], rtol=1e-4, atol=1e-4) for n, p in model.named_parameters())


@pytest.mark.parametrize("before", [False, True])
def test_checkpointing_before_or_after_apply(before):
    expected = engine_step(*dropped(BASES["sdpa", torch.float32], SPLIT), MADE)
    model = checkpointed(copy.deepcopy(BASES["sdpa", torch.float32])) if before else BASES["sdpa", torch.float32]
    model, drop = dropped(model, SPLIT)
    assert same(engine_step(model if before else checkpointed(model), drop, MADE), expected)


def test_bfloat16():
    base = llama(dtype=torch.bfloat16, spread=0.2)
    model, drop = dropped(base, SPLIT)
    logits, grads = engine_step(model, drop, MADE)
    assert logits.dtype == torch.bfloat16
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    exact, _ = engine_step(*dropped(BASES["sdpa", torch.float32], SPLIT), MADE)
    assert (logits - exact)[MADE.real].abs().max() < 0.2 * exact.abs().max()
