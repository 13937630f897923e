"""The callback in a Trainer: where the model is made, what is trained, and that nothing is left behind."""

import lightning as L
import pytest
import torch
from device import ACCELERATOR
from lit_llama import LIGHTNING_WARNS, METHODS, Batches, Lit, Validated, batch, dropped_keys, llama, loader, trainer

import tokendrop as td
from tokendrop.engine.forward.state import frames

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
WHERE = ("init", "setup", "configure_model")


def by_hand(batches, methods=METHODS, steps_of=1):
    """What the trainer must do, written out: losses, and parameters by name."""
    model = llama()
    drop = td.apply(model, methods)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for number, given in enumerate(batches):
        layout = td.TokenLayout(
            given["image_mask"], given["task"], padding=given["attention_mask"].bool(), labels=given["labels"]
        )
        with drop.layout(layout):
            loss = model(given["input_ids"], attention_mask=given["attention_mask"], labels=given["labels"]).loss
            (loss / steps_of).backward()
        losses.append(loss.item())
        if (number + 1) % steps_of == 0:
            optimizer.step()
            optimizer.zero_grad()
    return losses, dict(model.named_parameters())


def entered(handle):
    return len(frames(handle.key))


def assert_same_parameters(module, expected):
    found = {name.removeprefix("model."): value for name, value in module.named_parameters()}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("where", WHERE)
def test_fit_equals_plain_pytorch_wherever_the_model_is_made(where):
    module, start = Lit(where), td.TokenDrop(METHODS)
    run = trainer(start)
    run.fit(module, loader(6))
    losses, parameters = by_hand(loader(6))
    assert module.losses == losses
    assert_same_parameters(module, parameters)
    added = dropped_keys(module)
    assert len(added) == (3 * 2 + 2 * 3)  # k and v in 3 layers, q, k and v in 2
    optimized = {id(p) for group in run.optimizers[0].param_groups for p in group["params"]}
    assert all(id(module.get_parameter(name)) in optimized for name in added)
    # Each moved: it is no longer the copy of the text's weights that it began as.
    untrained = llama()
    td.apply(untrained, METHODS)
    assert all(not torch.equal(module.get_parameter(name), untrained.get_parameter(name)) for name in added)


@pytest.mark.parametrize("where", WHERE)
def test_labelled_logits_train_alike(where):
    plain, labelled = Lit(where), Lit(where)
    trainer(td.TokenDrop(METHODS)).fit(plain, loader(6))
    start = td.TokenDrop(METHODS, labelled_logits=True, multiple=1)
    trainer(start).fit(labelled, loader(6))
    assert labelled.losses == pytest.approx(plain.losses, rel=1e-5)
    for name, value in plain.named_parameters():
        torch.testing.assert_close(labelled.get_parameter(name), value)
    start.remove()
    assert "_loss_function" not in vars(labelled.model)


@pytest.mark.parametrize("where", WHERE)
def test_hooks_run_once_and_are_given_back(where):
    module = Lit(where)
    trainer(td.TokenDrop(METHODS)).fit(module, loader())
    assert module.hooks == ["init", "setup", "configure_model"]
    assert not {"setup", "configure_model"} & module.__dict__.keys()


def test_a_hook_set_on_the_instance_is_given_back():
    module, calls = Lit("configure_model"), []

    def setup(stage):
        calls.append(stage)

    module.setup = setup
    trainer(td.TokenDrop(METHODS)).fit(module, loader())
    assert module.__dict__["setup"] is setup
    assert calls == ["fit"]


@pytest.mark.parametrize("where", WHERE)
def test_fit_twice_trains_on(where):
    module, callback = Lit(where), td.TokenDrop(METHODS)
    trainer(callback).fit(module, loader())
    handle = callback.handle
    trainer(callback).fit(module, loader())
    assert callback.handle is handle is td.handle(module)
    losses, parameters = by_hand([*loader(), *loader()])
    assert module.losses == losses
    assert_same_parameters(module, parameters)


@pytest.mark.parametrize("where", WHERE)
def test_fit_then_test_with_the_same_or_a_new_callback(where):
    module, callback = Lit(where), td.TokenDrop(METHODS)
    run = trainer(callback)
    run.fit(module, loader())
    first = run.test(module, loader(1), verbose=False)
    second = trainer(td.TokenDrop(METHODS)).test(module, loader(1), verbose=False)
    assert first == second
    assert first[0]["tokendrop/kept_ratio/u"] == pytest.approx((16 + 3 * 8) / 64)
    assert not entered(callback.handle)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("stage", ["validate", "test"])
def test_an_evaluation_alone(where, stage):
    given = batch(0, "u")
    run = trainer(td.TokenDrop(METHODS))
    (found,) = getattr(run, stage)(Validated(where), Batches(given), verbose=False)
    model = llama()
    layout = td.TokenLayout(given["image_mask"], "u", labels=given["labels"])
    with torch.no_grad(), td.apply(model, METHODS).layout(layout):
        expected = model(given["input_ids"], attention_mask=given["attention_mask"], labels=given["labels"]).loss
    assert found["loss"] == expected.item()


