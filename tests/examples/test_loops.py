"""The examples run, and what each loop has trained is what a written-out loop with `drop.layout` trains."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import tokendrop as td

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))

import accelerate_loop  # noqa: E402
import hf_trainer  # noqa: E402
import tiny  # noqa: E402

METHODS = hf_trainer.METHODS
RANDOM = {"understanding": td.RandomLTD("1:3", 2), "generation": td.Drop(":", 0.5)}
pytestmark = [
    # Of trainers, about themselves.
    pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]


def batches(size, count, samples=None):
    samples = samples or tiny.Samples(size * count)
    return [tiny.collate([samples[size * at + one] for one in range(size)]) for at in range(count)]


def written_out(steps, methods=METHODS, optimizer=torch.optim.AdamW):
    """Weights after optimiser steps on the sum of the losses of each step's batches, over their labels.

    Args:
        steps: of each, its batches, and how much the loss of each counts.
    """
    model = tiny.vlm().train()
    drop = td.apply(model, methods)
    more = {"weight_decay": 0.0} if optimizer is torch.optim.AdamW else {}
    optimizer = optimizer(model.parameters(), lr=1e-2, **more)
    for made in steps:
        for batch in made:
            ids, labels, mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
            layout = td.TokenLayout.from_ids(ids, tiny.IMAGE, batch["task"], labels, mask)
            with drop.layout(layout):
                logits = model(input_ids=ids, attention_mask=mask, pixel_values=batch["pixel_values"]).logits
                loss = F.cross_entropy(
                    logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=-100
                )
                (loss / batch.get("items", (labels[:, 1:] != -100).sum())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def accumulated(pairs):
    """Micro-batches that share the number of their labels."""
    for pair in pairs:
        items = sum((batch["labels"][:, 1:] != -100).sum() for batch in pair)
        for batch in pair:
            batch["items"] = items
    return pairs


def same(found, expected):
    assert found.keys() == expected.keys()
    assert any("tokendrop" in name for name in found) or not any("tokendrop" in name for name in expected)
    start = tiny.vlm().state_dict()
    assert any(not torch.equal(expected[name], value) for name, value in start.items())
    for name, value in expected.items():
        if name.endswith("k_proj.bias"):  # a softmax has no gradient for it, and Adam likes noise
            continue
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: name + text)


@pytest.mark.parametrize("methods", [METHODS, RANDOM], ids=["projections", "random"])
def test_the_trainer_of_hugging_face(methods, tmp_path):
    trainer = hf_trainer.train(str(tmp_path), methods, optim="sgd")
    same(trainer.model.state_dict(), written_out([[one] for one in batches(2, 5)], methods, torch.optim.SGD))


def test_it_accumulates_and_evaluates(tmp_path):
    more = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = hf_trainer.train(str(tmp_path), RANDOM, optim="sgd", **more)
    made = batches(2, 10)
    pairs = accumulated([made[at : at + 2] for at in range(0, 10, 2)])
    same(trainer.model.state_dict(), written_out(pairs, RANDOM, torch.optim.SGD))


def test_it_evaluates_under_the_method(tmp_path):
    trainer = hf_trainer.train(str(tmp_path), steps=1, per_device_eval_batch_size=4)
    found = trainer.evaluate()["eval_loss"]
    (batch,) = batches(4, 1)
    layout = td.TokenLayout.from_ids(
        batch["input_ids"], tiny.IMAGE, batch.pop("task"), batch["labels"], batch["attention_mask"]
    )
    with torch.no_grad(), trainer.model.tokendrop.layout(layout):
        assert found == pytest.approx(trainer.model(**batch).loss.item(), rel=1e-5)
    with torch.no_grad(), trainer.model.tokendrop.disabled():
        assert found != pytest.approx(trainer.model(**batch).loss.item(), rel=1e-3)


@pytest.mark.parametrize("methods", [METHODS, RANDOM], ids=["projections", "random"])
def test_it_goes_on_from_a_checkpoint(methods, tmp_path):
    whole = hf_trainer.train(str(tmp_path), methods, save_strategy="steps", save_steps=3)
    resumed = hf_trainer.train(str(tmp_path), methods, resume=str(tmp_path / "checkpoint-3"))
    assert resumed.state.global_step == 5
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


@pytest.mark.parametrize("recompute", [False, True])
def test_trl(recompute, tmp_path):
    trl_sft = pytest.importorskip("trl_sft")
    trainer = trl_sft.train(str(tmp_path), optim="sgd", gradient_checkpointing=recompute)
    same(trainer.model.state_dict(), written_out([[one] for one in batches(2, 5)], optimizer=torch.optim.SGD))
    assert trainer.evaluate()["eval_loss"] > 0


def test_accelerate(capsys):
    runpy.run_path(str(EXAMPLES / "accelerate_loop.py"), run_name="__main__")
    assert capsys.readouterr().out.count("loss") == 5
    same(accelerate_loop.train().state_dict(), written_out([[one] for one in batches(2, 5)]))


def test_accelerate_in_mixed_precision():
    model = accelerate_loop.train(steps=2, mixed_precision="bf16")  # hangs a forward on the instance
    drop = td.handle(model)
    assert drop.entered == 2
    drop.remove()
    assert type(model) is type(tiny.vlm())


def test_fsdp2_under_torchrun(tmp_path):
    weights = tmp_path / "weights.pt"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = [*command, str(EXAMPLES / "fsdp2.py"), str(weights)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("loss") == 5
    samples = tiny.Samples(20)
    ranks = [batches(2, 5, [samples[at] for at in range(rank, 20, 2)]) for rank in range(2)]
    for rank in ranks:
        for batch in rank:  # gradients are averaged over ranks
            batch["items"] = 2 * (batch["labels"][:, 1:] != -100).sum()
    same(torch.load(weights), written_out(list(zip(*ranks, strict=True))))


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_examples_are_short(path):
    assert len(path.read_text().splitlines()) < 80
