"""The small model: its loss, its update rules, its recipe."""

import pytest
import torch
import torch.nn.functional as F

from tokendrop.unified.data import TASKS, Scenes, mix
from tokendrop.unified.model import UnifiedVLM, learning_rate_share


@pytest.fixture(scope="module")
def scenes():
    return Scenes("digits", (1, 2), codes=16)


@pytest.fixture(scope="module")
def batches(scenes):
    return [scenes.batch(task, scenes.draw("train", 3, seed=(i,))) for i, task in enumerate(TASKS)]


def small(scenes, seed=0):
    return UnifiedVLM(scenes, hidden=16, layers=2, seed=seed)


def test_loss_is_the_next_token_loss_of_the_labels(scenes, batches):
    module = small(scenes)
    for batch in batches:
        hugging_face = module.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
        torch.testing.assert_close(module.training_step(batch), hugging_face)
    logits, labels = module(batches[0])[:, -7:-1].flatten(0, 1), batches[0]["input_ids"][:, -6:].flatten()
    torch.testing.assert_close(module.training_step(batches[0]), F.cross_entropy(logits, labels))


def test_mixed_batches_sum_the_losses_of_the_tasks(scenes, batches):
    module = small(scenes)
    alone = sum(module.training_step(batch) for batch in batches)
    torch.testing.assert_close(module.training_step(mix(batches)), alone)


def test_weights_depend_on_the_seed_alone(scenes):
    torch.manual_seed(1)
    first = small(scenes).state_dict()
    torch.manual_seed(2)
    second, other = small(scenes).state_dict(), small(scenes, seed=1).state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["model.lm_head.weight"], other["model.lm_head.weight"])


def test_output_projections_start_small_and_embeddings_large(scenes):
    model = small(scenes).model
    layer = model.model.layers[0]
    for weight in (layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight):
        assert weight.std() < 0.02
    assert model.model.embed_tokens.weight.std() > 0.9


def test_learning_rate_warms_up_and_falls_to_a_tenth():
    shares = [learning_rate_share(step, 400) for step in range(401)]
    assert shares[:40] == sorted(shares[:40])
    assert max(shares) == shares[39] == 1.0
    assert shares[40:] == sorted(shares[40:], reverse=True)
    assert shares[400] == pytest.approx(0.1)


def test_it_learns(scenes):
    module = small(scenes)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    rows = scenes.draw("train", 8, seed=(0,))
    losses = []
    for _ in range(30):
        loss = sum(module.training_step(scenes.batch(task, rows)) for task in TASKS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
