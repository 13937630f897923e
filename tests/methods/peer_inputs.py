"""Deterministic inputs that the peers' own code was run on; what it chose is in tests/data/peers/chosen.json.

Every number is an integer drawn from torch's CPU generator, divided by a power of two or multiplied once by a constant,
so it is the same bit for bit on any machine.

Shape letters: B batch, T tokens, M image tokens, D hidden, L layers, N patches.
"""

import torch
from torch import Generator, Tensor

BEFORE, AFTER, ANSWER = 35, 30, 12  # text before the image, behind it (the end of the prompt), and the answer's tokens
VOCABULARY, HIDDEN, HEADS, INNER, LAYERS = 128, 64, 4, 128, 32


def _seeded(seed: int) -> Generator:
    return torch.Generator().manual_seed(seed)


def normal(generator: Generator, *shape: int) -> Tensor:
    """Nearly normal draws: mean 0, variance 1, none beyond 3, each a multiple of 2^-16."""
    three = torch.randint(0, 65536, (*shape, 3), generator=generator).sum(-1)
    return (2 * three - 3 * 65535).float() / 65536


def uniform(generator: Generator, *shape: int) -> Tensor:
    """Draws in (0, 1], each a multiple of 2^-23."""
    return torch.randint(1, 2**23 + 1, shape, generator=generator).float() / 2**23


# Decoder ------------------------------------------------------------------------------------------------------------


