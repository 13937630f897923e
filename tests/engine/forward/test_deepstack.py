"""Features that a model adds between its first layers (DeepStack), where image tokens have left them.

Shape letters: B batch, T tokens, D hidden.
"""

import copy
from typing import Any

import pytest
import torch
from families import IMAGE, Batch, batch, model
from torch import Tensor

import tokendrop as td
from tokendrop.errors import UnsupportedError

LAYERS, DEPTH = 5, 2


def made() -> tuple[Any, Batch]:
    return copy.deepcopy(model("qwen3_vl", "sdpa")).eval(), batch("qwen3_vl", "left")


def given(module: Any, data: Batch) -> dict[str, Any]:
    """What the model gives its decoder, the features among it."""
    seen: dict[str, Any] = {}
    hook = module.model.language_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        module(**data.inputs, use_cache=False)
    hook.remove()
    assert len(seen["deepstack_visual_embeds"]) == DEPTH
    return seen


def states(module: Any, drop: td.Handle, data: Batch, layer: int) -> Tensor:
    """(B, T, D) as a layer gets them."""
    seen: list[Tensor] = []
    drop.decoder_layers[layer].register_forward_pre_hook(lambda _, args, kwargs: seen.append(args[0]), with_kwargs=True)
    with drop.layout(td.TokenLayout(data.image, padding=data.real)), torch.no_grad():
        module(**data.inputs, use_cache=False)
    return seen[0]


@pytest.mark.parametrize("method", [td.HMGen("0:3"), td.HiMix("0:3")], ids=["BYPASS", "CONTEXT"])
def test_a_token_that_skips_layers_gets_the_features_and_nothing_else(method: Any) -> None:
    module, data = made()
    seen = given(module, data)
    expected = seen["inputs_embeds"][data.image]
    for features in seen["deepstack_visual_embeds"]:
        expected = expected + features
    found = states(module, td.apply(module, method, multiple=4), data, 3)
    assert torch.equal(found[data.image], expected)


def test_tokens_that_are_gone_take_their_features_along() -> None:
    # The decoder by itself, on the tokens that are left and on the features of these alone.
    module, data = made()
    seen = given(module, data)
    plain = copy.deepcopy(module)
    drop = td.apply(module, td.SVDPrune(3), multiple=1)
    with drop.layout(td.TokenLayout(data.image, padding=data.real)), torch.no_grad():
        out = module(**data.inputs, use_cache=True)
    kept = out.past_key_values.layers[0]
    for sample in range(2):
        at = kept.positions[sample, kept.valid[sample]]
        at = at[data.real[sample, at]]
        left = data.image[sample, at]
        assert int(left.sum()) == 3
        numbers = data.image.flatten().cumsum(0).view_as(data.image)[sample, at[left]] - 1
        with torch.no_grad():
            alone = plain.model.language_model(
                inputs_embeds=seen["inputs_embeds"][sample : sample + 1, at],
                position_ids=seen["position_ids"][..., sample : sample + 1, at],
                visual_pos_masks=left[None],
                deepstack_visual_embeds=[features[numbers] for features in seen["deepstack_visual_embeds"]],
                use_cache=False,
            ).last_hidden_state
            expected = plain.lm_head(alone)[0, ~left]
        torch.testing.assert_close(out.logits[sample, at[~left]], expected, rtol=1e-4, atol=1e-5)


def test_a_second_image_behind_a_cache() -> None:
    # The features of a later turn are those of its own tokens.
    module, data = made()
    drop = td.apply(module, td.HMGen("0:3"), multiple=4)
    ids = torch.randint(10, 40, (1, 5))
    turn = torch.randint(10, 40, (1, 9))
    turn[0, 2:6] = IMAGE
    pixels = {"pixel_values": data.inputs["pixel_values"][:16], "image_grid_thw": data.inputs["image_grid_thw"][:1]}
    whole, at = torch.cat([ids, turn], 1), torch.arange(14)[None]
    kinds = (whole == IMAGE).long()
    with torch.no_grad():
        with drop.layout(td.TokenLayout(whole == IMAGE)):
            expected = module(
                input_ids=whole, position_ids=at, mm_token_type_ids=kinds, **pixels, use_cache=False
            ).logits[:, 5:]
        with drop.layout(td.TokenLayout.from_ids(ids, IMAGE)):
            cache = module(input_ids=ids, position_ids=at[:, :5], use_cache=True).past_key_values
            found = module(
                input_ids=turn, position_ids=at[:, 5:], mm_token_type_ids=kinds[:, 5:], past_key_values=cache, **pixels
            ).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "start"), [(td.HiMix(), 0), (td.HMGen("1:4"), 1)])
def test_features_that_inspection_cannot_follow_are_refused(method: Any, start: int, monkeypatch: Any) -> None:
    module, _ = made()
    before = {name: type(one) for name, one in module.named_modules()}
    # A decoder with such a loop of its own, in the names that transformers gives the method that adds them.
    monkeypatch.delattr(type(module.model.language_model), "_deepstack_process")
    with pytest.raises(UnsupportedError, match=rf"across layers {start} and {start + 1}.*deepstack.*layers='2:'"):
        td.apply(module, method)
    assert {name: type(one) for name, one in module.named_modules()} == before
    td.apply(module, td.HiMix("2:")).remove()
    # Granite 4 Vision's config names the layers in front of which they are added.
    monkeypatch.setattr(module.config.vision_config, "deepstack_visual_indexes", [])
    monkeypatch.setattr(module.config, "deepstack_layer_map", [(-1, 2), (-2, 4)], raising=False)
    monkeypatch.setattr(module.config, "spatial_target_layers", [3, 9], raising=False)
    with pytest.raises(UnsupportedError, match=r"across layers 1 and 2.*layers='4:'"):
        td.apply(module, td.HMGen("1:4"))
    td.apply(module, td.HiMix("4:")).remove()
