"""PEFT's LoRA, put on a dropped model and beneath the methods."""

import copy

import pytest
import torch
from helpers import MIXED, batch, close, llama, loss_of, perturbed
from peft import LoraConfig, get_peft_model

import tokendrop as td
from tokendrop.engine.reference import reference

# PEFT 0.21 still asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
MADE = batch(*MIXED, side="left")
METHODS = {
    "shared weights": {"u": td.HiMix("1:"), "g": td.HMGen("1:3")},
    "separate": {"u": td.HiMix("1:", "shared"), "g": td.HMGen("1:3", "shared")},
    "drop": {"u": td.Drop("1:", 0.5, then="gone"), "g": td.Drop("0:2", 0.5)},
}


def adapted(model):
    """With LoRA on what attention and the MLP project with, both factors far from zero."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj"]
    made = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=names, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(5)
    for name, p in made.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.3, generator=generator)
    return made


def run(model):
    logits = model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits
    loss_of(logits, MADE.labels).backward()
    return logits.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def expected(base, methods, drop):
    """The dense reference of the adapted model, image-only projections those of `drop`."""
    model, sets = adapted(copy.deepcopy(base)), copy.deepcopy(drop.layers)
    with reference(model, methods, MADE.layout(), sets, drop.names):
        return run(model)


def check(model, drop, base, methods):
    with drop.layout(MADE.layout(), step=(0, 0)):
        logits, grads = run(model)
    wanted = expected(base, methods, drop)
    lora = {name.partition("base_model.")[2]: grad for name, grad in grads.items() if "lora_" in name}
    theirs = {name.partition("base_model.")[2]: grad for name, grad in wanted[1].items() if "lora_" in name}
    assert len(theirs) == 4 * 5 * 2
    assert close((logits, lora), (wanted[0], theirs), MADE.real, 1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_methods_on_an_adapted_model(name):
    base = llama()
    model = adapted(copy.deepcopy(base))
    drop = perturbed(td.apply(model, METHODS[name], multiple=4))
    check(model, drop, base, METHODS[name])
    drop.remove()
    assert all("tokendrop" not in key for key in model.state_dict())


@pytest.mark.parametrize("name", ["shared weights", "drop"])
def test_an_adapter_on_a_dropped_model(name):
    base = llama()
    inner = copy.deepcopy(base)
    drop = td.apply(inner, METHODS[name], multiple=4)
    model = adapted(inner)
    assert td.handle(model) is drop
    check(model, drop, base, METHODS[name])


def test_an_adapter_on_image_only_projections_too():
    # PEFT freezes them with the rest of the base model; they are linears it may adapt by name, like any other.
    inner = llama()
    drop = td.apply(inner, METHODS["separate"], multiple=4)
    model = adapted(inner)
    assert not any(p.requires_grad for p in drop.layers.parameters())
    with drop.layout(MADE.layout()):
        _, grads = run(model)
    assert all(grad is not None for grad in grads.values())


def test_merging_an_adapter_gives_the_same_model():
    inner = llama()
    drop = td.apply(inner, METHODS["shared weights"], multiple=4)
    model = adapted(inner).eval()
    with drop.layout(MADE.layout()), torch.no_grad():
        before = model(input_ids=MADE.ids, attention_mask=MADE.mask).logits
        after = model.merge_and_unload()(input_ids=MADE.ids, attention_mask=MADE.mask).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
