"""`save_pretrained`, `from_pretrained`, checkpoints and pickles of a dropped model, and of parts of it."""

import io
import pickle
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import MIXED, batch, dropped, engine_step, llama, perturbed, same, step
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from transformers import LlamaForCausalLM

import tokendrop as td

MADE = batch(*MIXED, side="left")
PLAIN = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}
PARTS = {"u": td.HiMix("1:", "shared", "kv+norm"), "g": td.HMGen("1:3", "per-task", "qkv+o+norm+ffn")}
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
@pytest.mark.parametrize("methods", [PLAIN, SEPARATE, PARTS], ids=["none", "per-task", "parts"])
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


def trained(folder, **options):
    """A dropped model whose image-only projections are unlike the text's, saved."""
    model = llama()
    drop = td.apply(model, SHARED)
    with torch.no_grad():
        for p in drop.layers.parameters():
            p.add_(1.0)
    model.save_pretrained(folder, **options)
    return drop.layers.state_dict()


SHARED = td.HiMix(separate="shared")


def holds(state, expected):
    return state.keys() == expected.keys() and all(torch.equal(value, expected[key]) for key, value in state.items())


def cache(tmp_path, monkeypatch):
    """The hub's cache as it lies on a disk after a download."""
    (tmp_path / "models--me--dropped" / "refs").mkdir(parents=True)
    (tmp_path / "models--me--dropped" / "refs" / "v1").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return tmp_path / "models--me--dropped" / "snapshots"


def of_the_hub(folder, revision="v1", **options):
    options |= {"cache_dir": folder, "local_files_only": True, "revision": revision}
    return LlamaForCausalLM.from_pretrained("me/dropped", **options)


@pytest.mark.parametrize("size", ["5GB", "20KB"], ids=["one file", "shards"])
def test_a_model_of_the_hubs_cache_has_what_was_saved(tmp_path, monkeypatch, size):
    expected = trained(cache(tmp_path, monkeypatch) / ("a" * 40), max_shard_size=size)
    assert holds(td.apply(of_the_hub(tmp_path), SHARED).layers.state_dict(), expected)


def test_of_several_revisions_none_is_taken(tmp_path, monkeypatch):
    """Nothing says which one a model was loaded from, and a frozen decoder is the same in all."""
    snapshots = cache(tmp_path, monkeypatch)
    for one in "ab":
        trained(snapshots / (one * 40))
    with pytest.warns(td.NoEffectWarning, match=r"has 2 revisions of me/dropped, 2 with such .* revision=\.\.\."):
        drop = td.apply(of_the_hub(tmp_path, "b" * 40), SHARED)
    assert holds(drop.layers.state_dict(), td.apply(llama(), SHARED).layers.state_dict())


@pytest.mark.parametrize("where", ["no model beside it", "a dense model beside it", "the hub"])
def test_a_subfolder_that_has_them_is_said(tmp_path, monkeypatch, where):
    folder = cache(tmp_path, monkeypatch) / ("a" * 40) if where == "the hub" else tmp_path
    expected = trained(folder / "final")
    if where == "a dense model beside it":
        llama().save_pretrained(folder)
    hub = where == "the hub"
    made = (
        of_the_hub(tmp_path, subfolder="final") if hub else LlamaForCausalLM.from_pretrained(folder, subfolder="final")
    )
    with pytest.warns(td.NoEffectWarning, match=r"has no such parameters as .*final has; .* without subfolder="):
        td.apply(made, SHARED)
    again = LlamaForCausalLM.from_pretrained(folder / "final")
    assert holds(td.apply(again, SHARED).layers.state_dict(), expected)


def test_the_file_of_a_variant_is_not_taken_for_the_models(tmp_path):
    expected = trained(tmp_path)
    other = llama()
    td.apply(other, SHARED)
    other.save_pretrained(tmp_path, variant="fp16")
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert holds(td.apply(again, SHARED).layers.state_dict(), expected)


def test_from_pretrained_and_apply_give_back_what_was_saved(tmp_path):
    model, drop = dropped(llama(), SEPARATE)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    again = td.apply(loaded, SEPARATE)
    assert same(engine_step(loaded, again, MADE), engine_step(model, drop, MADE))


