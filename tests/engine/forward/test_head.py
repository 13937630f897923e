"""Logits on labelled rows only: the loss and all gradients are those of all rows.

Shape letters: B batch, T tokens, N rows with a label, V vocabulary.
"""

import copy
import pickle

import pytest
import torch
from families import FAMILIES, NAMES, batch, model
from helpers import MIXED, llama, snapshot
from helpers import batch as written
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn

import tokendrop as td

MADE = written(*MIXED, side="left")
METHODS = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}


def grads(module, loss):
    loss.backward()
    found = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    module.zero_grad(set_to_none=True)
    return found


def agree(found, expected, tolerance=1e-5):
    assert found.keys() == expected.keys()
    largest = max(grad.abs().max() for grad in expected.values())
    assert max((found[name] - grad).abs().max() for name, grad in expected.items()) <= tolerance * largest


@pytest.mark.parametrize("name", NAMES)
def test_every_family_has_the_same_loss_and_gradients(name):
    data = batch(name, "left")
    labels = data.trained([False, False])
    layout = td.TokenLayout(data.image, padding=data.real, labels=labels)
    runs = []
    for labelled in (False, True):
        module = copy.deepcopy(model(name))
        drop = td.apply(module, td.HiMix(f"{FAMILIES[name].first}:"), multiple=4, labelled_logits=labelled)
        with drop.layout(layout):
            out = module(**data.inputs, labels=labels)
        runs.append((out.logits.shape, out.loss.detach(), grads(module, out.loss)))
    (_, loss, expected), (shape, same, found) = runs
    count = int((labels[:, 1:] != -100).sum())
    assert count <= shape[1] < count + 4
    assert shape[0] == 1
    torch.testing.assert_close(same, loss)
    agree(found, expected)


@given(st.lists(st.booleans(), min_size=MADE.labels.numel(), max_size=MADE.labels.numel()), st.integers(1, 16))
def test_any_labels(hide, multiple):
    labels = MADE.labels.masked_fill(torch.tensor(hide).view(MADE.labels.shape), -100)
    if not (labels[:, 1:] != -100).any():
        return
    base, runs = llama(dtype=torch.float64), []
    for labelled in (False, True):
        module = copy.deepcopy(base)
        drop = td.apply(module, METHODS | {"d": None}, multiple=multiple, labelled_logits=labelled)
        with drop.layout(MADE.layout(labels=labels)):
            loss = module(MADE.ids, attention_mask=MADE.mask, labels=labels, use_cache=False).loss
        runs.append((loss.detach(), grads(module, loss)))
    torch.testing.assert_close(runs[1][0], runs[0][0])
    agree(runs[1][1], runs[0][1], 1e-9)


def test_a_sum_over_items_of_an_accumulated_batch():
    runs = []
    for labelled in (False, True):
        module = llama()
        drop = td.apply(module, METHODS, labelled_logits=labelled)
        with drop.layout(MADE.layout()):
            runs.append(module(MADE.ids, labels=MADE.labels, use_cache=False, num_items_in_batch=77).loss)
    torch.testing.assert_close(runs[1], runs[0])


def test_without_labels_logits_are_whole():
    module = llama()
    drop = td.apply(module, METHODS, labelled_logits=True)
    with drop.layout(MADE.layout(labels=None)), torch.no_grad():
        assert module(MADE.ids, use_cache=False).logits.shape[:2] == MADE.ids.shape
    with drop.disabled():
        assert module(MADE.ids, labels=MADE.labels).logits.shape[:2] == MADE.ids.shape


def test_other_labels_than_the_layout_are_refused():
    module = llama()
    drop = td.apply(module, METHODS, labelled_logits=True)
    fewer = MADE.layout(labels=MADE.labels.masked_fill(MADE.labels > 20, -100))
    with drop.layout(fewer), pytest.raises(td.LayoutError, match=r"labels of shape \(5, 11\) that differ from"):
        module(MADE.ids, labels=MADE.labels, use_cache=False)


def test_remove_gives_head_and_loss_back():
    module = llama()
    before = snapshot(module)
    td.apply(module, METHODS, labelled_logits=True).remove()
    assert snapshot(module) == before
    module.loss_function = own = lambda logits, labels, vocab_size, shift_labels=None: logits.sum()
    td.apply(module, METHODS, labelled_logits=True).remove()
    assert module.loss_function is own


