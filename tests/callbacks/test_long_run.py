"""Long training with every callback on: nothing grows; and nothing stale is left where it breaks."""

import gc
import os
import resource
import threading
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lit_llama import LIGHTNING_WARNS, METHODS, Batches, Lit, Validated, batch, llama, loader, trainer
from torch._dynamo.testing import CompileCounterWithBackend

import tokendrop as td
from tokendrop.engine.forward import state
from tokendrop.engine.forward.span import frames
from tokendrop.synergy import read_history

pytestmark = pytest.mark.filterwarnings(
    LIGHTNING_WARNS, "ignore:It is recommended to use", "ignore:the gradients of", "ignore:the monitor left out"
)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_load_state_dict_pre_hooks")
METHODS_OF_MANY = METHODS | {"ltd": td.RandomLTD("1:3"), "fast": td.FastV(2, 0.5)}


class Forgetful(Validated):
    """Keeps no losses."""

    def training_step(self, given, index):
        return self.loss(given)

    def loss(self, given):
        loss = super().loss(given)
        self.seen.clear()
        return loss


class Sampler(L.Callback):
    """Counts what a process holds, after each `every` steps."""

    def __init__(self, every):
        self.every, self.counts, self.rss = every, [], []

    def on_train_batch_end(self, trainer, module, outputs, given, index):
        if trainer.global_step % self.every:
            return
        del outputs, given
        gc.collect()
        things = gc.get_objects()
        self.counts.append(
            {
                "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in things),
                "objects": len(things),
                "files": len(os.listdir("/proc/self/fd")),
                "hooks": sum(len(getattr(part, name)) for part in module.modules() for name in HOOKS),
                "threads": threading.active_count(),
                "frames": len(state.this_thread.by_key),
            }
        )
        del things
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.rss.append(pages * resource.getpagesize())


def nothing_grows(steps, folder):
    every = steps // 6
    kinds = ["u", "g", ["u", "g"], "ltd", ["fast", "u"]]
    batches = Batches(*(batch(seed, kinds[seed % 5]) for seed in range(30)))
    sampler = Sampler(every)
    watch = td.SynergyMonitor(
        ("u", "g"), every_n_steps=10, affinity=0.01, window=4, history=str(folder / "synergy.jsonl")
    )
    drop = td.TokenDrop(METHODS_OF_MANY, schedule=td.Schedule(steps=every // 2), labelled_logits=True)
    saver = ModelCheckpoint(folder, every_n_train_steps=every // 2, save_last=True)
    run = trainer(
        drop,
        watch,
        td.AttentionAllocation(),
        sampler,
        saver,
        max_steps=steps,
        max_epochs=-1,
        check_val_every_n_epoch=2,
        enable_checkpointing=True,
    )
    run.fit(Forgetful(), batches, Batches(batch(7), batch(8, "g")))
    assert run.global_step == steps
    assert len(read_history(folder / "synergy.jsonl")) == steps // 10
    first, *_, last = sampler.counts[1:]
    assert last["tensors"] <= first["tensors"] + 5
    assert last["objects"] <= first["objects"] + 0.02 * steps
    assert sampler.rss[-1] <= sampler.rss[1] + 32 * 2**20
    for name in ("files", "hooks", "threads", "frames"):
        assert last[name] == first[name], name
    assert not frames(drop.handle.key)


def test_300_steps_with_every_callback(tmp_path):
    nothing_grows(300, tmp_path)


@pytest.mark.slow
def test_2000_steps_with_every_callback(tmp_path):
    nothing_grows(2000, tmp_path)


def test_300_compiled_steps_compile_no_more_than_the_first():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    model = llama().train()
    drop = td.apply(model, {"u": td.HiMix("1:"), "g": td.RandomLTD("1:3", keep=0.5)}, multiple=8)
    compiled = torch.compile(model, backend=counter)
    after = 0
    for step in range(300):
        given = batch(step, ("u", ["u", "g"])[step % 2])
        moved = given["image_mask"].roll(step % 4, 1)
        labels = torch.where(moved, -100, given["labels"])
        labels[:, 1:][moved[:, :-1]] = -100
        with drop.layout(td.TokenLayout(moved, given["task"], labels=labels), (step, 0)):
            compiled(given["input_ids"], use_cache=False).logits.square().mean().backward()
        model.zero_grad()
        after = counter.frame_count if step == 30 else after
    assert 0 < counter.frame_count == after <= 12


def test_models_dropped_and_restored_leave_nothing():
    model, held = llama(), []
    for time in range(20):
        drop = td.apply(model, METHODS)
        with drop.disabled():
            pass
        drop.remove()
        if time in (4, 19):
            gc.collect()
            held.append((len(gc.get_objects()), len(state.this_thread.by_key)))
    assert held[1][1] == held[0][1]
    assert held[1][0] <= held[0][0] + 20


class Failing(Validated):
    """Raises in one of its steps, once."""

    where = ""

    def _maybe(self, name, index):
        if self.where == name and index == 1:
            self.where = ""
            raise RuntimeError(f"in the {name}")

    def training_step(self, given, index):
        self._maybe("training step", index)
        return super().training_step(given, index)

    def validation_step(self, given, index):
        self._maybe("validation step", index)
        return super().validation_step(given, index)

    def test_step(self, given, index):
        self._maybe("test step", index)
        return super().test_step(given, index)


def failing_loss(module, given):
    module._maybe("monitor", 1)
    return module.model(given["input_ids"], labels=given["labels"]).loss


@pytest.mark.parametrize("where", ["training step", "validation step", "monitor", "test step"])
def test_a_break_leaves_nothing_stale_and_training_goes_on(where, tmp_path):
    module, callback = Failing(), td.TokenDrop(METHODS)
    watch = td.SynergyMonitor(("u", "g"), every_n_steps=4, loss=failing_loss, history=str(tmp_path / "synergy.jsonl"))
    module.where = where
    run = trainer(callback, watch)
    with pytest.raises(RuntimeError, match=f"in the {where}"):
        run.test(module, loader(6)) if where == "test step" else run.fit(module, loader(6), loader(6))
    assert not frames(callback.handle.key)
    with pytest.raises(td.MissingLayoutError):
        Lit.loss(module, batch(0))
    hooks = sum(len(getattr(part, name)) for part in module.modules() for name in HOOKS)
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    module.train()  # Lightning leaves a module that broke in an evaluation in its eval mode
    trained, events = len(module.losses), watch.events
    # The same trainer goes on; a fresh one trains like one in which nothing ever broke.
    trainer(callback, watch).fit(module, loader(6), loader(6))
    assert len(module.losses) == trained + 6
    assert watch.events > events
    assert sum(len(getattr(part, name)) for part in module.modules() for name in HOOKS) == hooks
    fresh = Failing()
    td.apply(fresh, METHODS)
    fresh.load_state_dict(weights)
    trainer(td.TokenDrop(METHODS)).fit(fresh, loader(6), loader(6))
    assert fresh.losses == module.losses[trained:]
