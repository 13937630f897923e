"""Strategies under which a method would part the ranks are refused in setup; DeepSpeed's needs a GPU, and has a double.

That stage 2, which sums gradients in the order in which they arrive, may be taken is held by
tests/engine/forward/test_order.py, and by DeepSpeed's own engine in tests/distributed/test_zero.py.
"""

import pytest
import torch
from helpers import llama, snapshot
from lightning.pytorch.strategies import ModelParallelStrategy
from lit_llama import LIGHTNING_WARNS, METHODS, Lit, loader, trainer

import tokendrop as td
from tokendrop.callbacks.strategies import check_strategy

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)


class DeepSpeedStrategy:
    def __init__(self, **zero):
        self.config = {"zero_optimization": zero} if zero else {}


class Mesh:
    mesh_dim_names = ("data_parallel", "tensor_parallel")

    def __init__(self, *shape):
        self.shape = shape


def parallel(*shape):
    made = ModelParallelStrategy()
    made._device_mesh = Mesh(*shape)
    return made


@pytest.mark.parametrize("zero", [{"stage": 1}, {"stage": 1, "overlap_comm": True}, {"stage": 2}, {}], ids=str)
def test_stages_that_hold_weights_whole_are_taken(zero):
    methods = [td.HiMix("1:"), td.HMGen("1:3", separate="shared"), td.MixtureOfDepths("1:3"), None]
    check_strategy(DeepSpeedStrategy(**zero), methods, 4, llama().model.layers)


@pytest.mark.parametrize("zero", [{"stage": 1, "overlap_comm": True}, {"stage": 2}], ids=str)
def test_a_deepspeed_whose_hooks_cannot_be_seen_is_refused(zero, monkeypatch):
    monkeypatch.setattr("tokendrop.callbacks.strategies.find_spec", lambda _: True)
    for found in ("0.16.6", "0.19.8+cpu"):
        monkeypatch.setattr("tokendrop.callbacks.strategies.version", lambda _, found=found: found)
        check_strategy(DeepSpeedStrategy(**zero), [td.HiMix("1:")], 4)
    monkeypatch.setattr("tokendrop.callbacks.strategies.version", lambda _: "0.16.5")
    with pytest.raises(td.UnsupportedError, match=r"DeepSpeed 0\.16\.5: .*install DeepSpeed 0\.16\.6 or later"):
        check_strategy(DeepSpeedStrategy(**zero), [td.HiMix("1:")], 4)
    check_strategy(DeepSpeedStrategy(stage=1), [td.HiMix("1:")], 4)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DeepSpeedStrategy(stage=3), "ZeRO stage 3 gathers weights"),
        (parallel(1, 2), "tensor_parallel_size=2"),
    ],
    ids=["stage 3", "tensor parallel"],
)
@pytest.mark.parametrize("where", ["init", "configure_model", "by hand"])
def test_refused_in_setup_and_nothing_changes(strategy, message, where):
    module, callback, run = Lit("init" if where == "by hand" else where), td.TokenDrop(METHODS), trainer()
    if where == "by hand":
        td.apply(module.model, METHODS)
    before = snapshot(module)
    run._accelerator_connector.strategy, right = strategy, run._accelerator_connector.strategy
    if where == "configure_model":
        callback.setup(run, module, "fit")
    with pytest.raises(td.UnsupportedError, match=message):
        module.configure_model() if where == "configure_model" else callback.setup(run, module, "fit")
    run._accelerator_connector.strategy = right
    assert callback.handle is None
    if where != "configure_model":
        assert snapshot(module) == before
    callback.teardown(run, module, "fit")
    with torch.random.fork_rng():
        trainer(callback).fit(module, loader(1))
    assert len(module.losses) == 1


def leaves(made):
    for layer in made:
        layer._z3_leaf = True  # as deepspeed.utils.set_z3_leaf_modules does; tests/distributed/test_zero.py
    return made


@pytest.mark.parametrize("method", [td.HiMix("1:"), td.HMGen("1:3"), td.RandomLTD("1:3"), td.SVDPrune(0.5)])
def test_stage_3_is_taken_where_a_layer_is_gathered_as_one(method):
    layers = llama().model.layers
    for some in ((), layers):
        with pytest.raises(td.UnsupportedError, match=r"ZeRO stage 3 gathers weights at each .*set_z3_leaf_modules"):
            check_strategy(DeepSpeedStrategy(stage=3), [method], 4, some)
    check_strategy(DeepSpeedStrategy(stage=3, overlap_comm=True), [None, method], 4, leaves(layers))
    layers[2]._z3_leaf = False
    with pytest.raises(td.UnsupportedError, match="ZeRO stage 3"):
        check_strategy(DeepSpeedStrategy(stage=3), [method], 4, layers)


@pytest.mark.parametrize(
    "method",
    [
        td.HiMix("1:", "shared"),
        td.FastV(2),
        td.MixtureOfDepths("1:3"),
        td.Sprint("1:3"),
        td.Drop("1:", 0.5, "attention"),
    ],
)
def test_stage_3_is_refused_to_what_uses_weights_outside_the_layers(method):
    layers = leaves(llama().model.layers)
    with pytest.raises(td.UnsupportedError, match="outside the decoder layers") as caught:
        check_strategy(DeepSpeedStrategy(stage=3), [td.HiMix("1:"), method], 4, layers)
    assert repr(method) in str(caught.value)


def test_a_module_that_marks_its_layers_is_taken_in_setup():
    module, callback, run = Lit("init"), td.TokenDrop({"u": td.HiMix("1:"), "g": td.HMGen("1:3")}), trainer()
    leaves(module.model.model.layers)
    run._accelerator_connector.strategy, right = DeepSpeedStrategy(stage=3), run._accelerator_connector.strategy
    callback.setup(run, module, "fit")
    run._accelerator_connector.strategy = right
    assert callback.handle is not None
    callback.teardown(run, module, "fit")


def test_a_mesh_of_data_alone_is_taken():
    check_strategy(parallel(2, 1), [METHODS["u"]], 4)
