"""TRL's SFTTrainer on batches of images and text.

    python examples/trl_sft.py

Two settings are TRL's: it prepares no dataset whose collator is your own, and would take away the columns it does not
know, `pixel_values` and `task` among them.
"""

import tempfile

from datasets import Dataset
from tiny import IMAGE, VOCABULARY, Samples, collate, vlm
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import tokendrop as td

METHODS = {"understanding": td.HiMix(separate="shared"), "generation": td.HMGen("1:3", separate="shared")}


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the model's vocabulary; SFTTrainer wants one, though the samples are ids already."""
    names = ["<pad>", "<s>", "</s>", "<unk>", "<start>", "<image>"]
    words = {name: at for at, name in enumerate(names + [f"w{at}" for at in range(IMAGE + 1, VOCABULARY)])}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words)), **special)


def train(out: str, methods: td.Method | dict[str, td.Method] = METHODS, steps: int = 5, **more: object) -> SFTTrainer:
    """A trainer that has trained a dropped model.

    Args:
        out: folder for its checkpoints.
        methods: as `td.apply` takes them.
        steps: optimiser steps.
        more: further arguments of SFTConfig.
    """
    model = vlm()
    td.apply(model, methods, layout="auto")

    given = {"dataset_kwargs": {"skip_prepare_dataset": True}, "remove_unused_columns": False}
    given |= {"per_device_train_batch_size": 2, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
    given |= {"train_sampling_strategy": "sequential", "max_grad_norm": 0.0, "weight_decay": 0.0, "use_cpu": True}
    given |= {"bf16": False, "report_to": [], "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no"}
    args = SFTConfig(output_dir=out, max_steps=steps, **(given | more))
    data = Dataset.from_list([Samples(40)[index] for index in range(40)])
    trainer = SFTTrainer(model, args, collate, data, eval_dataset=data.select(range(4)), processing_class=tokenizer())
    trainer.train()
    return trainer


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(train(folder).evaluate())
