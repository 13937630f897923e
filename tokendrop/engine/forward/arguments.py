"""The arguments of a layer call, made compact for one group: masks, rotary, positions.

Shape letters: B batch, T tokens, K computed rows, M context rows, H heads.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokendrop.engine.plan.plan import Group
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import UnsupportedError
from tokendrop.kernels import gather_rotary

_BIASES = ("alibi", "position_bias")


@dataclass(frozen=True)
class Form:
    """What the arguments of a layer call look like.

    Args:
        shape: (B, T).
        mask: name of the argument that takes the attention mask, if any.
        float_mask: the dtype of the masks that the attention takes; None for bool.
        merged: whether a cache returns the keys of all tokens in order.
    """

    shape: tuple[int, int]
    mask: str | None
    float_mask: torch.dtype | None
    merged: bool


def compact(named: dict[str, Any], group: Group, form: Form) -> dict[str, Any]:
    """The arguments that the computing rows of `group` need.

    Args:
        named: the layer's arguments by name, for all (B, T) tokens.
        group: the samples and rows.
        form: what they look like.

    Raises:
        UnsupportedError: a mask that is no tensor, or a tensor whose rows cannot be told from its shape.
    """
    if group.whole and group.active is None:
        return named
    return {name: _compact(name, value, group, form) for name, value in named.items()}


def _compact(name: str, value: Any, group: Group, form: Form) -> Any:
    if name == form.mask:
        return compact_mask(value, group, form)
    if _is_square(value, form):
        return _square(name, value, group, form)
    if is_bias(value, form.shape[1]) or (name in _BIASES and isinstance(value, Tensor)):
        return _bias(name, value, group, form)
    return select(value, group, group.active, form.shape, name)


def is_bias(value: Any, tokens: int) -> bool:
    """Whether an argument (..., 1, T) has one column for each token, as linear biases of attention have."""
    return isinstance(value, Tensor) and value.dim() in (3, 4) and value.shape[-2:] == (1, tokens) and tokens > 1


def _bias(name: str, value: Tensor, group: Group, form: Form) -> Tensor:
    if len(value) not in (1, form.shape[0]) or not is_bias(value, form.shape[1]):
        if group.active is None and group.whole:
            return value
        raise UnsupportedError(
            f"the argument {name!r} of shape {tuple(value.shape)} biases attention by column, of which samples keep "
            f"different ones; expected ({form.shape[0]} or 1, ..., 1, {form.shape[1]}). Use a decoder with rotary or "
            "learned positions"
        )
    value = value if len(value) == 1 else value[group.samples]
    if group.active is None or form.merged:
        return value
    columns = _columns(group.active, group.context)[1]
    return columns_of(value, columns)


def columns_of(value: Tensor, columns: Tensor) -> Tensor:
    """The columns (B, K) of a bias (B or 1, ..., 1, T)."""
    index = columns.view(len(columns), *[1] * (value.dim() - 2), -1).expand(-1, *value.shape[1:-1], -1)
    return value.expand(len(columns), *value.shape[1:]).gather(-1, index)


def check_packing(named: dict[str, Any], backend: str) -> None:
    """Refuse packed sequences where an attention finds their borders by itself, among rows that are compact by then.

    Args:
        named: the layer's arguments by name.
        backend: the attention implementation; sdpa and eager are given their borders in the mask.

    Raises:
        UnsupportedError: lengths of packed sequences, or position ids that restart.
    """
    if backend in ("sdpa", "eager"):
        return
    lengths = next((name for name in named if name.startswith("cu_seq_lens") and named[name] is not None), None)
    ids = named.get("position_ids")
    restarts = isinstance(ids, Tensor) and ids.dim() == 2 and bool((ids.diff(dim=1) < 0).any())
    if lengths or restarts:
        found = f"{lengths!r}" if lengths else "position ids that restart"
        raise UnsupportedError(
            f"packed sequences ({found}) with the {backend!r} attention, which would look for their borders among the "
            "rows that are left; pass position ids that restart, with attn_implementation='sdpa'"
        )


def select(value: Any, group: Group, rows: Rows | None, shape: tuple[int, int], name: str) -> Any:
    """The rows of a group in a tensor of (B or 1, T, ...) or (3, B or 1, T, ...), as M-RoPE has them, or in a tuple.

    Anything else as it is.

    Raises:
        UnsupportedError: a tensor of (T, ...), which could be one row for each token.
    """
    if rows is not None and is_rotary(value, shape):
        cos, sin = (part if group.whole or len(part) == 1 else part[group.samples] for part in value)
        return gather_rotary(cos, sin, rows.index)
    if isinstance(value, tuple | list):
        return type(value)(select(item, group, rows, shape, name) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2:
        return value
    if value.dim() > 2 and value.shape[1] in (1, shape[0]) and value.shape[2] == shape[1] and len(value) == 3:
        return torch.stack([select(one, group, rows, shape, name) for one in value])
    if value.shape[1] != shape[1] or len(value) not in (1, shape[0]):
        if len(value) == shape[1] and rows is not None:
            raise UnsupportedError(
                f"the argument {name!r} of shape {tuple(value.shape)} has a row for each of {shape[1]} tokens but no "
                f"batch dimension; pass it as {(1, *value.shape)}, so that each sample can choose its rows"
            )
        return value
    if rows is None:
        return value if len(value) == 1 else value[group.samples]
    if len(value) == 1:
        return value[0][rows.index]
    return value[group.samples[:, None], rows.index]


def is_rotary(value: Any, shape: tuple[int, int]) -> bool:
    """Whether an argument is a pair of tables, cos and sin of (B or 1, T, width)."""
    pair = isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value)
    if not pair or value[0].shape != value[1].shape or value[0].dtype != value[1].dtype:
        return False
    return value[0].dim() == 3 and value[0].shape[1] == shape[1] and len(value[0]) in (1, shape[0])


def compact_mask(mask: Any, group: Group, form: Form) -> Any:
    """The attention mask of a group: rows that compute against rows that are seen, by original position.

    Args:
        mask: None for causal, (B or 1, T) for padding alone, or (B or 1, H or 1, T, T), bool or additive.
        group: the samples and rows.
        form: what the arguments look like.

    Returns:
        None where the computing rows stay causal without a mask; else (B, H or 1, K, K + M), context last, or
        (B, H or 1, K, T) where a cache returns the keys.

    Raises:
        UnsupportedError: a mask that is no tensor.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedError(
            f"an attention mask of type {type(mask).__name__} cannot be made compact; load the model with "
            "attn_implementation='sdpa' or 'eager'"
        )
    if mask is not None and mask.dim() == 2:
        if _is_square(mask, form):
            return _square(form.mask or "", mask, group, form)
        return select(mask, group, group.active, form.shape, form.mask or "")
    if mask is None and group.context is None:
        return None
    if group.active is None:
        return mask if mask is None or len(mask) == 1 else mask[group.samples]
    if form.merged:
        return _merged_mask(mask, group.active.index, group, form)
    rows, columns, seen, fills = _columns(group.active, group.context)
    if mask is None:
        return _as_dtype((seen & (columns[:, None] <= rows[:, :, None])[:, None]) | fills, form.float_mask)
    mask = mask.expand(form.shape[0], -1, -1, -1)
    mask = mask[group.samples[:, None, None], :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)
    if mask.dtype == torch.bool:
        return (mask & seen) | fills
    return mask.masked_fill(~(seen | fills), torch.finfo(mask.dtype).min)


