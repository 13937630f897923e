"""TokenDrop on batches as Hugging Face processors make them.

Shape letters: B batch, T tokens.
"""

import copy
from collections.abc import Iterator
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import transformers as hf
from device import ACCELERATOR
from families import FAMILIES, IMAGE, batch, model
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

import tokendrop as td
from tokendrop.callbacks.batch import batch_layout
from tokendrop.engine.reference import reference
from tokendrop.errors import NeededRowError

# Lightning 2.6.6 asks `isinstance(treespec, LeafSpec)` in its pytree helpers, which torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")

# <image> has the id that the tiny models' configs name.
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<|vision_start|>", "<image>", "<video>", "<|vision_end|>"]
WORDS = ["what", "is", "in", "this", "picture", "and", "that", "?", "a", "cat", "."]
PROMPTS = ["what is in this <image> picture ?", "<image> and <image> ?"]
ANSWERS = [" a cat .", " a cat and a picture ."]


def _tokenizer() -> Any:
    special = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=False))
    words = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(SPECIAL + WORDS)}, special["unk_token"])
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    made = hf.PreTrainedTokenizerFast(tokenizer_object=words, **special, extra_special_tokens=SPECIAL[4:])
    made.image_token, made.image_token_id, made.video_token, made.video_token_id = "<image>", IMAGE, "<video>", 6
    return made


class _WithoutVideo(hf.Qwen2_5_VLProcessor):
    """The processor itself; its video part alone needs torchvision, which the tests do without."""

    def check_argument_for_proper_class(self, *_: Any) -> None:
        return None


def _processor(name: str) -> Any:
    # Where there are two image processors, the one without "Pil" needs torchvision.
    if name == "llava":
        sizes = {"size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
        more = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        images = getattr(hf, "CLIPImageProcessorPil", None) or hf.CLIPImageProcessor
        return hf.LlavaProcessor(images(**sizes), _tokenizer(), **more)
    pixels = {"min_pixels": 64, "max_pixels": 1024}
    images = getattr(hf, "Qwen2VLImageProcessorPil", None) or hf.Qwen2VLImageProcessor
    return _WithoutVideo(images(patch_size=4, temporal_patch_size=2, merge_size=2, **pixels), _tokenizer())


def processed(name: str) -> Any:
    """A batch with one image in the first sample and two in the second; its answers are trained."""
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, (16, 16 + 8 * i, 3), dtype=np.uint8) for i in range(3)]
    texts = [prompt + answer for prompt, answer in zip(PROMPTS, ANSWERS, strict=True)]
    made = _processor(name)(images=images, text=texts, padding=True, return_tensors="pt")
    question = len(SPECIAL) + WORDS.index("?")
    answer = (made["input_ids"] == question).cumsum(1) * (made["input_ids"] != question)
    made["labels"] = made["input_ids"].masked_fill((answer == 0) | (made["attention_mask"] == 0), -100)
    return made


class Lit(L.LightningModule):
    """Any model, called with the batch as it is."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module, self.losses, self.logged = module, [], {}

    def training_step(self, given: Any, index: int) -> Tensor:
        loss = self.module(**given).loss
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.0)


class Once:
    """A data loader with one batch; not a DataLoader, for which Lightning would want workers."""

    def __init__(self, given: Any) -> None:
        self.given = given

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Any]:
        return iter([self.given])


def fit(lit: Lit, given: Any, callback: td.TokenDrop) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(accelerator=ACCELERATOR, max_steps=1, callbacks=[callback], **quiet)
    trainer.fit(lit, Once(given))
    return trainer


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_himix_needs_no_other_argument(name: str) -> None:
    given, base = processed(name), model(name, "sdpa")
    keys = {"input_ids", "attention_mask", "pixel_values", "labels"}
    assert set(given) == keys | (set() if name == "llava" else {"image_grid_thw", "mm_token_type_ids"})
    lit, before = Lit(copy.deepcopy(base)), set(given)
    trainer = fit(lit, given, td.TokenDrop(td.HiMix()))
    image, padding = given["input_ids"] == IMAGE, given["attention_mask"] == 1
    layout = td.TokenLayout(image, padding=padding, labels=given["labels"])
    with reference(base, {None: td.HiMix()}, layout):
        expected = base(**given).loss.item()
    assert lit.losses == pytest.approx([expected], rel=1e-5)
    assert abs(base(**given).loss.item() - expected) > 1e-2
    assert trainer.callback_metrics["tokendrop/kept_ratio/all"] < 0.8
    assert set(given) == before


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_labels_behind_images_are_refused(name: str) -> None:
    # Labels that are the ids themselves train what follows an image, with the output of an image row.
    given = processed(name)
    given["labels"] = given["input_ids"].masked_fill(given["input_ids"] == IMAGE, -100)
    with pytest.raises(
        NeededRowError, match=r"trains 1 image rows.*labels\[:, 1:\]\[image\[:, :-1\]\] = -100.*use HMGen"
    ):
        fit(Lit(copy.deepcopy(model(name, "sdpa"))), given, td.TokenDrop(td.HiMix()))


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", sorted(name for name in FAMILIES if FAMILIES[name].inputs))
def test_image_tokens_are_found_in_every_family(name: str, padding: str) -> None:
    data, module = batch(name, padding), torch.nn.ModuleDict({"inner": model(name)})
    for given in (data.inputs, {key: value for key, value in data.inputs.items() if key != "mm_token_type_ids"}):
        found = batch_layout(given, module)
        assert torch.equal(found.image, data.image)
        assert torch.equal(found.padding, data.real)
