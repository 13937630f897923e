"""Linears whose weight is packed: sizes, added parameters and roles are those of the weight that they multiply with.

Shape letters: B batch, T tokens, D hidden.
"""

import copy

import bitsandbytes as bnb
import pytest
import torch
from helpers import LAYERS, MIXED, VOCABULARY, batch, close, loss_of, snapshot
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

import tokendrop as td
from tokendrop.engine.model.decoder import layer_spec
from tokendrop.engine.reference import reference

# PEFT 0.21 still asks transformers by the old name.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
MADE = batch(*MIXED, side="left")
METHODS = {
    "context": {"u": td.HiMix("1:"), "g": td.HMGen("1:3")},
    "separate": {"u": td.HiMix("1:", "shared"), "g": td.HMGen("1:3", "per-task")},
    "router": {"u": td.MixtureOfDepths("1:3", 0.5), "g": td.MixtureOfDepths("1:3", 0.5)},
}


class Packed(nn.Module):
    """A linear of no library's: half bytes, (out * in / 2,); like many kernels it cannot run on no rows."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = linear.weight.detach().abs().max().item() / 7
        whole = (linear.weight.detach() / self.scale).round().to(torch.int8).flatten() + 8
        self.register_buffer("weight", (whole[::2] * 16 + whole[1::2]).to(torch.uint8))

    def unpacked(self):
        halves = torch.stack([self.weight // 16, self.weight % 16], 1).flatten()
        return (halves.float() - 8).view(self.out_features, self.in_features) * self.scale

    def forward(self, x):
        assert x.numel()
        return x @ self.unpacked().to(x.dtype).T


def nf4(linear):
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.weight = bnb.nn.Params4bit(linear.weight.detach().clone(), requires_grad=False, quant_type="nf4")
    return made.to("cpu")


def int8(linear):
    made = bnb.nn.Linear8bitLt(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
    made.weight = bnb.nn.Int8Params(linear.weight.detach().clone(), requires_grad=False, has_fp16_weights=False)
    return made.to("cpu")


KINDS = {"nf4": nf4, "int8": int8, "packed": Packed}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def phi3():
    torch.manual_seed(0)
    return Phi3ForCausalLM(Phi3Config(**SIZES))


def quantised(kind, make=llama):
    """In training mode: for inference, bitsandbytes computes in bfloat16 on some CPUs."""
    model = make()
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, linear in list(parent.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(parent, name, KINDS[kind](linear))
    return model.train()


def logits(model):
    return model(input_ids=MADE.ids, attention_mask=MADE.mask, use_cache=False).logits


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_are_those_of_the_dense_model(kind):
    model, dense = quantised(kind), llama()
    for make, one in ((model, dense), (quantised(kind, phi3), phi3())):
        spec, known = (layer_spec(m.model.layers[0], type(m.model.layers[0])) for m in (make, one))
        assert spec.linears == known.linears
        assert spec.widths(make.model.layers[0]) == known.widths(one.model.layers[0])
    for method in (td.HiMix(), td.HiMix(separate="shared"), td.MixtureOfDepths("1:3", 0.5)):
        assert td.flops(model, method, text=8, image=24) == td.flops(dense, method, text=8, image=24)
    with pytest.raises(
        td.UnsupportedError, match=f"which a quantised {type(model.model.layers[0].mlp.up_proj).__name__}"
    ):
        td.flops(model, td.HiMix(), text=8, image=24, counted=True)


@pytest.mark.parametrize("make", [llama, phi3])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", KINDS)
def test_any_roles_equal_the_dense_definition(kind, name, make):
    model, same = quantised(kind, make), quantised(kind, make)
    drop = td.apply(model, METHODS[name], multiple=4)
    with torch.no_grad():
        for p in drop.layers.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    with drop.layout(MADE.layout(), step=(0, 0)):
        ours = logits(model)
        ours.sum().backward()
    assert all(p.grad is not None for p in drop.layers.parameters())
    with torch.no_grad(), reference(same, METHODS[name], MADE.layout(), drop.layers, drop.names):
        theirs = logits(same)
    # int8 rounds each row of activations, so that a difference in the last bit becomes one of 1/127.
    away = (ours.detach() - theirs)[MADE.real].abs().max() / theirs.abs().max()
    assert away <= (3e-2 if kind == "int8" else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_image_only_projections_are_copies_of_what_is_packed(kind):
    model = quantised(kind)
    drop = td.apply(model, td.HiMix(separate="shared"))
    for layer, sets in zip(model.model.layers, drop.layers, strict=True):
        own, text = sets["image"].k, layer.self_attn.k_proj
        assert own.weight.dtype == torch.float32
        assert own.weight.requires_grad
        known = {
            "nf4": lambda one: bnb.functional.dequantize_4bit(one.weight.data, one.weight.quant_state),
            "int8": lambda one: one.weight.data.float() * one.state.SCB[:, None] / 127,
            "packed": Packed.unpacked,
        }[kind](text)
        torch.testing.assert_close(own.weight.detach(), known, rtol=1e-2 if kind == "int8" else 1e-6, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_image_only_ffns_are_copies_of_what_is_packed(kind):
    """So that with them an image token is what it was, and they are trained."""
    model, ids = quantised(kind), torch.randint(1, 40, (1, 6))
    drop = td.apply(model, td.MixtureOfTransformers(parts="o+norm+ffn"))
    assert all(p.is_floating_point() and p.requires_grad for p in drop.layers.parameters())
    with torch.no_grad():
        with drop.disabled():
            expected = model(ids, use_cache=False).logits
        with drop.layout(td.TokenLayout(torch.ones_like(ids).bool())):
            found = model(ids, use_cache=False).logits
    assert (found - expected).abs().max() < (0.05 if kind == "int8" else 1e-4) * expected.abs().max()


def test_they_have_the_dtype_of_the_hidden_states():
    model = quantised("nf4")
    for module in (
        model.model.embed_tokens,
        model.model.norm,
        *(layer.input_layernorm for layer in model.model.layers),
    ):
        module.to(torch.bfloat16)
    for layer in model.model.layers:
        layer.post_attention_layernorm.to(torch.bfloat16)
    drop = td.apply(model, METHODS["separate"])
    assert {p.dtype for p in drop.layers.parameters()} == {torch.bfloat16}


class _Largest(TorchDispatchMode):
    """The largest tensor of floats that any operation makes."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.is_floating_point():
                self.most = max(self.most, one.untyped_storage().nbytes())
        return out


