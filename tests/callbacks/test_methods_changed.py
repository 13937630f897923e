"""Checkpoints say under which methods they were made, and whoever goes on under others is told."""

import json
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from lit_llama import LIGHTNING_WARNS, Batches, Lit, Validated, batch, trainer

import tokendrop as td

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
METHODS: dict[str, Any] = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}


def made(*kinds):
    return Batches(*(batch(seed, kind) for seed, kind in enumerate(kinds or "ug")))


def saved(path, methods=METHODS, schedule=None, **options):
    run = trainer(td.TokenDrop(methods, schedule=schedule), **options)
    module = Lit()
    run.fit(module, made())
    run.save_checkpoint(path)
    return module


def go_on(stage, path, *callbacks):
    """Load the checkpoint in a stage, with warnings as errors but for those of a changed method."""
    run = trainer(*callbacks, max_epochs=2)
    if stage == "fit":
        run.fit(Lit(), made(), ckpt_path=path)
    elif stage == "predict":
        run.predict(Lit(), made(), ckpt_path=path)
    else:
        getattr(run, stage)(Validated(), made(), ckpt_path=path, verbose=False)


def changes(caught):
    return [str(one.message) for one in caught if one.category is td.MethodChangedWarning]


STAGES = ("fit", "validate", "test", "predict")


def test_the_callback_holds_the_config_and_the_checkpoint_too(tmp_path):
    schedule = td.Schedule(steps=2)
    assert td.TokenDrop(METHODS, schedule=schedule).state_dict() == td.to_config(METHODS, schedule)
    saved(tmp_path / "one.ckpt", schedule=schedule)
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["TokenDrop"]
    assert {key: state[key] for key in ("methods", "schedule")} == td.to_config(METHODS, schedule)
    assert state["progress"]["steps"] == 2
    assert json.loads(json.dumps(state)) == state
    assert td.methods_of(tmp_path / "one.ckpt") == (METHODS, schedule)


@pytest.mark.parametrize("stage", STAGES)
def test_equal_methods_say_nothing(stage, tmp_path):
    saved(tmp_path / "one.ckpt")
    go_on(stage, tmp_path / "one.ckpt", td.TokenDrop(dict(METHODS)))
    go_on(stage, tmp_path / "one.ckpt", td.TokenDrop(METHODS | {"dense": None}))  # as before, but for the name


OTHERS = {
    "another method": (METHODS | {"u": td.HMGen("2:")}, ["HiMix(layers='1:'", "HMGen(shallow='2:'"]),
    "another field": (METHODS | {"u": td.HiMix("2:")}, ["layers='1:'", "layers='2:'"]),
    "a task less": ({"u": td.HiMix("1:")}, ["'g': HMGen"]),
    "a dense task": (METHODS | {"g": None}, ["'g': HMGen", "'g': dense"]),
    "one for all": (td.HMGen("1:3"), ["runs HMGen(shallow='1:3'"]),
}


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("stage", STAGES)
def test_other_methods_are_said_once_naming_both(case, stage, tmp_path):
    saved(tmp_path / "one.ckpt")
    methods, parts = OTHERS[case]
    callback = td.TokenDrop(methods)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            go_on(stage, tmp_path / "one.ckpt", callback)
    (message,) = changes(caught)
    assert "made under" in message
    assert all(part in message for part in parts)


@pytest.mark.parametrize("stage", STAGES)
def test_without_the_callback_lightning_says_so(stage, tmp_path):
    saved(tmp_path / "one.ckpt")
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: \['TokenDrop'\]"):
        go_on(stage, tmp_path / "one.ckpt")


