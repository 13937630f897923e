"""Bad input is refused with what was found, before anything changes."""

import copy
import re
import warnings

import pytest
import torch
from helpers import MIXED, batch, checkpointed, dropped, llama, same, snapshot, step
from torch import nn

import tokendrop as td
from tokendrop import errors

BASE = llama()
MADE = batch(["tiitt", "ttiitt"], "uu")
BUILTINS = {
    "MissingLayoutError": RuntimeError,
    "LayoutError": ValueError,
    "LayoutTypeError": TypeError,
    "NeededRowError": ValueError,
    "LayerRangeError": ValueError,
    "MethodError": ValueError,
    "DecoderError": LookupError,
    "AppliedError": RuntimeError,
    "UnsupportedError": NotImplementedError,
    "BatchError": KeyError,
    "TaskLossError": ValueError,
}


def test_every_error_is_ours_and_a_builtin():
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and name.endswith("Error")}
    assert found == {*BUILTINS, "TokenDropError"}
    for name, builtin in BUILTINS.items():
        assert issubclass(getattr(td, name), (td.TokenDropError, builtin))
        assert issubclass(getattr(td, name), builtin)
    assert issubclass(td.NoEffectWarning, UserWarning)
    assert issubclass(td.LayoutWarning, UserWarning)
    assert issubclass(td.MethodChangedWarning, UserWarning)
    assert str(td.BatchError("a sentence")) == "a sentence"


