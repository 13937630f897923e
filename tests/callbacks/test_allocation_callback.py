"""AttentionAllocation logs what the function says of the same model and batches."""

import lightning as L
import pytest
import torch
from lit_llama import LIGHTNING_WARNS, METHODS, Batches, Validated, batch, llama, loader, trainer

import tokendrop as td
from tokendrop.analysis.allocation import SEGMENTS
from tokendrop.callbacks.batch import batch_layout

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)


def expected(batches, rows="all"):
    model = llama()

    def run(given):
        return model(given["input_ids"], attention_mask=given["attention_mask"])

    found = td.attention_allocation(model, batches, lambda one: batch_layout(one, model, ()), rows, loss=run)
    depth = found.share.shape[1]
    return {
        f"allocation/{task}/{name}": sum(float(found.share[row, layer, column]) for layer in range(depth)) / depth
        for row, task in enumerate(found.tasks)
        for column, name in enumerate(SEGMENTS)
    }


def logged(callback, *others):
    run = trainer(*others, callback)
    (found,) = run.validate(Validated(), loader(), verbose=False)
    return {name: value for name, value in found.items() if name.startswith("allocation/")}


@pytest.mark.parametrize("rows", ["all", "output"])
@pytest.mark.parametrize("count", [1, 3])
def test_it_logs_what_the_function_says(rows, count):
    held = list(loader())[:count]
    assert logged(td.AttentionAllocation(count, rows)) == pytest.approx(expected(held, rows), abs=1e-6)


def test_beside_dropping_it_is_still_of_the_dense_model():
    methods = {task: type(one)(one.layers if task == "u" else one.shallow) for task, one in METHODS.items()}
    found = logged(td.AttentionAllocation(3), td.TokenDrop(methods, consume=True))
    assert found == pytest.approx(expected(list(loader())), abs=1e-6)


def test_training_is_the_same_to_the_bit():
    weights = []
    for callbacks in ((), (td.AttentionAllocation(),)):
        model = Validated()
        run = trainer(*callbacks)
        run.fit(model, loader(), Batches(batch(7, "u"), batch(8, "g")))
        weights.append(model.state_dict())
    assert all(torch.equal(one, weights[1][name]) for name, one in weights[0].items())


def test_it_keeps_the_last_one_and_forgets_batches():
    callback = td.AttentionAllocation()
    trainer(callback).validate(Validated(), loader(), verbose=False)
    assert callback.allocation.tasks == ("u", "g")
    assert callback._held == []


def test_after_an_exception_nothing_is_kept():
    class Fails(L.Callback):
        def on_validation_batch_end(self, *_):
            raise KeyError("user")

    callback = td.AttentionAllocation()
    with pytest.raises(KeyError, match="user"):
        trainer(callback, Fails()).validate(Validated(), loader(), verbose=False)
    assert callback._held == []


@pytest.mark.parametrize(("given", "message"), [({"batches": 0}, "batches=0"), ({"rows": "few"}, "rows='few'")])
def test_bad_input(given, message):
    with pytest.raises(td.MethodError, match=message):
        td.AttentionAllocation(**given)
