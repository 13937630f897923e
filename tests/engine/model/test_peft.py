"""PEFT's adapters, put on a dropped model and beneath the methods.

With `separate`, an adapter belongs to the text's projection: image rows go past both.
"""

import copy
import warnings

import pytest
import torch
from families import model as family
from helpers import MIXED, batch, close, dropped, llama, loss_of, perturbed
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

import tokendrop as td
from tokendrop.analysis.flops import counter
from tokendrop.analysis.spent import unknown_flops
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


def test_image_only_projections_that_peft_froze_are_said_once():
    inner = llama()
    drop = td.apply(inner, METHODS["separate"], multiple=4)
    model = adapted(inner).train()
    said = pytest.warns(td.NoEffectWarning, match=r"all 10 parameters .*tokendrop.layers.0.*are frozen, as get_peft")
    with said, drop.layout(MADE.layout()):
        _, grads = run(model)
    assert all(grad is not None for grad in grads.values())
    with drop.layout(MADE.layout()):
        run(model)


@pytest.mark.parametrize("way", ["frozen by hand", "adapters of their own", "one is trained", "no training"])
def test_nothing_is_said_where_that_is_meant(way):
    inner = llama()
    drop = td.apply(inner, METHODS["separate"], multiple=4)
    model = inner
    if way == "frozen by hand":
        drop.requires_grad_(False)
    elif way == "adapters of their own":
        model = get_peft_model(inner, LoraConfig(r=2, target_modules=["q_proj", "image.q"]))
    else:
        model = adapted(inner)
        next(drop.parameters()).requires_grad_(way == "one is trained")
    model.train()
    with torch.set_grad_enabled(way != "no training"), drop.layout(MADE.layout()):
        model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False)


def test_merging_an_adapter_gives_the_same_model():
    inner = llama()
    drop = td.apply(inner, METHODS["shared weights"], multiple=4)
    model = adapted(inner).eval()
    with drop.layout(MADE.layout()), torch.no_grad():
        before = model(input_ids=MADE.ids, attention_mask=MADE.mask).logits
        after = model.merge_and_unload()(input_ids=MADE.ids, attention_mask=MADE.mask).logits
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


VARIANTS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "bias": {"lora_bias": True},
    "dropout": {"lora_dropout": 0.5},
    "ia3": None,
}
FAMILIES = {
    "llama": (lambda: llama(attention_bias=True), ["q_proj", "k_proj", "v_proj"]),
    "phi3": (lambda: copy.deepcopy(family("phi3", "sdpa")), ["qkv_proj"]),
    "gpt2": (lambda: copy.deepcopy(family("gpt2", "sdpa")), ["c_attn"]),
    "gpt_neox": (lambda: copy.deepcopy(family("gpt_neox", "sdpa")), ["query_key_value"]),
}


def varied(model, names, variant):
    more = VARIANTS[variant]
    if more is None:
        config = IA3Config(target_modules=names, feedforward_modules=[], fan_in_fan_out=names == ["c_attn"])
    else:
        config = LoraConfig(r=2, target_modules=names, fan_in_fan_out=names == ["c_attn"], **more)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        made, generator = get_peft_model(model, config), torch.Generator().manual_seed(5)
    for name, p in made.named_parameters():
        if "lora_" in name or "ia3_" in name:
            p.data += torch.empty(p.shape).normal_(0, 0.2, generator=generator)
    return made.eval()


def logits(model, drop):
    with torch.no_grad(), drop.layout(MADE.layout()):
        return model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits[MADE.real]


def agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))


