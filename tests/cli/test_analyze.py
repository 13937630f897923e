"""`tokendrop analyze`: the user's model by name, its files, and what it says when there is nothing to look at."""

import ast
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

def nothing():
    return None

secret = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "users_model.py").write_text(MODULE)
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
