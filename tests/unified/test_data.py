"""Captions, sequences and batches: what the model is shown and what it is trained on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tokendrop as td
from tokendrop.unified.data import TASKS, Scenes, layout_of, mix
from tokendrop.unified.datamodule import UnifiedData
from tokendrop.unified.images import DataError
from tokendrop.unified.vocabulary import DIGITS, Vocabulary

CODES = 16
GRIDS = st.tuples(st.integers(1, 3), st.integers(1, 3))


@pytest.fixture(scope="module")
def scenes():
    return Scenes("digits", (2, 2), CODES)


@given(grid=GRIDS, count=st.integers(1, 4), data=st.data())
@settings(deadline=None, max_examples=40)
def test_captions_round_trip(grid, count, data):
    vocabulary, cells = Vocabulary(CODES, grid), grid[0] * grid[1]
    label = np.array(data.draw(st.lists(st.integers(0, 9), min_size=count * cells, max_size=count * cells)))
    bold = np.array(data.draw(st.lists(st.booleans(), min_size=count * cells, max_size=count * cells)))
    caption = vocabulary.caption(label.reshape(count, cells), bold.reshape(count, cells))
    read_label, read_bold = vocabulary.read_caption(caption)
    np.testing.assert_array_equal(read_label.ravel(), label)
    np.testing.assert_array_equal(read_bold.ravel(), bold)
    words = vocabulary.text(caption[0]).split()
    assert vocabulary.encode(*words) == caption[0].tolist()
    assert len(set(vocabulary.places)) == cells


@given(grid=GRIDS)
def test_every_word_has_one_id_behind_the_codes(grid):
    vocabulary = Vocabulary(CODES, grid)
    ids = vocabulary.encode(*vocabulary.words)
    assert ids == list(range(CODES, len(vocabulary)))


def test_vocabulary_refuses_what_it_cannot_say():
    with pytest.raises(DataError, match=r"grid \(4, 1\) has no names"):
        Vocabulary(CODES, (4, 1))
    with pytest.raises(DataError, match="'eleven'"):
        Vocabulary(CODES, (1, 2)).encode("bold", "eleven")


def test_understanding_is_system_image_instruction_output(scenes):
    rows = scenes.draw("val", 3, seed=(1,))
    batch, digits = scenes.batch("understanding", rows, "val"), scenes.bank.splits["val"]
    kinds, counts = torch.unique_consecutive(batch["segments"][0], return_counts=True)
    assert kinds.tolist() == [td.Segment.SYSTEM, td.Segment.IMAGE, td.Segment.INSTRUCTION, td.Segment.OUTPUT]
    assert counts.tolist() == [3, 64, 1, 12]
    assert torch.equal(batch["image_mask"], batch["segments"] == td.Segment.IMAGE)
    labelled = batch["labels"] != -100
    assert torch.equal(labelled, batch["segments"] == td.Segment.OUTPUT)
    assert torch.equal(batch["labels"][labelled], batch["input_ids"][labelled])
    label, bold = scenes.vocabulary.read_caption(batch["labels"][labelled].view(3, -1).numpy())
    np.testing.assert_array_equal(label, digits.label[rows])
    np.testing.assert_array_equal(bold, digits.bold[rows])
    assert not (batch["labels"] >= 0)[batch["image_mask"]].any()


def test_generation_is_system_instruction_output(scenes):
    rows = scenes.draw("val", 3, seed=(1,))
    batch, digits = scenes.batch("generation", rows, "val"), scenes.bank.splits["val"]
    kinds, counts = torch.unique_consecutive(batch["segments"][0], return_counts=True)
    assert kinds.tolist() == [td.Segment.SYSTEM, td.Segment.INSTRUCTION, td.Segment.OUTPUT]
    assert counts.tolist() == [2, 14, 64]
    output = batch["segments"] == td.Segment.OUTPUT
    assert torch.equal(batch["image_mask"], output)
    assert torch.equal(batch["labels"] != -100, output)
    codes = batch["labels"][output].view(3, -1).numpy()
    np.testing.assert_array_equal(codes[1].reshape(4, 4, 4), digits.codes[rows[1]])
    assert scenes.captions_in(batch).tolist() == scenes.captions_in(scenes.batch("understanding", rows, "val")).tolist()
    elsewhere = {key: value.to("meta") if torch.is_tensor(value) else value for key, value in batch.items()}
    assert scenes.captions_in(elsewhere).shape == (len(rows), 12)


def test_image_tokens_dominate():
    for grid in ((1, 2), (2, 2)):
        for task in TASKS:
            scenes = Scenes("digits", grid, CODES)
            image = scenes.batch(task, scenes.draw("val", 1, seed=(0,)), "val")["image_mask"]
            assert image.sum() >= 3 * (~image).sum()


def test_pictures_put_each_digit_into_its_cell(scenes):
    rows = scenes.draw("test", 2, seed=(0,))
    digits = scenes.bank.splits["test"]
    codes = digits.codes[rows].reshape(2, -1)
    picture = scenes.pictures(codes)
    assert picture.shape == (2, 16, 16)
    np.testing.assert_array_equal(picture[1, 8:, :8], scenes.bank.decode(digits.codes[rows[1]])[2])


def test_mix_pads_on_the_right_without_labels():
    scenes = Scenes("digits", (1, 2), CODES)
    short, long = (scenes.batch(task, scenes.draw("val", 2, seed=(0,)), "val") for task in TASKS)
    short = {**short, **{k: short[k][:, :-4] for k in ("input_ids", "labels", "attention_mask", "segments")}}
    short["image_mask"] = short["image_mask"][:, :-4]
    mixed = mix([short, long])
    assert mixed["task"] == ["understanding"] * 2 + ["generation"] * 2
    assert mixed["input_ids"].shape == (4, 42)
    assert mixed["attention_mask"][:2, -4:].sum() == 0
    assert (mixed["labels"][:2, -4:] == -100).all()
    assert not mixed["image_mask"][:2, -4:].any()
    for key in ("input_ids", "labels", "segments", "image_mask"):
        assert torch.equal(mixed[key][:2, :-4], short[key])
        assert torch.equal(mixed[key][2:], long[key])
    assert layout_of(mixed).tasks == ("understanding", "understanding", "generation", "generation")


def same(a, b):
    return all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a)


def test_joint_runs_see_the_batches_of_single_runs():
    scenes = Scenes("digits", (1, 2), CODES)
    alone = {task: list(UnifiedData(scenes, (task,), 3, 4, seed=5).train_dataloader()) for task in TASKS}
    joint = list(UnifiedData(scenes, TASKS, 3, 4, seed=5).train_dataloader())
    mixed = list(UnifiedData(scenes, TASKS, 3, 4, update="mixed", seed=5).train_dataloader())
    assert len(joint) == 6
    assert len(mixed) == 3
    for step in range(3):
        ours = [alone[task][step] for task in TASKS]
        assert same(joint[2 * step], ours[0])
        assert same(joint[2 * step + 1], ours[1])
        assert same(mixed[step], mix(ours))
    assert not torch.equal(joint[0]["input_ids"], joint[2]["input_ids"])
    other = UnifiedData(scenes, TASKS, 3, 4, seed=6).train[0]
    assert not torch.equal(joint[0]["input_ids"], other["input_ids"])


def test_evaluation_scenes_are_the_same_for_all_seeds_and_of_their_split():
    scenes = Scenes("digits", (1, 2), CODES)
    first, second = (UnifiedData(scenes, seed=seed, test_scenes=150) for seed in (0, 1))
    pairs = list(zip(first.test_dataloader(), second.test_dataloader(), strict=True))
    assert [(a["task"], len(a["input_ids"])) for a, _ in pairs] == [(t, n) for t in TASKS for n in (128, 22)]
    assert all(same(a, b) for a, b in pairs)
    rows = scenes.draw("test", 150, seed=(0,))
    assert same(pairs[0][0], scenes.batch("understanding", rows[:128], "test"))


def test_bad_choices():
    scenes = Scenes("digits", (1, 2), CODES)
    with pytest.raises(DataError, match=r"tasks: found \('sing',\)"):
        UnifiedData(scenes, ("sing",))
    with pytest.raises(DataError, match="update: found 'summed'"):
        UnifiedData(scenes, update="summed")
    with pytest.raises(DataError, match="the task 'sing' is unknown"):
        scenes.batch("sing", scenes.draw("val", 1, seed=(0,)))


def indices(batches, scenes, split="train"):
    """The images of the split that stand in batches, found by their codes."""
    codes = scenes.bank.splits[split].codes.reshape(len(scenes.bank.splits[split]), -1)
    found = torch.cat([one["input_ids"][one["image_mask"]] for one in batches]).view(-1, codes.shape[1]).numpy()
    return [set((codes == image).all(1).nonzero()[0].tolist()) for image in found]


def test_few_images_are_for_understanding_and_the_others_for_generation():
    scenes = Scenes("digits", (1, 2), CODES, few=5)
    train = list(UnifiedData(scenes, TASKS, 6, 8, seed=2).train_dataloader())
    understood, generated = (indices([one for one in train if one["task"] == task], scenes) for task in TASKS)
    assert all(one & set(range(5)) for one in understood)
    assert all(one - set(range(5)) for one in generated)
    assert len(set().union(*understood) & set(range(5))) == 5
    # Evaluation is as without it, and so is the choice of scenes that are nobody's.
    whole = Scenes("digits", (1, 2), CODES)
    for split in ("val", "test"):
        assert (scenes.draw(split, 9, (3,), TASKS[0]) == whole.draw(split, 9, (3,))).all()
    assert (scenes.draw("train", 9, (3,)) == whole.draw("train", 9, (3,), TASKS[1])).all()


@pytest.mark.parametrize("others", [7, 1253])
def test_generation_may_train_on_some_of_the_others(others):
    scenes = Scenes("digits", (1, 2), CODES, few=5, others=others)
    drawn = [scenes.draw("train", 9000, (3,), task) for task in TASKS]
    assert [(one.min(), one.max()) for one in drawn] == [(0, 4), (5, 4 + others)]
    whole = Scenes("digits", (1, 2), CODES, few=5)
    assert (scenes.draw("test", 9, (3,), TASKS[1]) == whole.draw("test", 9, (3,), TASKS[1])).all()
    if others == 1253:
        assert (drawn[1] == whole.draw("train", 9000, (3,), TASKS[1])).all()


def test_understanding_may_be_asked_one_digit():
    scenes = Scenes("digits", (2, 2), CODES, question="digit")
    rows = scenes.draw("val", 5, seed=(1,))
    batch, digits = scenes.batch("understanding", rows, "val"), scenes.bank.splits["val"]
    kinds, counts = torch.unique_consecutive(batch["segments"][0], return_counts=True)
    assert kinds.tolist() == [td.Segment.SYSTEM, td.Segment.IMAGE, td.Segment.INSTRUCTION, td.Segment.OUTPUT]
    assert counts.tolist() == [3, 64, 2, 1]
    places = ("top-left", "top-right", "bottom-left", "bottom-right")
    for scene, ids in zip(rows, batch["input_ids"].numpy(), strict=True):
        cell = sum(scene) % 4
        digit = Vocabulary(CODES, (2, 2)).text(ids[-1:])
        assert Vocabulary(CODES, (2, 2)).text(ids[67:69]) == f"describe {places[cell]}"
        assert digit == DIGITS[digits.label[scene[cell]]]
    with pytest.raises(DataError, match="question='digit': batches of understanding hold no captions"):
        scenes.captions_in(batch)
    told = Scenes("digits", (2, 2), CODES)
    made = [one.batch("generation", rows, "val") for one in (scenes, told)]
    assert same(*made)


def test_placebo_gives_generation_the_captions_of_others_in_training_only():
    real, placebo = (Scenes("digits", (1, 2), CODES, placebo=one) for one in (False, True))
    rows = real.draw("train", 6, seed=(1,))
    true, shuffled = (one.batch("generation", rows) for one in (real, placebo))
    assert torch.equal(true["labels"], shuffled["labels"])
    assert torch.equal(placebo.captions_in(shuffled), real.captions_in(true).roll(1, 0))
    assert not torch.equal(placebo.captions_in(shuffled), real.captions_in(true))
    assert same(*(one.batch("understanding", rows) for one in (real, placebo)))
    assert same(*(one.batch("generation", rows % 50, "val") for one in (real, placebo)))


def test_what_is_chosen_is_tested_on_validation():
    scenes = Scenes("digits", (1, 2), CODES)
    (batch,) = UnifiedData(scenes, TASKS[:1], test_scenes=7, tested="val").test_dataloader()
    assert same(batch, scenes.batch(TASKS[0], scenes.draw("val", 7, seed=(0,)), "val"))


def test_bad_regimes():
    with pytest.raises(DataError, match="few: found 1258; give a number of training images from 0 to 1257"):
        Scenes("digits", (1, 2), CODES, few=1258)
    with pytest.raises(DataError, match="others: found 1254; beside few=5, give a number from 0 to 1253"):
        Scenes("digits", (1, 2), CODES, few=5, others=1254)
    with pytest.raises(DataError, match="others: found 1; beside few=0, give a number from 0 to 0"):
        Scenes("digits", (1, 2), CODES, others=1)
    with pytest.raises(DataError, match="question: found 'colour'"):
        Scenes("digits", (1, 2), CODES, question="colour")
    with pytest.raises(DataError, match="tested: found 'train'"):
        UnifiedData(Scenes("digits", (1, 2), CODES), tested="train")
