"""Attention logits of a call of torch, whoever makes it.

Shape letters: B batch, T tokens, R rows, H heads.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SOFTMAX: tuple[Any, ...] = (F.softmax, torch.softmax, Tensor.softmax)


def products(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **more: Any
) -> Tensor:
    """The logits (B, H, R, T) of a call of `scaled_dot_product_attention`."""
    scale = more.get("scale") or query.shape[-1] ** -0.5
    wide = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
        logits = (query.to(wide) * scale) @ key.to(wide).transpose(-2, -1)
    if attn_mask is None:
        return logits
    return logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
