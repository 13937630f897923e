"""FlexAttention's masks, made compact: the model's own rule, asked by original position.

Shape letters: B batch, T tokens, K queries, C keys, H heads.
"""

import sys
from typing import Any

import torch
from torch import Tensor

from tokendrop.engine.model.sight import Sight


def is_block_mask(mask: Any) -> bool:
    """Whether a mask is one of FlexAttention."""
    flex = sys.modules.get("torch.nn.attention.flex_attention")
    return flex is not None and isinstance(mask, flex.BlockMask)


def compact_block(mask: Any, samples: Tensor, sight: Sight, queries: Tensor | None = None) -> Any:
    """A BlockMask (B, H or 1, K, C) of some rows.

    Args:
        mask: the model's, of all tokens.
        samples: (B,) int64, those of the rows.
        sight: where they are, and which keys may be seen.
        queries: (B, K) int64, the row of each query in the mask; by default its position.
    """
    flex = sys.modules["torch.nn.attention.flex_attention"]
    rule, rows = mask.mask_mod, sight.rows if queries is None else queries
    columns, own, valid = sight.columns, sight.own, sight.valid
    samples = samples if mask.shape[0] > 1 else torch.zeros_like(samples)
    fills = None if own is None or valid is None else ~valid.gather(1, own)

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        may = rule(samples[b], h, rows[b, q], columns[b, k])
        if valid is None:
            return may
        may = may & valid[b, k]
        return may if own is None or fills is None else may | (fills[b, q] & (own[b, q] == k))

    # B is given in full: a mask broadcast over the batch reads out of bounds (pytorch 172225).
    sizes = len(samples), mask.shape[1], rows.shape[1], columns.shape[1]
    return flex.create_block_mask(seen, *sizes, device=str(rows.device), BLOCK_SIZE=mask.BLOCK_SIZE)


def rows_of_block(mask: Any, samples: Tensor, rows: Tensor) -> Tensor:
    """The rows (B, R) int64 of a BlockMask, (B, H or 1, R, T) bool."""
    heads, tokens = (torch.arange(mask.shape[at], device=rows.device) for at in (1, 3))
    samples = samples if mask.shape[0] > 1 else torch.zeros_like(samples)
    at = samples[:, None, None, None], heads[None, :, None, None], rows[:, None, :, None], tokens
    return mask.mask_mod(*at).expand(len(rows), len(heads), rows.shape[1], len(tokens))


def has_columns(mask: Any) -> bool:
    """Whether a mask says of each query which keys it sees."""
    return is_block_mask(mask) or (isinstance(mask, Tensor) and mask.dim() == 4)


def first_columns(mask: Any, tokens: int) -> Any:
    """The first T columns of a mask (B, H or 1, K, C)."""
    if isinstance(mask, Tensor):
        return mask[..., :tokens]
    flex, sizes = sys.modules["torch.nn.attention.flex_attention"], (*mask.shape[:3], tokens)
    device = str(mask.kv_indices.device)
    return flex.create_block_mask(mask.mask_mod, *sizes, device=device, BLOCK_SIZE=mask.BLOCK_SIZE)
