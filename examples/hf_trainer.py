"""Hugging Face's Trainer trains a dropped model as it trains any other.

    python examples/hf_trainer.py

The batch's `task` names the method of each of its samples; the model takes it away before its own forward.
"""

import tempfile

from tiny import Samples, collate, vlm
from transformers import Trainer, TrainerCallback, TrainingArguments

import tokendrop as td

METHODS = {"understanding": td.HiMix(separate="shared"), "generation": td.HMGen("1:3", separate="shared")}


class Resumed(TrainerCallback):
    """Needed only where selections are random: a resumed run draws those that follow, and not the first ones again."""

    def on_train_begin(self, args, state, control, model, **_: object) -> None:
        """Count the forwards of the training so far."""
        td.handle(model).entered = state.global_step * args.gradient_accumulation_steps


def train(out: str, methods: td.Method | dict[str, td.Method] = METHODS, steps: int = 5, **more: object) -> Trainer:
    """A Trainer that has trained a dropped model.

    Args:
        out: folder for its checkpoints.
        methods: as `td.apply` takes them.
        steps: optimiser steps.
        more: further arguments of TrainingArguments, and `resume`, a checkpoint to go on from.
    """
    model = vlm()
    td.apply(model, methods, layout="auto")

    resume = more.pop("resume", None)
    given = {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    given |= {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "weight_decay": 0.0, "use_cpu": True}
    given |= {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    args = TrainingArguments(output_dir=out, max_steps=steps, **(given | more))
    trainer = Trainer(model, args, collate, Samples(40), Samples(4), callbacks=[Resumed()])
    trainer.train(resume_from_checkpoint=resume)
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(train(folder).evaluate())
