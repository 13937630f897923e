"""Apply and remove: what is swapped, what comes back, copies, checkpoints, threads, gradients."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from helpers import MIXED, batch, checkpointed, close, dropped, engine_step, llama, same, snapshot, step
from torch import nn

import tokendrop as td
from tokendrop.engine.forward.state import frames
from tokendrop.errors import MissingLayoutError

METHODS = {"u": td.HiMix("1:", "per-task"), "g": td.HMGen("1:3", "per-task"), "d": None}
SEPARATES = ["none", "shared", "per-task"]
BASE = llama()
MADE = batch(*MIXED, side="left")


def methods_with(separate):
    return {"u": td.HiMix("1:", separate), "g": td.HMGen("1:3", separate), "d": None}


@pytest.mark.parametrize("separate", SEPARATES)
def test_remove_gives_back_the_very_same(separate):
    model = copy.deepcopy(BASE)
    before, state = snapshot(model), model.state_dict()
    drop = td.apply(model, methods_with(separate))
    engine_step(model, drop, MADE)
    drop.remove()
    assert snapshot(model) == before
    assert list(model.state_dict()) == list(state)
    assert same(step(model, MADE), step(BASE, MADE))
    td.apply(model, td.HiMix()).remove()  # and it can be dropped again
    assert snapshot(model) == before


@pytest.mark.parametrize("separate", SEPARATES)
def test_apply_changes_no_name(separate):
    model = copy.deepcopy(BASE)
    drop = td.apply(model, methods_with(separate))
    layer, original = model.model.layers[0], BASE.model.layers[0]
    assert isinstance(layer, type(original))
    assert isinstance(layer.self_attn.k_proj, nn.Linear)
    for ours, theirs in ((layer, original), (layer.self_attn.k_proj, original.self_attn.k_proj)):
        assert type(ours).__name__ == type(theirs).__name__
        assert type(ours).__qualname__ == type(theirs).__qualname__
        assert type(ours).__module__ == type(theirs).__module__
    added = [key for key in model.state_dict() if key not in BASE.state_dict()]
    assert [key for key in model.state_dict() if key not in added] == list(BASE.state_dict())
    assert all(key.startswith("tokendrop.layers.") for key in added)
    assert bool(added) == (separate != "none")
    assert model.tokendrop is drop


def test_wrong_remove_is_refused():
    model, drop = dropped(BASE, METHODS)
    drop.remove()
    before = snapshot(model)
    with pytest.raises(td.AppliedError, match="removed"):
        drop.remove()
    assert snapshot(model) == before


def test_deepcopy_obeys_the_original_and_has_its_own_weights():
    model, drop = dropped(BASE, METHODS)
    expected, twin = engine_step(model, drop, MADE), copy.deepcopy(model)
    assert same(engine_step(twin, drop, MADE), expected)
    theirs = td.handle(twin)
    assert theirs is twin.tokendrop
    assert theirs is not drop
    assert theirs.owner is twin
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
    assert same(engine_step(model, drop, MADE), expected)
    with pytest.raises(MissingLayoutError):
        twin(MADE.ids)
    theirs.remove()
    assert same(engine_step(model, drop, MADE), expected)
    assert not any("tokendrop" in key for key in twin.state_dict())


def test_deepcopy_of_a_part_of_a_wrapper():
    outer = nn.ModuleDict({"student": dropped(BASE, METHODS)[0]})
    outer["teacher"] = copy.deepcopy(outer["student"])
    drop = td.handle(outer["student"])
    assert same(engine_step(outer["teacher"], drop, MADE), engine_step(outer["student"], drop, MADE))


def test_copied_and_pickled_inside_a_layout_without_labels():
    """Its hooks, which see the ids, go with the modules that they hang on, and see nothing there."""
    model, drop = dropped(BASE, td.HMGen("1:3"))
    layout = td.TokenLayout(MADE.image)
    with drop.layout(layout), torch.no_grad():
        others = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # noqa: S301
        expected = model(MADE.ids, attention_mask=MADE.mask).logits
    for other in others:
        with td.handle(other).layout(layout), torch.no_grad():
            assert torch.equal(other(MADE.ids, attention_mask=MADE.mask).logits, expected)


@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_pickle_round_trip(how):
    model, drop = dropped(BASE, METHODS)
    file = io.BytesIO()
    (pickle.dump if how == "pickle" else lambda m, f: torch.save(m, f))(model, file)
    file.seek(0)
    twin = pickle.load(file) if how == "pickle" else torch.load(file, weights_only=False)  # noqa: S301
    assert type(twin.model.layers[0]) is type(model.model.layers[0])
    assert same(engine_step(twin, td.handle(twin), MADE), engine_step(model, drop, MADE))
    td.handle(twin).remove()
    assert same(step(twin, MADE), step(BASE, MADE))


def test_state_dict_round_trip():
    model, drop = dropped(BASE, METHODS)
    other, other_drop = dropped(llama(seed=3), METHODS)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert same(engine_step(other, other_drop, MADE), engine_step(model, drop, MADE))


def around(model):
    return nn.ModuleDict({"net": model})


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("config", [{}, {"attention_bias": True}])
@pytest.mark.parametrize("separate", SEPARATES)
def test_dense_checkpoint_loads_strictly(separate, config, copied, wrapped):
    dense = llama(seed=5, **config)
    model, _ = dropped(llama(**config), methods_with(separate))
    model = copy.deepcopy(model) if copied else model
    state = (around(dense) if wrapped else dense).state_dict()
    kept = dict(state)
    (around(model) if wrapped else model).load_state_dict(state)
    assert state == kept, "the checkpoint itself was changed"
    drop = td.handle(model)
    for name, p in drop.layers.named_parameters():
        index, _, letter, kind = name.split(".")
        text = f"model.layers.{index}.self_attn.{letter}_proj.{kind}"
        assert torch.equal(p, dense.state_dict()[text]), name
    back = drop.dense_state_dict()
    assert list(back) == list(dense.state_dict())
    assert all(torch.equal(back[key], value) for key, value in dense.state_dict().items())
    llama(**config).load_state_dict(back)


def test_partial_checkpoint_is_an_error():
    model, _ = dropped(BASE, METHODS)
    state = model.state_dict()
    del state["tokendrop.layers.1.image-u.k.weight"]
    with pytest.raises(RuntimeError, match=r"tokendrop.layers.1.image-u.k.weight"):
        model.load_state_dict(state)


@pytest.mark.parametrize("separate", ["shared", "per-task"])
def test_step_zero_equals_the_unseparated_model(separate):
    plain, split = copy.deepcopy(BASE), copy.deepcopy(BASE)
    ours = engine_step(split, td.apply(split, methods_with(separate)), MADE)
    theirs = engine_step(plain, td.apply(plain, methods_with("none")), MADE)
    assert torch.allclose(ours[0][MADE.real], theirs[0][MADE.real], rtol=1e-5, atol=1e-5)
    assert not close(ours, theirs, MADE.real, 1e-5), "image-only projections take no gradient from the text's"


def test_layouts_nest_and_leave_nothing_behind():
    model, drop = dropped(BASE, METHODS)
    other = batch(["tiit", "iitt"], "ug")
    alone, inner = engine_step(model, drop, MADE), engine_step(model, drop, other)
    with drop.layout(MADE.layout()):
        assert same(engine_step(model, drop, other), inner)
        assert same(step(model, MADE), alone)
        with drop.disabled():
            dense = step(model, other)
        assert same(dense, step(BASE, other))
        assert same(step(model, MADE), alone)
    with pytest.raises(MissingLayoutError):
        model(MADE.ids)


def test_an_exception_leaves_no_state():
    model, drop = dropped(BASE, METHODS)
    expected = engine_step(model, drop, MADE)
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with drop.layout(MADE.layout()) as plan:
        with pytest.raises(ZeroDivisionError):
            model(MADE.ids)
        hook.remove()
        assert same(step(model, MADE), expected), "a forward after a failed one"
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), drop.layout(MADE.layout()):
        model(MADE.ids)
    hook.remove()
    with pytest.raises(MissingLayoutError):
        model(MADE.ids)
    assert same(engine_step(model, drop, MADE), expected)
    assert plan.shape == tuple(MADE.ids.shape)


def test_two_threads_with_their_own_layouts():
    model, drop = dropped(BASE, METHODS)
    layouts = [MADE.layout(task="u", labels=None), MADE.layout(task="g"), MADE.layout(task="d"), MADE.layout()]

    def run(layout):
        with torch.no_grad(), drop.layout(layout):
            return model(MADE.ids, attention_mask=MADE.mask, use_cache=False).logits

    expected, found, gate = [run(layout) for layout in layouts], {}, threading.Barrier(len(layouts))

    def work(index):
        gate.wait(30)
        found[index] = [run(layouts[index]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(layouts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(torch.equal(logits, expected[i]) for i in range(len(layouts)) for logits in found[i])
    assert not torch.equal(expected[0], expected[1])


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("separate", ["shared", "per-task"])
def test_every_added_parameter_has_a_gradient_in_every_step(separate, checkpoint):
    model, drop = dropped(BASE, methods_with(separate))
    if checkpoint:
        checkpointed(model)
    text = batch(["tttt", "ttt"], "ug")
    layouts = [made.layout(task=task) for made in (text, MADE) for task in "gd"] + [MADE.layout(), text.layout()]
    for layout in layouts:
        made = text if layout.image.shape == text.image.shape else MADE
        _, grads = engine_step(model, drop, made, layout)
        assert [name for name, grad in grads.items() if grad is None] == []
    with drop.disabled():
        assert [name for name, grad in step(model, MADE)[1].items() if grad is None] == []


def test_frozen_decoder_still_trains_the_added_parameters():
    model = copy.deepcopy(BASE).requires_grad_(False)
    drop = td.apply(model, METHODS)
    grads = engine_step(model, drop, MADE)[1]
    assert all((grad is not None) == name.startswith("tokendrop.") for name, grad in grads.items())


def test_a_finished_forward_holds_no_tensor():
    model, drop = dropped(BASE, METHODS)
    with drop.layout(MADE.layout()):
        (frame,) = frames(drop.key)
        step(model, MADE)
        assert frame.forward is None


def test_leaving_drops_what_a_failed_forward_held():
    model, drop = dropped(BASE, METHODS)
    held = []

    def fail(*_):
        forward = frames(drop.key)[-1].forward
        assert forward.full is not None
        held.extend(weakref.ref(x) for x in (forward.full, *forward.context) if x is not None)
        raise ZeroDivisionError

    hook = model.model.layers[2].mlp.register_forward_hook(fail)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), drop.layout(MADE.layout()):
        model(MADE.ids, attention_mask=MADE.mask)
    hook.remove()
    gc.collect()
    assert held
    assert not any(ref() is not None for ref in held)
    assert frames(drop.key) == []


def test_a_removed_model_is_freed():
    model, drop = dropped(BASE, METHODS)
    engine_step(model, drop, MADE)
    drop.remove()
    ref = weakref.ref(drop)
    del model, drop
    gc.collect()
    assert ref() is None