@pytest.mark.parametrize("where", WHERE)
def test_prediction_alone(where):
    given = batch(0, "g")
    (found,) = trainer(td.TokenDrop(METHODS)).predict(Lit(where), Batches(given))
    model = llama()
    with torch.no_grad(), td.apply(model, METHODS).layout(td.TokenLayout(given["image_mask"], "g")):
        torch.testing.assert_close(found, model(given["input_ids"]).logits, rtol=0, atol=0)


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_no_decoder_is_an_error_and_leaves_no_trace(stage):
    module = (Validated if stage == "validate" else Lit)("never")
    module.model = torch.nn.Linear(2, 2)
    before = set(module.__dict__)
    with pytest.raises(td.DecoderError, match="has no decoder at the start of the stage"):
        getattr(trainer(td.TokenDrop(METHODS)), stage)(module, loader())
    assert not {"setup", "configure_model"} & (set(module.__dict__) - before)


def test_a_failing_configure_model_leaves_no_trace():
    class Failing(Lit):
        def configure_model(self):
            raise RuntimeError("out of luck")

    module = Failing("never")
    with pytest.raises(RuntimeError, match="out of luck"):
        trainer(td.TokenDrop(METHODS)).fit(module, loader())
    assert not {"setup", "configure_model"} & module.__dict__.keys()


def test_two_callbacks_are_refused():
    module = Lit()
    with pytest.raises(td.AppliedError, match="2 TokenDrop callbacks"):
        trainer(td.TokenDrop(METHODS), td.TokenDrop(td.HiMix())).fit(module, loader())
    assert not hasattr(module, "tokendrop")


def test_other_methods_on_a_dropped_module_are_refused():
    module = Lit()
    trainer(td.TokenDrop(METHODS)).fit(module, loader(1))
    with pytest.raises(td.AppliedError, match="dropped already") as caught:
        trainer(td.TokenDrop(td.HMGen("1:3"))).test(module, loader(1), verbose=False)
    assert "HiMix" in str(caught.value)
    assert "HMGen(shallow='1:3'" in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"layers": "other"}, "dropped already in 'model.layers' of .*, and TokenDrop was given 'other'"),
        ({"labelled_logits": True}, "dropped already with labelled_logits=False, and TokenDrop was given True"),
        ({"multiple": 1}, "dropped already with multiple=64, and TokenDrop was given 1"),
    ],
)
def test_other_arguments_on_a_dropped_module_are_refused(asked, message):
    module = Lit()
    module.other = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    td.apply(module.model, METHODS)
    with pytest.raises(td.AppliedError, match=message):
        trainer(td.TokenDrop(METHODS, **asked)).fit(module, loader())


def test_a_model_dropped_by_hand_is_taken_as_it_is():
    module = Lit()
    handle = td.apply(module.model, METHODS)
    callback = td.TokenDrop(METHODS)
    trainer(callback).fit(module, loader())
    assert callback.handle is handle
    assert module.losses == by_hand(loader())[0]


def test_a_model_made_and_dropped_in_configure_model_is_taken_as_it_is():
    class Applying(Lit):
        def configure_model(self):
            super().configure_model()
            td.apply(self.model, METHODS)

    module, callback = Applying("configure_model"), td.TokenDrop(METHODS)
    trainer(callback).fit(module, loader())
    assert callback.handle is td.handle(module.model)
    assert module.losses == by_hand(loader())[0]


@pytest.mark.parametrize("methods", [{}, None, "himix", {"u": 3}, {3: td.HiMix()}, td.HiMix(separate="per-task")])
def test_bad_methods_are_refused_at_once(methods):
    with pytest.raises(td.MethodError):
        td.TokenDrop(methods)


def test_a_layout_that_is_no_function_is_refused():
    with pytest.raises(td.MethodError, match="'image_mask'"):
        td.TokenDrop(METHODS, layout="image_mask")


def test_layers_chooses_among_two_decoders():
    module = Lit()
    module.teacher = llama().requires_grad_(False)
    with pytest.raises(td.DecoderError, match=r"'model\.model\.layers' and 'teacher\.model\.layers'"):
        trainer(td.TokenDrop(METHODS)).fit(module, loader(1))
    callback = td.TokenDrop(METHODS, layers="model.model.layers")
    trainer(callback).fit(module, loader(1))
    assert callback.handle.decoder_layers is module.model.model.layers


def test_layers_waits_for_the_model():
    callback = td.TokenDrop(METHODS, layers="model.model.layers")
    trainer(callback).fit(Lit("configure_model"), loader(1))
    assert callback.handle.path == "model.model.layers"


def test_remove_gives_back_the_very_same_model():
    module, callback = Lit(), td.TokenDrop(METHODS)
    classes = [type(part) for part in module.modules()]
    attributes = [set(part.__dict__) for part in module.model.modules()]
    keys = list(module.state_dict())
    with pytest.raises(td.AppliedError, match="dropped nothing yet"):
        callback.remove()
    trainer(callback).fit(module, loader(1))
    assert [type(part) for part in module.modules()] != classes
    callback.remove()
    assert [type(part) for part in module.modules()] == classes
    assert [set(part.__dict__) for part in module.model.modules()] == attributes
    assert list(module.state_dict()) == keys
    assert not hasattr(module, "tokendrop")
    module.loss(batch(0))


def test_a_lightning_module_without_a_trainer_needs_a_layout():
    module, callback = Lit(), td.TokenDrop(METHODS)
    trainer(callback).fit(module, loader(1))
    with pytest.raises(td.MissingLayoutError):
        module.loss(batch(0))
    with callback.handle.disabled():
        module.loss(batch(0))


def test_manual_setup_without_trainer_callbacks():
    # A trainer-like object is enough: what the callback needs of it in setup is its list of callbacks.
    module, callback = Lit(), td.TokenDrop(METHODS)
    callback.setup(L.Trainer(logger=False, enable_checkpointing=False, accelerator=ACCELERATOR), module, "fit")
    assert td.handle(module) is callback.handle