def _merged_mask(mask: Tensor | None, rows: Tensor, group: Group, form: Form) -> Tensor:
    if mask is None:
        causal = torch.arange(form.shape[1], device=rows.device) <= rows[:, :, None]
        return _as_dtype(causal[:, None], form.float_mask)
    return mask.expand(form.shape[0], -1, -1, -1)[group.samples[:, None], :, rows].transpose(1, 2)


def _is_square(value: Any, form: Form) -> bool:
    tokens = form.shape[1]
    masks = isinstance(value, Tensor) and (value.dtype == torch.bool or value.dtype.is_floating_point)
    return masks and value.shape == (tokens, tokens) and tokens not in (1, form.shape[0])


def _square(name: str, mask: Tensor, group: Group, form: Form) -> Tensor:
    # One mask for the whole batch serves different rows of each sample only if it is causal.
    if group.active is None:
        return mask
    tokens = form.shape[1]
    causal = torch.ones_like(mask, dtype=torch.bool).tril()
    boolean = mask.dtype == torch.bool
    is_causal = torch.equal(mask if boolean else mask == 0, causal) or (boolean and torch.equal(mask, ~causal))
    if group.context is not None or not is_causal:
        raise UnsupportedError(
            f"the argument {name!r} of shape {tuple(mask.shape)} is one mask for all samples, which keep different "
            f"rows; pass one of (1, 1, {tokens}, {tokens}), or a causal one"
        )
    return mask[: group.size, : group.size]


def _columns(active: Rows, context: Rows | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, valid = active.index, active.valid
    columns = rows if context is None else torch.cat([rows, context.index], 1)
    seen = valid if context is None else torch.cat([valid, context.valid], 1)
    # A row that only fills up sees itself, so that its discarded softmax stays finite.
    own = torch.eye(rows.shape[1], columns.shape[1], dtype=torch.bool, device=rows.device)
    return rows, columns, seen[:, None, None], own & ~valid[:, None, :, None]


def _as_dtype(allowed: Tensor, dtype: torch.dtype | None) -> Tensor:
    if dtype is None:
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, torch.finfo(dtype).min)
