"""FLOPs of real models: the formula equals a counted run in every layer and part, and published figures follow.

Shape letters: T text tokens, M image tokens, D hidden, L layers.
"""

import copy
import json
import subprocess
import sys
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path

import pytest
import torch
import transformers as hf
from families import FAMILIES, NAMES, batch, model
from helpers import config, llama, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.analysis.flop_ledger import PARTS
from tokendrop.cli import app
from tokendrop.engine.model.from_config import model_from_config
from tokendrop.methods.text import KNOWN, LAYERS, each_from_text, method_from_text, methods_from_text

CONFIGS = Path(__file__).parents[2] / "tokendrop" / "configs"
LLAVA = str(CONFIGS / "llava-1.5-7b.json")
METHODS = [
    td.HiMix(),
    td.HiMix("1:3", "shared"),
    td.HMGen("1:3"),
    td.HMGen("1:4:2", "shared"),
    td.Drop("1:3", 0.3),
    td.Drop("1:", 3, "attention", "gone"),
    td.Drop("1:3", 0.5, "similarity"),
    td.Drop("1:3", 5, "attention", "context"),
    td.RandomLTD("1:-1", 0.4),
    td.MixtureOfDepths("1::2", 0.4),
    td.SkipVision("1:", 0.4),
    td.HMGen("1:4:2", "shared", "qkv+o+norm+ffn"),
    td.HiMix("1:3", "shared", "v+norm"),
    td.SVDPrune(keep=3, rank=1),
    td.DivPrune(keep=3),
    td.DART(1, 0.5),
    td.PMoD(),
    td.Sprint("1:3", keep=0.4),
    td.Sprint("1::2", keep=5),
    td.FastV(2, 0.5),
    td.PyramidDrop((1, 2, 3), (0.5, 0.25, 0.125)),
    td.HiDrop(1, (2,), (0.3,), 3),
    td.DuetVLM((1, 3), (0.5, 0)),
]


def both(source, methods, **kwargs):
    """The report by formula, after it was found equal to the counted one."""
    report = td.flops(source, methods, **kwargs)
    assert report == td.flops(source, methods, counted=True, **kwargs)
    return report


