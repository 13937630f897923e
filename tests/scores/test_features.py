"""Scores among image tokens against their definitions.

Shape letters: B batch, T tokens, M image tokens, D hidden.
"""

import pytest
import torch

from tokendrop import scores

TOKENS, WIDTH = 12, 4


@pytest.fixture
def states():
    return torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def image():
    made = torch.zeros(2, TOKENS, dtype=torch.bool)
    made[0, 2:10], made[1, 1:7] = True, True
    return made


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_similarity_is_the_mean_over_the_others(states, image):
    found = scores.similarity(states, image)
    for sample in range(2):
        tokens = image[sample].nonzero().flatten().tolist()
        for token in tokens:
            cosines = [
                torch.cosine_similarity(states[sample, token], states[sample, u], 0) for u in tokens if u != token
            ]
            close(found[sample, token], -torch.stack(cosines).mean())
    assert found[~image].abs().sum() == 0


def test_similarity_prefers_what_is_unlike(image):
    alike = torch.ones(2, TOKENS, WIDTH)
    alike[:, 5] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    assert scores.similarity(alike, image).masked_fill(~image, -9).argmax(1).tolist() == [5, 5]
    alone = torch.zeros(1, 3, dtype=torch.bool)
    alone[0, 1] = True
    close(scores.similarity(torch.ones(1, 3, 2), alone), torch.zeros(1, 3))


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_leverage_sums_to_the_rank_and_lies_between_0_and_1(states, image, rank):
    found = scores.leverage(states, image, rank=rank)
    close(found.sum(1), torch.full((2,), float(rank)))
    assert found.min() >= 0
    assert found.max() <= 1
    assert found[~image].abs().sum() == 0


def test_leverage_at_full_rank_is_the_diagonal_of_the_hat_matrix(states, image):
    found = scores.leverage(states, image, rank=WIDTH)
    for sample in range(2):
        x = states[sample, image[sample]].double()
        close(found[sample, image[sample]], (x @ torch.linalg.pinv(x)).diagonal().float())


def test_leverage_does_not_depend_on_the_basis(states, image):
    generator = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator))[0]
    mixing = torch.randn(WIDTH, WIDTH, generator=generator)
    for rank in (1, 2, WIDTH):
        found = scores.leverage(states, image, rank=rank)
        close(scores.leverage(states @ rotation, image, rank=rank), found)
        close(scores.leverage(3 * states, image, rank=rank), found)
    close(scores.leverage(states @ mixing, image, rank=WIDTH), found)


def test_leverage_of_equal_rows_is_shared_and_other_tokens_do_not_matter(states, image):
    states[:, 5] = states[:, 4]
    found = scores.leverage(states, image, rank=2)
    close(found[:, 5], found[:, 4])
    close(scores.leverage(states.masked_fill(~image[:, :, None], 7.0), image, rank=2), found)


def test_leverage_chooses_its_rank_by_energy():
    # Squared singular values 9, 4 and 1 of 14.
    states = torch.diag(torch.tensor([3.0, 2.0, 1.0]))[None]
    image = torch.ones(1, 3, dtype=torch.bool)
    assert [scores.leverage(states, image, energy=e).sum().round().item() for e in (0.6, 0.65, 0.92, 0.93, 1.0)] == [
        *(1, 2, 2, 3, 3)
    ]


def test_leverage_has_no_more_rank_than_its_matrix(image):
    same = torch.ones(2, TOKENS, WIDTH)
    close(scores.leverage(same, image, rank=3).sum(1), torch.ones(2))
    close(scores.leverage(same, image).sum(1), torch.ones(2))
    assert scores.leverage(torch.zeros(2, TOKENS, WIDTH), image).abs().sum() == 0


def test_no_gradient_flows(states, image):
    states.requires_grad_(True)
    assert not scores.leverage(states, image).requires_grad
    assert not scores.similarity(states, image).requires_grad
