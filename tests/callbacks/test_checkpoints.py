"""Checkpoints of a dropped LightningModule: the same keys everywhere, and the ways to and from a dense one."""

from collections import UserDict

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_llama import LIGHTNING_WARNS, METHODS, Batches, Lit, batch, dropped_keys, llama, loader, trainer

import tokendrop as td

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


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
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['TokenDrop'\]"):
        trainer(max_epochs=3).fit(again, loader(), ckpt_path=tmp_path / "dropped.ckpt")
    assert len(again.losses) == 3


def test_a_checkpoint_with_some_of_the_added_keys_is_refused(tmp_path):
    module, run = Lit(), trainer(td.TokenDrop(METHODS))
    run.fit(module, Batches(batch(0)))
    run.save_checkpoint(tmp_path / "some.ckpt")
    checkpoint = torch.load(tmp_path / "some.ckpt", weights_only=True)
    missing = dropped_keys(module)[0]
    del checkpoint["state_dict"][missing]
    torch.save(checkpoint, tmp_path / "some.ckpt")
    with pytest.raises(RuntimeError, match="Missing key") as caught:
        trainer(td.TokenDrop(METHODS)).test(Lit(), loader(1), ckpt_path=tmp_path / "some.ckpt", verbose=False)
    assert missing in str(caught.value)


def test_projections_turned_on_halfway_are_refused_with_what_differs(tmp_path):
    dense_checkpoint(tmp_path / "dense.ckpt")
    module = Lit()
    with pytest.raises(td.UnsupportedError, match=r"without the \d+ image-only projections") as caught:
        trainer(td.TokenDrop(METHODS), max_epochs=2).fit(module, loader(), ckpt_path=tmp_path / "dense.ckpt")
    assert dropped_keys(module)[0] in str(caught.value)
    assert "optimiser states" in str(caught.value)
    assert module.losses == []
    # What the message says to do instead.
    module = Lit()
    module.load_state_dict(torch.load(tmp_path / "dense.ckpt", weights_only=True)["state_dict"])
    trainer(td.TokenDrop(METHODS)).fit(module, loader())
    assert len(module.losses) == 3


def shallower():
    module = Lit("never")
    module.model = llama()
    del module.model.model.layers[3]
    return module


REFUSED = {
    "into a dense model": (Lit, [], "tokendrop.layers.0.image-g.k.weight"),
    "into one without projections": (Lit, [td.TokenDrop({"u": td.HiMix()})], "tokendrop.layers.0.image-g.k.weight"),
    "into other projections": (Lit, [td.TokenDrop({"u": td.HiMix(separate="shared")})], "tokendrop.layers.0.image.k"),
    "into fewer layers": (shallower, [td.TokenDrop(METHODS)], "model.layers.3.mlp.up_proj.weight"),
    "into fewer layers, dense": (shallower, [], "model.layers.3.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_dropped_checkpoint_that_does_not_fit_is_refused_with_what_differs(case, tmp_path):
    module, run = Lit(), trainer(td.TokenDrop(METHODS))
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "dropped.ckpt")
    make, callbacks, key = REFUSED[case]
    other = make()
    with pytest.raises(RuntimeError, match="key\\(s\\) in state_dict") as caught:
        trainer(*callbacks, max_epochs=2).fit(other, loader(), ckpt_path=tmp_path / "dropped.ckpt")
    assert key in str(caught.value)
    assert other.losses == []


def monitored(tmp_path):
    return td.SynergyMonitor(("u", "g"), every_n_steps=1, history=str(tmp_path / "synergy.jsonl"))


def the_state(path):
    callbacks = torch.load(path, weights_only=True)["callbacks"]
    return next(state for key, state in callbacks.items() if "SynergyMonitor" in key)


def test_the_monitors_batches_are_saved_and_no_more_than_them(tmp_path):
    pool = torch.stack([batch(seed, "u")["input_ids"] for seed in range(1000)])  # batches that are views of much more
    made = [batch(seed, kind) | {"input_ids": pool[seed]} for seed, kind in enumerate("ugugug")]
    run = trainer(td.TokenDrop(METHODS), monitored(tmp_path))
    run.fit(Lit(), Batches(*made))
    run.save_checkpoint(tmp_path / "fit.ckpt")
    (recent,) = the_state(tmp_path / "fit.ckpt")["recent"]
    assert [torch.equal(one["input_ids"], pool[seed]) for (one, _), seed in zip(recent["u"], (2, 4), strict=True)]
    sizes = {one["input_ids"].untyped_storage().nbytes() for held in recent.values() for one, _ in held}
    assert sizes == {pool[0].numel() * 8}


def test_batches_that_are_no_plain_data_are_left_out(tmp_path):
    class Own:
        pass

    class Odd(UserDict):
        pass

    module, run = Lit(), trainer(td.TokenDrop(METHODS), monitored(tmp_path))
    made = [batch(0, "u") | {"own": Own()}, Odd(batch(1, "g"))]
    run.fit(module, Batches(*made, *made))
    run.save_checkpoint(tmp_path / "fit.ckpt")
    (recent,) = the_state(tmp_path / "fit.ckpt")["recent"]
    assert recent["u"] == []
    assert len(recent["g"]) == 2


def test_a_monitor_goes_on_with_other_ranks_or_tasks(tmp_path):
    run = trainer(td.TokenDrop(METHODS), monitored(tmp_path))
    run.fit(Lit(), loader())
    run.save_checkpoint(tmp_path / "fit.ckpt")
    checkpoint = torch.load(tmp_path / "fit.ckpt", weights_only=True)
    state = next(state for key, state in checkpoint["callbacks"].items() if "SynergyMonitor" in key)
    state["recent"] = [{"x": state["recent"][0]["u"]}]
    torch.save(checkpoint, tmp_path / "tasks.ckpt")
    state["recent"] *= 2
    torch.save(checkpoint, tmp_path / "ranks.ckpt")
    for name in ("tasks", "ranks"):
        again = monitored(tmp_path)
        trainer(td.TokenDrop(METHODS), again, max_epochs=2).fit(Lit(), loader(), ckpt_path=tmp_path / f"{name}.ckpt")
        assert [len(held) for held in again.recent.held.values()] == [2, 2]


def test_loading_into_a_used_monitor_replaces_what_it_held(tmp_path):
    run, watch = trainer(td.TokenDrop(METHODS)), monitored(tmp_path)
    run.callbacks.append(watch)
    run.fit(Lit(), loader(6))
    state = watch.state_dict()
    watch.load_state_dict(state)
    assert len(watch.figures.products.grams) == len(state["grams"]) == watch.events


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_dense_tail_leaves_the_loader_where_the_checkpoint_says(tmp_path):
    class Place(Batches):
        at = begin = 0

        def __iter__(self):
            first, self.begin = self.begin, 0
            for place in range(first, len(self.made)):
                self.at = place + 1
                yield self.made[place]

        def state_dict(self):
            return {"at": self.at % len(self.made)}

        def load_state_dict(self, state):
            self.begin = state["at"]

    def run(folder, **options):
        module, drop = Lit(), td.TokenDrop(METHODS, schedule=td.Schedule(steps=2, dense_tail=1))
        saver = ModelCheckpoint(folder, filename="{step}", every_n_train_steps=4, save_top_k=-1)
        trainer(drop, saver, max_epochs=2, enable_checkpointing=True).fit(module, Place(*loader(6)), **options)
        return module.losses

    whole = run(tmp_path / "whole")
    assert run(tmp_path / "rest", ckpt_path=tmp_path / "whole" / "step=4.ckpt") == whole[4:]
