"""Scores from frame to frame, against loops.

Shape letters: B batch, T tokens, D hidden.
"""

import torch
from hypothesis import given
from hypothesis import strategies as st

from tokendrop.scores.frames import frame_before, temporal

TOKENS = st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 3)), min_size=1, max_size=12)


def by_loops(tokens):
    """For each token the one of as high a rank in the next lower frame of its video."""
    found = []
    for t, (video, frame) in enumerate(tokens):
        earlier = [one for v, one in tokens if v == video and one < frame]
        own = [u for u, pair in enumerate(tokens) if pair == (video, frame)]
        before = [u for u, pair in enumerate(tokens) if earlier and pair == (video, max(earlier))]
        rank = own.index(t)
        found.append(before[rank] if video >= 0 and rank < len(before) else -1)
    return found


@given(st.lists(TOKENS, min_size=1, max_size=3))
def test_the_same_place_of_the_frame_before(rows):
    longest = max(map(len, rows))
    rows = [row + [(-1, 0)] * (longest - len(row)) for row in rows]
    images, frames = torch.tensor(rows).unbind(-1)
    assert frame_before(images, frames).tolist() == [by_loops(row) for row in rows]


def test_how_unlike_it_is():
    torch.manual_seed(0)
    x = torch.randn(1, 7, 5, dtype=torch.bfloat16)
    images, frames = torch.tensor([[0, 0, -1, 0, 0, 0, 1]]), torch.tensor([[0, 0, 0, 2, 2, 2, 0]])
    found = temporal(x, images, frames)
    expected = [torch.inf] * 7
    for t, u in ((3, 0), (4, 1)):
        one, other = x[0, t].double(), x[0, u].double()
        expected[t] = (1 - one @ other / (one.norm() * other.norm())).item()
    torch.testing.assert_close(found[0], torch.tensor(expected), rtol=1e-5, atol=1e-5)
