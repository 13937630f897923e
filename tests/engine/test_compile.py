"""torch.compile: one graph for each rounded count, none for a new selection or a moved image."""

import pytest
import torch
from helpers import llama
from torch._dynamo.testing import CompileCounterWithBackend

import tokendrop as td

TOKENS = 32


@pytest.mark.parametrize(
    "method", [td.HiMix(), td.HMGen("0:1"), td.Drop("0:1", keep=0.5)], ids=lambda m: type(m).__name__
)
def test_one_graph_for_each_rounded_count(method):
    torch._dynamo.reset()
    model = llama(layers=2)
    drop = td.apply(model, method, multiple=8)
    graphs = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    seen = []
    for start, stop in [(2, 18), (9, 25), (3, 7)]:
        ids, image = torch.randint(1, 50, (2, TOKENS)), torch.zeros(2, TOKENS, dtype=torch.bool)
        image[:, start:stop] = True
        labels = ids.masked_fill(image.roll(1, 1) | image, -100)
        with drop.layout(td.TokenLayout(image, labels=labels), step=(len(seen), 0)):
            out = compiled(input_ids=ids, labels=labels, use_cache=False)
            plain = model(input_ids=ids, labels=labels, use_cache=False)
        torch.testing.assert_close(out.logits, plain.logits)
        torch.testing.assert_close(out.loss, plain.loss)
        seen.append(graphs.frame_count)
    assert seen == [1, 1, 2]
