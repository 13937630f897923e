"""Vision encoders that methods cannot look at are refused, with what to use instead."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from families import _TEXT, _VISION, IMAGE, batch, model
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


def pooled() -> Any:
    """Gemma 3, which pools patches to image tokens."""
    vision = hf.SiglipVisionConfig(**_VISION, vision_use_head=False)
    text = hf.Gemma3TextConfig(**_TEXT, head_dim=8)
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1)
    )


def resampled() -> Any:
    """Idefics 2, whose image tokens look at all patches."""
    perceiver = {"hidden_size": 32, "resampler_n_latents": 2, "resampler_depth": 1, "resampler_n_heads": 2}
    perceiver |= {"resampler_head_dim": 8, "num_key_value_heads": 1}
    config = hf.Idefics2Config(vision_config=_VISION, text_config=hf.MistralConfig(**_TEXT), perceiver_config=perceiver)
    return hf.Idefics2ForConditionalGeneration(config)


@pytest.mark.parametrize(("make", "name"), [(pooled, "AvgPool2d"), (resampled, "Idefics2Perceiver")])
@pytest.mark.parametrize("method", ["vscan", "duet_vlm"])
def test_tokens_made_of_patches_all_over_the_image_are_refused(method: str, make: Any, name: str) -> None:
    module = make()
    before = snapshot(module)
    message = rf"a {name}\w*, makes image tokens of patches in a way .* cannot follow.*use SVDPrune or"
    with pytest.raises(td.UnsupportedError, match=message):
        td.apply(module, METHODS[method])
    assert snapshot(module) == before


class Written(torch.nn.Module):
    """An attention that looks up nothing, and calls a kernel of its own."""

    flash_attn_of_their_own: Any

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> Any:
        return self.flash_attn_of_their_own(hidden_states)


def test_an_attention_that_shows_nothing_is_refused() -> None:
    module = copy.deepcopy(model("internvl", "sdpa"))
    attention = module.model.vision_tower.encoder.layer[-1].attention
    attention.config._attn_implementation, attention.__class__ = "flash_attention_2", Written
    with pytest.raises(td.UnsupportedError, match=r"runs the 'flash_attention_2' attention.*'sdpa', or use SVDPrune"):
        td.apply(module, METHODS["vscan"])


def test_images_that_are_not_square_under_a_pixel_shuffle() -> None:
    # The model would cut the 2 x 8 patches as if they were 4 x 4.
    module = copy.deepcopy(model("internvl", "sdpa")).eval()
    image = torch.tensor([[False] + [True] * 4 + [False]])
    drop = td.apply(module, METHODS["vscan"])
    inputs = {"input_ids": torch.where(image, IMAGE, 11), "pixel_values": torch.randn(1, 3, 4, 16)}
    message = "1 images with 2 rows and 8 columns of them; expected square"
    with torch.no_grad(), drop.layout(td.TokenLayout(image)), pytest.raises(td.UnsupportedError, match=message):
        module(**inputs, use_cache=False)


def test_a_pixel_shuffle_of_something_else_than_squares() -> None:
    module = copy.deepcopy(model("internvl", "sdpa")).eval()
    kind = type(module.model)
    # Patches of one row behind each other, as nobody does.
    strips = type(kind.__name__, (kind,), {"pixel_shuffle": lambda _, x, scale_factor: x.reshape(len(x), 2, 2, -1)})
    module.model.__class__ = strips
    data, drop = batch("internvl", None), td.apply(module, METHODS["vscan"])
    message = "a token of 4 patches that are no square of the image"
    with torch.no_grad(), drop.layout(td.TokenLayout(data.image)), pytest.raises(td.UnsupportedError, match=message):
        module(**data.inputs, use_cache=False)


def test_images_and_videos_in_one_batch() -> None:
    # The encoder runs once for the images and once for the videos, and one of them is seen.
    module = copy.deepcopy(model("qwen2_5_vl", "sdpa")).eval()
    ids = torch.tensor([[11] + [IMAGE] * 4 + [12] + [6] * 4 + [13]])
    image, pixels = (ids == IMAGE) | (ids == 6), torch.randn(16, 96)
    grid = torch.tensor([[1, 4, 4]])
    inputs = {"pixel_values": pixels, "image_grid_thw": grid, "pixel_values_videos": pixels, "video_grid_thw": grid}
    inputs |= {"input_ids": ids, "mm_token_type_ids": (ids == IMAGE).long() + 2 * (ids == 6).long()}
    drop = td.apply(module, METHODS["vscan"])
    message = "seen for 4 tokens, expected one for each of 8 image tokens; give pixel values, of images or of videos"
    with torch.no_grad(), drop.layout(td.TokenLayout(image)), pytest.raises(td.UnsupportedError, match=message):
        module(**inputs, use_cache=False)


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