def llama(kv_heads: int = 4) -> dict:
    """A random Llama of 32 layers: "config" for transformers' LlamaConfig, "state_dict" for LlamaForCausalLM.

    Args:
        kv_heads: 4 for plain multi-head attention (seed 1), 2 for grouped queries (seed 2).
    """
    g, head = _seeded({4: 1, 2: 2}[kv_heads]), HIDDEN // HEADS
    config = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    weights = {"model.embed_tokens.weight": normal(g, VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}."
        weights[name + "self_attn.q_proj.weight"] = normal(g, HIDDEN, HIDDEN) * 0.15
        weights[name + "self_attn.k_proj.weight"] = normal(g, kv_heads * head, HIDDEN) * 0.15
        weights[name + "self_attn.v_proj.weight"] = normal(g, kv_heads * head, HIDDEN) * 0.1
        weights[name + "self_attn.o_proj.weight"] = normal(g, HIDDEN, HIDDEN) * 0.1
        weights[name + "mlp.gate_proj.weight"] = normal(g, INNER, HIDDEN) * 0.1
        weights[name + "mlp.up_proj.weight"] = normal(g, INNER, HIDDEN) * 0.1
        weights[name + "mlp.down_proj.weight"] = normal(g, HIDDEN, INNER) * 0.05
        weights[name + "input_layernorm.weight"] = 1 + normal(g, HIDDEN) / 8
        weights[name + "post_attention_layernorm.weight"] = 1 + normal(g, HIDDEN) / 8
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = normal(g, VOCABULARY, HIDDEN) * 0.1
    return {"config": config, "state_dict": weights}


def prompt(images: int = 576, batch: int = 1, turns: int = 1) -> dict:
    """Embeddings of 35 text tokens, `images` image tokens, 30 text tokens and an answer of 12 tokens.

    Args:
        images: M, image tokens of each sample.
        batch: B; sample 0 of two is not the sample of one.
        turns: 2 takes the labels of answer tokens 4 to 7 away: the answer's first 4 and last 4 are two turns.

    Returns:
        "embeddings" (B, T, D), "image" (B, T) bool, "labels" (B, T) unshifted with -100 for none; "start", "images" and
        "length" (of the prompt, without the answer) as numbers.
    """
    g, length = _seeded(100 + 10 * batch + images % 10), BEFORE + images + AFTER
    embeddings = normal(g, batch, length + ANSWER, HIDDEN)
    image = torch.zeros(batch, length + ANSWER, dtype=torch.bool)
    image[:, BEFORE : BEFORE + images] = True
    labels = torch.full((batch, length + ANSWER), -100)
    labels[:, length:] = torch.randint(0, VOCABULARY, (batch, ANSWER), generator=g)
    if turns == 2:
        labels[:, length + 4 : length + 8] = -100
    return {
        "embeddings": embeddings,
        "image": image,
        "labels": labels,
        "start": BEFORE,
        "images": images,
        "length": length,
    }


def ltd_indices(step: int = 0) -> Tensor:
    """For random-LTD on `prompt()`: which rows each of the 30 inner layers computes, (30, 365) ascending.

    All 77 text rows, and 288 of the 576 image rows, others in each layer.
    """
    g, one = _seeded(200 + step), prompt()
    text = (~one["image"][0]).nonzero()[:, 0]
    rows = []
    for _ in range(LAYERS - 2):
        order = torch.randint(0, 2**31, (one["images"],), generator=g).argsort(stable=True)
        rows.append(torch.cat([text, BEFORE + order[:288]]).sort().values)
    return torch.stack(rows)


def routed() -> dict:
    """For Mixture-of-Depths on layer 1 of `llama(4)`: "states" (1, 200, D), "router" (D,), "bias" (), "image" (1, 200).

    Rows 20 to 169 are image tokens.
    """
    g = _seeded(300)
    image = torch.zeros(1, 200, dtype=torch.bool)
    image[:, 20:170] = True
    return {
        "states": normal(g, 1, 200, HIDDEN),
        "router": normal(g, HIDDEN) / 8,
        "bias": normal(g) / 8,
        "image": image,
    }


def ranked() -> dict:
    """For one ranking at the entry of a layer: "states" (1, 665, D), norm, query and key weights and biases.

    16-wide heads, 4 of queries and 2 of keys; 35 text, 600 image, 30 text rows.
    """
    g = _seeded(400)
    return {
        "states": normal(g, 1, BEFORE + 600 + AFTER, HIDDEN),
        "norm": 1 + normal(g, HIDDEN) / 8,
        "q_weight": normal(g, HIDDEN, HIDDEN) * 0.15,
        "q_bias": normal(g, HIDDEN) / 4,
        "k_weight": normal(g, HIDDEN // 2, HIDDEN) * 0.15,
        "k_bias": normal(g, HIDDEN // 2) / 4,
        "start": BEFORE,
        "images": 600,
    }


def keys_and_states() -> dict:
    """For DART: "keys" (1, 4, 641, 16) as in a cache, and "states" (1, 641, D) behind a norm; 35, 576 and 30 rows."""
    g = _seeded(500)
    keys = normal(g, 1, HEADS, BEFORE + 576 + AFTER, HIDDEN // HEADS)
    size = 1 + 3 * uniform(g, 1, 1, BEFORE + 576 + AFTER, 1)
    return {"keys": keys * size, "states": normal(g, *keys.shape[::2], HIDDEN), "start": BEFORE, "images": 576}


# Vision encoder -----------------------------------------------------------------------------------------------------


def clip() -> dict:
    """A random CLIP encoder of 8 layers and 24 x 24 patches.

    Returns:
        "config" for CLIPVisionConfig; "state_dict" with the names of transformers 5 ("embeddings.class_embedding", ...;
        older releases put "vision_model." before them); "pixels" (1, 3, 336, 336); "projector", the weights of a
        LLaVA projector (linear_1, GELU, linear_2) from 32 to 64.
    """
    g, width, inner, layers = _seeded(600), 32, 64, 8
    config = {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "image_size": 336,
        "patch_size": 14,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
    }
    weights = {
        "embeddings.class_embedding": normal(g, width),
        "embeddings.patch_embedding.weight": normal(g, width, 3, 14, 14) * 0.05,
        "embeddings.position_embedding.weight": normal(g, 577, width) / 2,
    }

    def norm(name: str) -> None:
        weights[name + ".weight"] = 1 + normal(g, width) / 8
        weights[name + ".bias"] = normal(g, width) / 16

    def linear(name: str, out: int, into: int, scale: float) -> None:
        weights[name + ".weight"] = normal(g, out, into) * scale
        weights[name + ".bias"] = normal(g, out) / 16

    norm("pre_layrnorm")
    for layer in range(layers):
        name = f"encoder.layers.{layer}."
        for part, scale in (("q", 0.35), ("k", 0.35), ("v", 0.15), ("out", 0.15)):
            linear(f"{name}self_attn.{part}_proj", width, width, scale)
        norm(name + "layer_norm1")
        linear(name + "mlp.fc1", inner, width, 0.15)
        linear(name + "mlp.fc2", width, inner, 0.1)
        norm(name + "layer_norm2")
    norm("post_layernorm")
    projector = {
        "linear_1.weight": normal(g, HIDDEN, width) * 0.2,
        "linear_1.bias": normal(g, HIDDEN) / 16,
        "linear_2.weight": normal(g, HIDDEN, HIDDEN) * 0.15,
        "linear_2.bias": normal(g, HIDDEN) / 16,
    }
    return {"config": config, "state_dict": weights, "pixels": normal(g, 1, 3, 336, 336), "projector": projector}


def llava() -> dict:
    """`clip()` and `llama(4)` as one LLaVA: "vision" and "text" configs, "state_dict", "pixels", "ids" (1, 641).

    The names are those of LlavaForConditionalGeneration in transformers 5. Image tokens have id 127; they are made of
    the encoder's layer -2 without its [CLS] row.
    """
    g, encoder, decoder = _seeded(900), clip(), llama(4)
    weights = {"model.vision_tower." + name: one for name, one in encoder["state_dict"].items()}
    weights |= {"model.multi_modal_projector." + name: one for name, one in encoder["projector"].items()}
    for name, one in decoder["state_dict"].items():
        weights[name.replace("model.", "model.language_model.", 1)] = one
    ids = torch.randint(0, 120, (1, BEFORE + 576 + AFTER), generator=g)
    ids[:, BEFORE : BEFORE + 576] = 127
    return {
        "vision": encoder["config"],
        "text": decoder["config"],
        "state_dict": weights,
        "pixels": encoder["pixels"],
        "ids": ids,
    }


def grid(rows: int, columns: int) -> dict:
    """For VScan's windows: "local" and "whole" (N,), the attention that each of rows x columns image tokens gets.

    Neither sums to 1. "local" is up to eight times as high in some blocks of 6 x 6 tokens as in others.
    """
    g = _seeded(730 + 40 * rows + columns)
    block = torch.randint(1, 9, (-(-rows // 6), -(-columns // 6)), generator=g).float()
    block = block.repeat_interleave(6, 0).repeat_interleave(6, 1)[:rows, :columns]
    local = uniform(g, rows, columns) * block / 8
    return {"local": local.flatten(), "whole": uniform(g, rows * columns)}


def clusters() -> dict:
    """For DivPrune and CDPruner: "features" (576, 64) around 40 centres; "image" (1, 576, 32) and "text" (3, 32)."""
    g = _seeded(800)
    centre = torch.randint(0, 40, (576,), generator=g)
    features = normal(g, 40, 64)[centre] + normal(g, 576, 64) / 2
    return {"features": features, "image": normal(g, 1, 576, 32), "text": normal(g, 3, 32)}