def test_copies_and_pickles_obey():
    module = llama()
    drop = td.apply(module, METHODS, labelled_logits=True)
    with drop.layout(MADE.layout()):
        expected = module(MADE.ids, labels=MADE.labels, use_cache=False)
        copied = copy.deepcopy(module)(MADE.ids, labels=MADE.labels, use_cache=False)
    assert torch.equal(copied.logits, expected.logits)
    again = pickle.loads(pickle.dumps(module))  # noqa: S301
    with td.handle(again).layout(MADE.layout()):
        assert torch.equal(again(MADE.ids, labels=MADE.labels, use_cache=False).logits, expected.logits)


class Headless(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = llama().model


def test_a_model_without_a_head_is_refused():
    module = Headless()
    before = snapshot(module)
    with pytest.raises(td.UnsupportedError, match="Headless holds no Hugging Face model with an output head"):
        td.apply(module, METHODS, labelled_logits=True)
    assert snapshot(module) == before


def test_a_loss_without_shifted_labels_is_refused():
    module = llama()
    module.loss_function = lambda logits, labels, vocab_size: logits.sum()
    before = snapshot(module)
    with pytest.raises(td.UnsupportedError, match=r"loss_function takes no 'shift_labels'"):
        td.apply(module, METHODS, labelled_logits=True)
    assert snapshot(module) == before


def test_in_one_graph():
    torch._dynamo.reset()
    module = llama(layers=2)
    drop = td.apply(module, {"u": td.HiMix(), "g": None}, multiple=4, labelled_logits=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with drop.layout(MADE.layout()):
        inputs = {"input_ids": MADE.ids, "labels": MADE.labels, "use_cache": False}
        torch.testing.assert_close(compiled(**inputs).loss, module(**inputs).loss)


def labelled(module, drop):
    """Loss and logits' shape inside the layout."""
    with torch.no_grad(), drop.layout(MADE.layout()):
        out = module(input_ids=MADE.ids, attention_mask=MADE.mask, labels=MADE.labels, use_cache=False)
    return out.loss, out.logits.shape[:2]


def resized(module):
    with torch.random.fork_rng():
        torch.manual_seed(0)  # of the new rows
        module.resize_token_embeddings(72, mean_resizing=False)
    return module


def exchanged(module):
    head = nn.Linear(32, 50, bias=False)
    head.weight.data = module.lm_head.weight.data * 2
    module.set_output_embeddings(head)
    return module


def adapted(module, **more):
    made = get_peft_model(module, LoraConfig(r=2, **({"target_modules": ["lm_head"]} | more)))
    for name, p in made.named_parameters():
        if "lora_" in name:
            p.data = torch.linspace(-1, 1, p.numel()).view(p.shape)
    return made.eval()


EXCHANGES = {
    "resized": resized,
    "exchanged": exchanged,
    "adapted": adapted,
    "kept": lambda module: adapted(module, target_modules=["k_proj"], modules_to_save=["lm_head"]),
    "merged": lambda module: adapted(module).merge_and_unload(),
}


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
@pytest.mark.parametrize("ran", [False, True])
@pytest.mark.parametrize("name", EXCHANGES)
def test_a_head_that_was_exchanged_since_runs_on_labelled_rows(name, ran):
    whole = EXCHANGES[name](llama(tie_word_embeddings=False))
    expected, _ = labelled(whole, td.apply(whole, METHODS))
    module = llama(tie_word_embeddings=False)
    drop = td.apply(module, METHODS, multiple=4, labelled_logits=True)
    if ran:
        labelled(module, drop)
    module = EXCHANGES[name](module)
    loss, shape = labelled(module, drop)
    torch.testing.assert_close(loss, expected)
    count = int((MADE.labels[:, 1:] != -100).sum())
    assert shape[0] == 1
    assert count <= shape[1] < count + 4
    drop.remove()
    assert all("_tokendrop_base" not in vars(type(one)) for one in module.modules())


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
@pytest.mark.parametrize("more", [{}, {"task_type": "CAUSAL_LM"}, {"modules_to_save": ["lm_head"]}])
def test_a_model_within_peft(more):
    """PEFT's wrapper has every attribute of the model that makes the loss."""
    runs = []
    for kept in (False, True):
        module = adapted(llama(tie_word_embeddings=False), target_modules=["k_proj"], **more)
        drop = td.apply(module, METHODS, multiple=4, labelled_logits=kept)
        runs.append(labelled(module, drop))
        drop.remove()
        assert all("_loss_function" not in vars(one) or one._loss_function is None for one in module.modules())
    (expected, _), (loss, shape) = runs
    torch.testing.assert_close(loss, expected)
    assert shape[0] == 1
