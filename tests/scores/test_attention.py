"""Scores from attention are what they say, on numbers worked out by hand.

Shape letters: B batch, T tokens, R scoring rows, H heads.
"""

import torch

from tokendrop import scores


def test_attention_is_the_mean_over_heads_and_valid_rows():
    # One sample, two heads, two rows, three tokens.
    rows = torch.tensor([[[[0.5, 0.5, 0.0], [0.2, 0.4, 0.4]], [[0.1, 0.9, 0.0], [0.6, 0.2, 0.2]]]])
    both, first = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    torch.testing.assert_close(scores.attention(rows, both), torch.tensor([[0.35, 0.5, 0.15]]))
    torch.testing.assert_close(scores.attention(rows, first), torch.tensor([[0.3, 0.7, 0.0]]))


def test_rows_that_fill_up_do_not_count_even_where_they_are_not_finite():
    rows = torch.tensor([[[[0.5, 0.5], [torch.nan, torch.nan]]]], requires_grad=True)
    found = scores.attention(rows, torch.tensor([[True, False]]))
    assert found.tolist() == [[0.5, 0.5]]
    assert not found.requires_grad
    assert scores.attention(rows, torch.tensor([[False, False]])).tolist() == [[0.0, 0.0]]


def test_value_norm_is_over_all_heads():
    # Two heads of width two, two tokens.
    values = torch.tensor([[[[1.0, 2.0], [3.0, 0.0]], [[2.0, 0.0], [4.0, 0.0]]]])
    torch.testing.assert_close(scores.value_norm(values), torch.tensor([[3.0, 5.0]]))
