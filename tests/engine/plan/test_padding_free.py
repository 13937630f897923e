"""Padding-free batches, as transformers' collator flattens them: equal to each sample alone, under every attention.

Shape letters: B batch, T tokens, K computed rows.
"""

from typing import Any

import pytest
import torch
from helpers import batch, close, dropped, llama
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels_stand_in import kernels, with_attention
from test_packed import METHODS, apart, packed
from transformers import DataCollatorWithFlattening

import tokendrop as td
from tokendrop.engine.model.batch import batch_layout
from tokendrop.layout import packed_samples

BASE = llama(dtype=torch.float64)


def flattened(alone: list[Any]) -> dict[str, Any]:
    """One row, with its lengths, as the collator makes it."""
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    features = [{"input_ids": one.ids[0].tolist(), "labels": one.labels[0].tolist()} for one in alone]
    return dict(collate(features, return_tensors="pt"))


def step(model: Any, drop: Any, given: dict[str, Any], layout: td.TokenLayout) -> Any:
    """Logits, and the gradients of the summed loss."""
    inputs = {name: value for name, value in given.items() if name not in ("labels", "seq_idx")}
    with drop.layout(layout, step=(0, 0)):
        logits = model(**inputs, use_cache=False).logits
        flat, labels = logits[0, :-1], layout.labels[0, 1:]
        loss = torch.nn.functional.cross_entropy(flat, labels, ignore_index=-100, reduction="sum")
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return logits.detach(), dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))


EVERY = [(method, "flash_attention_2", True) for method in METHODS]
EVERY += [(method, "flash_attention_3", False) for method in ("himix", "pyramid", "context")]
EVERY += [("himix", "sdpa", True), ("pyramid", "eager", True), ("himix", "flex_attention", True)]
EVERY += [("depths", "flex_attention", False)]


@pytest.mark.parametrize(("method", "attention", "lengths"), EVERY)
def test_padding_free_equals_each_sample_alone(method: str, attention: str, lengths: bool) -> None:
    """By lengths and position ids, or by the ids alone; the layout is told nothing of samples."""
    model, drop = dropped(BASE, METHODS[method], multiple=4)
    alone, together, _ = packed()
    expected = apart(model, drop, alone)
    given = flattened(alone)
    if not lengths:
        given = {name: given[name] for name in ("input_ids", "labels", "position_ids")}
    layout = td.TokenLayout(together["image"], labels=together["labels"])
    with kernels() as calls:
        found = step(with_attention(model, attention), drop, given, layout)
    assert close(found, expected, torch.ones_like(together["image"]), 1e-9 if attention != "eager" else 1e-5)
    if "flash" in attention:
        assert calls.varlen
        assert not calls.plain
        assert all(one["causal"] for one in calls.varlen)


def test_the_calls_of_a_padding_free_batch() -> None:
    """Rows that compute are sequences of their own, and each run of text behind an image sees all before it."""
    samples = ["tttiiiitt", "iit", "t", "t", "tit"]
    alone, together, _ = packed(samples)
    layout = td.TokenLayout(together["image"], labels=together["labels"])
    calls = {}
    for name, method in {"hmgen": td.HMGen("1:3"), "himix": td.HiMix("1:3")}.items():
        model, drop = dropped(BASE, method, multiple=1)
        with kernels() as given:
            step(with_attention(model, "flash_attention_2"), drop, flattened(alone), layout)
        calls[name] = given.varlen
        assert not given.plain
    whole = {"queries": [0, 9, 12, 13, 14, 17], "keys": [0, 9, 12, 13, 14, 17], "longest": (9, 9)}
    bypass = {"queries": [0, 5, 6, 7, 8, 10], "keys": [0, 5, 6, 7, 8, 10], "longest": (5, 5)}
    context = {"queries": [0, 3, 5, 6, 7, 8, 9, 10], "keys": [0, 3, 12, 15, 16, 17, 18, 21], "longest": (3, 9)}
    for name, between in (("hmgen", bypass), ("himix", context)):
        found = [{part: one[part] for part in ("queries", "keys", "longest")} for one in calls[name]]
        assert found == [whole, between, between, whole]
        assert [one["q"][0] for one in calls[name]] == [17, 10, 10, 17]
        assert [one["k"][0] for one in calls[name]] == [17, between["keys"][-1], between["keys"][-1], 17]


