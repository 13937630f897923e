"""The example of Lightning's tuners: what it tries is what a loop written out with `drop.layout` trains."""

import sys
from pathlib import Path

import pytest
from helpers import descend

import tokendrop as td

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import lightning_tuner
import tiny


def written_out(rates):
    model, samples, losses = tiny.vlm().train(), tiny.Samples(64), []
    drop = td.apply(model, lightning_tuner.METHODS)
    for at, rate in enumerate(rates):
        batch = tiny.collate([samples[2 * at], samples[2 * at + 1]])
        task = batch.pop("task")
        layout = td.TokenLayout.from_ids(
            batch["input_ids"], [tiny.IMAGE], tuple(task), batch["labels"], batch["attention_mask"]
        )
        with drop.layout(layout):
            loss = model(**batch).loss
            loss.backward()
        losses.append(loss.item())
        descend(model, rate)
    return losses


@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
@pytest.mark.filterwarnings("ignore:You defined a .training_step. but have no .validation")
def test_rates_are_tried_under_the_method(tmp_path):
    module, trainer, tried = lightning_tuner.main(str(tmp_path))
    assert module.losses[: len(tried)] == pytest.approx(written_out(tried), rel=1e-5)
    assert module.batch_size == 4
    assert trainer.global_step == 3
