"""HiMix's attention in two parts: rows before the image see no image, rows behind it see all of it.

Shape letters: B batch, H heads, K computing rows, P of them before the image, M context rows, D hidden.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.overrides import TorchFunctionMode


class _SplitAttention(TorchFunctionMode):
    """Takes the place of the one attention call of a layer's own forward.

    Args:
        late: (K - P, M + K) bool, what rows behind the image see.
    """

    def __init__(self, late: Tensor) -> None:
        super().__init__()
        self.late = late

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return _split(self.late, *args, **kwargs or {})
        return func(*args, **kwargs or {})


def _split(
    late: Tensor, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any
) -> Tensor:
    attend: Any = F.scaled_dot_product_attention
    before, columns = query.shape[2] - len(late), late.shape[1]
    if attn_mask is None or attn_mask.shape[-2:] != (query.shape[2], columns) or key.shape[2] != columns:
        return attend(query, key, value, attn_mask, **rest)
    rest.pop("is_causal", None)  # there was a mask
    behind = attend(query[:, :, before:], key, value, lower_right(late) if query.is_cuda else late, **rest)
    if before == 0:
        return behind
    context = columns - query.shape[2]
    own = query[:, :, :before], *(x[:, :, context : context + before] for x in (key, value))
    return torch.cat([attend(*own, is_causal=True, **rest), behind], 2)


def lower_right(late: Tensor) -> Any:
    """The mask (K - P, M + K) in words, for which CUDA has kernels that read no mask: the last row sees all keys."""
    try:
        return causal_lower_right(*late.shape)
    except RuntimeError:  # where every call is looked at, as by a counter of FLOPs, torch makes no such tensor
        return late


def split_attention(late: Tensor | None) -> AbstractContextManager[object]:
    """Split the attention that a layer calls inside under the whole (K, M + K) mask; None leaves it.

    The P rows before the image are causal among themselves, without a mask; the others see what `late` says.
    """
    return nullcontext() if late is None else _SplitAttention(late)
