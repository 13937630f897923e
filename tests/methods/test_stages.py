"""FastV, PyramidDrop, HiDrop and DuetVLM say what their sources say, layer by layer."""

import itertools

import pytest
import torch
from helpers import batch, llama

import tokendrop as td
from tokendrop.engine.forward.state import frames
from tokendrop.roles import Queries, Role, Select

IMAGES, LAYERS = 576, 32


def counts(method, images=IMAGES, layers=LAYERS, strength=1.0):
    """Image tokens that compute in each layer."""
    found = []
    for layer in method.route(layers, strength):
        none = 0 if layer.image is not Role.ACTIVE else images
        found.append(none if layer.select is None else layer.select.count(images))
    return found


def average(method, images=IMAGES):
    return sum(counts(method, images)) / LAYERS


def hidrop(layers, first):
    return td.HiDrop(8, layers, (first, 10, 5, 1), 24)


def test_the_published_schedules_keep_what_they_publish():
    assert average(td.PyramidDrop()) == 270
    assert average(td.HiDrop()) == 64
    assert average(hidrop((10, 14, 16, 18), 87)) == 48
    assert round(average(hidrop((10, 13, 16, 19), 453)), 2) == 80.03
    assert average(td.DuetVLM(), 307) == 191.75
    assert average(td.DuetVLM(dominant=300)) == 191.75
    assert average(td.VScan()) == 64
    assert counts(td.FastV(2, 0.5)) == [576] * 2 + [288] * 30


def test_each_layer_of_hidrop():
    assert counts(td.HiDrop()) == [0] * 8 + [576] * 2 + [215] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8
    roles = [layer.image for layer in td.HiDrop().route(LAYERS)]
    assert roles == [Role.BYPASS] * 8 + [Role.ACTIVE] * 2 + [Role.GONE] * 22


def test_shares_are_of_the_original_count_and_rounded_down():
    assert [counts(td.PyramidDrop(), images)[n] for images in (577, 7) for n in (8, 16, 24)] == [288, 144, 72, 3, 1, 1]
    assert counts(td.PyramidDrop((1, 2), (0.3, 0.1)), 10, 3) == [10, 3, 1]


def test_whose_attention_scores():
    queries = {
        kind: [layer.select.queries for layer in kind().route(LAYERS) if layer.select is not None]
        for kind in (td.FastV, td.PyramidDrop, td.HiDrop, td.DuetVLM)
    }
    assert {(one.rows, one.layer) for one in queries[td.FastV]} == {("answer", 1)}
    assert {(one.rows, one.layer) for one in queries[td.PyramidDrop]} == {("answer", n) for n in (8, 16, 24)}
    assert {(one.rows, one.layer) for one in queries[td.HiDrop]} == {("answer", n) for n in (10, 14, 16, 18)}
    assert {(one.rows, one.layer) for one in queries[td.DuetVLM]} == {("prompt", 16)}


def test_each_layer_of_the_methods_that_begin_before_layer_0():
    assert counts(td.VScan()) == [96] * 16 + [32] * 16
    assert counts(td.DuetVLM(dominant=300)) == [307] * 16 + [153] * 8 + [0] * 8
    assert counts(td.SVDPrune()) == [32] * 32
    assert counts(td.SVDPrune(1 / 3)) == [192] * 32
    # Of Qwen2.5-VL: 11.1 % on average, shares of what is left.
    qwen = td.VScan(0.167, (14,), (0.333,), 7, -1, 4)
    assert sum(counts(qwen, 10000, 28)) / 28 == pytest.approx(1113, abs=1)
    assert counts(td.VScan(), 7) == [7] * 32
    roles = {layer.image for method in (td.VScan(), td.SVDPrune()) for layer in method.route(LAYERS)}
    assert roles == {Role.GONE}


