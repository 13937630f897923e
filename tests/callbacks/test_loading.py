"""`load_from_checkpoint` of a module that was trained dropped, and modules saved as hyperparameters."""

import logging

import pytest
import torch
from lit_llama import LIGHTNING_WARNS, METHODS, Lit, batch, dropped_keys, llama, loader, trainer

import tokendrop as td

pytestmark = [
    pytest.mark.filterwarnings(LIGHTNING_WARNS),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # Lightning asks for what the last two tests do, and says so.
    pytest.mark.filterwarnings("ignore:Attribute 'model' is an instance of `nn.Module`"),
    pytest.mark.filterwarnings("ignore:.*weights_only"),
]


def fitted(module, path, methods=METHODS):
    run = trainer(td.TokenDrop(methods))
    run.fit(module, loader())
    run.save_checkpoint(path)
    return td.handle(module)


def logits(module, drop):
    given = batch(7, ["u", "g"])
    layout = td.TokenLayout(given["image_mask"], given["task"], labels=given["labels"])
    with torch.no_grad(), drop.layout(layout):
        return module.model(given["input_ids"], use_cache=False).logits


def test_what_a_checkpoint_holds_is_said_once_when_it_is_written(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        run = trainer(td.TokenDrop(METHODS))
        module = Lit()
        run.fit(module, loader())
        for name in ("a", "b"):
            run.save_checkpoint(tmp_path / f"{name}.ckpt")
    said = [one.getMessage() for one in caplog.records if "parameters that TokenDrop added" in one.getMessage()]
    assert len(said) == 1
    assert f"holds {len(dropped_keys(module))} parameters" in said[0]
    assert "tokendrop.methods_of(path)[0]" in said[0]


def test_nothing_is_said_where_nothing_was_added(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fitted(Lit(), tmp_path / "a.ckpt", {"u": td.HiMix(), "g": td.HMGen("1:3")})
    assert not any("TokenDrop added" in one.getMessage() for one in caplog.records)
    Lit.load_from_checkpoint(tmp_path / "a.ckpt")


def test_strict_loading_refuses_and_the_other_names_what_it_leaves_out(tmp_path):
    module = Lit()
    drop = fitted(module, tmp_path / "a.ckpt")
    with pytest.raises(RuntimeError, match=r"Unexpected key.*tokendrop\.layers\.0\.image"):
        Lit.load_from_checkpoint(tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"not in the model state dict.*tokendrop\.layers\.0\.image"):
        dense = Lit.load_from_checkpoint(tmp_path / "a.ckpt", strict=False)
    assert all(torch.equal(value, dense.state_dict()[key]) for key, value in drop.dense_state_dict().items())


def test_the_way_back_that_is_said(tmp_path):
    module = Lit()
    expected = logits(module, fitted(module, tmp_path / "a.ckpt"))
    again = Lit()
    drop = td.apply(again, td.methods_of(tmp_path / "a.ckpt")[0])
    again.load_state_dict(torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(logits(again, drop), expected)


class Applied(Lit):
    """A module that drops its own model, which a checkpoint fits as it is."""

    def __init__(self):
        super().__init__()
        td.apply(self, METHODS)


def test_a_module_that_applies_itself_is_loaded_whole(tmp_path):
    module = Applied()
    expected = logits(module, fitted(module, tmp_path / "a.ckpt"))
    again = Applied.load_from_checkpoint(tmp_path / "a.ckpt")
    assert torch.equal(logits(again, td.handle(again)), expected)


class Given(Lit):
    """Its model is a hyperparameter."""

    def __init__(self, model):
        super().__init__("never")
        self.save_hyperparameters()
        self.model = model


@pytest.mark.filterwarnings("ignore:Found keys that are not in the model state dict")
@pytest.mark.parametrize("separate", ["none", "per-task"])
def test_a_model_saved_as_a_hyperparameter_is_dropped_and_restorable(tmp_path, separate):
    methods = {"u": td.HiMix("1:", separate), "g": td.HMGen("1:3", separate)}
    module = Given(llama())
    drop = fitted(module, tmp_path / "a.ckpt", methods)
    expected = logits(module, drop)
    again = Given.load_from_checkpoint(tmp_path / "a.ckpt", strict=separate == "none", weights_only=False)
    assert torch.equal(logits(again, td.handle(again)), expected)
    with pytest.raises(td.AppliedError, match=r"by tokendrop.handle\(model\).remove\(\)"):
        trainer(td.TokenDrop(methods)).fit(again, loader())
    td.handle(again).remove()
    drop.remove()
    ids = batch(7)["input_ids"]
    assert torch.equal(again.model(ids).logits, module.model(ids).logits)
    trainer(td.TokenDrop(methods)).fit(again, loader())
