"""What inspection says of a model, from Python and from the command line."""

import json

import pytest
import torch
from families import FAMILIES, model
from helpers import llama, snapshot
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tokendrop as td
from tokendrop import methods
from tokendrop.analysis.inspection import CASES
from tokendrop.cli import app
from tokendrop.engine.model.from_config import model_from_config

ENCODER = ("DuetVLM, vision stage", "VisionZip", "VScan")


def said_by_apply(built, method):
    try:
        td.apply(built, method).remove()
    except td.TokenDropError as error:
        return str(error)
    return "yes"


def test_every_method_is_asked_for():
    assert {type(one).__name__ for one in CASES.values()} == set(methods.__all__)
    routes = [layer for one in CASES.values() for layer in one.route(3)]
    assert {layer.image for layer in routes} == set(td.Role)
    assert any(layer.renumber for layer in routes)
    assert {bool(layer.select and layer.select.merge) for layer in routes} == {True, False}


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_it_says_is_what_apply_does(name):
    built = model(name)
    found = td.inspect(built)
    assert found.support == {case: said_by_apply(built, method) for case, method in CASES.items()}


def test_a_llama():
    found = td.inspect(llama())
    assert (found.path, found.layer_class, found.attention) == ("model.layers", "LlamaDecoderLayer", "sdpa")
    assert found.num_layers == len(llama().model.layers)
    assert all(found.support[case].startswith("inspection finds 0 vision encoders") for case in ENCODER)
    assert {answer for case, answer in found.support.items() if case not in ENCODER} == {"yes"}
    lines = [line.split("  ", 1) for line in str(found).splitlines()]
    assert [(name, value.strip()) for name, value in lines[:4]] == [
        ("layers", "model.layers"), ("class", "LlamaDecoderLayer"), ("depth", str(found.num_layers)),
        ("attention", "sdpa"),
    ]  # fmt: skip
    assert {name: value.strip() for name, value in lines[4:]} == found.support


def test_layers_that_a_method_cannot_have_are_named_for_it_alone():
    found = td.inspect(model("gemma3"))
    assert found.support["PMoD"].startswith("PMoD(shift=0.5, most=0.85, least=0.15, gate=0.2) weighs what an FFN gives")
    assert [case for case, said in found.support.items() if said != "yes"] == ["PMoD", *ENCODER]


def test_nothing_is_changed():
    built = llama()
    before, random = snapshot(built), torch.get_rng_state()
    td.inspect(built)
    assert snapshot(built) == before
    assert torch.equal(torch.get_rng_state(), random)


def test_a_dropped_model_is_refused():
    built = llama()
    drop = td.apply(built, td.HiMix())
    with pytest.raises(td.AppliedError, match="LlamaForCausalLM is dropped already; inspect it before"):
        td.inspect(built)
    drop.remove()
    assert td.inspect(built).support["HiMix"] == "yes"


def test_no_decoder():
    with pytest.raises(td.DecoderError, match="Linear"):
        td.inspect(nn.Linear(2, 2))


@pytest.fixture
def config(tmp_path):
    sizes = {"vocab_size": 9, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
    LlamaConfig(**sizes, num_attention_heads=32, architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    return tmp_path


def test_a_config_makes_a_model_without_weights(config):
    made = model_from_config(str(config))
    assert isinstance(made, LlamaForCausalLM)
    assert all(parameter.is_meta for parameter in made.parameters())


def test_the_command(config):
    result = CliRunner().invoke(app, ["inspect", str(config), "--json"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.output) == {
        "path": "model.layers",
        "layer_class": "LlamaDecoderLayer",
        "num_layers": 32,
        "attention": "sdpa",
        "support": td.inspect(model_from_config(str(config))).support,
    }
    table = CliRunner().invoke(app, ["inspect", str(config / "config.json")])
    assert table.exit_code == 0, table.output
    assert all(case in table.output for case in CASES)


@pytest.mark.parametrize(("text", "message"), [(None, "does not exist"), ("{", "is no Hugging Face config")])
def test_the_command_refuses(tmp_path, text, message):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["inspect", str(path)])
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())


def test_an_architecture_that_transformers_does_not_have(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["NoSuchModel"]}')
    with pytest.raises(td.DecoderError, match="NoSuchModel"):
        model_from_config(str(tmp_path))
