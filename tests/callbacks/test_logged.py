"""What the callback logs, against sums written out here, and schedules."""

import lightning as L
import pytest
from lit_llama import (
    IMAGES,
    INNER,
    LAYERS,
    LIGHTNING_WARNS,
    METHODS,
    TEXT,
    TOKENS,
    VOCABULARY,
    WIDTH,
    Batches,
    Lit,
    Validated,
    batch,
    loader,
    trainer,
)

import tokendrop as td
from tokendrop.roles import Role

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)

KV = WIDTH // 2  # 2 of 4 heads
ROW = 2 * (2 * WIDTH * WIDTH + 2 * WIDTH * KV + 3 * WIDTH * INNER)
CONTEXT_ROW = 2 * (2 * WIDTH * KV)
HEAD = 3 * 2 * WIDTH * VOCABULARY * TOKENS
PAIR = (4 + 10) * WIDTH  # q k and p v forward; scores again and four products backward
DENSE = 3 * TOKENS * ROW + TOKENS * TOKENS * PAIR
TEXT_ONLY = 3 * TEXT * ROW + TEXT * TEXT * PAIR
BEFORE = 3  # text before the image, whose attention is computed apart
SEEN = BEFORE * BEFORE + (TEXT - BEFORE) * TOKENS
TEXT_AND_CONTEXT = 3 * TEXT * ROW + 3 * IMAGES * CONTEXT_ROW + SEEN * PAIR

KEPT = {"u": (TOKENS + 3 * TEXT) / (4 * TOKENS), "g": (2 * TOKENS + 2 * TEXT) / (4 * TOKENS)}
FLOPS = {
    "u": (DENSE + 3 * TEXT_AND_CONTEXT + HEAD) / (4 * DENSE + HEAD),
    "g": (2 * DENSE + 2 * TEXT_ONLY + HEAD) / (4 * DENSE + HEAD),
}


class Log(L.Callback):
    """What each training step logged, and how far the schedule was."""

    def __init__(self):
        self.steps, self.strength = [], []

    def on_train_batch_end(self, trainer, module, out, batch, index):
        # Lightning repeats what earlier steps logged, so only the tasks of this one are taken.
        tasks = batch["task"] if isinstance(batch["task"], list) else [batch["task"]]
        logged = trainer.logged_metrics.items()
        self.steps.append({name: float(value) for name, value in logged if name.rpartition("/")[2] in tasks})
        self.strength.append(td.handle(module).strength)


def ours(metrics):
    return {name: float(value) for name, value in metrics.items() if name.startswith("tokendrop/")}


def expected(*tasks):
    return {
        f"tokendrop/{kind}/{t}": of[t] for t in tasks for kind, of in (("kept_ratio", KEPT), ("flops_ratio", FLOPS))
    }


def test_training_logs_each_task_of_the_step():
    log = Log()
    trainer(td.TokenDrop(METHODS), log).fit(Lit(), loader())
    assert log.steps == [pytest.approx(expected(*tasks)) for tasks in (["u"], ["g"], ["u", "g"])]


@pytest.mark.parametrize("stage", ["validate", "test"])
def test_evaluation_logs_each_task_once(stage):
    run = trainer(td.TokenDrop(METHODS))
    (found,) = getattr(run, stage)(Validated(), loader(), verbose=False)
    assert ours(found) == pytest.approx(expected("u", "g"))


def test_an_evaluation_weighs_the_tokens_of_the_task_itself():
    """One sample of "u" beside seven of "g", then seven: of eight in all, one has no image."""
    few, many = batch(0, ["u", *"ggggggg"], 8), batch(1, [*"uuuuuuu", "g"], 8)
    few["image_mask"][0] = False
    run = trainer(td.TokenDrop({"u": td.HiMix(), "g": None}))
    (found,) = run.validate(Validated(), Batches(few, many), verbose=False)
    assert ours(found)["tokendrop/kept_ratio/u"] == pytest.approx((1 + 7 * 0.5) / 8)


@pytest.mark.parametrize(
    ("methods", "task", "name", "kept"),
    [
        (td.HiMix(), None, "all", 0.5),
        (td.HiMix(), "u", "u", 0.5),
        ({"u": td.HiMix()}, None, "u", 0.5),
        ({"u": td.HiMix(), "dense": None}, "dense", "dense", 1.0),
    ],
)
def test_names_in_the_log(methods, task, name, kept):
    run = trainer(td.TokenDrop(methods))
    run.fit(Lit(), Batches(batch(0, task)))
    assert set(ours(run.logged_metrics)) == {f"tokendrop/kept_ratio/{name}", f"tokendrop/flops_ratio/{name}"}
    assert run.logged_metrics[f"tokendrop/kept_ratio/{name}"] == kept


def test_an_unknown_task_runs_dense_and_warns_once():
    run = trainer(td.TokenDrop({"u": td.HiMix(), "g": None}))
    with pytest.warns(td.NoEffectWarning, match=r"no method for task 'typo'.*'u', 'g'") as caught:
        run.fit(Lit(), Batches(batch(0, "typo"), batch(1, "typo")))
    assert len([one for one in caught if one.category is td.NoEffectWarning]) == 1
    assert run.logged_metrics["tokendrop/kept_ratio/typo"] == 1