@pytest.mark.parametrize("attn", ["sdpa", pytest.param("eager", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_formula_is_what_a_run_counts(method, attn):
    made = config(attn)
    both(made, method, text=9, image=24, before=4)
    report = both(made, method, text=9, image=24, before=4, backward=True, labelled=5, multiple=4)
    assert report.dropped < report.dense
    assert len(report.per_layer) == 4
    assert tuple(report.per_part) == PARTS
    for name in ("dense", "dropped"):
        whole, parts = getattr(report, name), [getattr(one, name) for one in report.per_part.values()]
        assert sum(parts) == whole
        assert sum(getattr(one, name) for one in report.per_layer) + parts[-1] == whole
    assert report.ratio == report.dropped / report.dense


@settings(max_examples=12)
@given(
    st.integers(0, 12), st.integers(0, 20), st.integers(0, 12), st.sampled_from([1, 4, 64]), st.sampled_from(METHODS)
)
def test_any_layout(text, image, before, multiple, method):
    if text + image:
        both(config(), method, text=text, image=image, before=min(before, text), multiple=multiple, backward=True)


# Of the others, experts have no formula, and a single head of keys is not counted whole by torch.
@pytest.mark.parametrize("name", [*(name for name in NAMES if not FAMILIES[name].alike), "falcon_40b", "paligemma2"])
def test_families(name):
    built = copy.deepcopy(model(name))
    with torch.no_grad():
        built(**batch(name, None).inputs)  # which leaves tensors of its own on some
    both(built, td.FastV(4, 0.5), text=6, image=12, before=2, backward=True)


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.json")), ids=lambda file: file.stem)
def test_configs_of_real_models(file):
    found = model_from_config(file)
    assert 3e9 < sum(p.numel() for p in found.parameters()) < 9e9
    both(found, td.HiMix("2:", "shared"), text=64, image=256, before=16)


def test_by_hand():
    """FastV at layer 1 of 4, written out: T 6, M 10, half of M kept, one scoring row."""
    d, kv, inner, vocab, tokens, kept = 32, 16, 48, 50, 16, 11
    attention, ffn, qkv = 2 * (2 * d * d + 2 * d * kv), 2 * 3 * d * inner, 2 * (d * d + 2 * d * kv)
    found = td.flops(config(), td.FastV(1, 0.5), text=6, image=10)
    assert found.dense == 4 * (tokens * (attention + ffn) + 4 * tokens**2 * d) + tokens * 2 * d * vocab
    parts = {name: cost.dropped for name, cost in found.per_part.items()}
    assert parts == {
        "projections": (tokens + 3 * kept) * attention,
        "image-only projections": 0,
        "attention": 4 * d * (tokens**2 + 3 * kept**2),
        "FFN": (tokens + 3 * kept) * ffn,
        "scoring": (tokens + 1) * qkv + 2 * d * tokens,
        "head": tokens * 2 * d * vocab,
    }


@pytest.mark.parametrize("method", [td.HiMix(), td.Drop("1:", 0.5, per="frame"), td.RandomLTD("1:", 0.5)])
def test_wherever_tensors_are_made_by_default(method):
    expected = td.flops(config(), method, text=6, image=8)
    with torch.device("meta"):
        assert td.flops(config(), method, text=6, image=8) == expected
        assert td.flops(config(), method, text=6, image=8, counted=True) == expected


def test_tasks_choose_their_method():
    methods = {"u": td.HiMix(separate="per-task"), "g": td.HMGen("1:3"), "dense": None}
    sizes = {"text": 8, "image": 24}
    found = {task: both(config(), methods, task=task, **sizes) for task in methods}
    assert found["g"] == td.flops(config(), td.HMGen("1:3"), **sizes)
    assert found["u"] == td.flops(config(), td.HiMix(separate="shared"), **sizes)
    assert found["dense"].ratio == 1
    with pytest.raises(td.LayoutError, match="name the task"):
        td.flops(config(), methods, **sizes)
    with pytest.warns(td.NoEffectWarning, match="'v'"):
        assert td.flops(config(), methods, task="v", **sizes).ratio == 1


def test_nothing_is_changed():
    built = llama()
    before, state = snapshot(built), torch.random.get_rng_state()
    expected = both(built, td.HiMix(separate="shared"), text=8, image=24)
    assert snapshot(built) == before
    assert torch.equal(torch.random.get_rng_state(), state)
    td.apply(built, td.HMGen("1:3", "shared"))
    before = snapshot(built)
    assert both(built, td.HiMix(separate="shared"), text=8, image=24) == expected
    assert snapshot(built) == before
    with pytest.raises(FrozenInstanceError):
        expected.ratio = 1


# Qwen2-0.5B, TinyLlama-1.1B, Llama-3.2-1B, Llama-3.2-3B, Vicuna-7B; GFLOPs dense and with HiMix as its README has them.
HIMIX = {
    (896, 4864, 24, 14, 2, 151936): (837, 78),
    (2048, 5632, 22, 32, 4, 32000): (1750, 161),
    (2048, 8192, 16, 32, 8, 128256): (2040, 192),
    (3072, 8192, 28, 24, 8, 128256): (5310, 525),
    (4096, 11008, 32, 32, 32, 32000): (10800, 1310),
}


def shaped(hidden, inner, layers, heads, kv_heads, vocab):
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers, "vocab_size": vocab}
    heads = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": hidden // heads}
    return hf.LlamaConfig(**sizes, **heads)


@pytest.mark.parametrize("shape", HIMIX)
def test_himix_published_figures(shape):
    d, inner, layers, heads, kv_heads, vocab = shape
    text, image, vision, kv = 64, 728, 1152, d // heads * kv_heads
    row, rows = 2 * d * d + 2 * d * kv + 3 * d * inner, text + image
    dense = 2 * (layers * (rows * row + 2 * rows**2 * d) + rows * d * vocab)
    theirs = layers * (text * row + 2 * image * vision * kv + 2 * text * rows * d) + text * d * vocab
    found = td.flops(shaped(*shape), td.HiMix(separate="shared"), text, image, labelled=text)
    assert found.dense == dense
    # Their image keys and values come from vision features, not from hidden states.
    own = found.per_part["image-only projections"].dropped
    assert own * vision % d == 0
    assert found.dropped - own + own * vision // d == 2 * theirs
    published = [figure * 1e9 for figure in HIMIX[shape]]
    assert [found.dense, 2 * theirs] == pytest.approx(published, rel=0.005)


def layers_ratio(report, scoring=True):
    """Dropped over dense in the layers, without the head."""
    dense, dropped = (sum(getattr(one, name) for one in report.per_layer) for name in ("dense", "dropped"))
    return (dropped - (0 if scoring else report.per_part["scoring"].dropped)) / dense


@pytest.mark.parametrize(("layer", "saved"), [(2, 0.45), (3, 0.43)])
def test_fastv_published_ratios(layer, saved):
    d, inner, text, image = 4096, 11008, 35, 576

    def theirs(n):
        return 4 * n * d * d + 2 * n * n * d + 2 * n * d * inner

    own = (layer * theirs(text + image) + (32 - layer) * theirs(text + image // 2)) / (32 * theirs(text + image))
    found = layers_ratio(td.flops(LLAVA, td.FastV(layer, 0.5), text, image), scoring=False)
    assert found == pytest.approx(own, rel=0.005)
    assert 1 - found == pytest.approx(saved, abs=0.005)


def test_pyramid_drop_published_ratio():
    found = td.flops(LLAVA, td.PyramidDrop(), text=0, image=2880)
    assert 1 - layers_ratio(found, scoring=False) == pytest.approx(0.55, abs=0.005)


def test_the_seed_paper_himix():
    """Its formula T(T + M)d + 8Td^2 over (T + M)^2 d + 8(T + M)d^2 is T / (T + M), without image keys and values."""
    text, image = 81, 256
    for shape in HIMIX:
        found = td.flops(shaped(*shape), td.HiMix(separate="shared"), text, image)
        dense = sum(one.dense for one in found.per_layer)
        own = found.per_part["image-only projections"].dropped
        assert (sum(one.dropped for one in found.per_layer) - own) * (text + image) == dense * text
    assert text / (text + image) == pytest.approx(0.24, abs=0.001)


@pytest.mark.parametrize(("layers", "ratios"), [(20, (0.85, 0.75)), (28, (0.89, 0.82))])
def test_the_seed_paper_hmgen(layers, ratios):
    sizes = shaped(3072, 8192, layers, 24, 8, 128256)
    found = [layers_ratio(td.flops(sizes, td.HMGen(f"4:{4 + 2 * k}:2"), text=16, image=4096)) for k in (3, 5)]
    assert found == pytest.approx(ratios, abs=0.005)


@pytest.mark.parametrize(
    "more",
    [
        {"text": -1},
        {"text": True},
        {"text": 2.0},
        {"image": "9"},
        {"text": 0, "image": 0},
        {"image": 1 << 40},
        {"before": 9},
        {"labelled": -1},
    ],
)
def test_token_counts_are_checked(more):
    with pytest.raises(td.LayoutError, match=f"{list(more)[-1]}="):
        td.flops(config(), td.HiMix(), **{"text": 8, "image": 8} | more)


def test_what_is_refused():
    with pytest.raises(td.DecoderError, match="neither a model"):
        td.flops(7, td.HiMix(), text=8, image=8)
    with pytest.raises(td.DecoderError, match="no list of layers"):
        td.flops(nn.Linear(2, 2), td.HiMix(), text=8, image=8)
    with pytest.raises(td.DecoderError, match="does not exist"):
        td.flops("nowhere.json", td.HiMix(), text=8, image=8)
    with pytest.raises(td.DecoderError, match="can be made of"):
        td.flops(config(rope_parameters={"rope_type": "none such"}), td.HiMix(), text=8, image=8)
    with pytest.raises(td.MethodError, match="multiple"):
        td.flops(config(), td.HiMix(), text=8, image=8, multiple=0, labelled=3)
    experts = hf.MixtralConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    with pytest.raises(td.UnsupportedError, match="experts"):
        td.flops(experts, td.HMGen("1:"), text=8, image=8)


class OtherAttention(nn.Module):
    is_causal = True

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, states):
        return self.mix(states)


class OtherLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = OtherAttention()

    def forward(self, states):
        return self.attn(states)


class NoEmbeddings(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = llama().model.layers

    def forward(self, states):
        return states


def test_layers_whose_linears_are_not_found():
    other = nn.Module()
    other.layers = nn.ModuleList([OtherLayer()])
    with pytest.raises(td.UnsupportedError, match="finds no linears for q, k and v in OtherLayer"):
        td.flops(other, td.HMGen("0:1"), text=8, image=8)


def test_a_decoder_that_cannot_be_run():
    assert td.flops(NoEmbeddings(), td.HiMix(), text=8, image=8).per_part["head"].dense == 0
    with pytest.raises(td.UnsupportedError, match="inputs_embeds"):
        td.flops(NoEmbeddings(), td.HiMix(), text=8, image=8, counted=True)


@pytest.mark.parametrize(
    ("text", "layers", "expected"),
    [
        ("HiMix", None, td.HiMix()),
        (" HiMix ", "2:", td.HiMix("2:")),
        ('HMGen(shallow="8:24:2", separate="shared")', None, td.HMGen("8:24:2", "shared")),
        ("HMGen", "8:24:2", td.HMGen("8:24:2")),
        ("FastV(keep=0.25)", "3", td.FastV(3, 0.25)),
        ("PyramidDrop", "[4, 8, 12]", td.PyramidDrop((4, 8, 12))),
        ('Drop(":", keep=5)', None, td.Drop(":", 5)),
        ("HiMix(layers='16:')", "2:", td.HiMix("16:")),
        ("HiMix('16:')", "2:", td.HiMix("16:")),
        ("HiMix(':')", "2:", td.HiMix()),
        ("FastV(3)", "1", td.FastV(3)),
        ("DuetVLM", "[4, 8]", td.DuetVLM((4, 8))),
        ("VScan", "[4]", td.VScan(text_layers=(4,))),
    ],
)
def test_methods_as_text(text, layers, expected):
    assert method_from_text(text, layers) == expected


@pytest.mark.parametrize("text", ["SVDPrune", "divprune(0.5)", "CDPruner", "PMoD", "VisionZip"])
def test_a_method_without_layers_takes_none(text):
    name = type(method_from_text(text)).__name__
    with pytest.raises(td.MethodError, match=rf"^{name} has no layers .* found --layers 2:; leave it out"):
        method_from_text(text, "2:")
    with pytest.raises(td.MethodError, match=rf"^{name} has no layers"):
        each_from_text(["HiMix", text], "2:")


def test_layers_that_a_method_names_are_its_own():
    """What is compared are two methods, each with its layers."""
    assert each_from_text(["HiMix(layers='16:')", "HiMix"], "2:") == [td.HiMix("16:"), td.HiMix("2:")]


def test_every_method_says_which_of_its_fields_are_layers():
    """A new one whose layers have another name would be taken for one without."""
    for made in KNOWN.values():
        own = [one.name for one in fields(made) if one.name in LAYERS]
        others = [one.name for one in fields(made) if "layer" in one.name and one.name not in LAYERS]
        assert len(own) <= 1
        assert set(others) <= {"local_layer", "global_layer", "vision_layer"}  # of the vision encoder


HOSTILE = [
    "", "NoSuch", "td.HiMix", "HiMix(", "HiMix(layers=__import__('os').getcwd())", "__import__('os')", "HiMix(1:2)",
    "HiMix(width=2)", "HiMix(*[1])", "HiMix(**{'layers': ':'})", "HiMix()()", "HiMix, FastV", "HMGen", "\0",
    "Drop(':', keep=0.5, score=[])", "Drop(':', keep='a')", "(" * 999, "FastV(layer=-1)", "HiMix(layers=3)",
    "x=y=HiMix",
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_methods_are_one_sentence(text):
    with pytest.raises(td.TokenDropError):
        methods_from_text([text])


def test_methods_of_tasks_as_text():
    assert methods_from_text(["u=HiMix", 'g=HMGen(shallow="1:")']) == {"u": td.HiMix(), "g": td.HMGen("1:")}
    for texts in (["HiMix", "FastV"], ["u=HiMix", "FastV"], ["u=HiMix", "u=FastV"]):
        with pytest.raises(td.MethodError, match="one for each task"):
            methods_from_text(texts)


def invoke(*args):
    return CliRunner().invoke(app, ["flops", *map(str, args)], terminal_width=100)


def test_the_command(tmp_path):
    sizes = config(architectures=["LlamaForCausalLM"])
    sizes.save_pretrained(tmp_path)
    tasks = ["--method", "u=HiMix", "--method", "g=HMGen", "--task", "g", "--layers", "1:3"]
    rest = ["--text", 8, "--image", 24, "--before", 2, "--backward", "--multiple", 4, "--labelled", 4]
    report = td.flops(sizes, td.HMGen("1:3"), 8, 24, before=2, backward=True, multiple=4, labelled=4)
    for more in ([], ["--counted"]):
        found = invoke(tmp_path, *tasks, *rest, "--json", *more)
        assert found.exit_code == 0, found.output
        assert json.loads(found.stdout) == json.loads(json.dumps(asdict(report)))
    printed = invoke(LLAVA, "--method", "HMGen", "--layers", "8:24:2", "--text", 64, "--image", 576)
    assert printed.exit_code == 0, printed.output
    lines = [" ".join(line.split()) for line in printed.stdout.splitlines()]
    whole = td.flops(LLAVA, td.HMGen("8:24:2"), 64, 576)
    assert f"all {whole.dense / 1e9:,.2f} {whole.dropped / 1e9:,.2f} {whole.ratio:.3f}" in lines
    assert any(line.startswith("each of 8 layers, 8 to 22 ") for line in lines)
    assert "scoring" not in printed.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere.json", "--method", "HiMix", "--text", 8, "--image", 8], "DecoderError"),
        ([LLAVA, "--method", "HiMix(", "--text", 8, "--image", 8], "MethodError"),
        ([LLAVA, "--method", "HiMix", "--layers", "40:", "--text", 8, "--image", 8], "LayerRangeError"),
        ([LLAVA, "--method", "PMoD", "--layers", "2:", "--text", 8, "--image", 8], "MethodError: PMoD has no layers"),
        ([LLAVA, "--method", "HiMix", "--text", -8, "--image", 8], "LayoutError"),
        ([LLAVA, "--method", "HiMix", "--text", 8, "--image", 8, "--multiple", 0], "MethodError"),
    ],
)
def test_the_command_refuses(args, message):
    found = invoke(*args)
    assert found.exit_code == 1
    assert found.stderr.startswith(message)
    assert "Traceback" not in found.output


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"model_type": "llama", "num_hidden_layers": "x"}', '{"model_type": 5}', "\0"]
)
def test_hostile_configs(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(td.DecoderError, match=r"can be made of|no model"):
        td.flops(tmp_path, td.HiMix(), text=8, image=8)


def test_a_7b_model_takes_little_memory():
    """32 GB of weights would not fit in the address space that this process allows itself."""
    code = (
        "import resource, tokendrop as td\n"
        "import transformers\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30),) * 2)\n"
        f"print(td.flops({LLAVA!r}, td.HiMix(), text=64, image=576, counted=True).ratio)\n"
    )
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert float(ran.stdout) == td.flops(LLAVA, td.HiMix(), text=64, image=576).ratio
