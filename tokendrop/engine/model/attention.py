"""The attention of somebody else's layer, whose implementation is chosen call by call.

A layer's attention looks the function up by the name in its config. In a call with a `Sight` for its mask that name is
ours, in this thread and this module only, and the function goes on to the model's own, which is given sequences, or to
one that takes a mask tensor, where no sequences say it.

Shape letters: B batch, K queries, C keys, H heads, W width.
"""

import inspect
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.model import swap
from tokendrop.engine.model.block_masks import is_block_mask, rows_of_block
from tokendrop.engine.model.sight import Sight, additive, pick_keys
from tokendrop.engine.model.swap import Swapped

OURS = "tokendrop"
# By the function that makes its masks, each kind of attention; the hub's kernels and registered ones have one of these.
_KINDS = {"sdpa": "sdpa", "eager": "eager", "flash_attention_2": "flash", "flex_attention": "flex"}
_swapping = threading.Lock()


class _Choosing(threading.local):
    """Whether the attention of this thread is ours at the moment."""

    def __init__(self) -> None:
        self.on = False  # there from the start, or a compiled graph would see it come


_choosing = _Choosing()


@contextmanager
def choosing(on: bool) -> Generator[None]:
    """Have layers that are settled call our attention inside, or their own."""
    before, _choosing.on = _choosing.on, on
    try:
        yield
    finally:
        _choosing.on = before


class _Config:
    """A config that names our attention, and says whatever else another says."""

    _attn_implementation = OURS

    def __init__(self, config: Any) -> None:
        self.__dict__["_config"] = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_config"], name)


class _ChosenAttention(Swapped):
    """Mixin of an attention that looks its function up by the name in its config."""

    @property
    def config(self) -> Any:
        """Its own, or one that names our attention."""
        own = self.__dict__["config"]
        return _Config(own) if _choosing.on else own

    @config.setter
    def config(self, value: Any) -> None:
        self.__dict__["config"] = value


class _MaskedAttention(_ChosenAttention):
    """Mixin of an attention that looks up nothing: it follows as a class of its own that takes a mask tensor."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        masked = _masked_class(self)
        if not _choosing.on or masked is None:
            return super().forward(*args, **kwargs)
        dtype = args[0].dtype
        args = tuple(additive(one.mask(None), dtype) if isinstance(one, Sight) else one for one in args)
        kwargs = {n: additive(x.mask(None), dtype) if isinstance(x, Sight) else x for n, x in kwargs.items()}
        return masked.forward(self, *args, **kwargs)


def kind(name: str) -> str | None:
    """Which masks an attention implementation takes: "sdpa", "eager", "flash" or "flex"; None where nobody says it."""
    if name in ("sdpa", "eager"):
        return name
    from transformers.masking_utils import AttentionMaskInterface

    known = AttentionMaskInterface._global_mapping
    made = known.get(name)
    return next((kind for of, kind in _KINDS.items() if made is not None and made is known.get(of)), None)


def follows(attention: nn.Module | None) -> bool:
    """Whether an attention can be made to follow a `Sight`."""
    config = attention is not None and "config" in attention.__dict__
    return config and (looks_up(attention) or _masked_class(attention) is not None)


def looks_up(attention: nn.Module) -> bool:
    """Whether an attention looks its function up by name."""
    return "ALL_ATTENTION_FUNCTIONS" in _names(_forwards(attention)[0])


def _forwards(attention: nn.Module) -> list[type[nn.Module]]:
    # The classes that say what it does, the first one first.
    found = (one for one in type(attention).__mro__ if issubclass(one, nn.Module) and one is not nn.Module)
    return [one for one in found if "forward" in vars(one) and not issubclass(one, Swapped)]


def _names(owner: type[nn.Module]) -> tuple[str, ...]:
    return getattr(getattr(inspect.unwrap(owner.forward), "__code__", None), "co_names", ())


def _masked_class(attention: nn.Module) -> type[nn.Module] | None:
    # Of an attention that is written for one kernel, the class below with the same weights that takes a mask tensor.
    return next((one for one in _forwards(attention) if not any("flash" in name for name in _names(one))), None)


def settle(attention: nn.Module | None) -> None:
    """Swap the class of an attention, where it is not swapped already."""
    if attention is None or isinstance(attention, _ChosenAttention):
        return
    with _swapping:
        if not isinstance(attention, _ChosenAttention):  # now
            from transformers.modeling_utils import AttentionInterface

            AttentionInterface.register(OURS, _attend)
            swap.swap(attention, _ChosenAttention if looks_up(attention) else _MaskedAttention)


def settled(attention: nn.Module) -> bool:
    """Whether the class of an attention is swapped."""
    return isinstance(attention, _ChosenAttention)


@contextmanager
def seen_kernels(module: nn.Module) -> Generator[None]:
    """Inside, sdpa runs wherever a kernel runs that nobody can look into; it computes the same."""
    configs = {id(config): config for one in module.modules() if (config := getattr(one, "config", None)) is not None}
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    for config, backend in before:
        if backend not in (None, "sdpa", "eager"):
            config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, backend in before:  # in this order: a config gives what it is given to those that it is made of
            if backend is not None and config._attn_implementation != backend:
                config._attn_implementation = backend


def unseen(attention: nn.Module) -> bool:
    """Whether an attention runs a kernel that nobody can look into."""
    name = getattr(getattr(attention, "config", None), "_attn_implementation", None) or "sdpa"
    return kind(name) not in ("sdpa", "eager")


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, Any]:
    # As transformers calls an attention: queries (B, H, K, W), keys and values (B, H, C, W).
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    window, sight = kwargs.get("sliding_window"), attention_mask
    within = window is None or (isinstance(sight, Sight) and window >= sight.tokens)
    with choosing(False):
        if not isinstance(sight, Sight) or sight.own is None or not within:
            mask = sight.mask(None if within else window) if isinstance(sight, Sight) else _tensor(sight)
            return _masked(module, query, key, value, mask, kwargs)
        config: Any = module.config
        own: Any = ALL_ATTENTION_FUNCTIONS[config._attn_implementation]
        kwargs |= {"sliding_window": None} if window is not None else {}
        # Positions with gaps would be taken for packed samples.
        kwargs |= dict.fromkeys(("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
        if not sight.causal:
            given = sight.sequences()
            if given.keys is not None:
                key, value = pick_keys(key, given.keys), pick_keys(value, given.keys)
            kwargs |= {"cu_seq_lens_q": given.query_ends, "cu_seq_lens_k": given.key_ends}
            kwargs |= {"max_length_q": given.longest[0], "max_length_k": given.longest[1]}
        return own(module, query, key, value, None, **kwargs)


def _tensor(mask: Any) -> Tensor | None:
    # As a mask tensor, what FlashAttention is told of padding (B, C), and a BlockMask.
    if is_block_mask(mask):
        at = [torch.arange(count, device=mask.kv_indices.device) for count in (mask.shape[0], mask.shape[2])]
        return rows_of_block(mask, at[0], at[1].expand(len(at[0]), -1))
    return mask[:, None, None].bool() if isinstance(mask, Tensor) and mask.dim() == 2 else mask


def _masked(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor, Any]:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attend: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:  # which sdpa leaves out
        homes = (sys.modules.get(one.__module__) for one in type(module).__mro__)
        attend = next(home.eager_attention_forward for home in homes if hasattr(home, "eager_attention_forward"))
        if mask is not None and mask.dtype == torch.bool:
            mask = additive(mask, query.dtype)
    return attend(module, query, key, value, mask, **kwargs)
