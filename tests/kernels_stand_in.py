"""Attention kernels of a GPU, written plainly on torch with their documented semantics, under their own names.

Shape letters: B batch, T tokens, K queries, C keys, H heads, G heads of keys and values, W width, N sequences.
"""

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers.integrations.flex_attention as flex_integration
from torch import Tensor
from torch._higher_order_ops.flex_attention import math_attention
from torch.nn.attention.flex_attention import AuxOutput, create_block_mask
from transformers import masking_utils, modeling_utils
from transformers import modeling_flash_attention_utils as flash_utils
from transformers.models.falcon import modeling_falcon

HUB = "kernels-community/flash-attn2"
FLASH = ("flash_attention_2", "flash_attention_3", HUB)
EVERY = (*FLASH, "flex_attention")


@dataclass
class Calls:
    """What the kernels were given, call by call: shapes and arguments by name."""

    plain: list[dict[str, Any]] = field(default_factory=list)
    varlen: list[dict[str, Any]] = field(default_factory=list)
    flex: list[dict[str, Any]] = field(default_factory=list)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: Any, softcap: float, s_aux: Any
) -> Tensor:
    # One sequence: q (K, H, W), k and v (C, G, W). The last query stands beside the last key; a row without keys is 0.
    times = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    logits = torch.einsum("khw,chw->hkc", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    behind = torch.arange(len(q))[:, None] + len(k) - len(q) - torch.arange(len(k))
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    left, right = window
    if left >= 0:
        seen = seen & (behind <= left)
    if right >= 0 and not causal:
        seen = seen & (-behind <= right)
    logits = logits.masked_fill(~seen, -torch.inf)
    if s_aux is not None:  # a column that takes its share and gives no value
        logits = torch.cat([logits, s_aux[:, None, None].expand(-1, len(q), 1)], -1)
    weights = torch.where(seen.any(1)[None, :, None], logits, 0).softmax(-1)[..., : len(k)] * seen
    return torch.einsum("hkc,chw->khw", weights, v)


def flash_attn_func(
    calls: Calls,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """FlashAttention of q (B, K, H, W), k and v (B, C, G, W)."""
    calls.plain.append({"q": tuple(q.shape), "k": tuple(k.shape), "causal": causal})
    assert dropout_p == 0
    outs = [_attend(*one, softmax_scale, causal, window_size, softcap, s_aux) for one in zip(q, k, v, strict=True)]
    return torch.stack(outs)


def flash_attn_varlen_func(
    calls: Calls,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """FlashAttention of N sequences, q (sum of K, H, W), k and v (sum of C, G, W)."""
    calls.varlen.append(
        {
            "q": tuple(q.shape),
            "k": tuple(k.shape),
            "causal": causal,
            "queries": cu_seqlens_q.tolist(),
            "keys": cu_seqlens_k.tolist(),
            "longest": (int(max_seqlen_q), int(max_seqlen_k)),
        }
    )
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (sum(queries), sum(keys)) == (len(q), len(k))
    assert max(queries) <= max_seqlen_q
    assert max(keys) <= max_seqlen_k
    assert min(queries) > 0
    assert all(b >= a for a, b in zip(queries, keys, strict=True))  # else it has rows without keys
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([_attend(*one, softmax_scale, causal, window_size, softcap, s_aux) for one in parts])


@torch.library.custom_op("tokendrop_tests::varlen", mutates_args=())
def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Tensor, keys: Tensor, most: int, more: int) -> Tensor:
    return flash_attn_varlen_func(Calls(), q, k, v, queries, keys, most, more, causal=True)


@_varlen.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(q)


def _operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool = False,
    softmax_scale: float | None = None,
) -> Tensor:
    """The same as one operator, without gradients; causal, with the usual scale."""
    return _varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


def _flex(calls: Calls, query: Tensor, key: Tensor, value: Tensor, training: bool = False, **given: Any) -> Any:
    mask = given["block_mask"]
    if mask is None:  # nothing is masked
        sizes = len(query), 1, query.shape[2], key.shape[2]
        mask = create_block_mask(lambda b, h, q, k: b >= 0, *sizes, device=str(query.device))
    assert mask.shape == (len(query), 1, query.shape[2], key.shape[2])
    calls.flex.append({"q": tuple(query.shape), "k": tuple(key.shape), "mask": mask})
    rule = given["score_mod"]
    out, lse, _ = math_attention(query, key, value, rule, mask.as_tuple(), given["scale"], {})
    # What transformers asks for on every device but the CPU; of base 2 here.
    aux = AuxOutput(lse=lse * math.log(2))
    return (out, aux) if given.get("return_aux") is not None else (out, aux.lse) if given.get("return_lse") else out


def _falcon(*args: Any, **given: Any) -> Tensor:
    return flash_utils._flash_attention_forward(*args, **given, attn_implementation="flash_attention_2")


@contextmanager
def kernels(operators: bool = False) -> Iterator[Calls]:
    """Inside, flash attention and flex attention run on the CPU, as written here; what they were given."""
    calls = Calls()
    made: list[Any] = [functools.partial(one, calls) for one in (flash_attn_func, flash_attn_varlen_func)]
    made[1] = _operator if operators else made[1]
    functions = (*made, None, flash_utils._pad_input, flash_utils._unpad_input)
    plain = functools.partial(create_block_mask, _compile=False)

    def block_mask(**given: Any) -> Any:
        return plain(**{name: value for name, value in given.items() if name != "_compile"})

    with (
        mock.patch.object(flash_utils, "_lazy_imports", return_value=functions),
        mock.patch.object(flash_utils, "_loaded_implementation", None),
        # Which it imports where FlashAttention is installed.
        mock.patch.object(modeling_falcon, "_flash_attention_forward", _falcon, create=True),
        mock.patch.object(flex_integration, "compile_friendly_flex_attention", functools.partial(_flex, calls)),
        mock.patch.object(masking_utils, "create_block_mask", block_mask),
        mock.patch.dict(
            modeling_utils.AttentionInterface._global_mapping,
            {HUB: modeling_utils.AttentionInterface._global_mapping["flash_attention_2"]},
        ),
        mock.patch.dict(
            masking_utils.AttentionMaskInterface._global_mapping,
            {HUB: masking_utils.AttentionMaskInterface._global_mapping["flash_attention_2"]},
        ),
    ):
        yield calls


def with_attention(model: Any, name: str) -> Any:
    """The model, running the attention `name`."""
    model.config._attn_implementation = name
    return model


def ignores_masks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **_: Any
) -> tuple[Tensor, None]:
    """An attention of somebody's own that takes no mask, causal by position in the row."""
    times = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(times, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=query.shape[2] > 1, scale=scaling)
    return out.transpose(1, 2), None
