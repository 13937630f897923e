"""The rows of a group in a layer's arguments, against a loop over samples.

Shape letters: B batch, T tokens, K computed rows.
"""

import pytest
import torch

import tokendrop as td
from tokendrop.engine.forward.arguments import select

IMAGE = torch.tensor([[c == "i" for c in row] for row in ("ttiitt", "tiitti", "tttttt", "iittit")])
SHAPE = tuple(IMAGE.shape)


@pytest.fixture
def group():
    """The compact group of samples 0, 1 and 3; sample 2 has no image."""
    layers = td.DropLayers([torch.nn.TransformerEncoderLayer(4, 1, 4)], td.HMGen("0:1"), multiple=1)
    with layers.tokendrop.layout(td.TokenLayout(IMAGE)) as plan:
        return next(one for one in plan.spans[0].groups if one.members == (0, 1, 3))


def rows_of(value, group):
    """Of (B or 1, T, ...), by hand."""
    picked = [value[sample if len(value) > 1 else 0][group.active.index[at]] for at, sample in enumerate(group.members)]
    return torch.stack(picked)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("rest", [(), (5,), (2, 5)])
def test_a_row_for_each_token(group, batch, rest):
    value = torch.randn(batch, SHAPE[1], *rest)
    assert torch.equal(select(value, group, group.active, SHAPE, "x"), rows_of(value, group))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("rest", [(), (5,)])
def test_three_sections_of_each_token(group, batch, rest):
    value = torch.randn(3, batch, SHAPE[1], *rest)
    expected = torch.stack([rows_of(one, group) for one in value])
    assert torch.equal(select(value, group, group.active, SHAPE, "x"), expected)


@pytest.mark.parametrize("batch", [1, 4])
def test_rotary_tables(group, batch):
    tables = tuple(torch.randn(batch, SHAPE[1], 5) for _ in range(2))
    found = select(tables, group, group.active, SHAPE, "x")
    assert all(torch.equal(one, rows_of(table, group)) for one, table in zip(found, tables, strict=True))


def test_tuples_keep_their_kind(group):
    value = [torch.randn(1, 6, 2), (torch.randn(4, 6), None)]
    found = select(value, group, group.active, SHAPE, "x")
    assert isinstance(found, list)
    assert isinstance(found[1], tuple)
    assert torch.equal(found[1][0], rows_of(value[1][0], group))


@pytest.mark.parametrize(
    "value", [None, 3, "x", torch.randn(7), torch.randn(6), torch.randn(2, 9), torch.randn(3, 5, 6)]
)
def test_anything_else_stays(group, value):
    assert select(value, group, group.active, SHAPE, "x") is value


@pytest.mark.parametrize("shape", [(4,), (4, 9), (4, 5, 6)])
def test_the_samples_of_what_has_a_row_for_each(group, shape):
    value = torch.randn(shape)
    expected = torch.stack([value[sample] for sample in group.members])
    assert torch.equal(select(value, group, group.active, SHAPE, "x"), expected)
