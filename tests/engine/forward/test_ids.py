"""The ids of a forward are held against the layout, and rows are repeated in an order that is seen.

Shape letters: B batch, T tokens of the prompt.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from families import batch, model
from generation import EVEN, LAYERS, RAGGED, TEXT_ONLY, apart, dropped, generated, prompt
from helpers import llama

import tokendrop as td
from tokendrop.engine.reference import reference

OTHER = prompt(["tttiiiiiittt", "ttttiiiiiitt"])
TEXT = prompt(["tttttttttttt", "tttttttttttt"])
UNSEEN = replace(EVEN.layout, image_ids=None)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("method", [td.HMGen("1:4:2"), td.HiMix(), td.FastV(2, 0.5)])
@pytest.mark.parametrize(("entered", "given", "wrong"), [(OTHER, EVEN, 2), (EVEN, TEXT, 12), (TEXT, EVEN, 12)])
@torch.no_grad()
def test_another_prompt_of_the_same_shape(entered: Any, given: Any, wrong: int, method: Any, cached: bool) -> None:
    net, drop = dropped(method)
    with drop.layout(entered.layout), pytest.raises(td.LayoutError, match=rf"{wrong} of 24 tokens.*another prompt"):
        net(**given.inputs, use_cache=cached)
    with drop.layout(given.layout):
        net(**given.inputs, use_cache=cached)


def test_guidance_with_a_negative_prompt() -> None:
    """It runs a forward of its own, which would take the first prompt's images."""
    net, drop = dropped(td.HMGen("1:4:2"))
    with pytest.raises(td.LayoutError, match="12 of 24 tokens"):
        generated(net, drop, EVEN, False, guidance_scale=2.0, negative_prompt_ids=TEXT.ids, do_sample=False)
    other = EVEN.ids.where(EVEN.layout.image, 7)  # other text, images at the same places
    generated(net, drop, EVEN, False, guidance_scale=2.0, negative_prompt_ids=other, do_sample=False)


def test_a_loss_made_by_hand_on_another_batch() -> None:
    net, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout), pytest.raises(td.LayoutError, match="2 of 24 tokens"):
        net(input_ids=OTHER.ids, use_cache=False)


@torch.no_grad()
def test_rows_in_another_order_where_ids_are_seen() -> None:
    net, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout):
        right = net(input_ids=EVEN.ids.repeat_interleave(2, 0), use_cache=False).logits
        assert torch.equal(right[::2], right[1::2])
        assert torch.equal(net(input_ids=EVEN.ids.repeat(2, 1), use_cache=False).logits, right[[0, 2, 1, 3]])
        with pytest.raises(td.LayoutError, match="4 rows under a layout of 2 samples that differ"):
            net(input_ids=EVEN.ids[[0, 1, 1, 0]], use_cache=False)


@torch.no_grad()
def test_tasks_in_another_order_where_ids_are_seen() -> None:
    net, drop = dropped({"u": td.HiMix(), "g": td.HMGen("1:4:2")})
    given = prompt(["ttiiiiiitttt", "ttiiiiiitttt"], ("u", "g"))
    with drop.layout(given.layout):
        net(input_ids=given.ids.repeat_interleave(2, 0), use_cache=False)
        with pytest.raises(td.LayoutError, match="4 rows under a layout of 2 samples that differ"):
            net(input_ids=given.ids.repeat(2, 1), use_cache=False)


@torch.no_grad()
def test_more_rows_of_which_nobody_saw_the_ids() -> None:
    net, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout):
        right = net(**EVEN.inputs, use_cache=False).logits
    with drop.layout(UNSEEN):
        with pytest.raises(td.LayoutError, match=r"4 rows under a layout of 2 samples.*layout with all the rows"):
            net(input_ids=EVEN.ids.repeat(2, 1), use_cache=False)
        embeds = net.get_input_embeddings()(EVEN.ids)
        with pytest.raises(td.LayoutError, match=r"4 rows under a layout of 2 samples.*layout with all the rows"):
            net(inputs_embeds=embeds.repeat(2, 1, 1), use_cache=False)
        copies = net(inputs_embeds=embeds.repeat_interleave(2, 0), use_cache=False).logits
        assert (copies - right.repeat_interleave(2, 0)).abs().max() < 1e-5
        options: Any = {"max_new_tokens": 3, "num_return_sequences": 2, "do_sample": True, "suppress_tokens": TEXT_ONLY}
        assert net.generate(**EVEN.inputs, **options).shape == (4, 15)


