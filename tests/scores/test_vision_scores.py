"""Choices by the vision encoder's attention, against loops.

Shape letters: B batch, T tokens.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrop import scores

SIZES = st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=3)


def layout(sizes, text=2):
    """One sample with images of these rows and columns, and text around each: image (1, T) and place (1, T, 3)."""
    image, place = [False] * text, [[0, 0, 0]] * text
    for number, (rows, columns) in enumerate(sizes):
        image += [True] * rows * columns + [False] * text
        place += [[number, row, column] for row in range(rows) for column in range(columns)] + [[0, 0, 0]] * text
    return torch.tensor([image]), torch.tensor([place])


def draw(image, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(image.shape, generator=generator), torch.rand(image.shape, generator=generator)


def chosen(scores, image, count):
    """The `count` image tokens with the highest scores, ties to the earlier."""
    tokens = image[0].nonzero().flatten().tolist()
    return set(sorted(tokens, key=lambda token: (-scores[0, token].item(), token))[:count])


def test_scan_as_published():
    # 24 x 24 tokens, 96 kept: 3 of each of 16 windows, then the 48 best others.
    image, place = layout([(24, 24)])
    local, whole = draw(image, 0)
    expected = set()
    for row in range(0, 24, 6):
        for column in range(0, 24, 6):
            tokens = [2 + (row + r) * 24 + column + c for r in range(6) for c in range(6)]
            expected |= set(sorted(tokens, key=lambda token: -local[0, token].item())[:3])
    rest = whole.clone()
    rest[0, list(expected)] = 0
    expected |= set(rest.masked_fill(~image, 0)[0].topk(48).indices.tolist())
    found = scores.scan(local, whole, image, place, torch.tensor([96]), 6)
    assert chosen(found, image, 96) == expected
    assert len(expected) == 96


@given(SIZES, st.integers(1, 4), st.floats(0, 1), st.integers(0, 99))
def test_scan_takes_from_each_window_in_turn(sizes, window, share, seed):
    image, place = layout(sizes)
    local, whole = draw(image, seed)
    count = round(share * int(image.sum()))
    windows = {}
    for token in image[0].nonzero().flatten().tolist():
        number, row, column = place[0, token].tolist()
        windows.setdefault((number, row // window, column // window), []).append(token)
    turns = [sorted(tokens, key=lambda token: -local[0, token].item()) for tokens in windows.values()]
    taken = []
    while any(turns):
        best = sorted((tokens.pop(0) for tokens in turns if tokens), key=lambda token: -local[0, token].item())
        taken += best
    found = scores.scan(local, whole, image, place, torch.tensor([count]), window)
    assert set(found[0].isinf().nonzero().flatten().tolist()) == set(taken[: count // 2])
    rest = [token for token in image[0].nonzero().flatten().tolist() if token not in taken[: count // 2]]
    rest = sorted(rest, key=lambda token: -whole[0, token].item())[: count - count // 2]
    assert chosen(found, image, count) == {*taken[: count // 2], *rest}


def test_scan_of_samples_with_different_counts():
    one, two = layout([(2, 2)]), layout([(2, 2)])
    image, place = torch.cat([one[0], ~two[0] & False]), torch.cat([one[1], two[1]])
    local, whole = draw(image, 3)
    found = scores.scan(local, whole, image, place, torch.tensor([4, 0]), 2)
    assert found.isinf().sum(1).tolist() == [2, 0]


@given(SIZES, st.floats(0, 1), st.floats(0, 1), st.integers(1, 5), st.integers(0, 99))
def test_dominant_and_contextual_as_published(sizes, share, part, width, seed):
    image, _ = layout(sizes)
    looked, _ = draw(image, seed)
    count = round(share * int(image.sum()))
    contextual = round(part * count)
    order = sorted(image[0].nonzero().flatten().tolist(), key=lambda token: -looked[0, token].item())
    first, pool = order[: count - contextual], order[count - contextual :][: width * contextual]
    found = scores.dominant(looked, image, torch.tensor([count]), torch.tensor([contextual]), width)
    dominant, anchors, members = (one[0].nonzero().flatten().tolist() for one in found)
    assert (set(dominant), set(members)) == (set(first), set(pool))
    assert len(dominant) + len(anchors) == count
    assert set(anchors) <= set(pool)
    if contextual and len(pool) == width * contextual:
        assert set(anchors) == set(pool[::width])


@given(SIZES, st.floats(0, 1), st.integers(0, 99))
def test_nearest(sizes, share, seed):
    image, _ = layout(sizes)
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(*image.shape, 4, generator=generator)
    targets = image & (torch.rand(image.shape, generator=generator) < share)
    members = image & ~targets
    into, group = scores.nearest(features, members, targets)
    for token in range(image.shape[1]):
        best = token
        if members[0, token] and targets.any():
            others = targets[0].nonzero().flatten().tolist()
            best = max(others, key=lambda other: torch.cosine_similarity(features[0, token], features[0, other], 0))
        assert into[0, token] == best
        assert group[0, token] == (into[0] == best).sum()
