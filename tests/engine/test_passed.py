"""What layers hand to one another, and other sequences that they are given: right, or refused.

Shape letters: B batch, T tokens, D hidden.
"""

import copy

import pytest
import torch
from helpers import llama
from torch import nn
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
)

import tokendrop as td
from tokendrop.engine.reference import reference

B, T, D = 3, 12, 16
SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "pad_token_id": 0}
IMAGE = torch.zeros(2, T, dtype=torch.bool)
IMAGE[:, 2:8] = True


def gemma4(shared):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8}
    beside = {"vocab_size_per_layer_input": 32, "hidden_size_per_layer_input": 8, "sliding_window": 64}
    kinds = ["sliding_attention", "full_attention"] * 2
    return Gemma4ForCausalLM(
        Gemma4TextConfig(**SIZES, **heads, **beside, num_kv_shared_layers=shared, layer_types=kinds)
    )


def glm(shared):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16}
    widths = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "moe_intermediate_size": 16}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    index = {"index_topk": T, "index_n_heads": 8, "index_head_dim": 16, "mlp_layer_types": ["dense"] * 4}
    kinds = {"indexer_types": ["full", "shared" if shared else "full"] * 2}
    return GlmMoeDsaForCausalLM(GlmMoeDsaConfig(**SIZES, **heads, **widths, **experts, **index, **kinds))


def llama4(scale):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size_mlp": 48}
    plain = {"moe_layers": [], "num_local_experts": 2, "floor_scale": scale, "no_rope_layers": [1, 0, 1, 0]}
    return Llama4ForCausalLM(Llama4TextConfig(**SIZES, **heads, **plain))


MODELS = [
    ("gemma4", lambda: gemma4(0), td.HMGen("1:3"), None),
    ("gemma4, shared", lambda: gemma4(2), td.HMGen("1:3"), "takes 'shared_kv_states', a KVSharingDict of tensors, in"),
    ("gemma4, written", lambda: gemma4(2), td.HMGen("0:1"), "takes 'shared_kv_states', a KVSharingDict of tensors"),
    ("glm", lambda: glm(False), td.HMGen("1:3"), None),
    ("glm, in one range", lambda: glm(True), td.HMGen("2:4"), None),
    (
        "glm, read",
        lambda: glm(True),
        td.HMGen("1:2"),
        "layer 1 .* takes 'prev_topk_indices', which an earlier layer ret",
    ),
    (
        "glm, written",
        lambda: glm(True),
        td.HMGen("2:3"),
        "layer 3 .* takes 'prev_topk_indices', which an earlier layer",
    ),
    ("llama4", lambda: llama4(T + 1), td.HMGen("1:3"), None),
    (
        "llama4, scaled",
        lambda: llama4(T),
        td.HMGen("1:3"),
        "layer 1 .* scales queries by positions from 12 on, .* 12 to",
    ),
    ("llama4, elsewhere", lambda: llama4(T), td.HMGen("2:3"), None),
]


