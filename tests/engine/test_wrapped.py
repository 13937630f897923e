"""Models inside torch.compile's and DDP's wrappers, and in threads of their own."""

import copy
import queue
import threading

import pytest
import torch
from helpers import batch, llama, loss_of
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import tokendrop as td

# Dynamo asks every tensor for its gradient, and torch warns of that.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
BASE = llama(layers=2)
MADE = batch(["tiiittt", "ttiiitt", "ttttt"], "ggg")
METHOD = td.HMGen("1:", separate="shared")


def logits(run, drop):
    with drop.layout(MADE.layout()):
        return run(MADE.ids, attention_mask=MADE.mask, use_cache=False).logits


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_a_compiled_model_is_dropped_as_the_model_inside():
    plain, model = copy.deepcopy(BASE), copy.deepcopy(BASE)
    dense, expected = plain(MADE.ids, use_cache=False).logits, logits(plain, td.apply(plain, METHOD))
    compiled = torch.compile(model, backend="eager")
    compiled(MADE.ids, use_cache=False)
    drop = td.apply(compiled, METHOD)
    assert drop.owner is model
    assert drop is td.handle(compiled) is td.handle(model) is compiled.tokendrop
    assert not set(map(id, drop.parameters())) - set(map(id, compiled.parameters()))
    found = logits(compiled, drop)
    torch.testing.assert_close(found, expected)
    for one in (found, expected):
        loss_of(one, MADE.labels).backward()
    for name, value in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name).grad, value.grad, msg=name)
    with pytest.raises(td.AppliedError, match="dropped already"):
        td.apply(compiled, METHOD)
    drop.remove()
    torch.testing.assert_close(model(MADE.ids, use_cache=False).logits, dense)
    assert type(model.model.layers[0]) is type(BASE.model.layers[0])


def test_layers_compiled_one_by_one():
    model = copy.deepcopy(BASE)
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    with pytest.raises(td.UnsupportedError, match=r"'model\.layers' are compiled one by one.*layer\.compile\(\)"):
        td.apply(model, METHOD)
    plain, model = copy.deepcopy(BASE), copy.deepcopy(BASE)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    method = td.HMGen("1:")
    expected = logits(plain, td.apply(plain, method))
    torch.testing.assert_close(logits(model, td.apply(model, method)), expected)


class Parallel(DistributedDataParallel):
    """DDP's class around a module, without a process group."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


class Holder(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner


@pytest.mark.parametrize("around", [Parallel, lambda model: Holder(Parallel(model))], ids=["ddp", "a holder of it"])
@pytest.mark.parametrize("method", [td.HiMix(separate="shared"), td.MixtureOfDepths(layers="1::2", keep=0.5)])
def test_parameters_that_ddp_would_not_average_are_refused(around, method):
    model = around(copy.deepcopy(BASE))
    with pytest.raises(td.UnsupportedError, match="DistributedDataParallel would not average"):
        td.apply(model, method)
    assert not hasattr(model, "tokendrop")


def test_a_method_that_adds_nothing_may_go_onto_ddp():
    plain, model = copy.deepcopy(BASE), Parallel(copy.deepcopy(BASE))
    expected = logits(plain, td.apply(plain, td.HMGen("1:")))
    assert torch.equal(logits(model, td.apply(model, td.HMGen("1:"))), expected)


def in_thread(function):
    """What a function returns, or raises, in a thread of its own."""
    found = queue.Queue()

    def run():
        try:
            found.put(function())
        except Exception as error:
            found.put(error)

    thread = threading.Thread(target=run, name="streamer")
    thread.start()
    thread.join()
    return found.get()


def generate(model):
    return model.generate(MADE.ids[:1, :6], max_new_tokens=3, do_sample=False, pad_token_id=0)


def test_a_thread_without_a_layout_is_told_whose_layouts_count():
    model = copy.deepcopy(BASE)
    drop = td.apply(model, td.HiMix())
    layout = td.TokenLayout(MADE.image[:1, :6])
    with drop.layout(layout):
        found = in_thread(lambda: generate(model))
        expected = generate(model)
    assert isinstance(found, td.MissingLayoutError)
    assert "This is thread 'streamer'" in str(found)
    assert "enter it inside the function that the thread runs" in str(found)

    def entered():
        with drop.layout(layout):
            return generate(model)

    assert torch.equal(in_thread(entered), expected)
    with pytest.raises(td.MissingLayoutError) as caught:
        generate(model)
    assert "thread" not in str(caught.value)
