"""A decoding step costs what the dense model's does: operators, transfers from the device and masks, counted.

Shape letters: B batch, T tokens of the prompt.
"""

from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from generation import EVEN, IMAGE_IDS, METHODS, PADDED, RAGGED, Prompt, apart, dropped, generated, prompt, stored
from kernels_stand_in import kernels, with_attention
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import tokendrop as td
from tokendrop.roles import Role

# Each makes the host wait for a GPU; so does an index of booleans.
WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}
MANY = prompt(["tt" + 25 * "i" + 13 * "t"] * 2)  # 15 rows of text, of which layers compute 16
# Where a new image token is another thing than text; elsewhere a selection is of the prompt's tokens only.
ROUTES = {"himix", "himix_range", "himix_shared", "hmgen", "hmgen_first", "hmgen_shared", "hmgen_parts"}
ROUTES |= {"transformers", "attend", "hidrop", "duet_vlm", "sprint"}


class Ops(TorchDispatchMode):
    """The operators that run, and those of them that make the host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.ran[name] += 1
        at = args[1] if name in ("index", "index_put", "index_put_") else ()
        if name in WAITS or any(one is not None and one.dtype == torch.bool for one in at):
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class Masks(TorchFunctionMode):
    """The masks that attention is given, by layer."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is scaled_dot_product_attention:
            self.given.append((kwargs or {}).get("attn_mask", args[3] if len(args) > 3 else None))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def step(model: Any, entered: Any, given: Prompt) -> tuple[Ops, Masks]:
    """What the second token behind a prompt runs."""
    real, token = given.real, torch.full((len(given.ids), 1), 5)
    with entered:
        cache = model(input_ids=given.ids, attention_mask=real, use_cache=True).past_key_values
        for ops, masks in ((nullcontext(), nullcontext()), (Ops(), Masks())):
            real = torch.cat([real, torch.ones_like(token)], 1)
            with masks, ops:
                model(input_ids=token, attention_mask=real, past_key_values=cache, use_cache=True)
    return ops, masks


def both(method: str, given: Prompt, layout: td.TokenLayout, attention: str = "sdpa") -> Any:
    """The step of a method, and of the dense model."""
    model, drop = dropped(METHODS[method], attention)
    return step(model, drop.layout(layout), given), step(model, drop.disabled(), given)


def plain(given: Prompt) -> td.TokenLayout:
    return td.TokenLayout(given.layout.image, padding=given.real.bool())


@pytest.mark.parametrize("method", METHODS)
def test_samples_alike_decode_as_a_dense_model_does(method: str) -> None:
    for given in (EVEN, MANY):
        (ours, masks), (dense, theirs) = both(method, given, td.TokenLayout(given.layout.image))
        assert masks.given == theirs.given == [None] * 5
        if method != "renumbered":  # whose kernel looks at its index on a CPU, and runs in parts there
            assert ours.ran.total() <= dense.ran.total() + 2
            assert ours.waits == dense.waits


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("given", [RAGGED, PADDED], ids=["ragged", "left_padded"])
def test_samples_that_differ_share_masks(given: Prompt, method: str) -> None:
    """One mask, of 16 operators, for the layers whose caches hold the same tokens."""
    (ours, masks), (dense, theirs) = both(method, given, plain(given))
    _, drop = dropped(METHODS[method])
    with drop.layout(plain(given)) as plan:
        held = len({id(group) for span in plan.spans for group in span.groups if group.role is not Role.ACTIVE})
    assert len({id(mask) for mask in masks.given}) <= held + 1
    if method != "renumbered":
        # And what sdpa does with a mask, where a dense model has none.
        masked = sum(mask is not None for mask in masks.given) - sum(mask is not None for mask in theirs.given)
        assert ours.ran.total() <= dense.ran.total() + 2 + 16 * held + 12 * masked
        assert ours.waits == dense.waits


@pytest.mark.parametrize("method", METHODS)
def test_ids_are_asked_only_where_they_matter(method: str) -> None:
    (ours, _), (dense, _) = both(method, EVEN, EVEN.layout)
    more = Counter({"_local_scalar_dense": 1}) if method in ROUTES else Counter()
    assert method == "renumbered" or ours.waits - dense.waits == more


@pytest.mark.parametrize("method", ["hmgen", "gone", "fastv", "pyramid_drop"])
def test_flash_attention_is_given_no_sequences(method: str) -> None:
    with kernels():
        model, drop = dropped(METHODS[method])
        model = with_attention(model, "flash_attention_2")
        ours, _ = step(model, drop.layout(td.TokenLayout(MANY.layout.image)), MANY)
        dense, _ = step(model, drop.disabled(), MANY)
    assert ours.waits == dense.waits


@pytest.mark.parametrize("method", METHODS)
def test_rows_that_fill_up_are_not_stored(method: str) -> None:
    """16 rows run, 15 are kept, and what is generated stays the same."""
    model, drop = dropped(METHODS[method])
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 4, "suppress_tokens": IMAGE_IDS.tolist()}
    cached, uncached = (generated(model, drop, MANY, cached, **options) for cached in (True, False))
    assert apart(torch.stack(cached.logits), torch.stack(uncached.logits)) < 1e-4
    layers = cached.past_key_values.layers
    assert all(layer.valid.all() for layer in layers if hasattr(layer, "valid"))
    if method == "hmgen":
        assert stored(cached.past_key_values) == [40 + 3, 15 + 3, 40 + 3, 15 + 3, 40 + 3]