@pytest.mark.parametrize(("made", "method", "message"), [one[1:] for one in MODELS], ids=[one[0] for one in MODELS])
def test_what_layers_hand_on_and_count(made, method, message):
    torch.manual_seed(0)
    model, ids, layout = made().eval(), torch.randint(1, 32, (2, T)), td.TokenLayout(IMAGE)
    plain, drop = copy.deepcopy(model), td.apply(model, method, multiple=1)
    with drop.layout(layout):
        if message is not None:
            with pytest.raises(td.UnsupportedError, match=message):
                model(input_ids=ids, use_cache=False)
            return
        found = model(input_ids=ids, use_cache=False).logits
    with reference(plain, {"u": method}, td.TokenLayout(IMAGE, task="u")):
        expected = plain(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_an_attention_with_an_indexer_sees_no_frozen_rows():
    with pytest.raises(
        td.UnsupportedError, match="GlmMoeDsaAttention chooses keys by an indexer with a cache of its own"
    ):
        td.apply(glm(False), td.HiMix("1:"))


@pytest.mark.parametrize("length", [9, T])
@pytest.mark.parametrize("images", [[1, 1, 1], [1, 0, 1]])
def test_cross_attention_is_refused(length, images):
    layers = nn.ModuleList([nn.TransformerDecoderLayer(D, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)])
    image = torch.zeros(B, T, dtype=torch.bool)
    image[:, 2:8] = torch.tensor(images).bool()[:, None]
    run = td.DropLayers(layers, td.HMGen(":"))
    causal = nn.Transformer.generate_square_subsequent_mask(T)
    with (
        run.tokendrop.layout(td.TokenLayout(image)),
        pytest.raises(
            td.UnsupportedError, match=r"layer 0 \(TransformerDecoderLayer\) attends to 'memory', rows of anoth"
        ),
    ):
        run(torch.randn(B, T, D), torch.randn(B, length, D), tgt_mask=causal)


class Conditioned(nn.Module):
    """Adds a projection of (B, D) and a number (B,) to a layer's input, and reads plain settings."""

    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 32, dropout=0.0, batch_first=True)
        self.linear = nn.Linear(8, D)

    def forward(self, x, cond, time, src_mask=None, settings=None):
        settings = settings or {"scale": 2.0}
        return self.layer(x + settings["scale"] * (self.linear(cond) * time[:, None])[:, None], src_mask=src_mask)


@pytest.mark.parametrize("images", [[1, 1, 1], [1, 0, 1], [0, 0, 1]])
def test_arguments_with_a_row_for_each_sample(images):
    torch.manual_seed(0)
    causal = nn.Transformer.generate_square_subsequent_mask
    layers, image = nn.ModuleList([Conditioned(), Conditioned()]).eval(), torch.zeros(B, T, dtype=torch.bool)
    image[:, 2:8] = torch.tensor(images).bool()[:, None]
    x, cond, time = torch.randn(B, T, D), torch.randn(B, 8), torch.rand(B)
    expected = []
    for one in range(B):  # whoever is gone from the first layer on was never there
        y = x[one : one + 1, ~image[one]]
        for layer in layers:
            y = layer(y, cond[one : one + 1], time[one : one + 1], src_mask=causal(y.shape[1]))
        expected.append(y[0])
    run = td.DropLayers(layers, td.Drop(":", keep=0, score="norm", then="gone"), multiple=1)
    layout = td.TokenLayout(image, labels=torch.full((B, T), -100))
    with torch.no_grad(), run.tokendrop.layout(layout):
        found = run(x, cond, time, src_mask=causal(T), settings={"scale": 2.0})
    torch.testing.assert_close(torch.cat([found[one, ~image[one]] for one in range(B)]), torch.cat(expected))


def test_labels_are_no_part_of_a_prompt():
    model, ids = llama(), torch.randint(1, 32, (2, T))
    td.apply(model, td.HiMix("1:"), layout="auto")
    given = {"input_ids": ids, "image_mask": IMAGE, "max_new_tokens": 2, "do_sample": False}
    expected = model.generate(**given)
    torch.testing.assert_close(model.generate(**given, labels=ids), expected)


def test_a_copy_that_is_removed_leaves_the_layout_of_the_original():
    model, ids = llama().eval(), torch.randint(1, 32, (2, T))
    drop = td.apply(model, td.HMGen(":"))
    with torch.no_grad(), drop.layout(td.TokenLayout(IMAGE)):
        expected = model(ids).logits
        td.handle(copy.deepcopy(model)).remove()
        torch.testing.assert_close(model(ids).logits, expected)


def test_audio_is_no_image():
    kinds = torch.tensor([[0, 1, 1, 2, 3, 3, 0]])
    layout = td.callbacks.batch.batch_layout({"mm_token_type_ids": kinds}, nn.Identity())
    assert layout.image.tolist() == [[False, True, True, True, False, False, False]]
