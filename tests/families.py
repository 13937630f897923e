"""Tiny random models of every decoder family, and batches for them with real images.

Shape letters: B batch, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

TOKENS = 26
IMAGE, START, VOCABULARY = 5, 4, 64
TEXT = (10, 40)
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


@dataclass(frozen=True)
class Family:
    """One family of decoders.

    Args:
        config: makes the config of a tiny model.
        model: its class.
        inputs: number of images in each sample -> what the model takes beside ids and mask.
        per_image: image tokens of one image.
        first: first layer whose image tokens may leave for a range of layers.
        attentions: the implementations it has.
        alike: whether it differs in a few things only from another family, so that fewer tests of it say the same.
    """

    config: Callable[[], Any]
    model: type[nn.Module]
    inputs: Callable[[list[int]], dict[str, Tensor]] | None = None
    per_image: int = 4
    first: int = 0
    attentions: tuple[str, ...] = ("sdpa", "eager")
    alike: bool = False

    def pairs(self) -> list[tuple[str, str | None]]:
        """The attentions and paddings to test, one padding each where it is much like another family."""
        if self.alike:
            return [(attention, ("left", "right")[at % 2]) for at, attention in enumerate(self.attentions * 2)][:2]
        return [(attention, padding) for attention in self.attentions for padding in (None, "left", "right")]


@dataclass(frozen=True)
class Batch:
    """A batch of two samples, the first with one image, the second with two.

    Args:
        inputs: keyword arguments of the model, without labels.
        image: (B, T) bool.
        real: (B, T) bool.
        labels: (B, T), none on padding nor on the first real token.
    """

    inputs: dict[str, Tensor]
    image: Tensor
    real: Tensor
    labels: Tensor

    def trained(self, images: list[bool]) -> Tensor:
        """The labels; those of image rows only for the samples where `images` says so."""
        behind = torch.zeros_like(self.image)
        behind[:, 1:] = self.image[:, :-1]
        return self.labels.masked_fill(behind & ~torch.tensor(images)[:, None], -100)


def _images(counts: list[int], *shape: int) -> Tensor:
    return torch.randn(sum(counts), *(shape or (3, 8, 8)), generator=torch.Generator().manual_seed(1))


def _pixels(counts: list[int]) -> dict[str, Tensor]:
    return {"pixel_values": _images(counts)}


def _sized(counts: list[int]) -> dict[str, Tensor]:
    return _pixels(counts) | {"image_sizes": torch.full((sum(counts), 2), 8)}


def _tiled(counts: list[int]) -> dict[str, Tensor]:
    # The whole image, and the one tile that its grid has.
    pixels = _images(counts)[:, None].repeat(1, 2, 1, 1, 1)
    return {"pixel_values": pixels, "image_sizes": torch.full((sum(counts), 2), 8)}


def _padded(counts: list[int]) -> dict[str, Tensor]:
    pixels, images = torch.zeros(len(counts), max(counts), 3, 8, 8), iter(_images(counts))
    for sample, count in enumerate(counts):
        for index in range(count):
            pixels[sample, index] = next(images)
    return {"pixel_values": pixels}


def _patches(counts: list[int]) -> dict[str, Tensor]:
    grid = torch.tensor([[1, 4, 4]] * sum(counts))
    return {"pixel_values": _images([int(grid.prod(1).sum())], 3 * 2 * 4 * 4), "image_grid_thw": grid}


def _vq(**more: Any) -> dict[str, Any]:
    # 32 channels: the fewest that its group norms divide.
    shape = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1, "embed_dim": 8}
    return shape | {"latent_channels": 8} | more


def _vocabulary(name: Callable[[int], str]) -> dict[str, int]:
    return {"<image>": IMAGE, "<|extra_200|>": 8} | {name(code): 48 + code for code in range(16)}


def _chameleon(**more: Any) -> hf.ChameleonConfig:
    names = _vocabulary(lambda code: "IMGIMG" + "".join("ABCDEFGHIJ"[int(digit)] for digit in str(code)) + "Z")
    vq = hf.models.chameleon.configuration_chameleon.ChameleonVQVAEConfig(num_embeddings=16, resolution=8, **_vq())
    return hf.ChameleonConfig(**_TEXT, vocabulary_map=names, vq_config=vq.to_dict(), **more)


def _emu3() -> hf.Emu3Config:
    names = _vocabulary(lambda code: f"<|visual token {code:06d}|>")
    vq = hf.Emu3VQVAEConfig(codebook_size=16, hidden_size=32, attn_resolutions=[], **_vq())
    # Its own default drops a tenth of the attention weights.
    text = hf.Emu3TextConfig(**_TEXT, attention_dropout=0.0)
    return hf.Emu3Config(vq_config=vq, text_config=text, vocabulary_map=names)


def _janus() -> hf.JanusConfig:
    vision = hf.JanusVisionConfig(
        **(_VISION | {"projection_dim": 32}), mlp_ratio=2, num_image_tokens=4, attention_dropout=0.0
    )
    more = {"num_embeddings": 16, "projection_dim": 32, "image_token_embed_dim": 32, "base_channels": 32}
    vq = hf.JanusVQVAEConfig(**_vq(**more))
    text = hf.LlamaConfig(**_TEXT)
    return hf.JanusConfig(text_config=text, vision_config=vision, vq_config=vq, image_token_id=IMAGE)


def _qwen_vl(config: Any, text: dict[str, Any], vision: Any, depths: dict[str, Any], **rope: Any) -> Any:
    shape = {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1], **rope}
    return config(
        text_config=_TEXT | text | {"rope_parameters": rope},
        vision_config=vision(**shape, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, **depths).to_dict(),
        image_token_id=IMAGE,
        video_token_id=6,
        vision_start_token_id=START,
        vision_end_token_id=7,
    )


def _qwen2_5_vl() -> hf.Qwen2_5_VLConfig:
    vision = hf.models.qwen2_5_vl.configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig
    return _qwen_vl(hf.Qwen2_5_VLConfig, {}, vision, {"window_size": 16, "fullatt_block_indexes": [1]})


def _qwen3_vl() -> hf.Qwen3VLConfig:
    depths = {"deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16}
    return _qwen_vl(
        hf.Qwen3VLConfig,
        {"head_dim": 8},
        hf.models.qwen3_vl.configuration_qwen3_vl.Qwen3VLVisionConfig,
        depths,
        mrope_interleaved=True,
    )


def _idefics3(config: Any, vision: Any) -> Any:
    sizes = _VISION | {"patch_size": 2}
    return config(
        text_config=hf.LlamaConfig(**_TEXT), vision_config=vision(**sizes), scale_factor=2, image_token_id=IMAGE
    )


def _internvl() -> hf.InternVLConfig:
    vision = hf.InternVLVisionConfig(**(_VISION | {"image_size": (8, 8), "patch_size": (2, 2)}))
    return hf.InternVLConfig(text_config=hf.Qwen2Config(**_TEXT), vision_config=vision, image_token_id=IMAGE)


def _llava() -> hf.LlavaConfig:
    vision = hf.CLIPVisionConfig(**_VISION, projection_dim=16)
    return hf.LlavaConfig(text_config=hf.LlamaConfig(**_TEXT), vision_config=vision, image_token_index=IMAGE)


def _llava_onevision() -> hf.LlavaOnevisionConfig:
    return hf.LlavaOnevisionConfig(
        text_config=hf.Qwen2Config(**_TEXT),
        vision_config=hf.SiglipVisionConfig(**_VISION, vision_use_head=False),
        image_grid_pinpoints=[[8, 8]],
        image_token_index=IMAGE,
        video_token_index=6,
    )


def _gemma3() -> hf.Gemma3TextConfig:
    kinds = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    return hf.Gemma3TextConfig(**_TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=8, layer_types=kinds)


def _gpt_neox() -> hf.GPTNeoXConfig:
    return hf.GPTNeoXConfig(**{k: v for k, v in _TEXT.items() if k != "num_key_value_heads"})


def _falcon(**form: Any) -> hf.FalconConfig:
    text = {k: v for k, v in _TEXT.items() if k not in ("num_key_value_heads", "intermediate_size")}
    drop = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    return hf.FalconConfig(**text, **drop, ffn_hidden_size=40, **form)


def _deepseek_v3() -> hf.DeepseekV3Config:
    # What it caches is of two widths, neither that of its values.
    widths = {"kv_lora_rank": 12, "q_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    heads = {"num_key_value_heads": 4, "first_k_dense_replace": 2, "moe_intermediate_size": 16}
    return hf.DeepseekV3Config(**(_TEXT | heads), **widths, **experts)


def _gpt_oss() -> hf.GptOssConfig:
    rope = {"rope_type": "default", "rope_theta": 1e4}
    more = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "sliding_window": 8}
    return hf.GptOssConfig(**_TEXT, **more, rope_parameters=rope)


def _minimax() -> hf.MiniMaxConfig:
    kinds = ["linear_attention", "full_attention", "linear_attention", "full_attention", "full_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return hf.MiniMaxConfig(**_TEXT, **experts, head_dim=8, layer_types=kinds, block_size=8)


def _falcon_h1() -> hf.FalconH1Config:
    state = {"d_ssm": 32, "n_heads": 4, "d_head": 8, "d_state": 8, "chunk_size": 8, "n_groups": 1}
    return hf.FalconH1Config(**_TEXT, **{f"mamba_{name}": value for name, value in state.items()})


def _paligemma2() -> hf.PaliGemmaConfig:
    vision = hf.SiglipVisionConfig(**_VISION, vision_use_head=False)
    text = hf.Gemma2Config(**_TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=8)
    parts = {"vision_config": vision, "text_config": text, "projection_dim": 32, "hidden_size": 32}
    return hf.PaliGemmaConfig(**parts, image_token_id=IMAGE, image_token_index=IMAGE)


def _gpt2() -> hf.GPT2Config:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return hf.GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=5, n_head=4, n_positions=64, **ids, **drop)


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: hf.LlamaConfig(**_TEXT), hf.LlamaForCausalLM),
    "qwen2": Family(lambda: hf.Qwen2Config(**_TEXT), hf.Qwen2ForCausalLM),
    "qwen3": Family(lambda: hf.Qwen3Config(**_TEXT, head_dim=8), hf.Qwen3ForCausalLM),
    "mistral": Family(lambda: hf.MistralConfig(**_TEXT, head_dim=8, sliding_window=8), hf.MistralForCausalLM),
    "gemma3": Family(_gemma3, hf.Gemma3ForCausalLM),
    "phi3": Family(lambda: hf.Phi3Config(**_TEXT), hf.Phi3ForCausalLM),
    "gpt_neox": Family(_gpt_neox, hf.GPTNeoXForCausalLM),
    "gpt2": Family(_gpt2, hf.GPT2LMHeadModel),
    "llava": Family(_llava, hf.LlavaForConditionalGeneration, _pixels),
    "llava_onevision": Family(_llava_onevision, hf.LlavaOnevisionForConditionalGeneration, _tiled, per_image=10),
    "qwen2_5_vl": Family(_qwen2_5_vl, hf.Qwen2_5_VLForConditionalGeneration, _patches),
    "qwen3_vl": Family(_qwen3_vl, hf.Qwen3VLForConditionalGeneration, _patches),
    "janus": Family(_janus, hf.JanusForConditionalGeneration, _pixels),
    "emu3": Family(_emu3, hf.Emu3ForConditionalGeneration, _sized, per_image=6),
    "chameleon": Family(_chameleon, hf.ChameleonForConditionalGeneration, _pixels),
    "chameleon_swin": Family(lambda: _chameleon(swin_norm=True), hf.ChameleonForConditionalGeneration, _pixels),
    "smolvlm": Family(
        lambda: _idefics3(hf.SmolVLMConfig, hf.SmolVLMVisionConfig), hf.SmolVLMForConditionalGeneration, _padded
    ),
    "idefics3": Family(
        lambda: _idefics3(hf.Idefics3Config, hf.models.idefics3.configuration_idefics3.Idefics3VisionConfig),
        hf.Idefics3ForConditionalGeneration,
        _padded,
    ),
    "internvl": Family(_internvl, hf.InternVLForConditionalGeneration, _pixels),
    "falcon": Family(
        lambda: _falcon(multi_query=False, parallel_attn=False, alibi=True), hf.FalconForCausalLM, alike=True
    ),
    "falcon_7b": Family(lambda: _falcon(multi_query=True), hf.FalconForCausalLM, alike=True),
    "falcon_40b": Family(
        lambda: _falcon(new_decoder_architecture=True, num_kv_heads=2), hf.FalconForCausalLM, alike=True
    ),
    "mixtral": Family(
        lambda: hf.MixtralConfig(**_TEXT, num_local_experts=4, num_experts_per_tok=2),
        hf.MixtralForCausalLM,
        alike=True,
    ),
    "qwen3_moe": Family(
        lambda: hf.Qwen3MoeConfig(
            **_TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, mlp_only_layers=[1]
        ),
        hf.Qwen3MoeForCausalLM,
        alike=True,
    ),
    "deepseek_v3": Family(_deepseek_v3, hf.DeepseekV3ForCausalLM, alike=True),
    "gpt_oss": Family(_gpt_oss, hf.GptOssForCausalLM, attentions=("eager",), alike=True),
    "paligemma2": Family(_paligemma2, hf.PaliGemmaForConditionalGeneration, _pixels, attentions=("eager",), alike=True),
    "minimax": Family(_minimax, hf.MiniMaxForCausalLM, alike=True),
    "falcon_h1": Family(_falcon_h1, hf.FalconH1ForCausalLM, alike=True),
}
# Some layers carry a state from row to row, for which the dense definition has no masks; see test_hybrids.py.
HYBRID = ("falcon_h1", "minimax")
NAMES = sorted(FAMILIES.keys() - HYBRID)


@lru_cache
def model(name: str, attention: str = "") -> Any:
    """A tiny random model in training mode, without dropout; shared, so copy it before you change it."""
    family = FAMILIES[name]
    config = family.config()
    config._attn_implementation = attention or family.attentions[0]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = family.model(config)
        _redraw(made)
    return made.train()


def _redraw(model: nn.Module) -> None:
    # Weights of usual initialisations are so small that a wrong role would hardly change an output. Quantisers keep
    # theirs: their codes have no gradient.
    for name, parameter in model.named_parameters():
        if "vqmodel" in name:
            continue
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
        else:
            parameter.data.add_(0.1 * torch.randn_like(parameter))


def batch(name: str, padding: str | None) -> Batch:
    """A batch for a family, padded on the "left", on the "right", or not."""
    family, generator = FAMILIES[name], torch.Generator().manual_seed(2)
    counts, per = [1, 2], family.per_image
    tokens = max(TOKENS, 2 * per + 10)
    starts, stops = {"left": ([5, 0], [tokens] * 2), "right": ([0, 0], [tokens - 5, tokens - 1])}.get(
        padding or "", ([0, 0], [tokens] * 2)
    )
    ids, mask = torch.zeros(2, tokens, dtype=torch.int64), torch.zeros(2, tokens, dtype=torch.int64)
    image = torch.zeros(2, tokens, dtype=torch.bool)
    for sample, (start, stop) in enumerate(zip(starts, stops, strict=True)):
        ids[sample, start:stop] = torch.randint(*TEXT, (stop - start,), generator=generator)
        mask[sample, start:stop] = 1
        at = start + 3 - sample
        for _ in range(counts[sample]):
            ids[sample, at - 1] = START
            image[sample, at : at + per] = True
            at += per + 3
    # Image tokens of a text-only family are ordinary ids of a range.
    ids[image] = IMAGE if family.inputs else torch.randint(48, VOCABULARY, (int(image.sum()),), generator=generator)
    labels = ids.masked_fill(mask == 0, -100)
    labels[torch.arange(2), torch.tensor(starts)] = -100
    inputs = {"input_ids": ids, "attention_mask": mask} | (family.inputs(counts) if family.inputs else {})
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = image.long()
    if family.model is hf.PaliGemmaForConditionalGeneration:
        # What stands before the last image token is seen from both sides, the suffix behind it is causal.
        inputs["token_type_ids"] = (image.flip(1).cumsum(1).flip(1) == 0).long()
    return Batch(inputs, image, mask == 1, labels)
