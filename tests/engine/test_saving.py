"""`save_pretrained`, `from_pretrained` and torch's distributed checkpoints of a dropped model."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import MIXED, batch, dropped, engine_step, llama, same, step
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import LlamaForCausalLM

import tokendrop as td

MADE = batch(*MIXED, side="left")
PLAIN = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}
SEPARATE = {"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task")}


def test_save_pretrained_writes_the_model_as_it_would_be_without(tmp_path):
    base = llama()
    model, _ = dropped(base, PLAIN)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(base.state_dict())
    assert same(step(loaded, MADE), step(base, MADE))


def test_save_pretrained_with_added_projections_and_back(tmp_path):
    model, drop = dropped(llama(), SEPARATE)
    model.save_pretrained(tmp_path, state_dict=drop.dense_state_dict())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    again = td.apply(loaded, SEPARATE)
    again.layers.load_state_dict(drop.layers.state_dict())
    assert same(engine_step(loaded, again, MADE), engine_step(model, drop, MADE))


def test_save_pretrained_of_everything_says_what_a_dense_model_ignores(tmp_path):
    model, drop = dropped(llama(), SEPARATE)
    model.save_pretrained(tmp_path)
    loaded, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    added = {key for key in model.state_dict() if key.startswith("tokendrop.")}
    assert set(info["unexpected_keys"]) == added
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in drop.dense_state_dict().items())


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("methods", [PLAIN, SEPARATE], ids=["none", "per-task"])
def test_a_distributed_checkpoint_has_the_same_keys_and_comes_back(methods, tmp_path):
    base = llama()
    model, drop = dropped(base, methods)
    state = get_model_state_dict(model)
    assert [key for key in state if not key.startswith("tokendrop.")] == list(get_model_state_dict(base))
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    other, again = dropped(llama(seed=3), methods)
    state = get_model_state_dict(other)
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(other, state)
    assert same(engine_step(other, again, MADE), engine_step(model, drop, MADE))
