"""The arguments of a layer call, made compact for one group: masks, rotary, positions.

Shape letters: B batch, T tokens, K computed rows, M context rows, H heads.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tokendrop.engine.model.block_masks import compact_block, is_block_mask
from tokendrop.engine.model.sight import Sight, additive
from tokendrop.engine.plan.plan import Group
from tokendrop.engine.plan.rows import Rows
from tokendrop.errors import UnsupportedError
from tokendrop.kernels import gather_rotary

_BIASES = ("alibi", "position_bias")
_KNOWN = "load the model with attn_implementation='sdpa' or 'eager'"


@dataclass(frozen=True)
class Form:
    """What the arguments of a layer call look like.

    Args:
        shape: (B, T).
        mask: name of the argument that takes the attention mask, if any.
        kind: of the attention, see `tokendrop.engine.model.attention.kind`.
        float_mask: the dtype of the masks that the attention takes; None for bool.
        merged: whether a cache returns the keys of all tokens in order.
        sight: whether the attention is given a `Sight` for its mask.
        packs: (B, T) int64, the packed samples that the attention finds by itself; None where each row is one.
        both: whether the attention sees both sides where it is given no mask.
    """

    shape: tuple[int, int]
    mask: str | None
    kind: str | None
    float_mask: torch.dtype | None
    merged: bool = False
    sight: bool = False
    packs: Tensor | None = None
    both: bool = False


def compact(named: dict[str, Any], group: Group, form: Form) -> dict[str, Any]:
    """The arguments that the computing rows of `group` need.

    Args:
        named: the layer's arguments by name, for all (B, T) tokens.
        group: the samples and rows.
        form: what they look like.

    Raises:
        UnsupportedError: a mask that is no tensor, or a tensor whose rows cannot be told from its shape.
    """
    if runs_all(group):
        return named
    return {name: _compact(name, value, group, form) for name, value in named.items()}


def runs_all(group: Group) -> bool:
    """Whether every row of the whole batch computes."""
    return group.whole and group.active is None


def _compact(name: str, value: Any, group: Group, form: Form) -> Any:
    if name == form.mask:
        return compact_mask(value, group, form)
    if name.startswith("cu_seq_lens") and isinstance(value, Tensor):
        return value if form.sight else _lengths(value, group, form)
    if name.startswith("max_length") and value is not None:
        return group.size
    if _is_square(value, form):
        return _square(name, value, group, form)
    if is_bias(value, form.shape[1]) or (name in _BIASES and isinstance(value, Tensor)):
        return _bias(name, value, group, form)
    return select(value, group, group.active, form.shape, name)


def _lengths(ends: Tensor, group: Group, form: Form) -> Tensor:
    # Where sequences (N + 1,) of the flat batch begin among the rows that compute; those that fill up are one more.
    tokens = torch.arange(form.shape[0] * form.shape[1], device=ends.device)
    packs = torch.bucketize(tokens, ends[1:].to(tokens.dtype), right=True).view(form.shape)[group.samples]
    if group.active is not None:
        packs = packs.gather(1, group.active.index).where(group.active.valid, -1)
    begins = torch.ones_like(packs, dtype=torch.bool)
    begins[:, 1:] = packs.diff() != 0
    return F.pad(begins.flatten().nonzero().flatten(), (0, 1), value=begins.numel()).to(ends.dtype)


def is_bias(value: Any, tokens: int) -> bool:
    """Whether an argument (..., 1, T) has one column for each token, as linear biases of attention have."""
    return isinstance(value, Tensor) and value.dim() in (3, 4) and value.shape[-2:] == (1, tokens) and tokens > 1


def _bias(name: str, value: Tensor, group: Group, form: Form) -> Tensor:
    if len(value) not in (1, form.shape[0]) or not is_bias(value, form.shape[1]):
        if runs_all(group):
            return value
        raise UnsupportedError(
            f"the argument {name!r} of shape {tuple(value.shape)} biases attention by column, of which samples keep "
            f"different ones; expected ({form.shape[0]} or 1, ..., 1, {form.shape[1]}). Use a decoder with rotary or "
            "learned positions"
        )
    value = value if len(value) == 1 else value[group.samples]
    if group.active is None or form.merged:
        return value
    return columns_of(value, places(group, form).columns)


def columns_of(value: Tensor, columns: Tensor) -> Tensor:
    """The columns (B, K) of a bias (B or 1, ..., 1, T)."""
    index = columns.view(len(columns), *[1] * (value.dim() - 2), -1).expand(-1, *value.shape[1:-1], -1)
    return value.expand(len(columns), *value.shape[1:]).gather(-1, index)


def select(value: Any, group: Group, rows: Rows | None, shape: tuple[int, int], name: str) -> Any:
    """The rows of a group in a tensor of (B or 1, T, ...) or (3, B or 1, T, ...), as M-RoPE has them, or in a tuple.

    The samples of a group in another tensor of (B, ...); anything else as it is.

    Raises:
        UnsupportedError: a tensor of (T, ...), which could be one row for each token.
    """
    if rows is not None and is_rotary(value, shape):
        cos, sin = (part if group.whole or len(part) == 1 else part[group.samples] for part in value)
        return gather_rotary(cos, sin, rows.index)
    if isinstance(value, tuple | list):
        return type(value)(select(item, group, rows, shape, name) for item in value)
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    if value.dim() == 1:
        return value[group.samples] if len(value) == shape[0] != shape[1] and not group.whole else value
    if value.dim() > 2 and value.shape[1] in (1, shape[0]) and value.shape[2] == shape[1] and len(value) == 3:
        return torch.stack([select(one, group, rows, shape, name) for one in value])
    if value.shape[1] != shape[1] or len(value) not in (1, shape[0]):
        if len(value) == shape[1] and rows is not None:
            raise UnsupportedError(
                f"the argument {name!r} of shape {tuple(value.shape)} has a row for each of {shape[1]} tokens but no "
                f"batch dimension; pass it as {(1, *value.shape)}, so that each sample can choose its rows"
            )
        return value[group.samples] if len(value) == shape[0] and not group.whole else value
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
        mask: None for causal, (B or 1, T) for padding alone, (B or 1, H or 1, T, T), bool or additive, or a BlockMask.
        group: the samples and rows.
        form: what the arguments look like.

    Returns:
        None where the computing rows stay causal; else (B, H or 1, K, M + K), context first, or (B, H or 1, K, T) where
        a cache returns the keys; or a BlockMask or a `Sight` of these.

    Raises:
        UnsupportedError: a mask that is no tensor.
    """
    if is_block_mask(mask):
        return compact_block(mask, group.samples, places(group, form))
    if mask is not None and not isinstance(mask, Tensor):
        found = type(mask).__name__
        raise UnsupportedError(f"an attention mask of type {found} cannot be made compact; {_KNOWN}")
    if form.sight and (mask is None or mask.dim() == 2):
        return _sight(mask, group, form)
    if mask is not None and mask.dim() == 2:
        if _is_square(mask, form):
            return _square(form.mask or "", mask, group, form)
        return select(mask, group, group.active, form.shape, form.mask or "")
    if mask is None and (group.context is None or group.active is None):
        return None
    if group.active is None:
        return mask if len(mask) == 1 else mask[group.samples]
    if form.merged:
        return _merged_mask(mask, group.active.index, group, form)
    seen = places(group, form)
    if mask is None:
        return _as_dtype(seen.mask(None), form.float_mask)
    mask = mask.expand(form.shape[0], -1, -1, -1)
    mask = mask[group.samples[:, None, None], :, seen.rows[:, :, None], seen.columns[:, None]].permute(0, 3, 1, 2)
    return seen.among(mask)


