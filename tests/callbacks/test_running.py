"""A dropped LightningModule while it runs: errors, skipped batches, validation, accumulation, precision, logs."""

import lightning as L
import pytest
import torch
from lit_llama import LIGHTNING_WARNS, METHODS, Batches, Lit, Validated, batch, llama, loader, trainer

import tokendrop as td
from tokendrop.engine.forward.state import frames

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)


def test_an_exception_leaves_no_layout_and_the_next_fit_works():
    class Failing(Lit):
        fail = True

        def training_step(self, given, index):
            loss = super().training_step(given, index)
            if self.fail and index == 1:
                raise RuntimeError("in the step")
            return loss

    module, callback = Failing(), td.TokenDrop(METHODS)
    with pytest.raises(RuntimeError, match="in the step"):
        trainer(callback).fit(module, loader())
    assert not frames(callback.handle.key)
    with pytest.raises(td.MissingLayoutError):
        module.loss(batch(0))
    module.fail = False
    trainer(callback).fit(module, loader())
    assert len(module.losses) == 2 + 3


def test_an_exception_in_a_later_callback_leaves_no_layout():
    class Failing(L.Callback):
        def on_train_batch_start(self, *_):
            raise RuntimeError("in a callback")

    callback = td.TokenDrop(METHODS)
    with pytest.raises(RuntimeError, match="in a callback"):
        trainer(callback, Failing()).fit(Lit(), loader())
    assert not frames(callback.handle.key)


def test_a_skipped_epoch_leaves_no_layout():
    # Lightning skips the rest of an epoch, and on_train_batch_end, where the module's hook returns -1.
    class Skipping(Validated):
        def on_train_batch_start(self, given, index):
            return -1 if index == 1 else None

    class Seen(L.Callback):
        def on_validation_start(self, trainer, module):
            depth.append(len(frames(callback.handle.key)))

        on_train_epoch_end = on_train_epoch_start = on_validation_start

    depth = []
    callback, module = td.TokenDrop(METHODS), Skipping()
    trainer(callback, Seen(), max_epochs=2).fit(module, loader(), loader(1))
    assert len(module.losses) == 2
    assert set(depth) == {0}
    assert not frames(callback.handle.key)


def test_a_callback_that_returns_minus_one_skips_nothing():
    class Returning(L.Callback):
        def on_train_batch_start(self, *_):
            return -1

    callback, module = td.TokenDrop(METHODS), Lit()
    trainer(Returning(), callback).fit(module, loader())
    assert len(module.losses) == 3
    assert not frames(callback.handle.key)


def test_validation_inside_fit_changes_no_step():
    alone = Lit()
    trainer(td.TokenDrop(METHODS), max_epochs=2).fit(alone, loader())
    validated, callback = Validated(), td.TokenDrop(METHODS)
    run = trainer(callback, max_epochs=2, val_check_interval=1)
    run.fit(validated, loader(), Batches(batch(7, "u"), batch(8, "g"), batch(9, ["g", "u"])))
    assert validated.losses == alone.losses
    assert run.callback_metrics["loss"] > 0
    assert run.callback_metrics["tokendrop/kept_ratio/u"] == pytest.approx((16 + 3 * 8) / 64)
    assert not frames(callback.handle.key)


def test_gradient_accumulation_equals_the_written_out_loop():
    module = Lit()
    trainer(td.TokenDrop(METHODS), accumulate_grad_batches=3, max_epochs=2).fit(module, loader())
    model = llama()
    drop = td.apply(model, METHODS)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for given in [*loader(), *loader()]:
        layout = td.TokenLayout(given["image_mask"], given["task"], labels=given["labels"])
        with drop.layout(layout):
            loss = model(given["input_ids"], attention_mask=given["attention_mask"], labels=given["labels"]).loss
            (loss / 3).backward()
        losses.append(loss.item())
        if len(losses) % 3 == 0:
            optimizer.step()
            optimizer.zero_grad()
    assert module.losses == losses


def test_manual_optimization():
    class Manual(Lit):
        automatic_optimization = False

        def training_step(self, given, index):
            loss, optimizer = self.loss(given), self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            self.losses.append(loss.item())

    manual, automatic = Manual(), Lit()
    for module in (manual, automatic):
        trainer(td.TokenDrop(METHODS)).fit(module, loader())
    assert manual.losses == automatic.losses


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_bf16_stays_near_fp32(precision):
    runs = {}
    for name in ("32-true", precision):
        module = Lit()
        trainer(td.TokenDrop(METHODS), precision=name).fit(module, loader(6))
        runs[name] = torch.tensor(module.losses)
    assert runs[precision].isfinite().all()
    torch.testing.assert_close(runs[precision], runs["32-true"], rtol=0.02, atol=0)


def test_gradient_checkpointing_equals_none():
    plain, recomputing = Lit(), Lit()
    recomputing.model.activation_checkpointing_enable({"use_reentrant": False})
    for module in (plain, recomputing):
        trainer(td.TokenDrop(METHODS)).fit(module, loader(6))
    assert recomputing.losses == pytest.approx(plain.losses, rel=1e-6)


def test_consume_removes_our_keys_and_only_in_the_step():
    batches = loader()
    for consume, ours in ((False, {"image_mask", "task"}), (True, set())):
        module = Lit()
        trainer(td.TokenDrop(METHODS, consume=consume), max_epochs=2).fit(module, batches)
        assert len(module.seen) == 6
        assert all(seen == {"input_ids", "labels", "attention_mask"} | ours for seen in module.seen)


def test_consume_keeps_the_callers_batch():
    given = batch(0)
    trainer(td.TokenDrop(METHODS, consume=True)).fit(Lit(), Batches(given))
    assert {"image_mask", "task"} <= given.keys()


def test_a_layout_function_replaces_the_default():
    def layout(given):
        calls.append(set(given))
        return td.TokenLayout(given["pixels"], "u", labels=given["labels"])

    calls, given = [], batch(0, None)
    given["pixels"] = given.pop("image_mask")
    run = trainer(td.TokenDrop(METHODS, layout=layout))
    run.fit(Lit(), Batches(given))
    assert calls == [{"input_ids", "labels", "attention_mask", "pixels"}]
    assert run.callback_metrics["tokendrop/kept_ratio/u"] == pytest.approx(40 / 64)


def test_a_layout_function_that_returns_something_else_is_refused():
    callback = td.TokenDrop(METHODS, layout=lambda given: given["image_mask"])
    with pytest.raises(td.TokenDropError, match="expected a TokenLayout; found Tensor"):
        trainer(callback).fit(Lit(), loader(1))


def test_removed_while_training_is_an_error():
    class Removing(L.Callback):
        def on_train_batch_end(self, *_):
            callback.remove()

    callback = td.TokenDrop(METHODS)
    with pytest.raises(td.AppliedError, match="no handle"):
        trainer(callback, Removing()).fit(Lit(), loader())
