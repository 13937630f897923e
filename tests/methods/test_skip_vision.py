"""SkipVision: what its published code made of given inputs (tests/data/peers/skip-vision.json), and its selection.

Shape letters: B batch, T tokens, S a summary row, D hidden.
"""

import json
from pathlib import Path

import peer_inputs
import pytest
import torch
import torch.nn.functional as F
from helpers import batch, llama
from transformers import LlamaConfig, LlamaForCausalLM

import tokendrop as td

CASE = json.loads((Path(__file__).parents[1] / "data" / "peers" / "skip-vision.json").read_text())
RETAINED, SKIPPED = CASE["settings"]["retained"], CASE["settings"]["skipped"]


def test_its_published_code():
    """On its own sequence: retained, their summary, skipped, their summary; skipped columns are masked in decoding."""
    given, router, made = peer_inputs.prompt(256), peer_inputs.routed(), peer_inputs.llama(4)
    before, image, after, _ = given["embeddings"][0].split([35, 256, 30, 12])

    def summary(x):
        score = F.layer_norm(x, x.shape[-1:], eps=1e-5) @ router["router"] + router["bias"]
        return (score.softmax(0)[:, None] * x).sum(0, keepdim=True)

    kept, rest = image[:RETAINED], image[RETAINED:]
    states = torch.cat([before, kept, summary(kept), rest, summary(rest), after])[None]
    kinds = torch.cat([torch.full((n,), kind) for n, kind in ((35, 0), (100, 1), (1, 0), (156, 2), (1, 0), (30, 0))])
    model = LlamaForCausalLM(LlamaConfig(**made["config"], attn_implementation="sdpa")).eval()
    model.load_state_dict(made["state_dict"])
    drop = td.apply(model, td.SkipVision(keep=RETAINED, score=lambda s: -torch.arange(s.image.shape[1]).float()[None]))
    with torch.no_grad(), drop.layout(td.TokenLayout((kinds > 0)[None], new="text")):
        out = model(inputs_embeds=states, use_cache=True)
        torch.testing.assert_close(out.logits[0, -1, :8], torch.tensor(CASE["logits_last_row"]), rtol=0, atol=2e-5)
        mask = (kinds < 2).long()[None]
        for token in CASE["tokens"]:
            mask = F.pad(mask, (0, 1), value=1)
            at = torch.tensor([[mask.shape[1] - 1]])
            more = {"past_key_values": out.past_key_values, "position_ids": at, "attention_mask": mask}
            out = model(torch.tensor([[token]]), **more)
    torch.testing.assert_close(out.logits[0, -1, :8], torch.tensor(CASE["logits_after_them"]), rtol=0, atol=2e-5)
    assert {one.keys.shape[2] for one in out.past_key_values.layers} == set(CASE["cache_length_by_layer"])


@pytest.mark.parametrize("score", ["uniform", "norm"])
def test_it_is_drop_to_attend(score):
    routes = [kind.route(6, 0.5) for kind in (td.SkipVision("1:", 3, score), td.Drop("1:", 3, score, "attend"))]
    assert routes[0] == routes[1]


def test_none_to_choose_needs_no_selection():
    """So that generated image tokens are like those of the prompt; under a schedule there is one to make."""
    method = td.SkipVision(keep=0)
    assert [layer.select for layer in method.route(3)] == [None] * 3
    assert all(layer.select is not None for layer in method.route(3, 0.5))


def test_by_default_what_its_source_retains():
    drop, made = td.apply(llama(), td.SkipVision(), multiple=1), batch(["t" + "i" * 256 + "t"], "u")
    (group,) = drop.plan(made.layout()).spans[0].groups
    assert group.ffn_rows == RETAINED + 2
