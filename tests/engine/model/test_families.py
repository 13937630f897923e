"""The engine against the dense reference, in every decoder family.

Shape letters: B batch, T tokens, L layers.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, NAMES, Batch, batch, model
from kernels_stand_in import kernels
from torch import Tensor, nn
from transformers.models.falcon import modeling_falcon

import tokendrop as td
from tokendrop.engine.model.decoder import find_layers, layer_spec
from tokendrop.engine.reference import reference
from tokendrop.errors import UnsupportedError

TOLERANCE = 1e-5
SEPARABLE = [name for name in NAMES if name != "deepseek_v3"]
EVERY = [(name, *pair) for name in NAMES for pair in FAMILIES[name].pairs()]
# "u" understands: its image rows need no output; "g" generates: image rows are trained. From layer n on.
METHODS: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "himix": lambda n, own: {"u": td.HiMix(f"{n}:", own)},
    "himix_range": lambda n, own: {"u": td.HiMix(f"{max(n, 1)}:{max(n, 1) + 2}", own)},
    "hmgen": lambda _, own: {"g": td.HMGen("1:4:2", own)},
    "rejoin": lambda n, _: {"g": td.Drop(f"{n}:{n + 2}", 0.5)},
    "random_ltd": lambda n, _: {"g": td.RandomLTD(f"{n}:{n + 2}", 0.5)},
    "mixture_of_depths": lambda n, _: {"g": td.MixtureOfDepths(f"{n}::2", 0.5)},
    "gone": lambda n, _: {"u": td.Drop(f"{max(n, 1)}:", 0.5, then="gone")},
    "context": lambda n, _: {"u": td.Drop(f"{max(n, 1)}:{max(n, 1) + 2}", 0.5, "norm", "context")},
    "fastv": lambda n, _: {"u": td.FastV(n + 1, 0.5)},
    "pyramid_drop": lambda n, _: {"u": td.PyramidDrop((n, n + 1, 4), (0.8, 0.5, 0.3))},
    "hidrop": lambda n, _: {"u": td.HiDrop(1, (max(n, 1), 3), (0.6, 2), 4)},
    "duet_vlm": lambda n, _: {"u": td.DuetVLM((max(n, 1), 4), (0.5, 0))},
    "fastv_mixed": lambda n, _: {"u": td.FastV(max(n, 1) + 1, 0.5), "g": td.HMGen("1:4:2")},
    "pyramid_mixed": lambda n, _: {
        "u": td.PyramidDrop((n, n + 2), (0.7, 0.3)),
        "g": td.Drop(f"{n + 1}:{n + 3}", 0.5, "attention"),
    },
    "mixed": lambda n, own: {"u": td.HiMix(f"{max(n, 1)}:", own), "g": td.HMGen("1:4:2", own)},
}
# Of the image features or the vision encoder, from layer 0 on.
VISION: dict[str, dict[str, Any]] = {
    "svd_prune": {"u": td.SVDPrune(0.5, rank=1)},
    "svd_prune_mixed": {"u": td.SVDPrune(3, energy=0.5), "g": td.HMGen("1:4:2")},
    "vscan": {"u": td.VScan(0.5, (2,), (0.5,), -1, -1, 1)},
    "vscan_mixed": {"u": td.VScan(3, (), (), -1, -1, 2), "g": td.HMGen("1:4:2")},
    "vision_zip": {"u": td.VisionZip(0.25, 0.25, -1)},
    "duet_vlm": {"u": td.DuetVLM((2, 4), (0.5, 0), 0.25, 0.25, 2, -1)},
}
# Those with a vision encoder whose patches, or squares of them, are the image tokens.
ENCODERS = ("janus", "llava", "qwen2_5_vl")
# Those whose tokens are made of patches by a pixel shuffle, with newlines, or beside deepstack features.
ARRANGED = ("idefics3", "internvl", "llava_onevision", "qwen3_vl", "smolvlm")
# Each method in all ways only in families that differ most; in one way where a family is much like another.
WHOLE = ("gemma3", "gpt2", "llama", "qwen2_5_vl", "qwen3_vl")


def ways(name: str, at: int) -> Iterator[Any]:
    """The pairs of attention and padding for method number `at` in a family; those that say the same again are slow."""
    pairs = FAMILIES[name].pairs()
    if FAMILIES[name].alike:
        yield from pairs[at % 2 :][:1]
        return
    for place, pair in enumerate(pairs):
        again = name not in WHOLE and place != at % len(pairs)
        yield pytest.param(*pair, marks=pytest.mark.slow) if again else pair


def marked(name: str, method: str, pair: Any) -> Any:
    """A case of a family, a method and a way, as slow as the way is."""
    values, marks = (pair.values, pair.marks) if hasattr(pair, "marks") else (pair, ())
    return pytest.param(name, method, *values, marks=marks)


CASES = [marked(name, method, pair) for name in NAMES for at, method in enumerate(METHODS) for pair in ways(name, at)]
SHOWN = {
    "himix": ["HiMix"],
    "himix_range": ["HiMix"],
    "hmgen": ["HMGen"],
    "rejoin": ["drop, rejoin"],
    "random_ltd": ["drop, rejoin"],
    "mixture_of_depths": ["drop, rejoin"],
    "gone": ["drop, gone"],
    "context": ["HiMix"],
    "fastv": [],
    "pyramid_drop": [],
    "hidrop": [],
    "duet_vlm": [],
    "fastv_mixed": [],
    "pyramid_mixed": [],
    "mixed": ["HiMix", "HMGen"],
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Case:
    """A family's model, batch, methods and layout."""

    def __init__(
        self, name: str, method: str, attention: str = "", padding: str | None = None, separate: str = "none"
    ) -> None:
        self.base, self.data = model(name, attention), batch(name, padding)
        self.methods = VISION[method[1:]] if method[0] == "@" else METHODS[method](FAMILIES[name].first, separate)
        if name == "gpt2" and attention == "eager" and "u" in self.methods:
            self.skip_old_gpt2()
        tasks = (list(self.methods) * 2)[:2]
        self.labels = self.data.trained([task == "g" for task in tasks])
        self.layout = td.TokenLayout(self.data.image, tasks, padding=self.data.real, labels=self.labels)

    def skip_old_gpt2(self) -> None:
        """Before transformers 5.1 its eager attention masks by index, which is refused."""
        layer = find_layers(self.base)[1][0]
        refusal = layer_spec(layer, type(layer)).context_refusal(layer)
        if refusal is not None:
            assert transformers.__version__.startswith("5.0.")
            pytest.skip(refusal)

    def run(self, module: nn.Module) -> "Result":
        return Result(module, self.data, self.labels)

    def dropped(self, change: Callable[[td.Handle], None] = lambda _: None) -> tuple["Result", td.Handle]:
        """What the engine makes of a copy, after a change of its handle."""
        module = copy.deepcopy(self.base)
        drop = td.apply(module, self.methods, multiple=4)
        change(drop)
        with drop.layout(self.layout, step=(0, 0)):
            return self.run(module), drop

    def expected(self, drop: td.Handle | None = None) -> "Result":
        """What the reference makes of the untouched model, with the image-only projections of `drop`."""
        if drop is None:
            with reference(self.base, self.methods, self.layout):
                return self.run(self.base)
        module = copy.deepcopy(self.base)
        sets = copy.deepcopy(drop.layers)
        with reference(module, self.methods, self.layout, sets, drop.names):
            module.tokendrop = nn.ModuleDict({"layers": sets})
            return self.run(module)


