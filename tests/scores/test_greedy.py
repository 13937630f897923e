"""DivPrune's and DART's choices, against their words written out token by token.

Shape letters: B batch, T tokens, G heads of keys, D hidden.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrop import scores
from tokendrop.engine.plan.selection import highest

IMAGES = st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3)


def drawn(image, seed, *shape):
    return torch.randn(len(image), *shape, generator=torch.Generator().manual_seed(seed))


def cosine(x, t, u):
    return torch.cosine_similarity(x[t], x[u], 0).item()


@given(IMAGES, st.integers(1, 6), st.integers(0, 99))
def test_diverse(image, most, seed):
    image = torch.tensor(image)
    x, counts = drawn(image, seed, 6, 4), image.sum(1).clamp(max=most)
    found = scores.diverse(x, image, counts)
    for sample in range(len(image)):
        free, chosen = image[sample].nonzero().flatten().tolist(), []
        while len(chosen) < counts[sample]:
            others = chosen or free
            near = {t: min([1 - cosine(x[sample], t, u) for u in others if u != t] or [9]) for t in free}
            best = max(free, key=lambda t: (round(near[t], 5), -t))
            chosen.append(best)
            free.remove(best)
        order = found[sample].argsort(descending=True, stable=True).tolist()
        assert order[: len(chosen)] == chosen
        assert found[sample].isfinite().sum() == len(chosen)


@given(IMAGES, st.integers(0, 6), st.integers(1, 3), st.integers(1, 3), st.integers(0, 99))
def test_pivots_and_what_is_unlike_them(image, most, images, texts, seed):
    image = torch.tensor(image)
    text = ~image & (drawn(image, seed + 1, 6) > -1)
    x, keys, counts = drawn(image, seed, 6, 4), drawn(image, seed + 2, 2, 6, 3), image.sum(1).clamp(max=most)
    found, valid = scores.pivots(keys, image, text, images, texts)
    score = scores.unlike(x, image, counts, found, valid)
    kept = highest(score, image, counts)
    for sample in range(len(image)):
        length = {t: keys[sample, :, t].abs().sum().item() for t in range(6)}
        tokens = image[sample].nonzero().flatten().tolist()
        behind = [t for t in text[sample].nonzero().flatten().tolist() if t > max(tokens, default=-1)]
        first = sorted(tokens, key=lambda t: -length[t])[:images]
        pivots = first + sorted(behind, key=lambda t: -length[t])[:texts]
        assert found[sample][valid[sample]].tolist() == pivots
        left, count = [t for t in tokens if t not in first], int(counts[sample])
        chosen = first[:count]
        if pivots and count > len(first):
            size, more = divmod(count - len(first), len(pivots))
            for at, pivot in enumerate(pivots):
                taken = sorted(left, key=lambda t: cosine(x[sample], t, pivot))[: size + (at < more)]
                chosen, left = chosen + taken, [t for t in left if t not in taken]
        assert kept[sample].nonzero().flatten().tolist() == sorted(chosen)


@given(IMAGES, st.integers(1, 5), st.integers(0, 99))
def test_conditional(image, most, seed):
    """The variance of a token given those chosen, by determinants."""
    image = torch.tensor(image)
    x, weight = drawn(image, seed, 6, 8), drawn(image, seed + 1, 6).abs() + 0.5
    counts = image.sum(1).clamp(max=most)
    found = scores.conditional(x, weight, image, counts)
    for sample in range(len(image)):
        unit = torch.nn.functional.normalize(x[sample].double(), dim=-1) * weight[sample, :, None].double()
        kernel, chosen = unit @ unit.T, []
        free = image[sample].nonzero().flatten().tolist()
        while len(chosen) < counts[sample]:
            before = torch.linalg.det(kernel[chosen][:, chosen]) if chosen else 1.0
            value = {t: (torch.linalg.det(kernel[[*chosen, t]][:, [*chosen, t]]) / before).item() for t in free}
            chosen.append(max(free, key=lambda t: (round(value[t], 5), -t)))
            free.remove(chosen[-1])
        assert found[sample].argsort(descending=True, stable=True).tolist()[: len(chosen)] == chosen
        assert found[sample].isfinite().sum() == len(chosen)


def test_relevance():
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [5.0, 0.0]]])
    image = torch.tensor([[True, True, True, False]])
    found = scores.relevance(x, image, ~image)
    expected = torch.tensor([[1e-6, 1 + 1e-6, 1 - 0.5**0.5 + 1e-6, 0.0]])
    torch.testing.assert_close(found, expected)
    assert scores.relevance(x, image, image & False).tolist() == [[1.0, 1.0, 1.0, 0.0]]


def test_states_that_overflow_are_zeros():
    x, image = torch.randn(1, 6, 4), torch.ones(1, 6, dtype=torch.bool)
    x[0, 2], x[0, 4] = torch.nan, torch.inf
    counts = torch.tensor([3])
    assert scores.diverse(x, image, counts).isfinite().sum() == 3
    found = scores.pivots(x[:, None], image, ~image, 2, 2)
    assert highest(scores.unlike(x, image, counts, *found), image, counts).sum() == 3