def _sight(padding: Tensor | None, group: Group, form: Form) -> Sight:
    seen, packs = places(group, form), form.packs
    fills = form.both and group.active is not None  # which those before them would see
    causal = not fills and padding is None and packs is None and group.context is None and not form.merged
    if group.late is not None and padding is None and packs is None and not form.merged and not form.both:
        seen.before = group.size - len(group.late)
    if padding is not None:
        real = padding.bool().expand(form.shape[0], -1)[group.samples].gather(1, seen.columns)
        seen.valid = real if seen.valid is None else seen.valid & real
    if packs is not None:
        packs = packs[group.samples]
        seen.packs = packs.gather(1, seen.rows), packs.gather(1, seen.columns)
    return replace(seen, causal=causal, both=form.both)


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


def places(group: Group, form: Form) -> Sight:
    """The positions of the rows that compute and of those that are seen, context first, or all where a cache returns
    them; without what an argument says of them."""
    tokens, active, context = form.shape[1], group.active, group.context
    every = torch.arange(tokens, device=group.samples.device).expand(len(group.samples), -1)
    rows = every if active is None else active.index
    if form.merged or active is None:
        return Sight(rows, every, rows, None, None, tokens)
    columns, valid = rows, active.valid
    own = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    if context is not None:
        columns, valid = torch.cat([context.index, rows], 1), torch.cat([context.valid, valid], 1)
        own = own + context.index.shape[1]
    return Sight(rows, columns, own, valid, None, tokens)


def both_sides(tokens: int, like: Tensor, dtype: torch.dtype | None) -> Tensor:
    """(1, 1, T, T), the mask that says what None means where attention sees both sides, on the device of `like`."""
    return _as_dtype(torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=like.device), dtype)


def _as_dtype(allowed: Tensor, dtype: torch.dtype | None) -> Tensor:
    return allowed if dtype is None else additive(allowed, dtype)
