"""The layout read from a batch: which keys count, in which order, and what is refused."""

import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from lit_llama import Batches, Lit, batch, llama, trainer
from torch import nn
from torch.utils.data import DataLoader, default_collate

import tokendrop as td
from tokendrop.callbacks.batch import batch_layout

IMAGE = torch.tensor([[False, True, True, False], [False, True, False, False]])
IDS = torch.tensor([[1, 7, 8, 2], [1, 7, 3, 4]])


def module(**config):
    holder = nn.Module()
    holder.inner = llama()
    for name, value in config.items():
        setattr(holder.inner.config, name, value)
    return holder


BARE = nn.Module()


def test_image_mask():
    assert torch.equal(batch_layout({"image_mask": IMAGE}, BARE).image, IMAGE)


def test_mm_token_type_ids_count_where_they_are_not_zero():
    layout = batch_layout({"mm_token_type_ids": IMAGE.long() * 2}, BARE)
    assert torch.equal(layout.image, IMAGE)


def test_input_ids_against_image_ids():
    layout = batch_layout({"input_ids": IDS}, BARE, (7, 8))
    assert torch.equal(layout.image, IMAGE)
    assert layout.image_ids.tolist() == [7, 8]


@pytest.mark.parametrize("images", [{"image_mask": IMAGE}, {"mm_token_type_ids": IMAGE.long()}, {"input_ids": IDS}])
def test_packed_samples_of_a_batch(images):
    positions = torch.tensor([[0, 1, 0, 1], [0, 1, 2, 0]])
    assert batch_layout(images | {"position_ids": positions}, BARE, (7, 8)).packs.tolist() == [
        [0, 0, 1, 1],
        [0, 0, 0, 1],
    ]
    padded = {"position_ids": positions, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0]])}
    assert batch_layout(images | padded, BARE, (7, 8)).packs is None
    assert batch_layout(images, BARE, (7, 8)).packs is None
    one = {name: x[:1] for name, x in images.items()} | {"cu_seq_lens_q": torch.tensor([0, 3, 4])}
    assert batch_layout(one, BARE, (7, 8)).packs.tolist() == [[0, 0, 0, 1]]


@pytest.mark.parametrize("name", ["image_token_id", "image_token_index"])
def test_input_ids_against_the_image_token_of_the_config(name):
    layout = batch_layout({"input_ids": IDS}, module(**{name: 7}))
    assert torch.equal(layout.image, IDS == 7)


def test_given_image_ids_go_before_the_config():
    assert torch.equal(batch_layout({"input_ids": IDS}, module(image_token_id=1), (7, 8)).image, IMAGE)


def test_the_mask_goes_before_types_and_types_before_ids():
    every = {"image_mask": IMAGE, "mm_token_type_ids": 1 - IMAGE.long(), "input_ids": IDS}
    assert torch.equal(batch_layout(every, BARE, (1,)).image, IMAGE)
    del every["image_mask"]
    assert torch.equal(batch_layout(every, BARE, (1,)).image, ~IMAGE)


@pytest.mark.parametrize("key", ["image_mask", "mm_token_type_ids", "input_ids"])
def test_what_else_the_batch_says_is_taken_along(key):
    value = {"image_mask": IMAGE, "mm_token_type_ids": IMAGE.int(), "input_ids": IDS}[key]
    padding, segments = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]]), IMAGE.long()
    given = {key: value, "labels": IDS, "attention_mask": padding, "segments": segments, "task": ["u", "g"]}
    layout = batch_layout(given, BARE, (7, 8))
    assert torch.equal(layout.image, IMAGE)
    assert torch.equal(layout.labels, IDS)
    assert torch.equal(layout.padding, padding.bool())
    assert torch.equal(layout.segments, segments)
    assert layout.tasks == ("u", "g")


def test_tasks_as_default_collate_makes_them():
    given = default_collate([{"image_mask": row, "task": name} for row, name in zip(IMAGE, "ug", strict=True)])
    assert isinstance(given["task"], list)
    assert batch_layout(given, BARE).tasks == ("u", "g")


def test_a_batch_class_that_is_a_mapping():
    transformers = pytest.importorskip("transformers")
    given = transformers.BatchEncoding({"image_mask": IMAGE, "task": "u"})
    assert batch_layout(given, BARE).tasks == ("u", "u")


def test_labels_of_another_kind_are_not_token_labels():
    layout = batch_layout({"image_mask": IMAGE, "labels": torch.tensor([0, 1]), "attention_mask": None}, BARE)
    assert layout.labels is None
    assert layout.padding is None


def test_missing_keys_name_what_was_found():
    with pytest.raises(td.BatchError, match=r"\['pixels', 'task'\].*'image_mask'.*layout=fn\(batch\)") as caught:
        batch_layout({"task": "u", "pixels": IMAGE}, BARE)
    assert isinstance(caught.value, KeyError)
    assert "image_ids=" not in str(caught.value)


def test_input_ids_without_known_image_ids_say_so():
    with pytest.raises(td.BatchError, match=r"\['input_ids'\], and neither image_ids= nor the model's config"):
        batch_layout({"input_ids": IDS}, module())


@pytest.mark.parametrize("given", [IDS, [IDS], None])
def test_a_batch_that_is_no_mapping(given):
    with pytest.raises(td.BatchError, match=f"found {type(given).__name__}"):
        batch_layout(given, BARE)