def test_a_batch_without_images_is_dense_in_silence():
    given = batch(0)
    given["image_mask"][:] = False
    run = trainer(td.TokenDrop(METHODS))
    run.fit(Lit(), Batches(given))
    assert ours(run.logged_metrics) == {"tokendrop/kept_ratio/u": 1, "tokendrop/flops_ratio/u": 1}


def of_u(count):
    return Batches(*(batch(seed, "u") for seed in range(count)))


def test_a_schedule_follows_the_global_step_in_plateaus():
    # 8 optimiser steps of 2 batches: 1 dense, 4 growing, then whole, the last one dense again.
    log, callback = Log(), td.TokenDrop({"u": td.HiMix()}, schedule=td.Schedule(start=1, steps=4, dense_tail=1))
    run = trainer(callback, log, accumulate_grad_batches=2, max_epochs=2)
    module = Lit()
    run.fit(module, of_u(8))
    strength = [0, 0, 0.25, 0.5, 0.75, 1, 1, 0]
    assert log.strength == [value for value in strength for _ in range(2)]
    assert [step["tokendrop/kept_ratio/u"] for step in log.steps[::2]] == [1 - value / 2 for value in strength]
    assert run.test(module, of_u(1), verbose=False)[0]["tokendrop/kept_ratio/u"] == 1


def test_a_schedule_starts_at_the_deep_end():
    class Routes(L.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            route = td.handle(module).route_of("u")
            seen.append([layer.image is Role.CONTEXT for layer in route])

    seen = []
    callback = td.TokenDrop({"u": td.HiMix()}, schedule=td.Schedule(steps=4))
    trainer(callback, Routes()).fit(Lit(), of_u(5))
    assert seen == [[layer >= LAYERS - step for layer in range(LAYERS)] for step in range(5)]


def test_after_fit_the_final_strength_holds():
    module, callback = Lit(), td.TokenDrop({"u": td.HiMix()}, schedule=td.Schedule(start=2, steps=0))
    run = trainer(callback)
    run.fit(module, of_u(3))
    assert run.test(module, of_u(1), verbose=False)[0]["tokendrop/kept_ratio/u"] == 0.5


@pytest.mark.parametrize(("schedule", "kept"), [(td.Schedule(100, 100), 0.5), (td.Schedule(100, 100, 5), 1.0)])
@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_a_fresh_evaluation_uses_the_strength_that_training_ends_with(schedule, kept, where):
    run = trainer(td.TokenDrop({"u": td.HiMix()}, schedule=schedule))
    assert run.test(Lit(where), of_u(1), verbose=False)[0]["tokendrop/kept_ratio/u"] == kept


def test_a_fresh_evaluation_of_a_model_dropped_by_hand_does_too():
    module = Lit()
    td.apply(module.model, {"u": td.HiMix()})
    run = trainer(td.TokenDrop({"u": td.HiMix()}, schedule=td.Schedule(dense_tail=5)))
    assert run.test(module, of_u(1), verbose=False)[0]["tokendrop/kept_ratio/u"] == 1


def test_validation_inside_fit_is_as_far_as_training():
    class Seen(L.Callback):
        def on_validation_batch_end(self, trainer, module, *_):
            if not trainer.sanity_checking:
                strength.append(callback.handle.strength)

    strength, callback = [], td.TokenDrop({"u": td.HiMix()}, schedule=td.Schedule(steps=4))
    trainer(callback, Seen(), val_check_interval=1).fit(Validated(), of_u(4), of_u(1))
    assert strength == [0.25, 0.5, 0.75, 1]


def test_a_resumed_schedule_goes_on(tmp_path):
    schedule = td.Schedule(steps=4)
    run = trainer(td.TokenDrop({"u": td.HiMix()}, schedule=schedule))
    run.fit(Lit(), of_u(2))
    run.save_checkpoint(tmp_path / "half.ckpt")
    log = Log()
    run = trainer(td.TokenDrop({"u": td.HiMix()}, schedule=schedule), log, max_epochs=2)
    run.fit(Lit(), of_u(2), ckpt_path=tmp_path / "half.ckpt")
    assert log.strength == [0.5, 0.75]


class Endless(Batches):
    """A loader whose length nobody knows."""

    def __len__(self):
        raise TypeError("an endless stream")


@pytest.mark.parametrize("endless", [False, True])
def test_a_dense_tail_of_unbounded_training_is_refused(endless):
    callback = td.TokenDrop({"u": td.HiMix()}, schedule=td.Schedule(dense_tail=2))
    module = Lit()
    run = trainer(callback, max_epochs=5 if endless else -1)
    with pytest.raises(td.MethodError, match=r"dense_tail=2.*unbounded"):
        run.fit(module, Endless(batch(0)) if endless else of_u(1))
    assert not module.losses
