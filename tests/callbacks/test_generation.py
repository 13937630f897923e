"""Generation inside a LightningModule: under the callback's layout, and under the prompt's inside it.

Shape letters: T tokens of the prompt.
"""

import pytest
import torch
from lit_llama import IMAGES, LIGHTNING_WARNS, VOCABULARY, Batches, Lit, batch, llama, trainer

import tokendrop as td

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
T, NEW = 12, 3  # 3 of text, 8 of an image, 1 of text
IMAGE_IDS = list(range(30, VOCABULARY))
METHODS = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "suppress_tokens": IMAGE_IDS}


def marked(task, seed=0):
    """A batch whose ids say which tokens are images, with labels behind the prompt."""
    made = batch(seed, task)
    ids = made["input_ids"] % 29 + 1
    ids[:, 3 : 3 + IMAGES] += 30 - ids[:, 3 : 3 + IMAGES].min()
    ids[:, 3 : 3 + IMAGES].clamp_(max=VOCABULARY - 1)
    labels = ids.masked_fill(torch.arange(16) < T, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids), "task": task}


def prompt(task, seed=0):
    """Its prompt alone, as a batch."""
    made = marked(task, seed)
    return {"input_ids": made["input_ids"][:, :T], "attention_mask": made["attention_mask"][:, :T], "task": task}


def by_hand(task, seed=0):
    """The same tokens, each by a forward of all before it, without a cache and without a callback."""
    model, ids = llama().eval(), prompt(task, seed)["input_ids"]
    drop = td.apply(model, METHODS[task], multiple=1)
    for _ in range(NEW):
        with torch.no_grad(), drop.layout(td.TokenLayout.from_ids(ids, IMAGE_IDS)):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        logits[:, IMAGE_IDS] = -torch.inf
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids[:, T:].tolist()


class Generating(Lit):
    """Validates by what it generates from the prompt of a batch with labels, and predicts from prompts."""

    def __init__(self):
        super().__init__()
        self.made, self.held = [], []

    def validation_step(self, given, index):
        self.held.append(self.loss(given).item())
        prompt = given["input_ids"][:, :T]
        with td.handle(self).layout(td.TokenLayout.from_ids(prompt, IMAGE_IDS, task=given["task"])):
            out = self.model.generate(prompt, **GREEDY)
        self.made.append(out[:, T:].tolist())
        self.held.append(self.loss(given).item())

    def predict_step(self, given, index):
        out = self.model.generate(given["input_ids"], attention_mask=given["attention_mask"], **GREEDY)
        return out[:, T:].tolist()


@pytest.mark.parametrize("task", "ug")
def test_prompts_as_batches_need_no_word(task):
    run = trainer(td.TokenDrop(METHODS, image_ids=IMAGE_IDS, multiple=1))
    assert run.predict(Generating(), Batches(prompt(task), prompt(task, 1))) == [by_hand(task), by_hand(task, 1)]


@pytest.mark.parametrize("task", "ug")
def test_the_prompt_of_a_batch_with_labels_has_a_layout_inside(task):
    module = Generating()
    run = trainer(td.TokenDrop(METHODS, image_ids=IMAGE_IDS, multiple=1))
    run.validate(module, Batches(marked(task), marked(task, 1)), verbose=False)
    assert module.made == [by_hand(task), by_hand(task, 1)]
    assert module.held[0] == module.held[1]  # the callback's layout is in force again
    assert module.held[2] == module.held[3]


def test_generation_between_steps_leaves_training_as_it_is():
    runs = []
    for limit in (0, 1):
        module, drop = Generating(), td.TokenDrop({"u": td.Drop("1:3", 0.5)}, image_ids=IMAGE_IDS)
        run = trainer(drop, max_epochs=2, num_sanity_val_steps=0, limit_val_batches=limit)
        run.fit(module, Batches(marked("u"), marked("u", 1)), Batches(marked("u", 5)))
        runs.append((module.losses, len(module.made)))
    (without, none), (within, some) = runs
    assert without == within
    assert (none, some) == (0, 2)


@pytest.mark.parametrize("cut", [T, 16])
def test_without_that_the_error_says_what_to_write(cut):
    class Forgetful(Generating):
        def validation_step(self, given, index):
            self.model.generate(given["input_ids"][:, :cut], **GREEDY)

    run = trainer(td.TokenDrop(METHODS, image_ids=IMAGE_IDS))
    with pytest.raises((td.LayoutError, td.UnsupportedError), match=r"To generate .* labels.*\.layout\(tokendrop\.To"):
        run.validate(Forgetful(), Batches(marked("u")), verbose=False)
