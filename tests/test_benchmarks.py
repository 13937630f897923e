"""The benchmarks do what they say: what a GPU's machine can import, what a cache holds, where a run goes on.

Shape letters: B batch, T tokens, N new tokens, D hidden, L layers.
"""

import ast
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import decode, scale, table  # noqa: E402
from benchmarks.gpu import step, tests  # noqa: E402
from benchmarks.train import step as train_step  # noqa: E402
from benchmarks.train.cases import Sizes, decoder, methods  # noqa: E402

# What comes with torch, transformers, lightning, torchmetrics, pytest and hypothesis.
THERE = {"torch", "triton", "transformers", "lightning", "torchmetrics", "pytest", "hypothesis", "numpy", "_pytest"}
THERE |= {"yaml", "safetensors", "packaging", "tqdm", "typing_extensions", "jinja2", "tokenizers", "huggingface_hub"}
THERE |= {"lightning_utilities", "_hypothesis", "tokendrop", "benchmarks", "rich", "typer", "typing"}
OURS = {file.stem: file for file in (ROOT / "tests").rglob("*.py")}


def named(file):
    """Top-level names of all that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


def missing(file, seen=frozenset()):
    """What a file, and what it imports of the tests, needs beyond what is there."""
    names = set(named(file))
    found = names - THERE - sys.stdlib_module_names - OURS.keys()
    for name in names & OURS.keys() - seen:
        found |= missing(OURS[name], seen | {name, file.stem})
    return found


@pytest.mark.parametrize("file", tests.selected())
def test_what_a_gpu_runs_imports_nothing_that_it_lacks(file):
    path = ROOT / file
    assert missing(path) == set()
    above = [folder / "conftest.py" for folder in path.parents if folder.is_relative_to(ROOT / "tests")]
    assert not set().union(*(missing(one) for one in above if one.exists()))


def test_what_is_left_out_is_there():
    assert all((ROOT / file).exists() for file in tests.LEFT_OUT + tests.FIRST + tests.REHEARSED)
    assert {missing(ROOT / file) != set() or "kernels" in file for file in tests.LEFT_OUT} == {True}
    assert set(tests.REHEARSED) <= set(tests.selected())
    assert len(tests.selected()) > 30


@pytest.mark.parametrize("rehearse", [False, True])
def test_every_method_fits_the_sizes_it_is_measured_at(rehearse):
    plans = list(step.plan(rehearse))
    for sizes, names, _ in plans:
        made = methods(sizes)
        assert names
        assert all(len(made[name][0].route(sizes.layers)) == sizes.layers for name in names)
    assert {sizes.attention for sizes, _, _ in plans} == {"sdpa", *step.BACKENDS}
    assert {sizes.dtype for sizes, _, unchecked in plans if not unchecked} == {"float32", "bfloat16"}


def test_a_device_whose_peak_is_known(monkeypatch):
    """MFU is of the FLOPs that a provider really runs, and stands in a row of its own."""
    monkeypatch.setattr(train_step, "available_flops", lambda dtype: 1e9)
    sizes = Sizes(layers=4, width=32, head=16, tokens=32, vocabulary=16)
    rows = train_step.measure(decoder(sizes), sizes, ["HMGen middle"], "cpu", 1, unchecked=True)
    assert {row["provider"] for row in rows} == {"dense", "HMGen middle"}
    of = {(row["provider"], row["metric"]): row["median"] for row in rows}
    ratio = of["HMGen middle", "MFU"] / of["dense", "MFU"]
    assert ratio == pytest.approx(of["HMGen middle", "FLOPs ratio"] / of["HMGen middle", "time ratio"], rel=1e-6)


@pytest.mark.parametrize("layers", [4, 8, 12])
def test_methods_of_any_depth(layers):
    sizes = Sizes(layers=layers)
    assert {len(one.route(layers)) for one, _ in methods(sizes).values()} == {layers}


SMALL = Sizes(layers=4, width=32, head=8, tokens=16, vocabulary=50, batch=2)


def test_what_a_cache_holds_by_hand(tmp_path):
    """Keys and values of T + N - 1 tokens in L layers; under HMGen's middle layer 3 image tokens of 4 fewer."""
    base, new = decoder(replace(SMALL, tokens=20)).eval(), 4
    found = decode.measure(base, SMALL, methods(SMALL)["HMGen middle"][0], new, 1, "cpu")
    token, layer = 2 * 2 * 32 * 4, SMALL.tokens + new - 1
    assert found[False][0].cache == token * 4 * layer
    holes = 12 * token  # 12 of 16 tokens are the image's; its layer notes the positions of those of the prompt that it holds
    notes = 2 * (SMALL.tokens - 12) * (8 + 1)
    assert found[True][0].cache == token * 4 * layer - holes + notes
    assert min(found[True][0].prefill, found[True][0].decode) > 0
    rows = decode.rows_of(found, "HMGen middle", SMALL, new, decode.environment())
    figures = {(row["provider"], row["metric"]): row["median"] for row in rows}
    run, dense = found[True][0], found[False][0]
    assert figures["HMGen middle", "tokens per second"] == 2 * (new - 1) / run.decode
    assert figures["HMGen middle", "decode time ratio"] == run.decode / dense.decode
    assert figures["dense beside HMGen middle", "cache ratio"] == 1
    decode.append(tmp_path / "rows.jsonl", rows)
    ((provider, _), *_) = sorted(decode.known(tmp_path / "rows.jsonl"), reverse=True)
    assert provider == "dense beside HMGen middle"
    assert decode.known(tmp_path / "none.jsonl") == set()