def test_another_schedule_is_said_where_it_matters(tmp_path):
    saved(tmp_path / "one.ckpt", schedule=td.Schedule(steps=2))
    with pytest.warns(td.MethodChangedWarning, match=r"schedule .*'steps': 2.*'steps': 8"):
        go_on("fit", tmp_path / "one.ckpt", td.TokenDrop(METHODS, schedule=td.Schedule(steps=8)))
    with pytest.warns(td.MethodChangedWarning, match=r"TokenDrop has None"):
        go_on("fit", tmp_path / "one.ckpt", td.TokenDrop(METHODS))
    # Two steps were made, after which both are whole.
    go_on("test", tmp_path / "one.ckpt", td.TokenDrop(METHODS))
    go_on("test", tmp_path / "one.ckpt", td.TokenDrop(METHODS, schedule=td.Schedule(start=1)))
    with pytest.warns(td.MethodChangedWarning, match=r"'steps': 2.*'steps': 8"):
        go_on("test", tmp_path / "one.ckpt", td.TokenDrop(METHODS, schedule=td.Schedule(steps=8)))


def rewritten(path, change):
    checkpoint = torch.load(path, weights_only=True)
    change(checkpoint["callbacks"])
    torch.save(checkpoint, path)


def test_checkpoints_of_other_versions(tmp_path):
    saved(tmp_path / "one.ckpt")

    def fewer(callbacks):  # a field that has its default is newer than the checkpoint
        del callbacks["TokenDrop"]["methods"]["u"]["init_args"]["separate"]

    def newer(callbacks):
        callbacks["TokenDrop"]["methods"]["u"]["init_args"]["depth"] = 3

    def before(callbacks):
        del callbacks["TokenDrop"]

    rewritten(tmp_path / "one.ckpt", fewer)
    go_on("fit", tmp_path / "one.ckpt", td.TokenDrop(METHODS))
    rewritten(tmp_path / "one.ckpt", newer)
    with pytest.warns(td.MethodChangedWarning, match="depth=3"):
        go_on("test", tmp_path / "one.ckpt", td.TokenDrop(METHODS))
    rewritten(tmp_path / "one.ckpt", before)
    go_on("fit", tmp_path / "one.ckpt", td.TokenDrop(METHODS))


def loud(scoring):
    return scoring.states.norm(dim=-1)


def quiet(scoring):
    return -scoring.states.norm(dim=-1)


@dataclass(frozen=True)
class Mine:
    """A method of somebody's own."""

    depth: int
    separate = "none"

    def route(self, num_layers, strength=1.0):
        return td.HMGen(f"{self.depth}:").route(num_layers, strength)


@pytest.mark.parametrize(
    ("method", "other"), [(td.Drop("1:", 2, loud), td.Drop("1:", 2, quiet)), (Mine(2), Mine(3))], ids=["score", "mine"]
)
def test_methods_that_no_config_holds_are_saved_by_name(method, other, tmp_path):
    methods = METHODS | {"u": method}
    saved(tmp_path / "one.ckpt", methods)
    go_on("fit", tmp_path / "one.ckpt", td.TokenDrop(methods))
    with pytest.warns(td.MethodChangedWarning):
        go_on("fit", tmp_path / "one.ckpt", td.TokenDrop(METHODS | {"u": other}))
    if isinstance(method, Mine):
        assert td.methods_of(tmp_path / "one.ckpt", classes=[Mine]) == (methods, None)
    with pytest.raises(td.MethodError, match=r"Mine|loud"):
        td.methods_of(tmp_path / "one.ckpt")


def test_the_way_back_without_a_trainer(tmp_path):
    methods = {"u": td.HiMix("1:", separate="shared"), "g": td.HMGen("1:3")}
    module = saved(tmp_path / "one.ckpt", methods)
    other = Lit()
    drop = td.apply(other, td.methods_of(tmp_path / "one.ckpt")[0])
    other.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    for given in made("u", "g").made:
        layout = td.TokenLayout(given["image_mask"], given["task"], labels=given["labels"])
        with drop.layout(layout), module.tokendrop.layout(layout):
            assert torch.equal(other.loss(given), module.loss(given))


def test_a_restored_model_says_nothing_of_methods(tmp_path):
    module, callback = Lit(), td.TokenDrop(METHODS)
    run = trainer(callback)
    run.fit(module, made())
    callback.remove()
    run.save_checkpoint(tmp_path / "dense.ckpt")
    with pytest.raises(td.MethodError, match="holds no methods"):
        td.methods_of(tmp_path / "dense.ckpt")
    go_on("test", tmp_path / "dense.ckpt")
