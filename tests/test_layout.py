"""Token layouts: what is accepted, what is refused, and what is derived from ids."""

import dataclasses

import pytest
import torch

from tokendrop import LayoutError, LayoutTypeError, Segment, TokenLayout
from tokendrop.layout import packed_samples

IMAGE = torch.tensor([[True, False, False], [False, True, True]])


def test_tasks_of_each_sample():
    assert TokenLayout(IMAGE).tasks == (None, None)
    assert TokenLayout(IMAGE, "u").tasks == ("u", "u")
    assert TokenLayout(IMAGE, ["u", "g"]).tasks == ("u", "g")
    assert TokenLayout(IMAGE, ("u", "g")).tasks == ("u", "g")


def test_everything_that_fits_is_kept():
    long = IMAGE.long()
    layout = TokenLayout(IMAGE, "u", segments=long, padding=IMAGE, labels=long, image_ids=torch.tensor([3]))
    layout = dataclasses.replace(layout, packs=long, new="image")
    moved = layout.to(torch.device("cpu"))
    for field in dataclasses.fields(TokenLayout):
        assert getattr(moved, field.name) is getattr(layout, field.name)
    with pytest.raises(dataclasses.FrozenInstanceError):
        layout.image = IMAGE


@pytest.mark.parametrize(
    ("image", "found"),
    [
        (None, "None"),
        ([[True]], r"\[\[True\]\]"),
        (IMAGE.long(), r"\(2, 3\) torch.int64"),
        (IMAGE[0], r"\(3,\) torch.bool"),
        (IMAGE[None], r"\(1, 2, 3\) torch.bool"),
    ],
)
def test_image_is_a_bool_tensor(image, found):
    with pytest.raises(LayoutTypeError, match=rf"image: .*found {found}") as caught:
        TokenLayout(image)
    assert isinstance(caught.value, TypeError)


