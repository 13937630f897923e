"""Vision encoders that methods cannot look at are refused, with what to use instead."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from families import batch, model
from helpers import llama, snapshot

import tokendrop as td

METHODS: dict[str, Any] = {
    "vscan": td.VScan(0.5, (2,), (0.5,), -1, -1, 1),
    "duet_vlm": td.DuetVLM((2,), (0.5,), 0.25, 0.25, 2, -1),
    "svd_prune": td.SVDPrune(0.5, rank=1),
}


@pytest.mark.parametrize("make", [llama, lambda: copy.deepcopy(model("emu3", "sdpa"))], ids=["llama", "emu3"])
@pytest.mark.parametrize("method", ["vscan", "duet_vlm"])
def test_a_model_without_an_encoder_is_refused(method: str, make: Any) -> None:
    module = make()
    before = snapshot(module)
    message = r"finds 0 vision encoders in .*, expected one .*use SVDPrune or Drop\(score='leverage'\)"
    with pytest.raises(td.UnsupportedError, match=message):
        td.apply(module, METHODS[method])
    assert snapshot(module) == before
    td.apply(module, METHODS["svd_prune"]).remove()


@pytest.mark.parametrize(
    ("name", "layer", "message"),
    [
        ("llava", 5, r"layer 5 of a vision encoder with 2 layers: expected one .* of \[0, 1\]"),
        ("llava", -3, r"layer -3 of a vision encoder with 2 layers"),
        ("qwen2_5_vl", 0, r"layer 0 .* attention sees the whole image, of \[1\]"),
    ],
)
def test_layers_that_cannot_be_looked_at(name: str, layer: int, message: str) -> None:
    module = copy.deepcopy(model(name, "sdpa"))
    before = snapshot(module)
    with pytest.raises(td.LayerRangeError, match=message):
        td.apply(module, td.VScan(0.5, (), (), layer, -1))
    assert snapshot(module) == before


@pytest.mark.parametrize("name", ["llava_onevision", "smolvlm", "internvl"])
def test_encoders_whose_tokens_are_not_the_decoders(name: str) -> None:
    data, module = batch(name, None), copy.deepcopy(model(name, "sdpa"))
    drop = td.apply(module, td.VScan(0.5, (), (), -1, -1))
    message = r"seen for \d+ tokens, expected one for each of \d+ image tokens"
    with torch.no_grad(), drop.layout(td.TokenLayout(data.image)), pytest.raises(td.UnsupportedError, match=message):
        module(**data.inputs, use_cache=False)


def test_features_made_elsewhere_are_refused() -> None:
    data, module = batch("llava", None), copy.deepcopy(model("llava", "sdpa"))
    embeds = module.get_input_embeddings()(data.inputs["input_ids"])
    message = "seen for 0 tokens, expected one for each of 12 image tokens; give pixel values"
    drop = td.apply(module, METHODS["vscan"])
    with torch.no_grad(), drop.layout(td.TokenLayout(data.image)), pytest.raises(td.UnsupportedError, match=message):
        module(inputs_embeds=embeds, use_cache=False)


def test_two_encoders_are_one_too_many() -> None:
    module = copy.deepcopy(model("llava", "sdpa"))
    module.model.second_tower = hf.CLIPVisionModel(module.config.vision_config)
    with pytest.raises(td.UnsupportedError, match="finds 2 vision encoders in LlavaForConditionalGeneration"):
        td.apply(module, METHODS["vscan"])