CASES = [("llama", variant) for variant in VARIANTS if variant != "bias"]
CASES += [("llama", "bias"), ("phi3", "lora"), ("phi3", "dora"), ("gpt2", "lora"), ("gpt_neox", "lora")]


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate:UserWarning")
@pytest.mark.parametrize("first", ["adapter", "apply"])
@pytest.mark.parametrize(
    ("name", "variant", "separate"),
    [*((*case, "shared") for case in CASES), ("llama", "lora", "none"), ("llama", "lora", "per-task")],
)
def test_merging_unmerging_and_disabling_change_nothing_else(name, variant, separate, first):
    methods = {"u": td.HiMix("1:", separate), "g": td.HMGen("1:3", separate)}
    make, targets = FAMILIES[name]
    model = make()
    if first == "adapter":
        model = varied(model, targets, variant)
        drop = perturbed(td.apply(model, methods, multiple=4))
    else:
        drop = perturbed(td.apply(model, methods, multiple=4))
        model = varied(model, targets, variant)
    sets = copy.deepcopy(drop.layers)
    plain, own = dropped(make(), methods, multiple=4)
    own.layers.load_state_dict(sets.state_dict())
    with model.disable_adapter():
        agree(logits(model, drop), logits(plain, own))
    expected = logits(model, drop)
    assert (expected - logits(plain, own)).abs().max() > 1e-2, "the adapter does something"
    model.merge_adapter()
    agree(logits(model, drop), expected)
    model.unmerge_adapter()
    agree(logits(model, drop), expected)
    merged = model.merge_and_unload()
    agree(logits(merged, drop), expected)
    for ours, theirs in zip(drop.layers.parameters(), sets.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("first", ["adapter", "apply"])
@pytest.mark.parametrize("name", FAMILIES)
def test_merging_before_anything_ran(name, first):
    make, targets = FAMILIES[name]
    runs = []
    for merge in (False, True):
        model = make()
        if first == "adapter":
            model = varied(model, targets, "lora")
            drop = td.apply(model, METHODS["separate"], multiple=4)
        else:
            drop = td.apply(model, METHODS["separate"], multiple=4)
            model = varied(model, targets, "lora")
        runs.append(logits(model.merge_and_unload() if merge else model, drop))
    agree(*runs)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_image_only_projections_begin_as_the_adapted_text(name, variant):
    """Step zero equals the model without them, whatever the adapter has learned by then."""
    make, targets = FAMILIES[name]
    runs = []
    for methods in (METHODS["separate"], METHODS["shared weights"]):
        model = varied(make(), targets, variant)
        drop = td.apply(model.train(), methods, multiple=4)  # in training, with dropout
        assert all(module.training for module in model.modules())
        runs.append(logits(model.eval(), drop))
    agree(*runs)


def test_remove_with_an_adapter_that_came_later():
    model, expected = llama(), varied(llama(), ["k_proj"], "lora")
    drop = td.apply(model, METHODS["separate"])
    model = varied(model, ["k_proj"], "lora")
    logits(model, drop)
    drop.remove()
    classes = [type(module) for module in model.modules()]
    assert classes == [type(module) for module in expected.modules()]
    assert torch.equal(model(MADE.ids).logits, expected(MADE.ids).logits)


def test_one_adapter_for_each_sample_is_refused_with_separate():
    model = varied(llama(), ["k_proj"], "lora")
    drop = td.apply(model, METHODS["separate"])
    names = ["default", "__base__"] * 3
    with pytest.raises(td.UnsupportedError, match="called with adapter_names, by sample"), drop.layout(MADE.layout()):
        model(input_ids=MADE.ids, attention_mask=MADE.mask, adapter_names=names[: len(MADE.ids)])


@torch.no_grad()
def test_one_adapter_for_each_sample_is_that_of_its_context_rows_too():
    model = adapted(llama())
    model.add_adapter("two", LoraConfig(r=2, target_modules=["k_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(6)
    for name, p in model.named_parameters():
        if "lora_" in name and ".two." in name:
            p.data.normal_(0, 0.3, generator=generator)
    model.eval()
    drop = td.apply(model, td.HiMix("1:"))
    ids, image, names = MADE.ids[1:2], MADE.image[1:2], ["default", "two"]  # the sample without padding
    with drop.layout(td.TokenLayout(image.repeat(2, 1))):
        both = model(input_ids=ids.repeat(2, 1), use_cache=False, adapter_names=names).logits
    for row, name in zip(both, names, strict=True):
        model.set_adapter(name)
        with drop.layout(td.TokenLayout(image)):
            alone = model(input_ids=ids, use_cache=False).logits[0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-4)


def test_something_else_in_the_place_of_a_linear_is_refused():
    model = llama()
    drop = td.apply(model, METHODS["separate"])
    model.model.layers[1].self_attn.k_proj = torch.nn.Sequential(torch.nn.Linear(32, 16))
    with pytest.raises(td.UnsupportedError, match="Sequential took the place of the linear that makes k"):
        drop.layout(MADE.layout()).__enter__()


@pytest.mark.parametrize("first", ["adapter", "apply"])
def test_an_adapter_file_without_trained_projections_is_said(first, tmp_path):
    model = llama()
    if first == "adapter":
        model = adapted(model)
    drop = td.apply(model, METHODS["separate"])
    model = model if first == "adapter" else adapted(model)
    drop.layers.requires_grad_(True)
    count = len(drop.layers.state_dict())
    with pytest.warns(td.NoEffectWarning, match=rf"PeftModel\w* is saved without the {count} parameters .* torch.save"):
        model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)  # said once
    torch.save(td.handle(model).state_dict(), tmp_path / "image.pt")
    again = llama()
    if first == "adapter":
        again = PeftModel.from_pretrained(again, tmp_path)
    back = td.apply(again, METHODS["separate"])
    again = again if first == "adapter" else PeftModel.from_pretrained(again, tmp_path)
    perturbed(back).load_state_dict(torch.load(tmp_path / "image.pt", weights_only=True))
    agree(logits(again, back), logits(model.eval(), drop))


def test_parts_that_an_adapter_file_leaves_out_are_said(tmp_path):
    """Norms and FFNs too, whose names are as long as those of adapters."""
    model = llama()
    drop = td.apply(model, td.MixtureOfTransformers(parts="norm+ffn"))
    model = adapted(model)
    drop.layers.requires_grad_(True)
    lost = [name for name, _ in drop.layers.named_parameters() if "lora_" not in name]
    assert lost
    with pytest.warns(td.NoEffectWarning, match=r"PeftModel\w* is saved without the \d+ parameters .*layers\.0\.image"):
        model.save_pretrained(tmp_path)


def test_projections_that_were_not_trained_are_not_missed(tmp_path):
    model = llama()
    drop = td.apply(model, METHODS["separate"])
    model = adapted(model)  # which froze them, as copies of the base model's
    with warnings.catch_warnings():
        warnings.simplefilter("error", td.NoEffectWarning)
        model.save_pretrained(tmp_path)
    again = llama()
    back = td.apply(again, METHODS["separate"])
    again = PeftModel.from_pretrained(again, tmp_path)
    agree(logits(again, back), logits(model.eval(), drop))


def test_modules_to_save_trains_and_keeps_them(tmp_path):
    names = ["image.q", "image.k", "image.v"]
    config = LoraConfig(r=2, target_modules=["q_proj", "k_proj"], modules_to_save=names)
    model = llama()
    drop = td.apply(model, METHODS["separate"], multiple=4)
    model = get_peft_model(model, config)
    trained = {name for name, p in model.named_parameters() if p.requires_grad and "tokendrop" in name}
    assert len(trained) == len(td.apply(llama(), METHODS["separate"]).layers.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with drop.layout(MADE.layout()):
        run(model)
    assert all(p.grad is not None for name, p in model.named_parameters() if name in trained)
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error", td.NoEffectWarning)
        model.save_pretrained(tmp_path)
    again = llama()
    back = td.apply(again, METHODS["separate"], multiple=4)
    again = PeftModel.from_pretrained(again, tmp_path).eval()
    expected = logits(model.eval(), drop)
    assert torch.equal(logits(again, back), expected)
    agree(logits(again.merge_and_unload(), back), expected)
    assert list(back.layers.state_dict()) == list(td.apply(llama(), METHODS["separate"]).layers.state_dict())


@pytest.mark.parametrize("kind", ["lora", "dora", "beneath experts"])
def test_adapters_are_no_experts(kind):
    """Whose linears lie in dicts, too; those of a list that are adapted are."""
    model = llama()
    if kind == "beneath experts":
        for layer in model.model.layers:
            layer.mlp.experts = torch.nn.ModuleList([torch.nn.Linear(32, 48)])
    made = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", use_dora=kind == "dora")).eval()
    drop = td.apply(made, METHODS["shared weights"])
    if kind == "beneath experts":
        assert "mlp.experts" in unknown_flops(drop)
        return
    assert unknown_flops(drop) is None
    if kind == "lora":
        with counter() as count, drop.disabled(), torch.no_grad():
            made(input_ids=MADE.ids[:1], use_cache=False)
        tokens = MADE.ids.shape[1]
        assert td.flops(made, td.HiMix(), text=tokens, image=0).dense == count.get_total_flops()