def test_new_tokens_are_those_of_generate():
    base, ids = decoder(replace(SMALL, tokens=20)).eval(), torch.randint(50, (2, 16))
    assert decode.generate(base, None, ids, None, 3).cache == 2 * 2 * 32 * 4 * 4 * 18


def test_scale_by_hand():
    """A model of 1e9 parameters, 1e7 of a layer and 1e8 of embeddings and head, on 64 GPUs."""
    found = scale.paper((10**9, 10**7, 10**8), kept=1e9, flops=1e13, gpus=64)
    assert found["states"] == 4 * 4 * 1e9 / 64
    assert found["gathered"] == 2 * 10**7 * 2 + 2 * 10**8
    assert found["samples"] == (80e9 - 0.25e9 - 0.24e9) // 1e9
    assert found["communication"] == (2 + 2 + 2) * 1e9 * 63 / 64
    assert found["hidden from"] == pytest.approx(6e9 * 56 / 64 / 400e9 * 989e12 / 1e13)
    assert found["MFU bound"] == pytest.approx(min(1, 79 / found["hidden from"]))
    near = scale.paper((10**9, 10**7, 10**8), kept=1e9, flops=1e13, gpus=8)
    assert near["hidden from"] == pytest.approx(5.25e9 / 450e9 * 989e12 / 1e13)
    assert scale.paper((10**11, 10**9, 10**9), kept=1e9, flops=1e13, gpus=8)["samples"] == 0


def test_activations_are_those_of_a_real_run(monkeypatch):
    """The bytes without memory are those that `saved_bytes` finds with it."""
    from tokendrop.analysis.memory import saved_bytes

    for name, value in {"TEXT": 24, "IMAGE": 40, "BEFORE": 8}.items():
        monkeypatch.setattr(scale, name, value)
    sizes = scale.config("7B", hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=50, head_dim=8)  # fmt: skip
    model = scale.AutoModelForCausalLM.from_config(sizes, dtype=torch.bfloat16).train()
    ids, image = torch.ones(1, 64, dtype=torch.int64), torch.arange(64)[None]
    image = (image >= 8) & (image < 48)
    labels = ids.masked_fill(torch.arange(64)[None] < 49, -100)
    own = list(model.parameters())
    dense = saved_bytes(lambda: model(input_ids=ids, labels=labels, use_cache=False).loss, own)
    assert scale.activations(sizes, None) == dense
    drop = scale.td.apply(model, scale.td.HiMix())
    with drop.layout(scale.td.TokenLayout(image, labels=labels)):
        dropped = saved_bytes(lambda: model(input_ids=ids, labels=labels, use_cache=False).loss, own)
    # Index tensors of the plan are real there, and shared.
    assert scale.activations(sizes, scale.td.HiMix()) == pytest.approx(dropped, rel=0.02)
    assert dropped < 0.75 * dense


def test_the_committed_scale_follows_its_formulas():
    found = table.on_paper()
    assert set(found) == {(shape, name) for shape in scale.SHAPES for name in scale.METHODS}
    for (shape, _), of in found.items():
        counts = scale.parameters(scale.config(shape))
        assert of["parameters", 0] == counts[0]
        for gpus in scale.GPUS:
            for metric, value in scale.paper(counts, of["activations", 0], of["computed FLOPs", 0], gpus).items():
                assert of[metric, gpus] == pytest.approx(value)
    sizes, method = scale.config("7B"), scale.METHODS["HiMix"](32)
    more = {"before": scale.BEFORE, "multiple": 64, "backward": True}
    report = scale.td.flops(sizes, method, scale.TEXT, scale.IMAGE, **more)
    assert found["7B", "HiMix"]["computed FLOPs", 0] == report.computed_dropped
    assert found["7B", "dense"]["computed FLOPs", 0] == report.computed_dense
    assert table.MEMORY == scale.MEMORY
