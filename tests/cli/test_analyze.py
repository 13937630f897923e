"""`tokendrop analyze`: the user's model by name, its files, and what it says when there is nothing to look at."""

import ast
import functools
import itertools
import json
import re
import sys

import pytest
import yaml
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.analysis.report import Section, render
from tokendrop.cli import app
from tokendrop.cli.source import SourceError, read_source
from tokendrop.study import study
from tokendrop.study.study import Study

MODULE = """
import lightning as L
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import tokendrop as td

def made():
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes))
    ids = torch.randint(1, 50, (2, 24), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:, :18] = -100
    batch = {"input_ids": ids, "labels": labels}
    return model, [batch], lambda one: td.TokenLayout(torch.arange(24).expand(2, -1) < 14, "vqa", labels=one["labels"])

def with_batches(batches, layout=None, loss=None):
    model, (batch,), given = made()
    return model, batches(batch), layout or given, *([loss(model)] if loss else [])

class Module(L.LightningModule):
    def __init__(self, automatic=True):
        super().__init__()
        self.model, self.seen = made()[0], []
        self.automatic_optimization = automatic

    def training_step(self, batch, batch_idx):
        self.seen.append((sorted(batch), batch_idx))
        loss = self.model(**batch).loss
        self.log("loss", loss)
        self.log_dict({"also": loss})
        return {"loss": loss}

class OneArgument(Module):
    def training_step(self, batch):
        return super().training_step(batch, 0)["loss"]

def module():
    batch = made()[1][0] | {"task": "vqa"}
    return Module(), [batch], made()[2]

def one_argument():
    return OneArgument(), *made()[1:]

def by_hand():
    return Module(automatic=False), *made()[1:]

def layout_of(tasks, image=14):
    return lambda one: td.TokenLayout(torch.arange(24).expand(2, -1) < image, tasks, labels=one["labels"])

def one_batch(): return with_batches(lambda one: one)
def no_batches(): return with_batches(lambda one: [])
def a_loader(): return with_batches(lambda one: iter([one]))
def a_task_in_the_batch(): return with_batches(lambda one: [one | {"task": "vqa"}])
def batches_on_meta(): return with_batches(lambda one: [{key: value.to("meta") for key, value in one.items()}])
def batches_of_text(): return with_batches(lambda one: "ab")
def mixed(): return with_batches(lambda one: [one], layout_of(("u", "g")))
def no_images(): return with_batches(lambda one: [one], layout_of("u", 0))
def no_layout(): return with_batches(lambda one: [one], lambda one: None)
def layout_without_arguments(): return with_batches(lambda one: [one], lambda: None)
def layout_raises(): return with_batches(lambda one: [one], lambda one: one["nope"])
def layout_of_other_tokens(): return with_batches(lambda one: [one], lambda one: td.TokenLayout(torch.ones(2, 9) > 0))
def layout_of_other_rows(): return with_batches(lambda one: [one], lambda one: td.TokenLayout(torch.ones(3, 24) > 0))
def no_labels(): return with_batches(lambda one: [{"input_ids": one["input_ids"]}], lambda one: layout_of("u")(
    {"labels": None}))
def loss_of_two(): return with_batches(lambda one: [one], loss=lambda model: lambda batch, more: 0)
def loss_of_none(): return with_batches(lambda one: [one], loss=lambda model: lambda: 0)
def loss_is_a_number(): return with_batches(lambda one: [one], loss=lambda model: lambda one: model(**one).loss.item())
def loss_without_the_model(): return with_batches(lambda one: [one], loss=lambda model: lambda one: torch.ones(1))
def loss_runs_it_twice(): return with_batches(
    lambda one: [one], loss=lambda model: lambda one: model(**one).loss + model(**one).loss)
def loss_raises(): return with_batches(lambda one: [one], loss=lambda model: lambda one: one["nope"])
def outputs_as_loss(): return with_batches(lambda one: [one], loss=lambda model: lambda one: model(**one))
def frozen(): return made()[0].requires_grad_(False), *made()[1:]
def meta(): return made()[0].to("meta"), *made()[1:]
def dropped():
    found = made()
    td.apply(found[0], td.HiMix())
    return found
def experts():
    found = made()
    found[0].model.layers[1].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    return found
def no_decoder(): return torch.nn.Linear(2, 2), *made()[1:]
def wrong_order(): return made()[::-1]
def raises(): raise ValueError("[red]boom\\nnext")
def takes_one(one): return made()
def nothing(): return None

secret = 3
"""