@pytest.mark.parametrize(
    "method",
    [
        td.FastV(),
        td.PyramidDrop(),
        td.HiDrop(),
        td.DuetVLM(),
        td.DuetVLM(dominant=300),
        td.VScan(),
        td.SVDPrune(),
    ],
    ids=str,
)
def test_a_schedule_goes_from_all_to_the_method(method):
    seen = [counts(method, strength=strength) for strength in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert seen[0] == [IMAGES] * LAYERS
    assert seen[-1] == counts(method)
    for more, less in itertools.pairwise(seen):
        assert all(a >= b for a, b in zip(more, less, strict=True))


METHODS = {
    "fastv": td.FastV(2, 0.5),
    "pyramid_drop": td.PyramidDrop((1, 2, 3), (0.8, 0.5, 0.3)),
    "hidrop": td.HiDrop(1, (1, 2), (0.6, 2), 3),
    "duet_vlm": td.DuetVLM((1, 3), (0.5, 0)),
    "svd_prune": td.SVDPrune(0.4),
    "svd_prune_count": td.SVDPrune(3, rank=2),
}
SAMPLES = ["ttiiiiiiittt", "tiiittiiiitt", "tttitttttttt", "tttttttttttt"]


@pytest.mark.parametrize("method", METHODS)
def test_realised_counts_equal_the_request(method):
    made, module = batch(SAMPLES, "uuuu"), llama()
    drop = td.apply(module, METHODS[method], multiple=1)
    with drop.layout(made.layout()):
        module(made.ids, labels=made.labels, use_cache=False)
    wanted = [counts(METHODS[method], int(row.sum()), 4) for row in made.image]
    seen = []
    with drop.layout(td.TokenLayout(made.image, made.tasks)), torch.no_grad():
        cache = module(made.ids, use_cache=True).past_key_values
    for index, layer in enumerate(cache.layers):
        whole = [layer.keys.shape[2]] * len(SAMPLES)
        found = layer.valid.sum(1).tolist() if hasattr(layer, "valid") else whole
        text = (~made.image).sum(1).tolist()
        seen.append([a - b for a, b in zip(found, text, strict=True)])
        assert seen[-1] == [one[index] for one in wanted]


def test_hidrops_image_tokens_enter_as_they_were_embedded():
    made, module = batch(["ttiiiittt"], "u"), llama()
    drop = td.apply(module, td.HiDrop(2, (2,), (1.0,), 3))
    entered = []
    module.model.layers[2].register_forward_pre_hook(lambda _, args: entered.append(args[0]))
    with drop.layout(made.layout()), torch.no_grad():
        module(made.ids, use_cache=False)
        embedded = module.model.embed_tokens(made.ids)
    # All 9 rows compute in layer 2.
    assert torch.equal(entered[0][made.image], embedded[made.image])


@pytest.mark.parametrize("method", METHODS)
def test_labelled_images_are_refused(method):
    made, module = batch(SAMPLES, "gggg"), llama()
    drop = td.apply(module, METHODS[method])
    with pytest.raises(td.NeededRowError, match="use HMGen"), drop.layout(made.layout()):
        pass


def test_drop_takes_a_function():
    made, module = batch(["ttiiiittt", "tiiittitt"], "uu"), llama()
    drop = td.apply(module, td.Drop("1:", 2, lambda scoring: -torch.arange(9.0).expand(2, -1), "gone"), multiple=1)
    with drop.layout(td.TokenLayout(made.image)), torch.no_grad():
        cache = module(made.ids, use_cache=True).past_key_values
    kept = [
        sorted(set(row) - {t for t in range(9) if not image[t]})
        for row, image in zip(cache.layers[1].positions.tolist(), made.image.tolist(), strict=True)
    ]
    assert kept == [[2, 3], [1, 2]]


@pytest.mark.parametrize(("score", "found"), [(lambda s: s.states, r"\(1, 9, 32\)"), (lambda s: 3, "int")])
def test_a_function_that_scores_no_tokens(score, found):
    made, module = batch(["ttiiiittt"], "u"), llama()
    drop = td.apply(module, td.Drop("1:", 2, score))
    message = rf"a score returned {found}; expected one number for each token, \(1, 9\)"
    with drop.layout(made.layout()), pytest.raises(td.MethodError, match=message):
        module(made.ids, use_cache=False)


REFUSED = {
    "far": (
        lambda: Select(1, torch.relu, 3, queries=Queries("answer", 1)),
        td.MethodError,
        "a selection at layer 3 looks at the attention of layer 1; it can look at that layer, or at the one before",
    ),
    "layer": (lambda: td.FastV(-1), td.LayerRangeError, "layer=(-1,): expected layer indices"),
    "layer 0": (lambda: td.FastV(0), td.MethodError, "layer=0: FastV scores with the attention of the layer before"),
    "share": (lambda: td.FastV(2, 1.5), td.MethodError, "keep=1.5: expected a share"),
    "outside": (lambda: td.FastV(9).route(4), td.LayerRangeError, "a stage at layer 9, but the decoder has 4 layers"),
    "no stages": (lambda: td.PyramidDrop((), ()), td.MethodError, "layers=(): expected a list"),
    "one layer": (lambda: td.PyramidDrop(8, 0.5), td.MethodError, "layers=8: expected a list"),
    "order": (lambda: td.PyramidDrop((8, 4), (1, 1)), td.LayerRangeError, "layers=(8, 4): expected layer indices"),
    "twice": (lambda: td.DuetVLM((8, 8)), td.LayerRangeError, "text_layers=(8, 8)"),
    "number": (lambda: td.DuetVLM((8,)), td.MethodError, "text_keep=(0.5, 0): expected one value for each of text_lay"),
    "stage share": (lambda: td.PyramidDrop((1,), (2.0,)), td.MethodError, "keep=2.0: expected a share"),
    "entry": (lambda: td.HiDrop(11), td.LayerRangeError, "entry=11, layers=(10, 14, 16, 18), exit=24: expected"),
    "exit": (lambda: td.HiDrop(exit=18), td.LayerRangeError, "exit=18: expected"),
    "bool": (lambda: td.HiDrop(True), td.LayerRangeError, "entry=True"),
    "short": (lambda: td.HiDrop().route(20), td.LayerRangeError, "a stage at layer 24, but the decoder has 20 layers"),
    "vision keep": (lambda: td.VScan(1.5), td.MethodError, "keep=1.5: expected a share"),
    "window": (lambda: td.VScan(window=0), td.MethodError, "window=0: expected 1 or more"),
    "first": (lambda: td.VScan(4, (0,), (1,)), td.LayerRangeError, "text_layers=(0,): tokens leave before layer 0"),
    "vision first": (lambda: td.DuetVLM((0,), (1,), 4), td.LayerRangeError, "begin at 1 or later"),
    "kinds": (lambda: td.DuetVLM(dominant=0.5), td.MethodError, "dominant=0.5, contextual=7: expected two counts or"),
    "sum": (lambda: td.DuetVLM(dominant=0.7, contextual=0.6), td.MethodError, "keep=1.2999999999999998: expected a"),
    "width": (lambda: td.DuetVLM(cluster_width=True), td.MethodError, "cluster_width=True: expected 1 or more"),
    "rank": (lambda: td.SVDPrune(rank=0), td.MethodError, "rank=0: expected 1 or more"),
    "energy": (lambda: td.SVDPrune(energy=1.0), td.MethodError, "energy=1.0: expected a share in (0, 1) as a float"),
    "late": (lambda: td.VScan().route(16), td.LayerRangeError, "a stage at layer 16, but the decoder has 16 layers"),
    "score": (lambda: td.Drop(":", 0.5, "looks"), td.MethodError, "score='looks' is unknown; use one of 'random'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_values_are_refused(case):
    make, error, message = REFUSED[case]
    with pytest.raises(error) as caught:
        make()
    assert message in str(caught.value)


def test_tread_is_one_set_for_a_range():
    """Drop over a range: what runs in its layers is one random set, another in the next step; the rest waits."""
    made, module = batch(["ttiiiiiiiitt", "tiiiiiiiittt"], "gg"), llama(layers=5, dtype=torch.float64)
    drop, seen = td.apply(module, td.Drop("1:4", 0.5), multiple=1), []
    entered = {}
    for index, layer in enumerate(module.model.layers):
        layer.register_forward_pre_hook(lambda _, args, index=index: entered.update({index: args[0]}))
    for step in (0, 1, 0):
        with drop.layout(made.layout(), step=(step, 0)) as plan:
            embedded = module.model.embed_tokens(made.ids).detach().requires_grad_()
            module(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
            kept = [span.groups[0].active for span in frames(drop.key)[-1].ran]
        assert [one.stop - one.start for one in plan.spans] == [1, 3, 1]
        assert kept[0] is kept[4] is None
        assert kept[1] is kept[2] is kept[3]  # one choice for the range
        chosen = torch.zeros_like(made.image).scatter(1, kept[1].index, kept[1].valid) & made.image
        assert chosen.sum(1).tolist() == [4, 4]
        seen.append(chosen)
        routed = made.image & ~chosen
        # Behind the range they go on from where it began, which layer 1 was called with.
        assert [entered[n].shape[1] for n in range(5)] == [12, 8, 8, 8, 12]
        assert (embedded.grad[routed].abs().amax(-1) > 0).all()
    assert torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], seen[1])
    # By hand: the layers of the range on the chosen rows alone.
    states, rotary = module.model.embed_tokens(made.ids), module.model.rotary_emb
    drop.remove()
    for sample in range(2):
        every = torch.arange(12)
        rows = (~made.image[sample] | seen[2][sample]).nonzero().flatten()
        x = states[sample : sample + 1]
        for index, layer in enumerate(module.model.layers):
            at = rows if 1 <= index < 4 else every
            out = layer(x[:, at], position_embeddings=rotary(x, at[None]), attention_mask=None)
            x = x.index_copy(1, at, out[0] if isinstance(out, tuple) else out)
        logits = module.lm_head(module.model.norm(x))
        with td.apply(module, td.Drop("1:4", 0.5), multiple=1).layout(made.layout(), step=(0, 0)), torch.no_grad():
            engine = module(made.ids, use_cache=False).logits
        td.handle(module).remove()
        torch.testing.assert_close(engine[sample], logits[0], rtol=1e-9, atol=1e-9)