class Result:
    """Logits of real rows, the loss, and gradients by name."""

    def __init__(self, module: nn.Module, data: Batch, labels: Tensor) -> None:
        module.zero_grad(set_to_none=True)
        out = module(**data.inputs, labels=labels)
        out.loss.backward()
        self.logits, self.loss = out.logits.detach()[data.real], out.loss.detach()
        self.grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}

    def error(self, other: "Result") -> float:
        """Relative to the largest logit; Chameleon gives tokens that it forbids the lowest number."""
        allowed = other.logits > torch.finfo(other.logits.dtype).min
        assert torch.equal(self.logits > torch.finfo(other.logits.dtype).min, allowed)
        return ((self.logits - other.logits)[allowed].abs().max() / other.logits[allowed].abs().max()).item()

    def gradient_error(self, other: "Result") -> float:
        """Relative, of all parameters at once: the true gradient of key biases is zero, so theirs alone means nothing.

        Image-only projections that no token uses have a gradient of zero where the reference has none; an untouched
        model has no routers.
        """
        assert all("router" in name for name in other.grads.keys() - self.grads.keys())
        apart = sum(((grad - other.grads.get(name, 0)) ** 2).sum() for name, grad in self.grads.items())
        return (apart / sum((grad**2).sum() for grad in other.grads.values())).sqrt().item()

    def equals(self, other: "Result") -> bool:
        same = all(torch.equal(self.grads[name], grad) for name, grad in other.grads.items())
        return torch.equal(self.logits, other.logits) and torch.equal(self.loss, other.loss) and same


