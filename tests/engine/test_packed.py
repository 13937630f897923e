"""Packed sequences: several samples in one row, told apart by position ids that restart.

Shape letters: B batch, T tokens.
"""

import pytest
import torch
from helpers import batch, close, dropped, llama, loss_of

import tokendrop as td
from tokendrop.engine.reference import reference

SAMPLES = ["tttiiiitt", "iittiit", "tttii", "iiiitttt"]
METHODS = {"himix": td.HiMix("1:", "shared"), "hmgen": td.HMGen("1:3", "shared"), "rejoin": td.Drop("0:2", 0.5)}


def packed():
    """The samples in one row, and what each would be alone."""
    alone = [batch([sample], "u", seed=seed) for seed, sample in enumerate(SAMPLES)]
    together = {name: torch.cat([getattr(one, name) for one in alone], 1) for name in ("ids", "image", "labels")}
    positions = torch.cat([torch.arange(one.ids.shape[1]) for one in alone])[None]
    return alone, together, positions


def run(model, drop, ids, layout, positions=None):
    with drop.layout(layout):
        logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        loss = loss_of(logits, layout.labels)
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return logits.detach(), dict(zip([name for name, _ in model.named_parameters()], grads, strict=True))


def apart(model, drop, alone):
    """Each sample in a batch of its own: logits one behind the other, gradients summed."""
    runs = [run(model, drop, one.ids, td.TokenLayout(one.image, labels=one.labels)) for one in alone]
    logits = torch.cat([logits for logits, _ in runs], 1)
    return logits, {name: sum(grads[name] for _, grads in runs) for name in runs[0][1]}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["himix", "hmgen"])
def test_packed_equals_each_sample_alone(method, attention):
    model, drop = dropped(llama(attention), METHODS[method], multiple=4)
    alone, together, positions = packed()
    layout = td.TokenLayout(together["image"], labels=together["labels"])
    expected, real = apart(model, drop, alone), torch.ones_like(together["image"])
    assert close(run(model, drop, together["ids"], layout, positions), expected, real, 1e-5)
    # Without restarts a sample sees those before it.
    assert not close(run(model, drop, together["ids"], layout), expected, real, 1e-2)


def test_a_selection_in_packed_sequences_is_one_of_the_row():
    base, (_, together, positions) = llama(), packed()
    layout = td.TokenLayout(together["image"], labels=together["labels"])
    model, drop = dropped(base, METHODS["rejoin"], multiple=4)
    with drop.layout(layout, step=(0, 0)), torch.no_grad():
        found = model(input_ids=together["ids"], position_ids=positions, use_cache=False).logits
    with reference(base, {None: METHODS["rejoin"]}, layout), torch.no_grad():
        expected = base(input_ids=together["ids"], position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["cu_seq_lens_q", "position ids that restart"])
def test_packed_sequences_that_an_attention_tells_apart_itself_are_refused(what):
    model, drop = dropped(llama(), td.HMGen("1:3"))
    model.config._attn_implementation = "flash_attention_2"
    _, together, positions = packed()
    layer, rotary = model.model.layers[0], model.model.rotary_emb
    states = torch.zeros(1, positions.shape[1], 32)
    given = {"attention_mask": None, "position_embeddings": rotary(states, positions)}
    given |= {"cu_seq_lens_q": torch.tensor([0, 9])} if what == "cu_seq_lens_q" else {"position_ids": positions}
    layout = td.TokenLayout(together["image"])
    with drop.layout(layout), pytest.raises(td.UnsupportedError, match=rf"{what}.*'flash_attention_2'.*'sdpa'"):
        layer(states, **given)


def test_lengths_of_packed_sequences_change_nothing_where_the_mask_says_it():
    model, drop = dropped(llama(), METHODS["hmgen"])
    _, together, positions = packed()
    lengths = torch.tensor([0, *torch.tensor([len(one) for one in SAMPLES]).cumsum(0)], dtype=torch.int32)
    with drop.layout(td.TokenLayout(together["image"])), torch.no_grad():
        given = {"input_ids": together["ids"], "position_ids": positions, "use_cache": False}
        more = {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": 9, "max_length_k": 9}
        assert torch.equal(model(**given, **more).logits, model(**given).logits)
