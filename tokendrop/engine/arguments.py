"""The arguments of a layer call, made compact for one group: masks, rotary, positions.

Shape letters: B batch, T tokens, K computed rows, M context rows, H heads.
"""

from typing import Any

import torch
from torch import Tensor

from tokendrop.engine.plan import Group, Rows
from tokendrop.errors import UnsupportedError

MASK = "attention_mask"


def compact(
    named: dict[str, Any], group: Group, shape: tuple[int, int], float_mask: torch.dtype | None
) -> dict[str, Any]:
    """The arguments that the computing rows of `group` need.

    Args:
        named: the layer's arguments by name, for all (B, T) tokens.
        group: the samples and rows.
        shape: (B, T).
        float_mask: the dtype of the masks that the attention takes; None for bool.

    Raises:
        UnsupportedError: a mask that is no tensor.
    """
    if group.whole and group.active is None:
        return named
    out = {name: select(value, group, group.active, shape) for name, value in named.items() if name != MASK}
    if MASK in named:
        out[MASK] = compact_mask(named[MASK], group, shape, float_mask)
    return out


def select(value: Any, group: Group, rows: Rows | None, shape: tuple[int, int]) -> Any:
    """The rows of a group in a tensor of (B or 1, T, ...), or in a tuple of these; anything else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(select(item, group, rows, shape) for item in value)
    if (
        not isinstance(value, Tensor)
        or value.dim() < 2
        or value.shape[1] != shape[1]
        or len(value) not in (1, shape[0])
    ):
        return value
    if rows is None:
        return value if len(value) == 1 else value[group.samples]
    if len(value) == 1:
        return value[0][rows.index]
    return value[group.samples[:, None], rows.index]


def compact_mask(mask: Any, group: Group, shape: tuple[int, int], float_mask: torch.dtype | None) -> Any:
    """The attention mask of a group: rows that compute against rows that are seen, by original position.

    Args:
        mask: None for causal, (B or 1, T) for padding alone, or (B or 1, H or 1, T, T), bool or additive.
        group: the samples and rows.
        shape: (B, T).
        float_mask: the dtype to make a mask in where there is none; None for bool.

    Returns:
        None where the computing rows stay causal without a mask; else (B, H or 1, K, K + M), context last.

    Raises:
        UnsupportedError: a mask that is no tensor.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedError(
            f"an attention mask of type {type(mask).__name__} cannot be made compact; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    if mask is not None and mask.dim() == 2:
        return select(mask, group, group.active, shape)
    if mask is None and group.context is None:
        return None
    if group.active is None:
        return mask if mask is None or len(mask) == 1 else mask[group.samples]
    rows, columns, seen, fills = _columns(group.active, group.context)
    if mask is None:
        return _as_dtype((seen & (columns[:, None] <= rows[:, :, None])[:, None]) | fills, float_mask)
    mask = mask.expand(shape[0], -1, -1, -1)
    mask = mask[group.samples[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    if mask.dtype == torch.bool:
        return (mask & seen) | fills
    return mask.masked_fill(~(seen | fills), torch.finfo(mask.dtype).min)


def _columns(active: Rows, context: Rows | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, valid = active.index, _valid(active)
    columns = rows if context is None else torch.cat([rows, context.index], 1)
    seen = valid if context is None else torch.cat([valid, _valid(context)], 1)
    # A row that only fills up sees itself, so that its discarded softmax stays finite.
    own = torch.eye(rows.shape[1], columns.shape[1], dtype=torch.bool, device=rows.device)
    return rows, columns, seen[:, None, None], own & ~valid[:, None, :, None]


def _valid(rows: Rows) -> Tensor:
    return torch.ones_like(rows.index, dtype=torch.bool) if rows.valid is None else rows.valid


def _as_dtype(allowed: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
