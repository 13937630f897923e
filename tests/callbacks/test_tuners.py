"""Lightning's tuners run under the method, though they put the trainer's callbacks aside."""

import lightning as L
import pytest
import torch
from helpers import descend
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.tuner import Tuner
from lit_llama import LIGHTNING_WARNS, Batches, Lit, batch, llama, trainer

import tokendrop as td

pytestmark = [
    pytest.mark.filterwarnings(LIGHTNING_WARNS),
    pytest.mark.filterwarnings("ignore:The .* does not have many workers"),
]
METHOD = td.HiMix(separate="shared")
STEPS = 4


@pytest.fixture(autouse=True)
def _no_collection(monkeypatch):
    # Half a second each time, and nothing to collect.
    monkeypatch.setattr("lightning.pytorch.tuner.batch_size_scaling.garbage_collection_cuda", lambda: None)


class Tuned(Lit):
    """Loaders by the module, with a batch size and a rate to be found; remembers how it ran."""

    def __init__(self, where="init"):
        super().__init__(where)
        self.batch_size, self.lr = 2, 0.1
        self.ran = []

    def loss(self, given):
        self.ran.append((len(given["input_ids"]), td.handle(self).strength))
        return super().loss(given)

    def train_dataloader(self):
        return Batches(*(batch(seed, "u", self.batch_size) for seed in range(STEPS)))

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader
    validation_step = Lit.test_step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def by_hand(rates):
    """Losses of steps with these rates under the method, written out."""
    model, losses = llama(), []
    drop = td.apply(model, METHOD)
    for seed, rate in enumerate(rates):
        given = batch(seed % STEPS, "u")
        with drop.layout(td.TokenLayout(given["image_mask"], labels=given["labels"])):
            loss = model(given["input_ids"], attention_mask=given["attention_mask"], labels=given["labels"]).loss
            loss.backward()
        losses.append(loss.item())
        descend(model, rate)
    return losses


@pytest.mark.parametrize("where", ["init", "configure_model"])
def test_a_learning_rate_is_found_under_the_method(where, tmp_path):
    module = Tuned(where)
    run = trainer(td.TokenDrop(METHOD), default_root_dir=tmp_path, max_epochs=2)
    found = Tuner(run).lr_find(module, num_training=STEPS, early_stop_threshold=None)
    expected = by_hand(found.results["lr"])
    assert module.losses == pytest.approx(expected, rel=1e-6)
    assert len(found.results["loss"]) == len(found.results["lr"]) == STEPS
    # What was tuned trains on from where it was, under the method.
    module.losses.clear()
    run.fit(module)
    assert module.losses[:STEPS] == pytest.approx(by_hand([module.lr] * STEPS), rel=1e-6)


def test_the_learning_rate_finder_as_a_callback(tmp_path):
    module = Tuned()
    finder = LearningRateFinder(num_training_steps=STEPS, early_stop_threshold=None)
    trainer(td.TokenDrop(METHOD), finder, default_root_dir=tmp_path).fit(module)
    assert module.losses == pytest.approx(by_hand(finder.optimal_lr.results["lr"]) + by_hand([module.lr] * STEPS))


@pytest.mark.parametrize("method", ["fit", "validate", "test", "predict"])
def test_a_batch_size_is_found_in_every_stage(method, tmp_path):
    module = Tuned()
    run = trainer(td.TokenDrop(td.HMGen("1:3")), default_root_dir=tmp_path)
    size = Tuner(run).scale_batch_size(module, method=method, steps_per_trial=1, init_val=2, max_trials=2)
    assert size == 4
    if method != "predict":  # which has no loss
        assert {count for count, _ in module.ran} == {2, 4}
    getattr(run, method)(module)


def test_the_batch_size_finder_as_a_callback_beside_the_other(tmp_path):
    module = Tuned()
    finders = [BatchSizeFinder(steps_per_trial=1, max_trials=2), LearningRateFinder(num_training_steps=STEPS)]
    trainer(td.TokenDrop(td.HMGen("1:3")), *finders, default_root_dir=tmp_path).fit(module)
    assert [count for count, _ in module.ran][-STEPS:] == [4] * STEPS


@pytest.mark.parametrize(("kind", "strength"), [("rate", 1.0), ("size", 0.0)])
def test_under_a_schedule_rates_are_of_the_method_and_sizes_fit_the_dense_steps(kind, strength, tmp_path):
    module = Tuned()
    callback = td.TokenDrop(td.HMGen("1:3"), schedule=td.Schedule(start=1, dense_tail=1))
    tuner = Tuner(trainer(callback, default_root_dir=tmp_path, limit_val_batches=0))
    if kind == "rate":
        tuner.lr_find(module, num_training=STEPS)
    else:
        tuner.scale_batch_size(module, steps_per_trial=1, max_trials=2)
    assert {found for _, found in module.ran} == {strength}
    assert callback.tuned_strength is None
    module.ran.clear()
    tuner._trainer.fit(module)
    assert [found for _, found in module.ran] == [0.0, 1.0, 1.0, 0.0]


def test_running_out_of_memory_is_the_finders_to_handle(tmp_path):
    class Small(Tuned):
        def training_step(self, given, index):
            loss = super().training_step(given, index)
            if len(given["input_ids"]) > 4:
                raise RuntimeError("CUDA out of memory.")
            return loss

    module, callback = Small(), td.TokenDrop(td.HMGen("1:3"))
    tuner = Tuner(trainer(callback, default_root_dir=tmp_path))
    assert tuner.scale_batch_size(module, mode="binsearch", steps_per_trial=1, margin=0) == 4
    assert {count for count, _ in module.ran} >= {2, 4, 8}
    with pytest.raises(td.MissingLayoutError):
        Lit.loss(module, batch(0))


def test_no_trace_is_left_when_a_tuner_fails(tmp_path):
    class Failing(Tuned):
        def training_step(self, given, index):
            raise RuntimeError("out of luck")

    callback, module = td.TokenDrop(METHOD), Failing()
    run = trainer(callback, default_root_dir=tmp_path)
    with pytest.raises(RuntimeError, match="out of luck"):
        Tuner(run).lr_find(module, num_training=STEPS)
    assert "run" not in vars(run.fit_loop)
    assert callback.tuned_strength is None
    with pytest.raises(td.MissingLayoutError):
        Lit.loss(module, batch(0))


def test_what_no_optimizer_holds_is_refused_in_a_tuner_too(tmp_path):
    class Missing(Tuned):
        def configure_optimizers(self):
            return torch.optim.SGD(self.model.parameters(), lr=self.lr)

    with pytest.raises(td.UnsupportedError, match="no optimizer holds"):
        Tuner(trainer(td.TokenDrop(METHOD), default_root_dir=tmp_path)).lr_find(Missing(), num_training=STEPS)


def test_no_decoder_in_a_tuner(tmp_path):
    class Empty(Tuned):
        def __init__(self):
            super().__init__("never")
            self.model = torch.nn.Linear(2, 2)

    with pytest.raises(td.DecoderError, match="Empty has no decoder"):
        Tuner(trainer(td.TokenDrop(METHOD), default_root_dir=tmp_path)).lr_find(Empty(), num_training=STEPS)


def test_without_a_tuner_no_loop_is_touched():
    class Looking(L.Callback):
        def on_train_start(self, trainer, pl_module):
            assert "run" not in vars(trainer.fit_loop)

    trainer(td.TokenDrop(METHOD), Looking()).fit(Lit(), Batches(batch(0)))