# What is analysed all the same, and what is refused: the error's name and a part of its one line.
WORKS = ["module", "one_argument", "one_batch", "a_loader", "a_task_in_the_batch", "outputs_as_loss"]
REFUSED = {
    "by_hand": ("UnsupportedError", "Module optimises by hand"),
    "no_batches": ("LayoutError", "0 batches of a list; give a few of each task"),
    "batches_on_meta": ("LayoutError", "on the meta device"),
    "batches_of_text": ("LayoutTypeError", "found 'ab'"),
    "mixed": ("LayoutError", "the tasks ['g', 'u'] with 28 image tokens"),
    "no_images": ("LayoutError", "with 0 image tokens"),
    "no_layout": ("LayoutTypeError", "expected a TokenLayout; found NoneType"),
    "layout_without_arguments": ("MethodError", "layout: expected a function of (batch)"),
    "layout_raises": ("SourceError", "raised KeyError: 'nope' (users_model.py, line"),
    "layout_of_other_tokens": ("LayoutError", "has 24 rows, and the layout 9 tokens"),
    "layout_of_other_rows": ("LayoutError", "looks at 2 x 24 tokens, and the layout has (3, 24)"),
    "no_labels": ("TaskLossError", "CausalLMOutputWithPast without a loss; put labels into it"),
    "loss_of_two": ("MethodError", "loss: expected a function of (batch)"),
    "loss_of_none": ("MethodError", "too many positional arguments"),
    "loss_is_a_number": ("TaskLossError", "expected a tensor of one number"),
    "loss_without_the_model": ("UnsupportedError", "the layers [0, 1, 2, 3] did not run"),
    "loss_runs_it_twice": ("UnsupportedError", "layer 0 ran twice"),
    "loss_raises": ("SourceError", "raised KeyError: 'nope' (users_model.py, line"),
    "frozen": ("TaskLossError", "no trained parameter"),
    "meta": ("UnsupportedError", "on the meta device"),
    "dropped": ("AppliedError", "call remove()"),
    "experts": ("UnsupportedError", "a budget is of FLOPs"),
    "no_decoder": ("DecoderError", "Linear"),
    "wrong_order": ("SourceError", "returned (function, list, LlamaForCausalLM); expected (model, batches, layout)"),
    "raises": ("SourceError", "raised ValueError: [red]boom next (users_model.py, line"),
    "takes_one": ("SourceError", "expected a function of no arguments"),
    "Module": ("SourceError", "returned Module; expected (model, batches, layout)"),
    "secret": ("SourceError", "found int 3"),
}


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "users_model.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("def made(:")
    (tmp_path / "dependent.py").write_text("import no_such_package")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "users_model"
    sys.modules.pop("users_model", None)


def test_a_users_model(module, tmp_path):
    result = CliRunner().invoke(app, ["analyze", f"{module}:made", "--budget", "0.7", "--out", "said"])
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "said" / "analysis.json").read_text())
    assert list(said["allocation"]["share"]) == list(said["advice"]["plans"]) == ["vqa"]
    assert all(plan["flops_ratio"] <= 0.7 for plan in said["advice"]["plans"]["vqa"])
    code = re.search(r"import tokendrop as td.*?\}\)\n", result.output, re.DOTALL).group()
    ast.parse(code)
    assert said["advice"]["plans"]["vqa"][0]["method"] in code
    assert "class_path: tokendrop.TokenDrop" in result.output
    page = (tmp_path / "said" / "report.html").read_text()
    assert page.count('src="data:image/png') == 1
    assert "callback = td.TokenDrop({" in page.replace("&#39;", "'")


