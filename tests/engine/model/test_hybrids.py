"""Decoders whose layers carry a state from row to row, against a loop over samples and the rows that take part.

Shape letters: B batch, T tokens, K rows of one sample that take part, D hidden.
"""

import copy
from typing import Any

import pytest
import torch
from families import HYBRID, Batch, batch, model
from helpers import checkpointed as recomputed
from helpers import snapshot
from torch import Tensor

import tokendrop as td
from tokendrop.engine.model.decoder import find_layers, layer_specs

# Column of the table -> method, and the layers that image rows skip or have left.
METHODS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "HMGen": (td.HMGen("1:3"), (1, 2)),
    "drop, rejoin": (td.Drop("0:2", 0), (0, 1)),
    "drop, gone": (td.Drop("2:", 0, then="gone"), (2, 3, 4)),
}
STATE = {"falcon_h1": "FalconH1Mixer", "minimax": "MiniMaxLightningAttention"}


def alone(module: Any, data: Batch, skipped: tuple[int, ...]) -> Tensor:
    """Logits (B, T, V) by definition: in a layer that image rows skip, the others are a sequence of their own."""
    made, ids = [], data.inputs["input_ids"]
    decoder, layers = module.model, find_layers(module)[1]
    for sample in range(len(ids)):
        x = decoder.embed_tokens(ids[sample : sample + 1]) * getattr(decoder, "embedding_multiplier", 1.0)
        every = torch.arange(ids.shape[1])
        cos, sin = decoder.rotary_emb(x, every[None])
        for index, layer in enumerate(layers):
            rows = every[~data.image[sample]] if index in skipped else every
            out = layer(x[:, rows], position_embeddings=(cos[:, rows], sin[:, rows]))
            x = x.index_copy(1, rows, out[0] if isinstance(out, tuple) else out)
        norm = getattr(decoder, "final_layernorm", None) or decoder.norm
        made.append(module.lm_head(norm(x)) * getattr(decoder, "lm_head_multiplier", 1.0))
    return torch.cat(made)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("column", METHODS)
@pytest.mark.parametrize("name", HYBRID)
def test_rows_that_are_left_out_are_no_step_of_the_state(name: str, column: str, checkpointed: bool, cell: Any) -> None:
    method, skipped = METHODS[column]
    data, plain = batch(name, None), copy.deepcopy(model(name, "sdpa")).double()
    plain.config._experts_implementation = "eager"  # the other takes no float64
    dropped = copy.deepcopy(plain)
    weight, none = torch.randn(*data.image.shape, 64).double(), [False, False]
    layout = td.TokenLayout(data.image, labels=data.trained(none))
    drop = td.apply(dropped, method, multiple=4)
    if checkpointed:
        recomputed(dropped)
    expected = alone(plain, data, skipped)
    (expected * weight).sum().backward()
    with drop.layout(layout):
        found = dropped(**data.inputs).logits
        (found * weight).sum().backward()
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    largest = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    pairs = zip(dropped.parameters(), plain.parameters(), strict=True)
    assert max((a.grad - b.grad).abs().max() for a, b in pairs if b.grad is not None) < 1e-5 * largest
    with drop.disabled(), torch.no_grad():
        assert (dropped(**data.inputs).logits - expected).abs().max() > 1e-3 * expected.abs().max()
    cell(name, "checkpointing" if checkpointed else column)