class TwoDecoders(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = copy.deepcopy(BASE), copy.deepcopy(BASE)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.tokendrop = copy.deepcopy(BASE), 3


def backend(name):
    model = copy.deepcopy(BASE)
    model.config._attn_implementation = name
    return model


def wide():
    model = copy.deepcopy(BASE)
    for layer in model.model.layers:
        layer.self_attn.k_proj = nn.Identity()
    return model


APPLY = {
    "no decoder": (lambda: nn.Linear(2, 2), td.HiMix(), {}, td.DecoderError, "Linear has no list of layers"),
    "two": (TwoDecoders, td.HiMix(), {}, td.DecoderError, "2 decoders, 'a.model.layers' and 'b.model.layers'"),
    "path": (None, td.HiMix(), {"layers": "model.blocks"}, td.DecoderError, "layers='model.blocks'"),
    "no list": (None, td.HiMix(), {"layers": "lm_head"}, td.DecoderError, "found Linear"),
    "outside": (None, td.HiMix("2:24"), {}, td.LayerRangeError, "reaches layer 24, but the decoder has 4"),
    "empty": (None, td.HMGen("3:3"), {}, td.LayerRangeError, "'3:3' names none of the decoder's 4 layers"),
    "twice": (None, td.HMGen([1, -3]), {}, td.LayerRangeError, "names a layer twice"),
    "no method": (None, None, {}, td.MethodError, "found None"),
    "text": (None, "HiMix", {}, td.MethodError, "found 'HiMix'"),
    "no methods": (None, {}, {}, td.MethodError, "found {}"),
    "not a method": (None, {"u": "HiMix"}, {}, td.MethodError, "methods['u']: expected a method"),
    "number": (None, {3: td.HiMix()}, {}, td.MethodError, "found 3"),
    "no name": (None, {"": td.HiMix()}, {}, td.MethodError, "found ''"),
    "dot": (None, {"a.b": td.HiMix()}, {}, td.MethodError, "found 'a.b'"),
    "class": (None, td.HiMix, {}, td.MethodError, "HiMix"),
    "class of a task": (None, {"u": td.HMGen}, {}, td.MethodError, "HMGen"),
    "per-task": (None, td.HiMix(separate="per-task"), {}, td.MethodError, "separate='per-task' and no task"),
    "zero": (None, td.HiMix(), {"multiple": 0}, td.MethodError, "multiple=0"),
    "negative": (None, td.HiMix(), {"multiple": -4}, td.MethodError, "multiple=-4"),
    "float": (None, td.HiMix(), {"multiple": 1.5}, td.MethodError, "multiple=1.5"),
    "attention": (lambda: backend("of_their_own"), td.HiMix(), {}, td.UnsupportedError, "'of_their_own' attention"),
    "attribute": (Named, td.HiMix(), {}, td.AppliedError, "attribute 'tokendrop'"),
    "no k of its own": (wide, td.HMGen("1:3", "shared"), {}, td.UnsupportedError, "image-only projections"),
    "a list": (lambda: copy.deepcopy(BASE).model.layers, td.HiMix(), {}, td.TokenDropError, "ModuleList"),
}


@pytest.mark.parametrize("case", APPLY)
def test_apply_refuses_and_changes_nothing(case):
    make, methods, kwargs, error, message = APPLY[case]
    model = make() if make else copy.deepcopy(BASE)
    before, keys = snapshot(model), list(model.state_dict())
    with pytest.raises(error) as caught:
        td.apply(model, methods, **kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert snapshot(model) == before
    assert list(model.state_dict()) == keys


def test_unusual_backends_may_bypass_and_score():
    td.apply(backend("of_their_own"), td.HMGen("1:3")).remove()
    td.apply(backend("of_their_own"), td.FastV(2)).remove()


@pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention"])
def test_no_method_is_refused_for_a_known_attention(name):
    for method in (td.HiMix(), td.FastV(2), td.Drop("1:", 0.5, "attention", "context"), td.PyramidDrop((1,), (0.5,))):
        td.apply(backend(name), method).remove()


def test_refused_methods_leave_the_others_unapplied():
    model = copy.deepcopy(BASE)
    before = snapshot(model)
    with pytest.raises(td.LayerRangeError):
        td.apply(model, {"u": td.HiMix(separate="shared"), "g": td.HMGen("9:")})
    assert snapshot(model) == before


@pytest.mark.parametrize("second", ["model", "part", "whole"])
def test_applied_twice(second):
    model, drop = dropped(BASE, {"u": td.HiMix(separate="shared")})
    target = {"model": model, "part": model.model, "whole": nn.ModuleDict({"net": model})}[second]
    before = snapshot(target)
    with pytest.raises(td.AppliedError, match="dropped already"):
        td.apply(target, td.HMGen("1:3"))
    assert snapshot(target) == before
    drop.remove()
    td.apply(target, td.HMGen("1:3"))


def test_no_handle():
    with pytest.raises(td.AppliedError, match="LlamaForCausalLM is not dropped"):
        td.handle(BASE)


def test_no_layout():
    model, _ = dropped(BASE, td.HiMix())
    with pytest.raises(td.MissingLayoutError, match=r"LlamaDecoderLayer 0 .*drop\.layout.*drop\.disabled"):
        model(MADE.ids)


LAYOUTS = {
    "text": (lambda: "layout", td.LayoutTypeError, "found str"),
    "tensor": (lambda: MADE.image, td.LayoutTypeError, "found Tensor"),
    "no task": (lambda: MADE.layout(task=None), td.LayoutError, "the methods are for 'u', 'g'"),
    "a missing task": (lambda: MADE.layout(task=["u"]), td.LayoutError, "1 names for 2 samples"),
    "needed": (lambda: MADE.layout(labels=MADE.ids), td.NeededRowError, "sample 0 (task 'u') trains 2 image rows"),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_layouts_that_are_refused(case):
    make, error, message = LAYOUTS[case]
    model, drop = dropped(BASE, {"u": td.HiMix(), "g": td.HMGen("1:3")})
    before = snapshot(model)
    with pytest.raises(error) as caught, drop.layout(make()):
        pass
    assert message in str(caught.value)
    assert snapshot(model) == before
    with pytest.raises(td.MissingLayoutError):
        model(MADE.ids)


@pytest.mark.parametrize("image", [MADE.image, torch.zeros_like(MADE.image)], ids=["images", "text"])
@pytest.mark.parametrize("ids", [MADE.ids[:1], MADE.ids[:, :-1], torch.cat([MADE.ids, MADE.ids])])
def test_layout_and_hidden_states_of_different_shapes(ids, image):
    model, drop = dropped(BASE, td.HiMix())
    shape = rf"\({len(ids)}, {ids.shape[1]}, 32\).*\(2, 6\)"
    with drop.layout(td.TokenLayout(image)), pytest.raises(td.LayoutError, match=shape):
        model(ids, use_cache=False)


@pytest.mark.parametrize("methods", [td.HiMix(), td.HMGen("1:3", separate="shared")])
def test_reentrant_checkpointing(methods):
    model, drop = dropped(BASE, methods)
    checkpointed(model, reentrant=True)
    with drop.layout(MADE.layout()), pytest.raises(td.UnsupportedError, match=r"re-entrant.*'use_reentrant': False"):
        step(model, MADE)
    with drop.layout(MADE.layout()):
        step(checkpointed(model), MADE)


def test_reentrant_checkpointing_may_bypass():
    base, made = copy.deepcopy(BASE), batch(MIXED[0], "ggggg")
    model, drop = dropped(base, td.HMGen("1:3"))
    with drop.layout(made.layout()):
        expected = step(model, made)
        assert same(step(checkpointed(model, reentrant=True), made), expected)


def test_unknown_task_warns_once_and_runs_dense():
    model, drop = dropped(BASE, {"u": td.HiMix(), "g": td.HMGen("1:3"), "quiet": None})
    message, layout = r"no method for task 'understanding'.*'u', 'g', 'quiet'", MADE.layout(task="understanding")
    with pytest.warns(td.NoEffectWarning, match=message) as caught, drop.layout(layout):
        assert same(step(model, MADE), step(BASE, MADE))
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in ("understanding", "quiet", ["understanding", "u"]):
            with drop.layout(MADE.layout(task=task)):
                pass


def test_the_warning_points_at_the_callers_line():
    _, drop = dropped(BASE, {"u": td.HiMix(), "g": td.HMGen("1:3")})
    with pytest.warns(td.NoEffectWarning) as caught, drop.layout(MADE.layout(task="understanding")):
        pass
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (td.HiMix(), "whether image rows are trained that end CONTEXT or GONE, with a stale state"),
        (td.FastV(1), "end CONTEXT or GONE, .*; nor where answers begin, so that the attention of the last row"),
        (td.Drop("1:3", 0.5, "attention"), "nobody knows where answers begin"),
        (td.HMGen("1:3"), None),
        (td.Drop("1:3", 0.5, "norm"), None),
    ],
)
def test_training_without_labels_is_said_once(method, said):
    model, drop = dropped(BASE, method)
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with drop.layout(MADE.layout()), drop.layout(batch(["ttt"], "u").layout(labels=None)):
            pass
        with torch.no_grad(), drop.layout(MADE.layout(labels=None)):
            pass
        model.eval()
        with drop.layout(MADE.layout(labels=None)):
            pass
    model.train()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with drop.layout(MADE.layout(labels=None)):
                pass
    assert [one.category for one in caught] == [td.LayoutWarning] * (said is not None)
    if said is not None:
        assert caught[0].filename == __file__
        assert re.search(rf"{said}.*labels=, \(B, T\)", str(caught[0].message))


def test_text_only_data_is_silent():
    _, drop = dropped(BASE, {"u": td.HiMix(), "g": td.HMGen("1:3")})
    with drop.layout(batch(["ttt"], "u").layout()) as plan:
        assert plan.dense


@pytest.mark.parametrize("first", [1, 3])
def test_a_layer_out_of_order(first):
    model, drop = dropped(BASE, td.HiMix())
    x = torch.zeros(2, 6, 32)
    with drop.layout(MADE.layout()):
        with pytest.raises(td.UnsupportedError, match=f"LlamaDecoderLayer {first} was called where layer 0 was due"):
            model.model.layers[first](x)
        model(MADE.ids, use_cache=False)


def test_a_layer_left_out():
    model, drop = dropped(BASE, td.HiMix())
    del model.model.layers[2]
    with drop.layout(MADE.layout()), pytest.raises(td.UnsupportedError, match="layer 2 was due"):
        model(MADE.ids, use_cache=False)


def test_a_cache_with_tokens():
    model, drop = dropped(BASE, td.HiMix())
    with drop.disabled(), torch.no_grad():
        cache = model(MADE.ids, use_cache=True).past_key_values
    with drop.layout(MADE.layout()), pytest.raises(td.UnsupportedError, match="a cache with 6 tokens"):
        model(MADE.ids, past_key_values=cache, use_cache=True)


def test_a_mask_that_is_no_tensor():
    model, drop = dropped(BASE, td.HMGen("1:3"))
    x, layer = torch.zeros(2, 6, 32), model.model.layers
    rotary = model.model.rotary_emb(x, torch.arange(6)[None])
    with drop.layout(MADE.layout()):
        layer[0](x, attention_mask=None, position_embeddings=rotary)
        with pytest.raises(td.UnsupportedError, match="mask of type dict"):
            layer[1](x, attention_mask={}, position_embeddings=rotary)


def test_a_model_whose_children_all_run():
    """A Sequential calls every child, so the handle must not become one, or the model must be refused."""

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = copy.deepcopy(BASE)

        def forward(self, ids):
            return self.net(ids, use_cache=False).logits

    model = nn.Sequential(Logits())
    try:
        drop = td.apply(model, td.HiMix())
    except td.TokenDropError:
        return
    with drop.disabled():
        assert model(MADE.ids).shape == (2, 6, 50)
