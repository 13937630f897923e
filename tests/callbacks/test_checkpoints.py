"""Checkpoints of a dropped LightningModule: the same keys everywhere, and the ways to and from a dense one."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_llama import LIGHTNING_WARNS, METHODS, Batches, Lit, batch, dropped_keys, loader, trainer

import tokendrop as td

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)


def weights(path):
    return torch.load(path, weights_only=False)["state_dict"]


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
def test_resume_goes_on_as_if_never_stopped(where, tmp_path):
    whole = Lit(where)
    trainer(td.TokenDrop(METHODS), max_epochs=2).fit(whole, loader())
    half, run = Lit(where), trainer(td.TokenDrop(METHODS), max_epochs=1)
    run.fit(half, loader())
    run.save_checkpoint(tmp_path / "half.ckpt")
    assert list(weights(tmp_path / "half.ckpt")) == list(whole.state_dict())
    resumed = Lit(where)
    trainer(td.TokenDrop(METHODS), max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "half.ckpt")
    assert half.losses + resumed.losses == whole.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_evaluation_loads_a_dropped_checkpoint(tmp_path):
    module, run = Lit(), trainer(td.TokenDrop(METHODS))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "fit.ckpt")
    expected = run.test(module, loader(), verbose=False)
    fresh = Lit("configure_model")
    found = trainer(td.TokenDrop(METHODS)).test(fresh, loader(), ckpt_path=tmp_path / "fit.ckpt", verbose=False)
    assert found == expected


def test_model_checkpoint_writes_the_keys_of_the_module(tmp_path):
    module, saver = Lit(), ModelCheckpoint(tmp_path, save_last=True)
    trainer(td.TokenDrop(METHODS), saver, enable_checkpointing=True).fit(module, loader())
    for path in (saver.best_model_path, saver.last_model_path):
        assert list(weights(path)) == list(module.state_dict())
    assert dropped_keys(module)


def test_after_remove_the_checkpoint_is_dense(tmp_path):
    module, callback = Lit(), td.TokenDrop(METHODS)
    run = trainer(callback)
    run.fit(module, loader())
    callback.remove()
    run.save_checkpoint(tmp_path / "dense.ckpt")
    assert list(weights(tmp_path / "dense.ckpt")) == list(Lit().state_dict())


def dense_checkpoint(path):
    module, run = Lit(), trainer()
    run.fit(module, loader())
    run.save_checkpoint(path)
    return module


@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_a_dense_checkpoint_loads_into_a_dropped_module_and_goes_back(where, tmp_path):
    dense = dense_checkpoint(tmp_path / "dense.ckpt")
    module, callback = Lit(where), td.TokenDrop(METHODS)
    trainer(callback).test(module, loader(1), ckpt_path=tmp_path / "dense.ckpt", verbose=False)
    for layer, text in zip(callback.handle.layers, dense.model.model.layers, strict=True):
        for projections in layer.values():
            for letter, linear in projections.items():
                assert torch.equal(linear.weight, getattr(text.self_attn, f"{letter}_proj").weight)
    back = callback.handle.dense_state_dict()
    assert list(back) == list(dense.state_dict())
    assert all(torch.equal(back[name], value) for name, value in dense.state_dict().items())
    Lit().load_state_dict(back)


def test_dense_training_goes_on_dropped_and_back_where_no_parameter_is_added(tmp_path):
    dense_checkpoint(tmp_path / "dense.ckpt")
    dropped, run = Lit(), trainer(td.TokenDrop({"u": td.HiMix(), "g": td.HMGen("1:3")}), max_epochs=2)
    run.fit(dropped, loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert len(dropped.losses) == 3
    run.save_checkpoint(tmp_path / "dropped.ckpt")
    again = Lit()
    trainer(max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "dropped.ckpt")
    assert len(again.losses) == 3


def test_a_checkpoint_with_some_of_the_added_keys_is_refused(tmp_path):
    module, run = Lit(), trainer(td.TokenDrop(METHODS))
    run.fit(module, Batches(batch(0)))
    run.save_checkpoint(tmp_path / "some.ckpt")
    checkpoint = torch.load(tmp_path / "some.ckpt", weights_only=False)
    missing = dropped_keys(module)[0]
    del checkpoint["state_dict"][missing]
    torch.save(checkpoint, tmp_path / "some.ckpt")
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        trainer(td.TokenDrop(METHODS)).test(Lit(), loader(1), ckpt_path=tmp_path / "some.ckpt", verbose=False)
    assert missing in str(caught.value)