@pytest.mark.parametrize(("name", "method", "attention", "padding"), CASES)
def test_the_engine_equals_the_reference(
    name: str, method: str, attention: str, padding: str | None, cell: Any
) -> None:
    case = Case(name, method, attention, padding)
    layer = find_layers(case.base)[1][0]
    assert layer_spec(layer, type(layer)).backend(layer) == attention
    dense, (found, drop) = case.run(case.base), case.dropped()
    expected = case.expected(drop)
    assert found.grads.keys() == expected.grads.keys()
    assert found.error(expected) < TOLERANCE
    assert found.gradient_error(expected) < TOLERANCE
    # A wrong role would be seen.
    assert dense.error(expected) > 1000 * TOLERANCE
    assert dense.gradient_error(expected) > 1000 * TOLERANCE
    for column in SHOWN[method]:
        cell(name, column)


@pytest.mark.parametrize(
    ("name", "method", "attention", "padding"),
    [(name, f"@{m}", *pair) for name, *pair in EVERY for m in VISION if name in ENCODERS]
    + [
        (name, f"@{m}", *pair)
        for name in NAMES
        for pair in FAMILIES[name].pairs()[1::2]
        for m in ("svd_prune", "svd_prune_mixed")
        if name not in ENCODERS
    ]
    + [
        (name, f"@{m}", *pair)
        for name in ARRANGED
        for m, pair in (("vscan_mixed", ("sdpa", "left")), ("vscan", ("eager", None)), ("duet_vlm", ("sdpa", "right")))
    ],
)
def test_methods_before_the_first_layer(name: str, method: str, attention: str, padding: str | None) -> None:
    case = Case(name, method, attention, padding)
    dense, expected, (found, _) = case.run(case.base), case.expected(), case.dropped()
    assert found.error(expected) < TOLERANCE
    assert found.gradient_error(expected) < TOLERANCE
    assert dense.error(expected) > 1000 * TOLERANCE


@pytest.mark.parametrize("name", NAMES)
def test_attention_without_ffn(name: str, cell: Any) -> None:
    """Half of the image tokens, and all beside a task that leaves some layers; image rows are trained."""
    family = FAMILIES[name]
    methods = {"g": td.Drop(f"{family.first}:", 0.5, then="attend"), "u": td.HiMix(f"{max(family.first, 1)}:")}
    for at, task in enumerate("gu"):
        attention, padding = family.pairs()[(len(name) + at) % len(family.pairs())]
        case = Case(name, "rejoin", attention, padding)
        if name == "gpt2" and attention == "eager":
            case.skip_old_gpt2()
        none = methods | {"g": td.Drop(f"{family.first}:{family.first + 2}", 0, then="attend")}
        case.methods = {"g": methods["g"]} if task == "g" else none
        case.layout = replace(case.layout, task=("g", task), labels=case.data.trained([True, task == "g"]))
        case.labels = case.layout.labels
        dense, (found, drop) = case.run(case.base), case.dropped()
        expected = case.expected(drop)
        assert found.error(expected) < TOLERANCE
        assert found.gradient_error(expected) < TOLERANCE
        assert dense.error(expected) > 1000 * TOLERANCE
    cell(name, "attend")