def test_training_on_more_rows_is_refused_as_ever() -> None:
    net, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout), pytest.raises(td.LayoutError, match=r"\(4, 12, 32\).*\(2, 12\)"):
        net(input_ids=EVEN.ids.repeat_interleave(2, 0), use_cache=False)


@torch.no_grad()
def test_ids_that_a_model_changes_before_it_embeds_them() -> None:
    """As some do with image tokens that lie behind their vocabulary."""
    outside = torch.where(EVEN.layout.image, 77, EVEN.ids)
    layout = td.TokenLayout.from_ids(outside, 77)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, input_ids: Any) -> Any:
            return self.inner(input_ids=input_ids.where(input_ids < 50, 0), use_cache=False).logits

    holder = Model()
    drop = td.apply(holder, td.HMGen("1:3"))
    with drop.layout(layout):
        holder(outside)
        with pytest.raises(td.LayoutError, match="12 of 24 tokens"):
            holder(TEXT.ids)


@torch.no_grad()
def test_ids_of_an_inner_layout_are_not_the_outer_ones() -> None:
    net, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(EVEN.layout):
        with drop.layout(OTHER.layout):
            net(**OTHER.inputs, use_cache=False)
        with drop.disabled():
            net(**TEXT.inputs, use_cache=False)
        net(**EVEN.inputs, use_cache=False)


@torch.no_grad()
def test_hooks_leave_with_the_layout() -> None:
    net, drop = dropped(td.HMGen("1:4:2"))
    with drop.layout(RAGGED.layout):
        assert any(module._forward_pre_hooks for module in net.modules())
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("name", ["llava", "emu3", "chameleon", "janus", "qwen2_5_vl", "internvl"])
@torch.no_grad()
def test_models_with_images_see_their_own_ids(name: str) -> None:
    data, net = batch(name, "left"), model(name, "sdpa")
    drop = td.apply(net, td.HMGen("2:4"))
    try:
        ids = data.inputs["input_ids"]
        layout = td.TokenLayout.from_ids(ids, ids[data.image].unique(), attention_mask=data.inputs["attention_mask"])
        with drop.layout(layout):
            net(**data.inputs, use_cache=False)
        with (
            drop.layout(replace(layout, image=layout.image.roll(1, 1))),
            pytest.raises(td.LayoutError, match="another prompt"),
        ):
            net(**data.inputs, use_cache=False)
    finally:
        drop.remove()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("soft", [1, 3])
@torch.no_grad()
def test_tokens_that_a_model_puts_before_its_ids(soft: int, cached: bool) -> None:
    """As soft prompts: its last ids are those of the prompt, and no tokens behind it."""
    net, drop = dropped(td.HMGen("1:4:2"))

    def run() -> torch.Tensor:
        embedded = net.get_input_embeddings()(EVEN.ids)
        return net(inputs_embeds=torch.cat([embedded[:, :soft], embedded], 1), use_cache=cached).logits

    with (
        drop.layout(EVEN.layout),
        pytest.raises(td.LayoutError, match=rf"\(2, 12\) and .* {12 + soft} tokens .* of 12"),
    ):
        run()
    image = torch.cat([torch.zeros(2, soft, dtype=torch.bool), EVEN.layout.image], 1)
    with drop.layout(td.TokenLayout(image)):
        found = run()
    plain = llama(layers=LAYERS, eos_token_id=None)
    ids = torch.cat([EVEN.ids[:, :soft], EVEN.ids], 1)
    with reference(plain, {None: td.HMGen("1:4:2")}, td.TokenLayout(image)):
        assert apart(found, plain(ids, use_cache=False).logits) < 1e-5
