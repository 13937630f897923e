"""What `inspect` and `flops` take as a model: a folder, a config file, a name that was tried, or a function."""

import json
import re
import sys

import pytest
from transformers import LlamaConfig
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.cli import app
from tokendrop.engine.model.from_config import model_from_config, presets

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 3}
MODULE = f"""
import torch
from transformers import LlamaConfig, LlamaForCausalLM

def config():
    return LlamaConfig(**{SIZES!r}, architectures=["LlamaForCausalLM"])

def model(): return LlamaForCausalLM(config())
def source(): return model(), [], None
def path(): return "folder"
def nothing(): return None
def empty(): return ()
def text(): return "no/such/file"
def raises(): return 1 / 0
"""
FLOPS = ["--method", 'HMGen("1:2")', "--text", "8", "--image", "24", "--json"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "folder")
    (tmp_path / "shapes.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    sys.modules.pop("shapes", None)


def run(*given):
    return CliRunner().invoke(app, list(given))


@pytest.mark.parametrize(
    "name", ["folder", "folder/config.json", "shapes:model", "shapes:config", "shapes:source", "shapes:path"]
)
def test_every_way_to_name_a_model_says_the_same(name):
    found = run("inspect", name, "--json")
    assert found.exit_code == 0, found.output
    said = json.loads(found.stdout)
    assert (said["path"], said["layer_class"], said["num_layers"]) == ("model.layers", "LlamaDecoderLayer", 3)
    counted = run("flops", name, *FLOPS)
    assert counted.exit_code == 0, counted.output
    report = td.flops(LlamaConfig(**SIZES, architectures=["LlamaForCausalLM"]), td.HMGen("1:2"), text=8, image=24)
    assert json.loads(counted.stdout)["dropped"] == report.dropped


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shapes:nothing", "DecoderError: NoneType is neither a model"),
        ("shapes:empty", "DecoderError: tuple is neither a model"),
        ("shapes:text", "DecoderError: 'no/such/file' does not exist here"),
        ("shapes:raises", "SourceError: 'shapes:raises' raised ZeroDivisionError: division by zero (shapes.py, line"),
        ("shapes:other", "has no attribute 'other'"),
        ("shapes.py:model", "write shapes:model"),
        ("no.module:model", "No module named 'no'"),
        (".", "is no Hugging Face config"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "flops"])
def test_what_is_no_model_is_one_line(command, name, message):
    result = run(command, name, *(FLOPS if command == "flops" else []))
    assert isinstance(result.exception, SystemExit)
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert message in line


def test_a_hub_name_is_not_downloaded_and_the_configs_that_were_tried_are_named():
    result = run("inspect", "llava-hf/llava-1.5-7b-hf")
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert "'llava-hf/llava-1.5-7b-hf' does not exist here, and nothing is downloaded" in line
    assert "config that was tried: emu3, janus-pro-7b, llava-1.5-7b, qwen2.5-vl-7b, vila-u-like" in line


@pytest.mark.parametrize("name", presets())
def test_the_configs_that_were_tried_are_there_by_name(name):
    said = json.loads(run("inspect", name, "--json").stdout)
    assert said["num_layers"] == td.inspect(model_from_config(str(presets()[name]))).num_layers
    assert said["support"]["HiMix"] == "yes"


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("HMGen(8:24:2)", "write 'HMGen(\"8:24:2\")'"),
        ("hmgen(shallow=8:24:2, separate=shared)", 'write \'HMGen(shallow="8:24:2", separate="shared")\''),
        ("Drop(:, keep=0.5, score=norm)", 'write \'Drop(":", keep=0.5, score="norm")\''),
        ("g=HMGen( 8: )", "write 'HMGen(\"8:\")'"),
        ("HiMx", "write 'HiMix'"),
        ("hi-mix", "write 'HiMix'"),
        ("fast v(2, 0.5)", "write 'FastV(2, 0.5)'"),
        ("NoSuch", "write one of CDPruner, DART, DivPrune, Drop, DuetVLM"),
        ("HMGen(a:b)", "write one of CDPruner, DART, DivPrune, Drop, DuetVLM"),
    ],
)
def test_a_method_that_is_none_says_what_to_type(text, advice):
    result = run("flops", "folder", "--method", text, *FLOPS[2:])
    assert result.exit_code == 1
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("MethodError: ")
    assert advice in line
    if "write '" in advice:
        typed = re.search("write '(.*)'", advice).group(1)
        assert run("flops", "llava-1.5-7b", "--method", typed, *FLOPS[2:]).exit_code == 0


@pytest.mark.parametrize("text", ['hmgen("1:2")', "HMGEN('1:2')", "hMgEn(shallow='1:2')"])
def test_a_methods_name_may_be_in_whatever_case(text):
    assert run("flops", "folder", "--method", text, *FLOPS[2:]).stdout == run("flops", "folder", *FLOPS).stdout