@pytest.mark.parametrize("score", ["attention", "value_norm", "similarity", "leverage"])
@pytest.mark.parametrize("then", ["rejoin", "gone"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen2_5_vl"])
def test_scores_of_the_engine_equal_those_of_the_reference(name: str, then: Any, score: str) -> None:
    case = Case(name, "gone", padding="left")
    first = FAMILIES[name].first
    case.methods = {"u": td.Drop(f"{first + 1}:{first + 3}", 0.5, score, then)}
    dense, expected, (found, _) = case.run(case.base), case.expected(), case.dropped()
    assert found.error(expected) < TOLERANCE
    assert found.gradient_error(expected) < TOLERANCE
    assert dense.error(expected) > 1000 * TOLERANCE


@pytest.mark.parametrize(
    ("name", "attention", "padding"), [one for one in EVERY if one[1:] in (("sdpa", "left"), ("eager", "right"))]
)
def test_padding_that_only_the_model_knows(name: str, attention: str, padding: str) -> None:
    case = Case(name, "mixed", attention, padding)
    case.layout = td.TokenLayout(case.data.image, case.layout.task, labels=case.labels)
    expected, (found, _) = case.expected(), case.dropped()
    assert found.error(expected) < TOLERANCE
    assert found.gradient_error(expected) < TOLERANCE


@pytest.mark.parametrize(("name", "attention", "padding"), EVERY)
def test_without_dropping_nothing_changes(name: str, attention: str, padding: str | None) -> None:
    case = Case(name, "mixed", attention, padding)
    # The engine gives the layers of a training forward no cache, and a cache copies keys, which may change rounding.
    case.data.inputs["use_cache"] = False
    dense = case.run(case.base)

    def weaken(drop: td.Handle) -> None:
        drop.strength = 0.0

    assert case.dropped(weaken)[0].equals(dense)
    case.layout = td.TokenLayout(torch.zeros_like(case.data.image), "u", padding=case.data.real, labels=case.labels)
    assert case.dropped()[0].equals(dense)
    # Rows gathered and scattered, all of them.
    case.methods = {"u": td.Drop(f"{FAMILIES[name].first}:", 1.0)}
    case.layout = td.TokenLayout(case.data.image, "u", labels=case.labels)
    assert case.dropped()[0].equals(dense)


@pytest.mark.parametrize("separate", ["shared", "per-task"])
@pytest.mark.parametrize(
    ("name", "attention", "padding"),
    [
        (name, *pair)
        for name in SEPARABLE
        for pair in (("sdpa", "left"), ("eager", None))
        if pair[0] in FAMILIES[name].attentions
    ],
)
def test_image_only_projections(name: str, attention: str, padding: str | None, separate: str, cell: Any) -> None:
    case = Case(name, "mixed", attention, padding, separate)
    same, drop = case.dropped()
    plain, _ = Case(name, "mixed", attention, padding).dropped()
    assert same.error(plain) < TOLERANCE
    assert {letter for one in drop.layers for own in one.values() for letter in own} == set("qkv")

    def perturb(drop: td.Handle) -> None:
        generator = torch.Generator().manual_seed(3)
        for parameter in drop.layers.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    found, drop = case.dropped(perturb)
    expected = case.expected(drop)
    assert any(name.startswith("tokendrop.") for name in expected.grads)
    assert found.error(expected) < TOLERANCE
    assert found.gradient_error(expected) < TOLERANCE
    assert found.error(plain) > 1000 * TOLERANCE
    cell(name, "projections")


@pytest.mark.parametrize("name", NAMES)
def test_image_only_parts(name: str, cell: Any) -> None:
    """All parts of image rows that compute beside the norms, keys and values of those that are CONTEXT."""
    latent = name == "deepseek_v3"  # no linears for q, k and v
    own = td.MixtureOfTransformers("1:4", "per-task", "o+norm+ffn" if latent else "qkv+o+norm+ffn")
    family = FAMILIES[name]
    case = Case(name, "hmgen", *family.pairs()[len(name) % len(family.pairs())])
    case.methods = {"g": own, "u": td.HMGen("2:3") if latent else td.HiMix("2:", "per-task", "qkv+norm")}
    case.labels = case.data.trained([True, False])
    case.layout = replace(case.layout, task=("g", "u"), labels=case.labels)

    def perturb(drop: td.Handle) -> None:
        generator = torch.Generator().manual_seed(3)
        for parameter in drop.layers.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)

    (same, _), (found, drop) = case.dropped(), case.dropped(perturb)
    expected = case.expected(drop)
    assert found.error(expected) < TOLERANCE
    assert found.gradient_error(expected) < TOLERANCE
    assert found.error(same) > 1000 * TOLERANCE
    cell(name, "parts", "without q, k and v" if latent else "pass")


def test_projections_of_latent_attention_are_refused(cell: Any, refusal: Any) -> None:
    # Its keys and values are made of one latent, by no linear of their own.
    case = Case("deepseek_v3", "hmgen", separate="shared")
    before = described(case.base)
    with pytest.raises(
        UnsupportedError, match=r"inspection finds no linears for q, k and v.*separate='none'"
    ) as caught:
        td.apply(case.base, case.methods)
    assert described(case.base) == before
    refusal("deepseek_v3", "`separate`", str(caught.value))
    cell("deepseek_v3", "projections", "refused, as below")


FUSED = ["phi3", "gpt_neox", "gpt2", "falcon", "falcon_7b", "falcon_40b"]


@pytest.mark.parametrize("name", FUSED)
def test_image_only_projections_copy_their_part_of_a_fused_linear(name: str) -> None:
    # Written out from the families' own forward, not from what inspection learns.
    module = copy.deepcopy(model(name, "sdpa"))
    own = td.apply(module, td.HMGen("1:3:2", "shared")).layers[0]["image"]
    if name == "phi3":
        weight = module.model.layers[0].self_attn.qkv_proj.weight
        expected = {"q": weight[:32], "k": weight[32:48], "v": weight[48:]}
    elif name == "gpt_neox":
        by_head = module.gpt_neox.layers[0].attention.query_key_value.weight.view(4, 3, 8, 32)
        expected = {letter: by_head[:, at].reshape(32, 32) for at, letter in enumerate("qkv")}
    elif "falcon" in name:
        attention = module.transformer.h[0].self_attention
        # (out, 1, in) is what the linear makes of each input feature, taken apart by Falcon's own code.
        parts = attention._split_heads(attention.query_key_value.weight.T[None])
        every = 2 if name == "falcon_40b" else 1  # its keys and values are repeated for two heads of queries
        expected = {
            letter: part[0, :, :: every if letter in "kv" else 1].flatten(1).T
            for letter, part in zip("qkv", parts, strict=True)
        }
    else:
        weight = module.transformer.h[0].attn.c_attn.weight
        expected = {letter: weight[:, 32 * at : 32 * at + 32].T for at, letter in enumerate("qkv")}
    for letter, weight in expected.items():
        assert torch.equal(own[letter].weight, weight)


@contextmanager
def counted(drop: td.Handle) -> Iterator[list[int]]:
    """How often the attention of the last layer is called."""
    attention, calls = getattr(drop.decoder_layers[-1], drop.spec.attention or ""), [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    hook = attention.register_forward_pre_hook(count)
    yield calls
    hook.remove()


def checkpoint(module: Any, use_reentrant: bool) -> None:
    enable = getattr(module, "activation_checkpointing_enable", None) or module.gradient_checkpointing_enable
    enable(**{f"{enable.__name__.split('_')[0]}_checkpointing_kwargs": {"use_reentrant": use_reentrant}})


@pytest.mark.parametrize(
    ("name", "method", "separate"),
    [
        (name, method, separate)
        for name in NAMES
        for method in (["mixed"] if FAMILIES[name].alike else ["himix", "hmgen", "mixed"])
        for separate in ("none", "per-task")
        if name in SEPARABLE or separate == "none"
    ],
)
def test_checkpointing_equals_none(name: str, method: str, separate: str, cell: Any) -> None:
    case = Case(name, method, padding="left", separate=separate)
    module = copy.deepcopy(case.base)
    drop = td.apply(module, case.methods, multiple=4)
    with counted(drop) as calls, drop.layout(case.layout):
        expected = case.run(module)
        once = calls[0]
        checkpoint(module, use_reentrant=False)
        assert case.run(module).equals(expected)
    assert calls[0] == 3 * once
    cell(name, "checkpointing")


@pytest.mark.parametrize("name", NAMES)
def test_reentrant_checkpointing(name: str, refusal: Any) -> None:
    # Without context or added parameters it is exact; with them it is refused.
    case = Case(name, "hmgen")
    expected, _ = case.dropped()
    case.base = copy.deepcopy(case.base)
    checkpoint(case.base, use_reentrant=True)
    assert case.dropped()[0].equals(expected)
    own = (Case(name, "hmgen", separate="shared"),) if name in SEPARABLE else ()
    for refused in (Case(name, "himix"), *own):
        refused.base = case.base
        with pytest.raises(UnsupportedError, match="use_reentrant") as caught:
            refused.dropped()
    layer = type(find_layers(case.base)[1][0]).__name__
    refusal(name, "re-entrant checkpointing, CONTEXT or projections", str(caught.value).replace(f"{layer} 0 ", "it "))


def described(module: nn.Module) -> dict[str, Any]:
    return {name: (type(one), sorted(one.__dict__), len(one._forward_hooks)) for name, one in module.named_modules()}


@pytest.mark.parametrize("name", NAMES)
def test_remove_restores(name: str) -> None:
    case = Case(name, "mixed", separate="per-task" if name in SEPARABLE else "none")
    module = copy.deepcopy(case.base)
    dense, before, keys = case.run(module), described(module), list(module.state_dict())
    drop = td.apply(module, case.methods)
    assert described(module) != before
    assert list(drop.dense_state_dict()) == keys
    drop.remove()
    assert described(module) == before
    assert list(module.state_dict()) == keys
    assert case.run(module).equals(dense)


KERNELS = [(name, one) for name in NAMES for one in ("flash_attention_2", "flex_attention")]


def running(module: nn.Module, attention: str) -> nn.Module:
    """The decoder of a model under another attention, its vision encoder as it was."""
    path, layers = find_layers(module)
    for one in (module.get_submodule(path.rpartition(".")[0]), *layers.modules()):
        if "config" in vars(one):
            one.config._attn_implementation_internal = attention
    return module


@pytest.mark.parametrize(("name", "attention"), KERNELS)
def test_no_method_is_refused_for_the_attention(name: str, attention: str) -> None:
    first = FAMILIES[name].first
    for method in (td.HiMix(f"{first}:"), td.HMGen("1:4:2"), td.FastV(first + 1, 0.5)):
        td.apply(module := running(copy.deepcopy(model(name)), attention), method)
        td.handle(module).remove()


# What transformers itself runs under it: no sinks in FlexAttention on a CPU, no ALiBi in FlashAttention, and a prefix
# that is seen from both sides only where there is a mask.
NEVER = {("gpt_oss", "flex_attention"), ("falcon", "flash_attention_2"), ("paligemma2", "flash_attention_2")}
NEVER |= {(name, "flex_attention") for name in ("falcon", "falcon_7b", "falcon_40b")}


@pytest.mark.parametrize(("name", "attention"), [pair for pair in KERNELS if pair not in NEVER])
def test_kernels_equal_the_reference(name: str, attention: str, cell: Any) -> None:
    """FlashAttention and FlexAttention that run on a CPU; a method that keeps tokens CONTEXT, and one that scores."""
    flash, at = "flash" in attention, NAMES.index(name)
    case = Case(name, ("mixed", "fastv_mixed")[(at + flash) % 2], padding=("left", "right", None)[at % 3])
    case.base = copy.deepcopy(case.base)
    if name == "gpt2":
        case.base = case.base.double()  # of which transformers asks no precision for FlashAttention
    expected = case.expected()
    with kernels() as calls:
        flashes = flash and "falcon" in name
        found, _ = Case.dropped(case, lambda drop: as_flash(running(drop.owner, attention), flashes))
    assert found.error(expected) < TOLERANCE
    assert found.gradient_error(expected) < TOLERANCE
    assert (calls.plain or calls.varlen) if flash else calls.flex
    cell(name, "flash" if flash else "flex")


def as_flash(module: nn.Module, flashes: bool) -> None:
    """Falcon has another class for FlashAttention, with the same weights."""
    for layer in find_layers(module)[1] if flashes else ():
        layer.self_attention.__class__ = modeling_falcon.FalconFlashAttention2
        layer.self_attention._flash_attn_uses_top_left_mask = False
