"""Ways people run a model: frozen parts, accumulated gradients, several models, hidden states asked for."""

import copy

import pytest
import torch
from families import FAMILIES, batch, model
from helpers import MIXED, close, dropped, engine_step, llama, perturbed, reference_step, same, step
from helpers import batch as written

import tokendrop as td
from tokendrop.errors import MissingLayoutError

MADE = written(*MIXED, side="left")
METHODS = {"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task")}


PARTS = {
    "llava": ["vision_tower", "language_model"],
    "qwen2_5_vl": ["visual", "language_model"],
    "qwen3_vl": ["visual", "language_model"],
    "smolvlm": ["vision_model", "text_model"],
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in PARTS.items() for part in parts])
def test_frozen_parts_get_no_gradient_and_change_no_other(name, part):
    module, data = copy.deepcopy(model(name, "sdpa")), batch(name, "left")
    drop = perturbed(td.apply(module, td.HiMix(f"{FAMILIES[name].first}:", "shared"), multiple=4))
    labels = data.trained([False, False])
    layout = td.TokenLayout(data.image, padding=data.real, labels=labels)

    def grads():
        module.zero_grad(set_to_none=True)
        with drop.layout(layout):
            module(**data.inputs, labels=labels).loss.backward()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    everything = grads()
    still = {one for one in everything if one.startswith(f"model.{part}.")}
    assert still
    for one, p in module.named_parameters():
        p.requires_grad_(not one.startswith(f"model.{part}."))
    rest = grads()
    assert rest.keys() == everything.keys() - still
    assert any(one.startswith("tokendrop.") for one in rest)
    for one, grad in rest.items():
        torch.testing.assert_close(grad, everything[one], rtol=1e-4, atol=1e-6)


def test_accumulated_gradients_are_the_sum():
    base, parts = llama(), [written(*MIXED, side=side, seed=seed) for seed, side in enumerate(["left", "right"])]
    one, drop = dropped(base, METHODS, multiple=4)
    apart = [engine_step(one, drop, part)[1] for part in parts]
    for part in parts:
        with drop.layout(part.layout()):
            logits = one(input_ids=part.ids, attention_mask=part.mask, use_cache=False).logits
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), part.labels[:, 1:].flatten(), ignore_index=-100, reduction="sum"
            ).backward()
    for name, p in one.named_parameters():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, apart[0][name] + apart[1][name], rtol=1e-5, atol=1e-5)


def test_two_models_with_their_own_methods_and_layouts():
    bases = [llama(seed=0), llama(seed=1)]
    methods = [METHODS, {"u": td.Drop("0:2", 0.5), "g": None}]
    pairs = [dropped(base, one, multiple=4) for base, one in zip(bases, methods, strict=True)]
    alone = [engine_step(module, drop, MADE) for module, drop in pairs]
    (first, one), (second, other) = pairs
    with one.layout(MADE.layout()):
        with pytest.raises(MissingLayoutError):
            second(MADE.ids)
        with other.layout(MADE.layout(), step=(0, 0)):
            assert torch.equal(first(MADE.ids, attention_mask=MADE.mask, use_cache=False).logits, alone[0][0])
            assert torch.equal(second(MADE.ids, attention_mask=MADE.mask, use_cache=False).logits, alone[1][0])
        with other.disabled():
            assert same(step(second, MADE), step(bases[1], MADE))


def test_a_dropped_student_and_its_dense_teacher_in_one_step():
    student, drop = dropped(llama(seed=0), METHODS, multiple=4)
    teacher = llama(seed=1)
    with drop.layout(MADE.layout()):
        target = teacher(MADE.ids, attention_mask=MADE.mask).logits.detach()
        found = step(student, MADE)
    assert close(found, reference_step(llama(seed=0), METHODS, drop, MADE), MADE.real, 1e-5)
    assert torch.equal(target, llama(seed=1)(MADE.ids, attention_mask=MADE.mask).logits)


def test_hidden_states_outside_a_range_are_whole_and_inside_compact():
    module, drop = dropped(llama(), {"u": td.HiMix("2:"), "g": td.HiMix("2:")}, multiple=4)
    labels = MADE.labels.masked_fill(MADE.image.roll(1, 1), -100)
    with drop.layout(MADE.layout(labels=labels)) as plan:
        rows = sum(len(group.samples) * group.size for group in plan.spans[-1].groups)
        out = module(MADE.ids, attention_mask=MADE.mask, use_cache=False, output_hidden_states=True)
    assert [one.shape[:2] for one in out.hidden_states[:3]] == [MADE.ids.shape] * 3
    assert out.hidden_states[3].shape[:2].numel() == rows < MADE.ids.numel()
    # The last is the one behind the final norm, which is whole.
    assert out.hidden_states[-1].shape[:2] == MADE.ids.shape