@pytest.mark.parametrize("mask", [IMAGE.long(), IMAGE[0], "image", None])
def test_an_image_mask_that_is_none(mask):
    with pytest.raises(td.LayoutTypeError, match=r"image: expected a \(B, T\) bool tensor"):
        batch_layout({"image_mask": mask}, BARE)


@pytest.mark.parametrize("task", [3, [3, 4], torch.tensor([0, 1])])
def test_a_task_that_is_no_string(task):
    with pytest.raises(td.LayoutTypeError, match="task: expected a string"):
        batch_layout({"image_mask": IMAGE, "task": task}, BARE)


def test_one_task_too_few():
    with pytest.raises(td.LayoutError, match="found 1 names for 2 samples"):
        batch_layout({"image_mask": IMAGE, "task": ["u"]}, BARE)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # see lit_llama
def test_in_a_trainer_image_ids_say_which_tokens_are_images():
    given = batch(0)
    given["input_ids"][given.pop("image_mask")] = 49
    given["input_ids"][0, 0] = given["input_ids"][1, 0] = 48
    run = trainer(td.TokenDrop(td.HiMix(), image_ids=[49]))
    run.fit(Lit(), Batches(given))
    assert run.logged_metrics["tokendrop/kept_ratio/u"] == (given["input_ids"] != 49).float().mean()


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # see lit_llama
@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_in_a_trainer_missing_keys_are_an_error_in_each_stage(stage):
    given = batch(0)
    del given["image_mask"]
    with pytest.raises(td.BatchError, match="'attention_mask', 'input_ids', 'labels', 'task'"):
        getattr(trainer(td.TokenDrop(td.HiMix())), stage)(Lit(), Batches(given))


class Several(Lit):
    """A step over several batches, one layout each."""

    entering = True

    def training_step(self, given, index):
        parts = given.values() if isinstance(given, dict) else given
        return sum(self._one(part) for part in parts if part is not None)

    def test_step(self, given, index):
        self.log("loss", self.training_step(given, index), batch_size=2)

    def _one(self, part):
        if not self.entering:
            return self.loss(part)
        with td.handle(self).layout(batch_layout(part, self)):
            return self.loss(part)


def parts_of(kind):
    made = {"u": batch(0, "u"), "g": batch(1, "g", size=3)}
    return made if kind is dict else kind(made.values())


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # see lit_llama
@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_in_a_trainer_several_batches_have_a_layout_each(kind):
    methods = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}
    module, callback = Several(), td.TokenDrop(methods)
    trainer(callback).fit(module, Batches(parts_of(kind)))
    model = llama()
    drop = td.apply(model, methods)
    losses = []
    for name, given in parts_of(dict).items():
        with drop.layout(td.TokenLayout(given["image_mask"], name, labels=given["labels"])):
            losses.append(
                model(given["input_ids"], attention_mask=given["attention_mask"], labels=given["labels"]).loss
            )
    sum(losses).backward()
    assert [one.grad is None for one in module.model.parameters()] == [one.grad is None for one in model.parameters()]
    with torch.no_grad():
        for found, one in zip(module.model.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found, one if one.grad is None else one - 0.1 * one.grad)
    assert callback.current is None


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # see lit_llama
@pytest.mark.filterwarnings("ignore:The .* does not have many workers")
def test_a_combined_loader_also_where_one_is_exhausted():
    rows = [{name: value[0] for name, value in batch(seed).items() if name != "task"} for seed in range(3)]
    loaders = {"long": DataLoader(rows, 1), "short": DataLoader(rows[:1], 1)}
    module = Several()
    trainer(td.TokenDrop(td.HiMix())).fit(module, CombinedLoader(loaders, "max_size"))
    assert len(module.seen) == 4


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # see lit_llama
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_several_batches_without_layouts_say_how(stage):
    module = Several()
    module.entering = False
    run = trainer(td.TokenDrop({"u": td.HiMix("1:"), "g": None}))
    with pytest.raises(td.MissingLayoutError, match=r"is 2 batches, 'u', 'g'.*tokendrop\.handle\(self\)\.layout"):
        getattr(run, stage)(module, Batches(parts_of(dict)))
    module.entering = True
    getattr(run, stage)(module, Batches(parts_of(dict)))
    with pytest.raises(td.MissingLayoutError) as caught:
        module.loss(batch(0))
    assert "batches" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning")  # see lit_llama
def test_batches_in_batches_have_a_layout_each():
    """As CombinedLoader makes of loaders in dicts of dicts and lists."""

    class Nested(Several):
        def training_step(self, given, index):
            return sum(self._one(part) for part in (given["a"]["u"], *given["b"]))

    given = {"a": {"u": batch(0, "u")}, "b": [batch(1, "g"), batch(2, "u")]}
    module = Nested()
    trainer(td.TokenDrop({"u": td.HiMix("1:"), "g": td.HMGen("1:3")})).fit(module, Batches(given))
    assert len(module.seen) == 3
    module.entering = False
    said = r"is 3 batches, 'a' 'u', 'b' 0, 'b' 1, .*batch_layout\(batch\['a'\]\['u'\], self\)"
    with pytest.raises(td.MissingLayoutError, match=said):
        trainer(td.TokenDrop({"u": td.HiMix("1:"), "g": td.HMGen("1:3")})).fit(module, Batches(given))


@pytest.mark.parametrize("kind", [dict, list, tuple])
def test_several_batches_have_no_one_layout(kind):
    with pytest.raises(td.BatchError, match=rf"one batch, found {kind.__name__}\. The batch is 2 batches"):
        batch_layout(parts_of(kind), BARE)
