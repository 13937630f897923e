"""`tokendrop bench`: the user's own model by name, its files, and what it says when something is wrong."""

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.cli import app
from tokendrop.cli.source import read_source
from tokendrop.engine.model import context

MODULE = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import tokendrop as td

IMAGE = torch.tensor([4 <= at < 8 or 10 <= at < 16 for at in range(24)])

def made():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    ids = torch.randint(1, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :18] = -100
    batch = {"input_ids": ids, "labels": labels}
    return model, [batch], lambda one: td.TokenLayout(IMAGE.expand(2, -1), "vqa", labels=one["labels"])

def with_a_loss():
    model, batches, layout = made()
    return model, batches, layout, lambda one: 2 * model(**one).loss

def one_batch():
    model, (batch,), layout = made()
    return model, batch, layout

def loss_raises(): return *made(), lambda one: one["nope"]
def no_batches(): return made()[0], [], made()[2]
def no_layout(): return *made()[:2], lambda one: None
def frozen(): return made()[0].requires_grad_(False), *made()[1:]
def wrong_order(): return made()[::-1]
def raises(): raise ValueError("boom")
def takes_one(one): return made()
"""
REFUSED = {
    "loss_raises": ("SourceError", "raised KeyError: 'nope' (users_bench.py, line"),
    "no_batches": ("LayoutError", "0 batches of a list"),
    "no_layout": ("LayoutTypeError", "expected a TokenLayout; found NoneType"),
    "frozen": ("TaskLossError", "no trained parameter"),
    "wrong_order": ("SourceError", "returned (function, list, LlamaForCausalLM); expected (model, batches, layout)"),
    "raises": ("SourceError", "raised ValueError: boom (users_bench.py, line"),
    "takes_one": ("SourceError", "expected a function of no arguments"),
    "other": ("SourceError", "has no attribute 'other'"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "users_bench.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("users_bench", None)


def run(name, *given, methods=("HiMix",)):
    chosen = [part for one in methods for part in ("--method", one)]
    return CliRunner().invoke(app, ["bench", f"users_bench:{name}", *chosen, "--rounds", "1", *given])


def test_it_says_what_td_benchmark_says(tmp_path):
    result = run("made", "--json", "--out", "said", methods=["HiMix", "vqa=HMGen('1:3')"])
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)["rows"]
    model, batches, layout, loss = read_source("users_bench:made")
    wanted = td.benchmark(model, batches, layout, [td.HiMix(), {"vqa": td.HMGen("1:3")}], loss, rounds=1).rows
    same = ("method", "part", "flops", "dense_flops", "flops_ratio", "kept_ratio", "memory", "dense_memory", "setup")
    assert [[row[key] for key in same] for row in said] == [[row[key] for key in same] for row in wanted]
    assert [json.loads(line) for line in (tmp_path / "said" / "rows.jsonl").read_text().splitlines()] == said
    page = (tmp_path / "said" / "report.html").read_text()
    assert page.count('src="data:image/png') == 1
    assert "vqa=HMGen(shallow=&#39;1:3&#39;)" in page


def test_a_table_and_only_what_is_missing_is_run():
    first, second = run("made"), run("made", methods=["HiMix", "Drop(':', keep=0.5, score='norm', then='gone')"])
    assert "…" not in first.stdout + second.stdout  # nothing is cut off
    assert "HiMix()" in first.stdout
    assert "n = 1 rounds" in " ".join(first.stdout.split())
    assert first.stderr.splitlines()[0] == "1 of 1: HiMix()"
    assert second.stderr.splitlines()[0] == "1 of 1: Drop(layers=':', keep=0.5, score='norm', then='gone')"
    assert "1 of the methods had rows there and were not run again" in " ".join(second.stderr.split())


@pytest.mark.parametrize("name", ["with_a_loss", "one_batch"])
def test_what_works_all_the_same(name):
    found, plain = (json.loads(run(one, "--json", "--out", one).stdout)["rows"] for one in (name, "made"))
    assert [row["flops_ratio"] for row in found] == pytest.approx([row["flops_ratio"] for row in plain], rel=1e-3)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(tmp_path, name):
    result = run(name)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    error, message = REFUSED[name]
    assert line.startswith(f"{error}: ")
    assert message in line
    assert result.stdout == ""
    assert not (tmp_path / "bench").exists()


@pytest.mark.parametrize("method", ["HiMx", "vqa=HiMx", "HiMix('9:')"])
def test_a_wrong_method(tmp_path, method):
    result = run("made", methods=["HMGen('1:3')", method])
    assert result.exit_code == 1
    assert result.stderr.startswith(("MethodError: ", "LayerRangeError: "))
    assert not (tmp_path / "bench").exists()


def test_layers_are_for_methods_that_name_none():
    found = run("made", "--layers", "2:", "--json", methods=["HiMix('3:')", "HiMix"])
    named = [row["method"] for row in json.loads(found.stdout)["rows"]]
    assert list(dict.fromkeys(named)) == ["HiMix(layers='3:')", "HiMix(layers='2:')"]
    refused = run("made", "--layers", "2:", methods=["HiMix", "SVDPrune"])
    assert refused.exit_code == 1
    (line,) = refused.stderr.strip().splitlines()
    assert line.startswith("MethodError: SVDPrune has no layers of its own to choose, and found --layers 2:")


def test_a_model_that_is_not_equal_to_the_reference_is_reported_only_where_asked(tmp_path, monkeypatch):
    update = context.ContextKeys.update

    def reversed_update(self, keys, values, *_):
        k, v = update(self, keys, values)
        rows = keys.shape[2]
        return (torch.cat([x[:, :, :-rows].flip(2), x[:, :, -rows:]], 2) for x in (k, v))

    monkeypatch.setattr(context.ContextKeys, "update", reversed_update)
    refused = run("made")
    assert refused.exit_code == 1
    assert refused.stderr.startswith("UnsupportedError: ")
    assert "not equal to the reference" in refused.stderr
    assert "--unchecked" in refused.stderr
    assert not (tmp_path / "bench").exists()
    unchecked = run("made", "--unchecked")
    assert unchecked.exit_code == 0
    assert "Not compared with the reference" in " ".join(unchecked.stdout.split())
