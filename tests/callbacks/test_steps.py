"""Optimiser steps, whatever the number of optimizers; and one strength for every evaluation of a training."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lit_llama import LIGHTNING_WARNS, Batches, Lit, Validated, batch, trainer

import tokendrop as td

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
METHODS = {"u": td.HiMix()}


class Manual(Lit):
    """Manual optimisation.

    Args:
        count: optimizers, each of a part of the parameters.
        steps: index of the batch -> the optimizers that step after it, one after another.
    """

    def __init__(self, count, steps):
        super().__init__()
        self.automatic_optimization, self.count, self.steps = False, count, steps

    def training_step(self, given, index):
        self.manual_backward(super().training_step(given, index))
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        for which in self.steps(index):
            optimizers[which].step()
        if self.steps(index):
            self.zero_grad()

    def configure_optimizers(self):
        parts = [list(self.parameters())[at :: self.count] for at in range(self.count)]
        return [torch.optim.SGD(part, lr=0.1) for part in parts]


class Seen(L.Callback):
    """The strength and the step that random choices depend on, of each batch."""

    def __init__(self, callback):
        self.callback, self.strength, self.steps, self.validated = callback, [], [], []

    def on_train_batch_start(self, trainer, module, *_):
        handle = self.callback.handle
        self.strength.append(handle.strength)
        self.steps.append(handle.progress.steps)

    def on_validation_batch_start(self, *_):
        self.validated.append(self.callback.handle.strength)


def of_u(count):
    return Batches(*(batch(seed, "u") for seed in range(count)))


def run(module, schedule, batches=12, **options):
    callback = td.TokenDrop(METHODS, schedule=schedule)
    seen = Seen(callback)
    made = trainer(callback, seen, *options.pop("callbacks", ()), **options)
    made.fit(module, of_u(batches))
    return seen, made


# name -> (module, steps done before each of 12 batches, by hand)
ONE_A_BATCH = list(range(12))
CASES = {
    "one": (lambda: Manual(1, lambda i: [0]), ONE_A_BATCH),
    "two together": (lambda: Manual(2, lambda i: [0, 1]), ONE_A_BATCH),
    "three together": (lambda: Manual(3, lambda i: [0, 1, 2]), ONE_A_BATCH),
    "two in turn": (lambda: Manual(2, lambda i: [i % 2]), ONE_A_BATCH),
    "one, every third batch": (lambda: Manual(1, lambda i: [0] if i % 3 == 2 else []), [i // 3 for i in range(12)]),
    "two, every third": (lambda: Manual(2, lambda i: [0, 1] if i % 3 == 2 else []), [i // 3 for i in range(12)]),
    "one, twice a batch": (lambda: Manual(1, lambda i: [0, 0]), [2 * i for i in range(12)]),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("limit", ["epochs", "steps"])
def test_steps_are_counted_whatever_the_number_of_optimizers(case, limit):
    make, steps = CASES[case]
    module = make()
    total = steps[-1] + (steps[-1] - steps[-2] or 1)  # the last batch steps, too
    # Lightning's own limit is in steps of each optimizer.
    each = sum(len(module.steps(index)) for index in range(12))
    options = {"max_epochs": -1, "max_steps": each} if limit == "steps" else {}
    seen, _ = run(module, td.Schedule(steps=3, dense_tail=2), **options)
    assert seen.steps == steps
    assert seen.strength == [0 if step >= total - 2 else min(1, step / 3) for step in steps]


@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_accumulated_steps_and_what_an_epoch_leaves_over(accumulate):
    # 2 epochs of 7 batches; the rest of an epoch is a step of its own.
    seen, made = run(Lit(), td.Schedule(dense_tail=2), 7, accumulate_grad_batches=accumulate, max_epochs=2)
    an_epoch = -(-7 // accumulate)
    steps = [epoch * an_epoch + index // accumulate for epoch in range(2) for index in range(7)]
    assert seen.steps == steps
    assert made.global_step == 2 * an_epoch
    assert seen.strength == [float(step < 2 * an_epoch - 2) for step in steps]


def test_accumulation_that_changes_between_epochs():
    changes = GradientAccumulationScheduler({0: 1, 1: 3})
    seen, _ = run(Lit(), td.Schedule(dense_tail=1), 6, max_epochs=2, callbacks=[changes])
    assert seen.steps == [0, 1, 2, 3, 4, 5, 6, 6, 6, 7, 7, 7]
    assert seen.strength == [1.0] * 9 + [0.0] * 3


def test_a_dense_tail_ends_where_a_resumed_run_does(tmp_path):
    """With other batches in an epoch than before, as on another number of ranks."""
    schedule = td.Schedule(dense_tail=2)
    _, made = run(Lit(), schedule, 4)
    made.save_checkpoint(tmp_path / "half.ckpt")
    callback = td.TokenDrop(METHODS, schedule=schedule)
    seen = Seen(callback)
    trainer(callback, seen, max_epochs=2).fit(Lit(), of_u(7), ckpt_path=tmp_path / "half.ckpt")
    assert seen.steps == list(range(4, 11))
    assert seen.strength == [1.0] * 5 + [0.0] * 2


def test_every_so_many_steps_are_dense_and_evaluations_are_not():
    callback = td.TokenDrop(METHODS, schedule=td.Schedule(dense_every=3))
    seen = Seen(callback)
    made = trainer(callback, seen, accumulate_grad_batches=2, val_check_interval=2, num_sanity_val_steps=1)
    module = Validated()
    made.fit(module, of_u(12), of_u(1))
    assert seen.strength == [1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 0, 0]
    assert seen.validated == [1.0] * 7
    assert callback.handle.strength == 1
    assert made.test(module, of_u(1), verbose=False)[0]["tokendrop/kept_ratio/u"] == 0.5


@pytest.mark.parametrize("optimizers", [1, 2])
def test_the_monitor_looks_at_the_method_in_a_dense_step(tmp_path, optimizers):
    made = [batch(seed, "ug"[seed % 2]) for seed in range(8)]
    callback = td.TokenDrop({"u": td.HiMix(), "g": td.HMGen("1:3")}, schedule=td.Schedule(dense_every=4))
    watch = td.SynergyMonitor(("u", "g"), every_n_steps=4, history=str(tmp_path / "s.jsonl"))
    seen = []
    watch._log = lambda module, entry: seen.append((entry["step"], entry["fidelity"]["u"].value))
    module = Manual(optimizers, lambda i: range(optimizers))
    trainer(callback, watch).fit(module, Batches(*made))
    assert [step for step, _ in seen] == [4, 8]  # both right after a dense step
    assert all(fidelity < 0.999 for _, fidelity in seen)


def strength_of(made, module, callback, **options):
    (found,) = made.test(module, of_u(1), verbose=False, **options)
    return found["loss"], callback.handle.strength


class BreakError(Exception):
    pass


class Breaks(L.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_start(self, trainer, module, given, index):
        if index == self.at:
            raise BreakError


INTERRUPTED = {
    "growing": (td.Schedule(steps=8), 3 / 8),
    "out": (td.Schedule(steps=4, direction="out"), 1 / 4),
    "before the tail": (td.Schedule(dense_tail=4), 1.0),
    "within the tail": (td.Schedule(dense_tail=7), 0.0),
    "before a dense step": (td.Schedule(dense_every=4), 1.0),
    "drawn": (td.Schedule(steps=8, drawn=True), 3 / 8),
    "before the start": (td.Schedule(start=5), 0.0),
}


@pytest.mark.parametrize("case", INTERRUPTED)
@pytest.mark.parametrize("make", [Lit, lambda: Manual(2, lambda i: [0, 1])], ids=["one", "two optimizers"])
def test_an_interrupted_training_is_evaluated_one_way(case, make, tmp_path):
    schedule, expected = INTERRUPTED[case]
    module, callback = make(), td.TokenDrop(METHODS, schedule=schedule)
    made = trainer(callback, Breaks(3))
    with pytest.raises(BreakError):
        made.fit(module, of_u(8))
    made.save_checkpoint(tmp_path / "broken.ckpt")
    weights = copy.deepcopy({k: v for k, v in module.state_dict().items() if "tokendrop" not in k})
    found = {
        "same process": strength_of(made, module, callback),
        "with its checkpoint": strength_of(made, module, callback, ckpt_path=tmp_path / "broken.ckpt"),
    }
    other = td.TokenDrop(METHODS, schedule=schedule)
    found["another trainer"] = strength_of(trainer(other), module, other)
    new = td.TokenDrop(METHODS, schedule=schedule)
    found["another process"] = strength_of(trainer(new), make(), new, ckpt_path=tmp_path / "broken.ckpt")
    loss = found["same process"][0]
    assert found == dict.fromkeys(found, (loss, expected))
    # By hand, behind any trainer.
    plain = make()
    plain.load_state_dict(weights)
    drop = td.apply(plain, METHODS)
    drop.strength = expected
    given = batch(0, "u")
    with drop.layout(td.TokenLayout(given["image_mask"], "u", labels=given["labels"])), torch.no_grad():
        assert plain.loss(given).item() == pytest.approx(loss, rel=1e-6)


def test_validation_in_a_fit_is_what_its_checkpoint_gives(tmp_path):
    class Saves(Seen):
        def on_validation_end(self, trainer, module):
            if not trainer.sanity_checking:
                trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
                losses[trainer.global_step] = trainer.callback_metrics["loss"].item()

    losses, schedule = {}, td.Schedule(start=1, steps=4, dense_tail=1)
    callback = td.TokenDrop(METHODS, schedule=schedule)
    seen = Saves(callback)
    trainer(callback, seen, val_check_interval=2, num_sanity_val_steps=1).fit(Validated(), of_u(6), of_u(1))
    assert seen.validated == [0, 1 / 4, 3 / 4, 0]
    for step, loss in losses.items():
        new = td.TokenDrop(METHODS, schedule=schedule)
        (found,) = trainer(new).validate(Validated(), of_u(1), ckpt_path=tmp_path / f"{step}.ckpt", verbose=False)
        assert found["loss"] == pytest.approx(loss, rel=1e-6)


def test_weights_without_a_training_are_evaluated_as_training_ends(tmp_path):
    schedule = td.Schedule(steps=8)
    module, callback = Lit(), td.TokenDrop(METHODS, schedule=schedule)
    made = trainer(callback, max_steps=2)
    made.fit(module, of_u(8))
    made.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    new = td.TokenDrop(METHODS, schedule=schedule)
    options = {"ckpt_path": tmp_path / "weights.ckpt"}
    there = strength_of(trainer(new), Lit(), new, **options)
    assert strength_of(made, module, callback, **options) == there
    assert there[1] == 1


def test_a_new_training_begins_anew():
    module, callback = Validated(), td.TokenDrop(METHODS, schedule=td.Schedule(steps=4, dense_tail=1))
    for _ in range(2):
        seen = Seen(callback)
        trainer(callback, seen, num_sanity_val_steps=1, limit_val_batches=1).fit(module, of_u(3), of_u(1))
        assert seen.steps == [0, 1, 2]
        assert seen.strength == [0, 0.25, 0]
        assert seen.validated[0] == 0


def test_without_a_schedule_the_method_is_whole_again():
    module = Lit()
    trainer(td.TokenDrop(METHODS, schedule=td.Schedule(steps=8)), max_steps=2).fit(module, of_u(8))
    callback = td.TokenDrop(METHODS)
    assert strength_of(trainer(callback), module, callback)[1] == 1


def test_a_pretrained_model_in_eval_mode_is_trained_under_random_ltd():
    """Lightning leaves modules in the mode they are in, and `from_pretrained` gives them in eval mode."""

    class Kept(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            kept.append(trainer.logged_metrics["tokendrop/kept_ratio/u"].item())

    kept = []
    method = td.RandomLTD(":", keep=4)
    module, callback = Validated(), td.TokenDrop({"u": method})
    module.model.eval()
    made = trainer(callback, Kept(), num_sanity_val_steps=0)
    with pytest.warns(UserWarning, match="eval mode at the start of training"):
        made.fit(module, of_u(2), of_u(1))
    assert kept == [12 / 16] * 2  # 8 of text and 4 of 8 image tokens
    assert made.logged_metrics["tokendrop/kept_ratio/u"] == 1
    given = batch(0, "u")
    with callback.handle.layout(td.TokenLayout(given["image_mask"], "u")) as plan:
        assert plan.dense