def test_also_in_shards_inside_a_wrapper_and_routers(tmp_path):
    methods = SEPARATE | {"g": td.MixtureOfDepths("1:3", 0.5)}
    model, drop = dropped(llama(), methods)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = td.apply(nn.ModuleDict({"net": LlamaForCausalLM.from_pretrained(tmp_path)}), methods)
    assert again.layers.state_dict().keys() == drop.layers.state_dict().keys()
    assert all(torch.equal(value, drop.layers.state_dict()[key]) for key, value in again.layers.state_dict().items())


def test_a_folder_of_other_methods_is_said(tmp_path):
    model, _ = dropped(llama(), SEPARATE)
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    with pytest.warns(
        td.NoEffectWarning, match=r"holds \d+ parameters of another apply, such as tokendrop.layers.0.image-"
    ):
        drop = td.apply(loaded, td.HiMix("1:", "shared"))
    assert torch.equal(drop.layers[1]["image"].k.weight, loaded.model.layers[1].self_attn.k_proj.weight)
    drop.remove()
    td.apply(loaded, td.HiMix("1:"))  # which adds nothing, and so misses nothing


class Outer(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net


def test_saving_the_part_without_what_was_added_is_said(tmp_path):
    outer = Outer(llama())
    drop = perturbed(td.apply(outer, SEPARATE))
    count = len(drop.layers.state_dict())
    with pytest.warns(
        td.NoEffectWarning, match=rf"LlamaForCausalLM is saved without the {count} parameters .* torch.save"
    ):
        outer.net.save_pretrained(tmp_path)
    torch.save(td.handle(outer).state_dict(), tmp_path / "image.pt")
    again = Outer(LlamaForCausalLM.from_pretrained(tmp_path))
    back = td.apply(again, SEPARATE)
    back.load_state_dict(torch.load(tmp_path / "image.pt", weights_only=True))
    assert same(engine_step(again.net, back, MADE), engine_step(outer.net, drop, MADE))


def test_saving_a_part_where_nothing_was_added_says_nothing(tmp_path):
    outer = Outer(llama())
    td.apply(outer, PLAIN)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outer.net.save_pretrained(tmp_path)


def loaded(model, how):
    file = io.BytesIO()
    (pickle.dump if how == "pickle" else torch.save)(model, file)
    file.seek(0)
    return pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)  # noqa: S301


@pytest.mark.parametrize("how", ["pickle", "torch"])
@pytest.mark.parametrize("methods", [PLAIN, SEPARATE], ids=["none", "per-task"])
def test_a_part_that_was_saved_alone_finds_its_handle(methods, how):
    outer = Outer(llama())
    drop = perturbed(td.apply(outer, methods))
    part = loaded(outer.net, how)
    own = td.handle(part)
    assert own is not drop
    assert same(engine_step(part, own, MADE), engine_step(outer.net, drop, MADE))
    own.remove()
    assert same(step(part, MADE), step(llama(), MADE))
    with pytest.raises(td.AppliedError, match="is not dropped"):
        td.handle(part)
    td.apply(part, methods)


def test_a_part_is_not_dropped_twice():
    outer = Outer(llama())
    drop = td.apply(outer, SEPARATE)
    assert td.handle(outer.net) is drop
    with pytest.raises(
        td.AppliedError, match=r"through another module; remove that first, by tokendrop.handle\(model\)"
    ):
        td.apply(loaded(outer.net, "torch"), SEPARATE)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_after_remove_the_whole_and_its_decoder_are_plain(how):
    model, drop = dropped(llama(), SEPARATE)
    drop.remove()
    assert same(step(loaded(model, how), MADE), step(llama(), MADE))
    with pytest.raises(td.AppliedError, match="is not dropped"):
        td.handle(loaded(model.model, how))


def test_a_file_of_a_dropped_model_into_one_that_is_dropped(tmp_path):
    model, drop = dropped(llama(tie_word_embeddings=False), SEPARATE)
    save_file(model.state_dict(), tmp_path / "all.safetensors")
    other, again = dropped(llama(seed=3, tie_word_embeddings=False), SEPARATE)
    other.load_state_dict(load_file(tmp_path / "all.safetensors"))
    assert same(engine_step(other, again, MADE), engine_step(model, drop, MADE))
