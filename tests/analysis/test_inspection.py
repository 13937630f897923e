"""What inspection says of a model, from Python and from the command line."""

import json

import pytest
from families import FAMILIES, model
from helpers import llama
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.cli import app
from tokendrop.engine.model.from_config import model_from_config

CASES = ["HiMix", "HMGen", "Drop, rejoin", "Drop, gone", "Drop, attend", "Drop by attention", "image-only projections"]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_what_it_says_is_what_apply_does(name):
    built = model(name)
    found = td.inspect(built)
    assert list(found.support) == CASES
    by_attention = td.Drop(":", 0.5, "attention")
    methods = {"HiMix": td.HiMix(), "HMGen": td.HMGen("0:1"), "Drop by attention": by_attention}
    for case, method in methods.items():
        try:
            td.apply(built, method).remove()
            refusal = "yes"
        except td.TokenDropError as error:
            refusal = str(error)
        assert found.support[case] == refusal


def test_a_llama():
    found = td.inspect(llama())
    assert (found.path, found.layer_class, found.attention) == ("model.layers", "LlamaDecoderLayer", "sdpa")
    assert found.num_layers == len(llama().model.layers)
    assert set(found.support.values()) == {"yes"}


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
        "support": dict.fromkeys(CASES, "yes"),
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
