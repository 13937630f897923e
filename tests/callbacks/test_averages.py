"""Averages of weights have what a method adds, wherever they are listed, by the recursion written out."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lit_llama import LIGHTNING_WARNS, Batches, Lit, Validated, batch, trainer
from torch.optim.swa_utils import AveragedModel

import tokendrop as td

pytestmark = [
    pytest.mark.filterwarnings(LIGHTNING_WARNS),
    pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model that overrides"),
]
SHARED = td.HiMix(separate="shared")
ROUTED = td.MixtureOfDepths(layers="1::2", keep=0.5)
DECAY = 0.5


def loader(count=3):
    return Batches(*(batch(seed, "u") for seed in range(count)))


class EachStep(L.Callback):
    """Parameters after each step; listed first, so before anybody averages."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, index):
        self.seen.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})


def ema(seen):
    """EMA: the first copy as it is, then decay * average + (1 - decay) * new."""
    average = seen[0]
    for one in seen[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * value for name, value in one.items()}
    return average


def mean(seen):
    return {name: torch.stack([one[name] for one in seen]).mean(0) for name in seen[0]}


AVERAGES = {
    "ema": (lambda: EMAWeightAveraging(decay=DECAY), ema),
    "mean": (WeightAveraging, mean),
}


@pytest.mark.parametrize("where", ["init", "setup", "configure_model"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_have_what_is_added(kind, first, where):
    make, expected = AVERAGES[kind]
    module, steps = Lit(where), EachStep()
    pair = [make(), td.TokenDrop(SHARED)]
    trainer(steps, *(pair if first else pair[::-1])).fit(module, loader(4))
    found = dict(module.named_parameters())
    assert len(steps.seen) == 4
    assert sum("tokendrop." in name for name in found) == 8
    for name, value in expected(steps.seen).items():
        torch.testing.assert_close(found[name], value, msg=name)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("method", [SHARED, ROUTED])
def test_stochastic_weight_averaging(first, method):
    class Epochs(EachStep):
        def on_train_epoch_start(self, trainer, pl_module):
            EachStep.on_train_batch_end(self, trainer, pl_module, None, None, 0)

        on_train_batch_end = L.Callback.on_train_batch_end

    module, epochs = Lit(), Epochs()
    pair = [StochasticWeightAveraging(0.1, swa_epoch_start=1), td.TokenDrop(method)]
    trainer(epochs, *(pair if first else pair[::-1]), max_epochs=3).fit(module, loader(2))
    # SWA averages what each epoch begins with.
    for name, value in mean(epochs.seen).items():
        torch.testing.assert_close(module.get_parameter(name), value, msg=name)


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_validation_sees_the_average_under_the_method(first):
    module, steps, found = Validated(), EachStep(), []

    class Watch(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            found.append(trainer.callback_metrics["loss"].item())

    pair = [EMAWeightAveraging(decay=DECAY), td.TokenDrop(SHARED)]
    callbacks = [steps, *(pair if first else pair[::-1]), Watch()]
    trainer(*callbacks, num_sanity_val_steps=0).fit(module, loader(4), Batches(batch(9)))
    alone = Lit()
    drop = td.apply(alone, SHARED)
    alone.load_state_dict(ema(steps.seen), strict=False)
    given = batch(9)
    with torch.no_grad(), drop.layout(td.TokenLayout(given["image_mask"], labels=given["labels"])):
        expected = alone.model(given["input_ids"], labels=given["labels"]).loss.item()
    assert found == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_a_checkpoint_of_averages_is_gone_on_from(tmp_path, first):
    def run(**where):
        module, pair = Lit(), [EMAWeightAveraging(decay=DECAY), td.TokenDrop(SHARED)]
        each = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
        callbacks = [*(pair if first else pair[::-1]), each]
        trainer(*callbacks, max_epochs=2, enable_checkpointing=True).fit(module, loader(2), **where)
        return module

    through = run()
    resumed = run(ckpt_path=tmp_path / "epoch=0.ckpt")
    for name, value in through.named_parameters():
        torch.testing.assert_close(resumed.get_parameter(name), value, msg=name)


class OfItsOwn(L.Callback):
    def setup(self, trainer, pl_module, stage):
        self.average = AveragedModel(pl_module)


def test_an_average_of_another_callback_is_refused_by_name():
    module = Lit()
    with pytest.raises(td.UnsupportedError, match=r"OfItsOwn copied Lit before TokenDrop .* list TokenDrop before it"):
        trainer(OfItsOwn(), td.TokenDrop(SHARED)).fit(module, loader())
    assert not hasattr(module, "tokendrop")
    trainer(td.TokenDrop(SHARED), OfItsOwn()).fit(module, loader())


def test_without_added_parameters_it_is_told_that_it_would_run_dense():
    """Nobody knows whether its copy is run, or only gives its weights back."""
    with pytest.warns(td.NoEffectWarning, match="OfItsOwn copied Lit before .*: should the copy be run, it runs dense"):
        trainer(OfItsOwn(), td.TokenDrop(td.HMGen("1:3"))).fit(Lit(), loader())
    trainer(td.TokenDrop(td.HMGen("1:3")), OfItsOwn()).fit(Lit(), loader())
