"""Metrics against hand computation, and the claim that one forward decides greedy decoding."""

import math

import numpy as np
import pytest
import torch

from tokendrop.unified.data import TASKS, Scenes
from tokendrop.unified.judge import agreement
from tokendrop.unified.metrics import ItemMean, greedy_exact, item_nll, measured, results, token_nll
from tokendrop.unified.model import UnifiedVLM
from tokendrop.unified.sampling import sample_codes

CODES = 16


@pytest.fixture(scope="module")
def scenes():
    return Scenes("digits", (1, 2), CODES)


def test_item_mean_by_hand():
    metric, items = ItemMean(), [0.5, 2.0, 3.5, 1.0]
    metric.update(torch.tensor(items[:3]))
    metric.update(torch.tensor(items[3:]))
    found = metric.compute()
    assert found["value"].item() == pytest.approx(np.mean(items))
    assert found["se"].item() == pytest.approx(np.std(items, ddof=1) / 2)


def test_share_has_the_binomial_error_and_is_never_certain():
    metric = ItemMean(resolution=1.0)
    metric.update(torch.tensor([1.0] * 30 + [0.0] * 70))
    assert metric.compute()["se"].item() == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    metric.reset()
    metric.update(torch.zeros(50))
    assert metric.compute()["se"].item() == pytest.approx(1 / 50)


def test_nll_by_hand():
    logits = torch.log(torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]]))
    labels = torch.tensor([[-100, 1, 2]])
    expected = [-math.log(0.25), -math.log(0.8)]
    assert token_nll(logits, labels)[0].tolist() == pytest.approx(expected)
    assert item_nll(logits, labels).item() == pytest.approx(sum(expected) / 2)
    assert token_nll(logits, torch.tensor([[-100, -100, 2]]))[0].tolist() == pytest.approx([0.0, expected[1]])


def test_exactness_by_hand():
    logits = torch.tensor([[[0.0, 1.0], [1.0, 0.0], [9.0, 0.0]]]).expand(3, -1, -1)
    labels = torch.tensor([[-100, 1, 0], [-100, 1, 1], [-100, -100, 0]])
    assert greedy_exact(logits, labels).tolist() == [True, False, True]


def trained(scenes, steps=30):
    module = UnifiedVLM(scenes, hidden=32, layers=2)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(steps):
        for task in TASKS:
            module.training_step(scenes.batch(task, scenes.draw("train", 4, seed=(step,)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.eval()


def test_one_forward_decides_greedy_decoding(scenes):
    # Few scenes learnt by heart, so that some captions come out right and some wrong.
    module = UnifiedVLM(scenes, hidden=32, layers=2)
    batch = scenes.batch("understanding", scenes.draw("train", 24, seed=(0,)))
    half = scenes.batch("understanding", scenes.draw("train", 24, seed=(0,))[:12])
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(80):
        module.training_step(half).backward()
        optimizer.step()
        optimizer.zero_grad()
    start = int((batch["labels"][0] != -100).nonzero()[0])
    ids = batch["input_ids"][:, :start]
    while ids.shape[1] < batch["input_ids"].shape[1]:
        ids = torch.cat([ids, module.model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    decoded = (ids == batch["input_ids"]).all(1)
    assert 0 < decoded.sum() < 24
    assert torch.equal(greedy_exact(module(batch), batch["labels"]), decoded)


def test_samples_know_the_prompt_only(scenes):
    module = trained(scenes)
    batch = scenes.batch("generation", scenes.draw("val", 3, seed=(0,)), "val")
    codes = sample_codes(module.model, batch, CODES, seed=1)
    assert codes.shape == (3, 32)
    assert codes.max() < CODES
    leaky = {
        **batch,
        "input_ids": torch.where(batch["image_mask"], (batch["input_ids"] + 1) % CODES, batch["input_ids"]),
    }
    assert torch.equal(sample_codes(module.model, leaky, CODES, seed=1), codes)
    assert not torch.equal(sample_codes(module.model, batch, CODES, seed=2), codes)
    other = scenes.batch("generation", scenes.draw("val", 3, seed=(7,)), "val")
    assert not torch.equal(sample_codes(module.model, other, CODES, seed=1), codes)


def test_samples_follow_the_model_step_by_step(scenes):
    module = trained(scenes)
    batch = scenes.batch("generation", scenes.draw("val", 2, seed=(0,)), "val")
    codes = sample_codes(module.model, batch, CODES, seed=3)
    generator = torch.Generator().manual_seed(3)
    ids = batch["input_ids"][:, :10]
    for _ in range(32):
        share = module.model(input_ids=ids).logits[:, -1, :CODES].softmax(-1)
        ids = torch.cat([ids, torch.multinomial(share, 1, generator=generator)], 1)
    assert torch.equal(ids[:, 10:], codes)


def test_agreement_counts_cells_that_show_the_digit_asked_for():
    scenes = Scenes("digits", (1, 2), 64)
    rows = scenes.draw("train", 40, seed=(0,))
    batch = scenes.batch("generation", rows)
    codes, captions = batch["labels"][:, -32:], scenes.captions_in(batch)
    assert agreement(scenes, codes, captions).mean() > 0.95
    swapped = torch.cat([codes[:, 16:], codes[:, :16]], 1)
    label = scenes.bank.splits["train"].label[rows]
    differ = torch.from_numpy(label[:, 0] != label[:, 1])
    assert agreement(scenes, swapped, captions)[differ].mean() < 0.05


def test_results_are_plain_numbers():
    metrics = measured("generation")
    for metric in metrics.values():
        metric.update(torch.tensor([0.0, 1.0]))
    assert results(metrics) == {"agreement": 0.5, "agreement_se": 0.5, "nll": 0.5, "nll_se": 0.5}