@pytest.mark.parametrize("name", HYBRID)
def test_padding_changes_nothing(name: str) -> None:
    # Behind what is real, also rows that only fill up; no state may pass through them.
    data, padded, module = batch(name, None), batch(name, "right"), copy.deepcopy(model(name, "sdpa"))
    drop = td.apply(module, td.HMGen("1:3"), multiple=8)
    with torch.no_grad():
        with drop.layout(td.TokenLayout(padded.image, padding=padded.real)):
            found = module(**padded.inputs, use_cache=False).logits
        for sample in range(2):
            real = padded.real[sample].nonzero()[:, 0]
            ids, image = padded.inputs["input_ids"][sample, real][None], padded.image[sample, real][None]
            with drop.layout(td.TokenLayout(image)):
                expected = module(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(found[sample, real][None], expected, rtol=1e-4, atol=1e-4)
    assert data.image.shape == padded.image.shape


@pytest.mark.parametrize("name", HYBRID)
def test_context_is_refused_where_a_state_is_carried(name: str, cell: Any, refusal: Any) -> None:
    module = copy.deepcopy(model(name, "sdpa"))
    before = snapshot(module)
    for method, says in ((td.HiMix(), "CONTEXT"), (td.FastV(1), "scores by attention"), (td.FastV(3), "by attention")):
        if name == "minimax" and method == td.FastV(3):
            continue  # looks at layer 2, or at 1, which has attention
        with pytest.raises(td.UnsupportedError, match=f"{says}.*{STATE[name]} carries a state from row") as caught:
            td.apply(module, method)
        assert snapshot(module) == before
        refusal(name, f"`{method}`", str(caught.value))
        assert td.inspect(module).support["HiMix"].startswith("HiMix(")
    cell(name, "HiMix", "refused, as below" if name == "falcon_h1" else "pass in layers with attention")


def test_attention_beside_a_state_may_have_projections_of_its_own(cell: Any) -> None:
    data, found = batch("falcon_h1", "left"), []
    for separate in ("none", "shared"):
        module = copy.deepcopy(model("falcon_h1", "sdpa"))
        drop = td.apply(module, td.HMGen("1:3", separate), multiple=4)
        with drop.layout(td.TokenLayout(data.image)), torch.no_grad():
            found.append(module(**data.inputs, use_cache=False).logits)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        drop.layers[0]["image"]["v"].weight.zero_()
        with drop.layout(td.TokenLayout(data.image)):
            assert not torch.allclose(module(**data.inputs, use_cache=False).logits, found[0], atol=1e-2)
    cell("falcon_h1", "projections")


def test_context_in_the_layers_that_have_attention(cell: Any) -> None:
    # Layers 1, 3 and 4 of MiniMax; by definition image rows there are keys and values, and keep their states.
    data, module = batch("minimax", None), copy.deepcopy(model("minimax", "sdpa")).eval()
    method = td.HiMix([1, 3, 4], "shared")
    drop = td.apply(module, method, multiple=4)
    with drop.layout(td.TokenLayout(data.image)), torch.no_grad():
        found = module(**data.inputs, use_cache=False).logits
    with torch.no_grad(), drop.disabled():
        for sample in range(2):
            x = module.model.embed_tokens(data.inputs["input_ids"][sample : sample + 1])
            rotary = module.model.rotary_emb(x, torch.arange(x.shape[1])[None])
            for index, layer in enumerate(module.model.layers):
                out = layer(x, position_embeddings=rotary)
                x = torch.where(data.image[sample][:, None], x, out) if index in (1, 3, 4) else out
            expected = module.lm_head(module.model.norm(x))
            text = ~data.image[sample]
            torch.testing.assert_close(found[sample, text], expected[0, text], rtol=1e-4, atol=1e-4)
    cell("minimax", "projections", "pass in layers with attention")


def test_generation_skips_no_row_where_a_state_is_carried(cell: Any) -> None:
    for name in HYBRID:
        data, module = batch(name, None), copy.deepcopy(model(name, "sdpa")).eval()
        drop = td.apply(module, td.HMGen("1:3"), multiple=4)
        with drop.layout(td.TokenLayout(data.image)):
            with pytest.raises(td.UnsupportedError, match=f"{STATE[name]} of layer .*generate with use_cache=False"):
                module.generate(**data.inputs, max_new_tokens=2, do_sample=False)
            assert module.generate(**data.inputs, max_new_tokens=2, do_sample=False, use_cache=False).shape[1] == 28
        cell(name, "generate", "with use_cache=False")


def test_layers_are_inspected_one_by_one() -> None:
    layers = find_layers(model("minimax", "sdpa"))[1]
    specs = layer_specs(layers)
    assert [spec.recurrent for spec in specs] == [STATE["minimax"], None, STATE["minimax"], None, None]
    assert [bool(spec.linears) for spec in specs] == [False, True, False, True, True]
    module = copy.deepcopy(model("minimax", "sdpa"))
    before = snapshot(module)
    with pytest.raises(td.UnsupportedError, match=r"in layer 2 MiniMaxLightning.*layers \[1, 3, 4\] can"):
        td.apply(module, td.HiMix("1:", "shared"))
    with pytest.raises(td.UnsupportedError, match="inspection finds no linears for q, k and v"):
        td.apply(module, td.HMGen("1:3", "shared"))
    assert snapshot(module) == before
    assert {spec.recurrent for spec in layer_specs(find_layers(model("falcon_h1", "sdpa"))[1])} == {STATE["falcon_h1"]}


@pytest.mark.parametrize("name", HYBRID)
def test_compiled_in_one_graph(name: str, cell: Any) -> None:
    torch._dynamo.reset()
    data, module = batch(name, None), copy.deepcopy(model(name, "sdpa"))
    del module.model.layers[3:]
    drop = td.apply(module, td.HMGen("1:2"))
    arguments = {"input_ids": data.inputs["input_ids"], "use_cache": False}
    with drop.layout(td.TokenLayout(data.image, labels=data.labels)), torch.no_grad():
        expected = module(**arguments).logits
        found = torch.compile(module, fullgraph=True, backend="eager")(**arguments).logits
    torch.testing.assert_close(found, expected)
    cell(name, "compile", "one graph; inductor not tried")