def test_context_makes_no_tensor_larger_than_the_dense_run():
    model = quantised("packed")
    drop = td.apply(model, td.HiMix(), multiple=1)
    with torch.no_grad(), drop.disabled(), _Largest() as dense:
        logits(model)
    with torch.no_grad(), drop.layout(MADE.layout(task=None, labels=None)), _Largest() as ours:
        logits(model)
    assert ours.most <= dense.most


@pytest.mark.parametrize("kind", KINDS)
def test_samples_of_nothing_but_images(kind):
    """No row needs the text's projection, and kernels of packed linears do not run on none."""
    made = batch(["iiii", "iiii"], "uu")
    model = quantised(kind)
    drop = td.apply(model, td.HMGen("1:2", "shared"), multiple=1)
    with torch.no_grad(), drop.layout(td.TokenLayout(made.image)):
        assert model(made.ids, use_cache=False).logits.isfinite().all()


def adapted(model):
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    names = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=4, target_modules=names, lora_dropout=0.0))
    generator = torch.Generator().manual_seed(5)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data.normal_(0, 0.1, generator=generator)
    return model


@pytest.mark.parametrize("separate", ["none", "shared"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_qlora_with_himix_trains_as_the_dense_definition(kind, separate):
    methods = {"u": td.HiMix("1:", separate), "g": td.HMGen("1:3", separate)}
    model, same = adapted(quantised(kind)), adapted(quantised(kind))
    drop = td.apply(model, methods, multiple=4)
    sets = copy.deepcopy(drop.layers)
    runs = []
    for one in (drop.layout(MADE.layout()), reference(same, methods, MADE.layout(), sets, drop.names)):
        module = same if runs else model
        with one:
            out = logits(module)
            loss_of(out, MADE.labels).backward()
        runs.append((out.detach(), {n: p.grad for n, p in module.named_parameters() if "lora_" in n}))
    assert len(runs[0][1]) == LAYERS * 4 * 2
    assert all(grad is not None for grad in runs[0][1].values())
    assert close(*runs, MADE.real, 3e-2 if kind == "int8" else 1e-5)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in drop.layers.parameters())


def test_a_linear_that_does_not_show_its_weight_is_refused_and_nothing_changes():
    model = quantised("packed")
    model.model.layers[2].self_attn.k_proj.scale = None  # as where its kernel is missing
    before = snapshot(model)
    with pytest.raises(td.UnsupportedError, match=r"Packed of 32 x 64 features does not give its weights"):
        td.apply(model, METHODS["separate"])
    assert snapshot(model) == before
    td.apply(model, METHODS["context"])  # needs none


@pytest.mark.parametrize("name", ["bias", "shift"])
def test_a_bias_that_is_no_parameter_is_copied_too(name):
    """As in GPTQ and AWQ, which keep it as a buffer."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES, attention_bias=True))

    class Shifted(Packed):
        def forward(self, x):
            return super().forward(x) + getattr(self, name).to(x.dtype)

    for layer in model.model.layers:
        for part in ("q_proj", "k_proj", "v_proj"):
            linear = getattr(layer.self_attn, part)
            linear.bias.data.normal_()
            made = Shifted(linear)
            made.register_buffer(name, linear.bias.detach().clone())
            setattr(layer.self_attn, part, made)
    drop = td.apply(model, td.HiMix(separate="shared"))
    for layer, sets in zip(model.model.layers, drop.layers, strict=True):
        for letter, own in sets["image"].items():
            torch.testing.assert_close(own.bias, getattr(getattr(layer.self_attn, f"{letter}_proj"), name))
            assert own.bias.requires_grad


def test_routers_where_no_linear_says_its_features_are_refused():
    """As where a library names them otherwise: nothing says how wide the hidden states are."""
    model = quantised("packed")
    for module in model.modules():
        if isinstance(module, Packed):
            del module.in_features
    before = snapshot(model)
    with pytest.raises(td.UnsupportedError, match=r"no linear in LlamaDecoderLayer says its in_features.*router"):
        td.apply(model, METHODS["router"])
    assert snapshot(model) == before
