"""Packed samples, as an attention is told of them by arguments other than a mask.

Shape letters: B batch, T tokens, N packed samples.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.arguments import Form
from tokendrop.engine.model.attention import follows, kind
from tokendrop.engine.model.decoder import LayerSpec, attention_of, sees_both_sides
from tokendrop.engine.plan.plan import Plan
from tokendrop.errors import UnsupportedError
from tokendrop.layout import packed_samples

_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def form_of(
    layer: nn.Module,
    spec: LayerSpec,
    shape: tuple[int, int],
    named: dict[str, Any],
    states: Tensor,
    made: dict[Any, Any] | None = None,
) -> Form:
    """What the arguments of a layer call look like.

    Args:
        layer: the decoder layer.
        spec: how it is called.
        shape: (B, T).
        named: its arguments by name.
        states: its hidden states.
        made: what was made so far in this forward, of which all layers are told the same packed samples.
    """
    of, sight = attends(layer, spec, spec.backend(layer))
    known = {} if made is None else made
    if sight and "packs" not in known:
        known["packs"] = flash_packs(named, spec.mask, shape)
    packs = known["packs"] if sight else None
    dtype, both = states.dtype if of == "eager" else None, sees_both_sides(layer)
    return Form(shape, spec.mask, of, dtype, sight=sight, packs=packs, both=both)


def attends(layer: nn.Module, spec: LayerSpec, backend: str) -> tuple[str | None, bool]:
    """The kind of a layer's attention, see `tokendrop.engine.model.attention.kind`; whether it is given a `Sight`."""
    of = kind(backend)
    return of, of == "flash" and spec.recurrent is None and follows(attention_of(layer))


def flash_packs(named: dict[str, Any], mask: str | None, shape: tuple[int, int]) -> Tensor | None:
    """The packed sample (B, T) int64 of each token, as transformers finds them for FlashAttention; None for no packs.

    Where there is a mask it looks for none; else the lengths say it, and in a batch of one row the position ids, where
    one begins at each that is the lowest.
    """
    if named.get(mask or "") is not None or shape[1] == 1:
        return None
    lengths, at = [named.get(name) for name in _LENGTHS], named.get("position_ids")
    if all(one is not None for one in lengths) and isinstance(lengths[0], Tensor):
        tokens = torch.arange(shape[0] * shape[1], device=lengths[0].device)
        return torch.bucketize(tokens, lengths[0][1:].to(tokens.dtype), right=True).view(shape)
    if not isinstance(at, Tensor) or at.shape != (1, shape[1]) or shape[0] > 1 or bool((at.diff() == 1).all()):
        return None
    return (at == at.min()).cumsum(1)


def keeps_apart(form: Form, named: dict[str, Any]) -> bool:
    """Whether an attention is told of packed samples, if there are any: by its mask, or as FlashAttention is."""
    return form.packs is not None if form.sight else named.get(form.mask or "") is not None


def unkept(samples: int, form: Form) -> str:
    """What to say of packed samples that an attention does not keep apart."""
    return (
        f"the layout has {samples} samples packed into {form.shape[0]} rows, but the layers are given no mask, so that "
        "a sample sees those before it; call the model with position_ids that begin again in each, without "
        "attention_mask, and with use_cache=False, or transformers does not look for them"
        f"{', with FlashAttention in one row' if form.sight else ''}"
    )


def told_packs(form: Form, named: dict[str, Any], padding: Tensor | None) -> Tensor | None:
    """The packed sample (B, T) of each token, where it keeps them apart; None where each row is one."""
    return form.packs if form.sight else packed_samples(named, form.shape, padding)


def check_packing(named: dict[str, Any], form: Form, backend: str) -> None:
    """Refuse packed sequences where an attention finds their borders by itself, among rows that are compact by then.

    Args:
        named: the layer's arguments by name.
        form: what they look like; FlashAttention is told of them again, and others have them in the mask.
        backend: the name of the attention implementation.

    Raises:
        UnsupportedError: lengths of packed sequences, or position ids that restart.
    """
    if form.sight or form.kind not in (None, "flash"):
        return
    lengths = next((name for name in named if name.startswith("cu_seq_lens") and named[name] is not None), None)
    ids = named.get("position_ids")
    several = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > 1
    restarts = several and bool((ids.diff(dim=1) < 0).any())
    if lengths or restarts:
        found = f"{lengths!r}" if lengths else "position ids that restart"
        raise UnsupportedError(
            f"packed sequences ({found}) with the {backend!r} attention, which would look for their borders among the "
            "rows that are left; pass position ids that restart, with attn_implementation='sdpa'"
        )


def refuse_packs(plan: Plan) -> None:
    """Refuse to continue rows that hold several samples.

    Raises:
        UnsupportedError: with how many.
    """
    if plan.packs is not None:
        raise UnsupportedError(
            f"{len(plan.packs.rows)} samples are packed into {plan.shape[0]} rows; behind a row only its last sample "
            "could go on. Generate with a row for each sample"
        )