@functools.cache
def as_made(module):
    return CliRunner().invoke(app, ["analyze", f"{module}:made", "--budget", "0.9", "--json"]).stdout


def without_seconds(text):
    said = json.loads(text)
    for plan in itertools.chain(*said["advice"]["plans"].values()):
        assert plan.pop("seconds_ratio") > 0
    return said


@pytest.mark.parametrize("name", WORKS)
def test_what_works_all_the_same(module, tmp_path, name):
    result = CliRunner().invoke(app, ["analyze", f"{module}:{name}", "--budget", "0.9", "--json"])
    assert result.exit_code == 0, result.output
    assert without_seconds(result.stdout) == without_seconds(as_made(module))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(module, tmp_path, name):
    result = CliRunner().invoke(app, ["analyze", f"{module}:{name}", "--budget", "0.9"])
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    error, message = REFUSED[name]
    assert line.startswith(f"{error}: ")
    assert message in line
    assert result.stdout == ""
    assert not (tmp_path / "analysis").exists()


def test_a_lightning_module_is_run_as_it_is_trained_and_logs_nothing(module):
    pl_module, batches, layout, _ = read_source(f"{module}:module")
    td.attention_allocation(pl_module, batches, layout).advise(0.9)
    assert {tuple(keys) for keys, _ in pl_module.seen} == {("input_ids", "labels")}
    assert {index for _, index in pl_module.seen} == {0}
    assert not {"log", "log_dict"} & vars(pl_module).keys()


def test_a_file_in_the_way_is_seen_before_anything_runs(module, tmp_path):
    (tmp_path / "said").write_text("")
    result = CliRunner().invoke(app, ["analyze", f"{module}:raises", "--out", "said"])
    assert result.exit_code == 1
    assert result.stderr.startswith("NotADirectoryError: --out said")


def test_the_demos_model(monkeypatch, tmp_path):
    sizes = {"codes": 16, "hidden": 16, "layers": 4, "heads": 2, "shallow": "1:3:2", "steps": 2, "batch_size": 4}
    monkeypatch.setattr(study, "QUICK", Study(**sizes))
    given = ["analyze", "--quick", "--json", "--budget", "0.8", "--out", str(tmp_path)]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert set(said["allocation"]["share"]) == {"understanding", "generation"}
    assert set(said["advice"]["plans"]) == {"understanding", "generation"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no.such.module:made", "No module named"),
        ("users_model:other", "has no attribute 'other'"),
        ("users_model", "expected package.module:function"),
        ("users_model:nothing", "returned NoneType"),
        ("users_model:a.b", "expected package.module:function"),
        ("./users_model.py:made", "write users_model:made"),
        (":made", "expected package.module:function"),
        ("users_model:", "expected package.module:function"),
        ("", "expected package.module:function"),
        ("broken:made", "raised SyntaxError"),
        ("dependent:made", "No module named 'no_such_package'"),
    ],
)
def test_a_name_that_leads_nowhere(module, tmp_path, name, message):
    result = CliRunner().invoke(app, ["analyze", name])
    assert result.exit_code == 1
    assert message in re.sub(r"\s+", " ", result.output)
    assert not (tmp_path / "analysis").exists()
    with pytest.raises(SourceError):
        read_source(name)


def test_a_budget_that_makes_no_sense(module, tmp_path):
    result = CliRunner().invoke(app, ["analyze", f"{module}:made", "--budget", "2"])
    assert result.exit_code == 1
    assert "budget=2.0" in result.output
    assert not (tmp_path / "analysis").exists()


def test_the_yaml_of_the_readme_form(module):
    model, batches, layout, _ = read_source(f"{module}:made")
    advice = td.attention_allocation(model, batches, layout).advise(0.7)
    (callback,) = yaml.safe_load(advice.yaml())["trainer"]["callbacks"]
    assert set(callback["init_args"]["methods"]) == {"vqa"}


def test_code_in_a_report_is_escaped():
    assert '<pre class="wide">&lt;b&gt;</pre>' in render("t", [Section("s", code="<b>")])