@pytest.mark.parametrize("shape", [(0, 3), (2, 0)])
def test_image_is_not_empty(shape):
    with pytest.raises(LayoutError, match=r"image: expected at least one"):
        TokenLayout(torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("name", ["segments", "padding", "labels", "packs"])
def test_other_tensors_have_the_shape_of_image(name):
    value = IMAGE if name == "padding" else IMAGE.long()
    with pytest.raises(LayoutError, match=rf"{name}: expected the shape of image, \(2, 3\); found \(2, 2\)"):
        TokenLayout(IMAGE, **{name: value[:, :2]})


@pytest.mark.parametrize(
    ("name", "value"),
    [("segments", IMAGE.float()), ("segments", IMAGE), ("padding", IMAGE.long()), ("labels", IMAGE.int()),
     ("labels", IMAGE), ("labels", [[1]]), ("padding", 1), ("packs", IMAGE), ("packs", IMAGE.int())],
)  # fmt: skip
def test_other_tensors_have_their_types(name, value):
    with pytest.raises(LayoutTypeError, match=rf"{name}: expected .*; found"):
        TokenLayout(IMAGE, **{name: value})


@pytest.mark.parametrize("task", [3, ["u", 3], {"u", "g"}, [None, "u"], object(), b"u"])
def test_task_is_a_string(task):
    with pytest.raises(LayoutTypeError, match="task: expected a string"):
        TokenLayout(IMAGE, task)


@pytest.mark.parametrize("task", [["u"], ["u", "g", "u"], []])
def test_a_task_for_each_sample(task):
    with pytest.raises(LayoutError, match=rf"task: found {len(task)} names for 2 samples"):
        TokenLayout(IMAGE, task)


@pytest.mark.parametrize("image_ids", [range(7, 9), [7, 8], {7, 8}, torch.tensor([7, 8]), torch.tensor([7, 8]).int()])
def test_from_ids(image_ids):
    ids = torch.tensor([[1, 7, 8, 0], [9, 6, 7, 2]])
    layout = TokenLayout.from_ids(ids, image_ids, "u", labels=ids, attention_mask=(ids != 0).long())
    assert layout.image.tolist() == [[False, True, True, False], [False, False, True, False]]
    assert layout.padding.tolist() == [[True, True, True, False], [True] * 4]
    assert layout.labels is ids
    assert sorted(layout.image_ids.tolist()) == [7, 8]
    assert layout.tasks == ("u", "u")


def test_from_one_id():
    layout = TokenLayout.from_ids(torch.tensor([[1, 7, 8]], dtype=torch.int32), 7)
    assert layout.image.tolist() == [[False, True, False]]
    assert layout.padding is None
    assert layout.image_ids.tolist() == [7]


@pytest.mark.parametrize("ids", [[[1, 2]], torch.ones(2, 3), torch.ones(3, dtype=torch.long), torch.ones(2, 2).bool()])
def test_from_wrong_ids(ids):
    with pytest.raises(LayoutTypeError, match="input_ids: expected"):
        TokenLayout.from_ids(ids, 7)


@pytest.mark.parametrize("image_ids", [[], torch.tensor([1.5]), 1.5, None, ["a"], True])
def test_from_wrong_image_ids(image_ids):
    with pytest.raises(LayoutTypeError, match="image_ids: expected"):
        TokenLayout.from_ids(torch.ones(2, 3, dtype=torch.long), image_ids)


def test_from_ids_with_a_mask_of_another_shape():
    with pytest.raises(LayoutError, match="padding"):
        TokenLayout.from_ids(torch.ones(2, 3, dtype=torch.long), 7, attention_mask=torch.ones(2, 2))


@pytest.mark.parametrize("new", ["video", 1])
def test_new_tokens_are_text_or_images(new):
    with pytest.raises(LayoutError, match=rf"new={new!r}: expected 'text' or 'image'"):
        TokenLayout(IMAGE, new=new)
    assert TokenLayout(IMAGE).new is None  # nothing said
    assert [TokenLayout(IMAGE, new=one).new for one in ("text", "image")] == ["text", "image"]


POSITIONS = {
    "one sample": ([0, 1, 2, 3], None),
    "from elsewhere on": ([5, 6, 7, 8], None),
    "two": ([0, 1, 0, 1], [0, 0, 1, 1]),
    "one of a single token behind": ([0, 1, 2, 0], [0, 0, 0, 1]),
    "one of a single token before": ([0, 0, 1, 2], [0, 1, 1, 1]),
    "images that share a position": ([0, 1, 1, 2], None),
    "not from zero on": ([3, 4, 1, 2], [0, 0, 1, 1]),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_packed_samples_by_positions(name):
    positions, expected = POSITIONS[name]
    ids = torch.tensor([positions])
    for given in (ids, torch.stack([ids] * 4), ids.int()):
        found = packed_samples({"position_ids": given}, (1, 4))
        assert (found if found is None else found.tolist()) == (expected if expected is None else [expected])
    if expected is not None:
        assert packed_samples({"position_ids": ids}, (2, 4)).tolist() == [expected] * 2


@pytest.mark.parametrize(
    ("positions", "real"), [([1, 1, 0, 1], "0011"), ([0, 1, 2, 1], "1110"), ([0, 1, 0, 0], "1100")]
)
def test_padding_begins_no_sample(positions, real):
    padding = torch.tensor([[letter == "1" for letter in real]])
    assert packed_samples({"position_ids": torch.tensor([positions])}, (1, 4), padding) is None


def test_time_of_mrope_falls_where_a_sample_begins():
    time = torch.tensor([[0, 0, 0, 2, 3, 0, 1]])  # of an image of three tokens, which stands still
    rows = torch.tensor([[0, 1, 0, 2, 3, 0, 1]])
    assert packed_samples({"position_ids": torch.stack([time, rows, rows])}, (1, 7)).tolist() == [[0] * 5 + [1] * 2]
    still = torch.zeros(1, 3, dtype=torch.int64)
    assert packed_samples({"position_ids": torch.stack([still] * 3)}, (1, 3)) is None


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seqlens"])
def test_packed_samples_by_lengths(name):
    lengths = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
    given = {name: lengths, "position_ids": torch.arange(6)[None]}
    assert packed_samples(given, (1, 6)).tolist() == [[0, 0, 1, 2, 2, 3]]  # what is behind the last is padding
    assert packed_samples({name: lengths[:2]}, (1, 2)) is None
    assert packed_samples({name: lengths}, (2, 3)) is None


@pytest.mark.parametrize(
    "given", [{}, {"position_ids": None}, {"position_ids": torch.zeros(1, 3).long()}, {"cu_seqlens": 3}]
)
def test_nothing_is_said_of_packed_samples(given):
    assert packed_samples(given, (1, 4)) is None


def test_segments():
    assert [segment.name for segment in Segment] == ["SYSTEM", "IMAGE", "INSTRUCTION", "OUTPUT"]