samples_written = st.lists(st.text("ti", min_size=1, max_size=6), min_size=1, max_size=6)


@given(samples_written, st.sampled_from(["himix", "gone", "context"]), st.sampled_from(["flash_attention_2", "sdpa"]))
@settings(max_examples=12)
def test_any_samples(samples: list[str], method: str, attention: str) -> None:
    model, drop = dropped(BASE, METHODS[method], multiple=1)
    alone, together, _ = packed(samples)
    given = flattened(alone)
    with torch.no_grad(), kernels():
        with_attention(model, attention)
        with drop.layout(td.TokenLayout(together["image"], labels=together["labels"]), step=(0, 0)):
            inputs = {name: value for name, value in given.items() if name not in ("labels", "seq_idx")}
            found = model(**inputs, use_cache=False).logits
        with_attention(model, "sdpa")
        for one, part in zip(alone, found.split([len(one) for one in samples], 1), strict=True):
            with drop.layout(td.TokenLayout(one.image, labels=one.labels), step=(0, 0)):
                torch.testing.assert_close(part, model(one.ids, use_cache=False).logits, rtol=1e-9, atol=1e-9)


def test_several_rows_with_lengths_of_the_flat_batch() -> None:
    """What no collator of transformers makes, and its attention takes."""
    model, drop = dropped(BASE, td.HiMix("1:"), multiple=4)
    alone, together, _ = packed(["tiit", "itti", "ttit", "iitt"])
    lengths = torch.arange(0, 17, 4, dtype=torch.int32)
    given = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 4, "max_length_k": 4}
    rows = {name: x.view(2, 8) for name, x in together.items()}
    at = torch.arange(4).repeat(2, 2)
    with torch.no_grad(), kernels(), drop.layout(td.TokenLayout(rows["image"], labels=rows["labels"])):
        with_attention(model, "flash_attention_2")
        found = model(rows["ids"], position_ids=at, **given, use_cache=False).logits.view(1, 16, -1)
    expected = apart(with_attention(model, "sdpa"), drop, alone)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_lengths_given_on_are_those_of_the_rows_that_compute() -> None:
    """Also where the attention needs none: a layer may use them for something else."""
    model, drop = dropped(BASE, td.HMGen("1:3"), multiple=4)
    alone, together, _ = packed(["tttiiiitt", "iit", "tit"])
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(lambda *args: seen.append(args[2]), with_kwargs=True)
    layout = td.TokenLayout(together["image"], labels=together["labels"])
    step(model, drop, flattened(alone), layout)
    assert [one["cu_seq_lens_q"].tolist() for one in seen] == [
        [0, 9, 12, 15],
        [0, 5, 6, 8],
        [0, 5, 6, 8],
        [0, 9, 12, 15],
    ]
    assert [one["max_length_q"] for one in seen] == [9, 8, 8, 9]


def test_a_layout_of_the_flattened_batch_knows_its_samples() -> None:
    alone, _, _ = packed(["ti", "t", "t", "tii"])
    expected = [[0, 0, 1, 2, 3, 3, 3]]
    given = flattened(alone)
    listed = {"cu_seq_lens_q": given["cu_seq_lens_q"].tolist(), "position_ids": torch.arange(7)[None]}
    numbered = {"seq_idx": given["seq_idx"]}
    for one in (given, listed, numbered, {"position_ids": given["position_ids"]}):
        assert packed_samples(one, (1, 7)).tolist() == expected
    module = torch.nn.Module()
    image_ids = alone[0].ids[0, 1:].tolist()
    for one in (listed, numbered):
        assert batch_layout(one | {"input_ids": given["input_ids"]}, module, image_ids).packs.tolist() == expected


def test_several_rows_that_flash_attention_does_not_keep_apart_are_said() -> None:
    """It looks at position ids in a batch of one row only, and so does the untouched model."""
    model, drop = dropped(BASE, METHODS["gone"])
    made = batch(["tittit", "tittit"], "uu")
    positions, packs = torch.arange(3).repeat(2, 2), torch.arange(6).expand(2, 6) // 3
    with kernels(), drop.layout(made.layout(packs=packs)), torch.no_grad():
        with_attention(model, "flash_attention_2")
        with pytest.warns(td.LayoutWarning, match="4 samples packed into 2 rows.*with FlashAttention in one row"):
            model(made.ids, position_ids=positions, use_cache=False)
