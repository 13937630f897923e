"""Methods and schedules as plain data: written, read back, and out of checkpoints."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import yaml

import tokendrop as td
from tokendrop import methods as published
from tokendrop.config import described

METHODS = [
    td.HiMix("1:", separate="shared"),
    td.HMGen((1, 2), separate="shared"),
    td.Drop("1:", keep=3, score="norm", then="gone", seed=4),
    td.Drop("1:", keep=0.25, then="context"),
    td.Drop("1:", keep=0.25),
    td.RandomLTD(keep=7),
    td.SkipVision("1:", keep=0.25, score="random", seed=2),
    td.Drop("1:", keep=3, then="attend"),
    td.MixtureOfDepths("2:", 0.25),
    td.MixtureOfTransformers("2:", parts="o+ffn"),
    td.HMGen("1:3", "shared", "qkv+norm"),
    td.FastV(3, keep=0.25),
    td.PyramidDrop((2, 4), keep=(0.5, 7)),
    td.HiDrop(1, (2, 3), (0.5, 4), 5),
    td.DuetVLM((2, 4), (0.5, 0), dominant=0.65, contextual=0.05, cluster_width=3, vision_layer=-1),
    td.VScan(0.25, (2,), (0.5,), local_layer=1, global_layer=-1, window=2, merge=False),
    td.SVDPrune(0.5, rank=4),
    td.CDPruner(12),
    td.DivPrune(12),
    td.PMoD(0.25),
    td.Sprint("1:-1", 0.5, 3),
    td.DART(2, 0.25),
    td.VisionZip(9, 3),
]
SCHEDULES = [None, td.Schedule(), td.Schedule(1, 2, 3, "out", 4)]


def fraction(scoring: Any) -> Any:
    return scoring.states.sum(-1)


@dataclass(frozen=True)
class Mine:
    """A method of somebody else's."""

    depth: int
    names: tuple[str, ...] = ("a",)
    separate = "none"

    def route(self, num_layers, strength=1.0):
        return td.HMGen(f"{self.depth}:").route(num_layers, strength)


class NoDataclass:
    separate = "none"

    def route(self, num_layers, strength=1.0):
        return td.HMGen().route(num_layers, strength)


def test_all_published_methods_are_here():
    assert {type(method).__name__ for method in METHODS} == set(published.__all__)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_round_trip_through_json_and_yaml(method):
    for given in (method, {"u": method, "g": None}):
        for schedule in SCHEDULES:
            config = td.to_config(given, schedule)
            for text in (json.loads(json.dumps(config)), yaml.safe_load(yaml.safe_dump(config))):
                assert text == config
                assert td.from_config(text) == (given, schedule)


def test_the_form_is_written_out():
    assert td.to_config({"u": td.HMGen("1:3")}, td.Schedule(start=2)) == {
        "methods": {
            "u": {"class_path": "tokendrop.HMGen", "init_args": {"shallow": "1:3", "separate": "none", "parts": "qkv"}}
        },
        "schedule": {"start": 2, "steps": 0, "dense_tail": 0, "direction": "in", "dense_every": 0}
        | {"drawn": False, "seed": 0},
    }


def test_subclasses_of_numbers_become_numbers():
    np = pytest.importorskip("numpy")
    keep = td.to_config(td.FastV(2, keep=np.float64(0.5)))["methods"]["init_args"]["keep"]
    assert (type(keep), keep) == (float, 0.5)


def test_fields_that_are_left_out_have_their_defaults():
    config = {"methods": {"class_path": "tokendrop.HiMix"}}
    assert td.from_config(config) == (td.HiMix(), None)


HIMIX = {"class_path": "tokendrop.HiMix", "init_args": {}}
WRONG = {
    "no mapping": (3, "found 3"),
    "no methods": ({"schedule": None}, "expected 'methods'"),
    "another key": ({"methods": HIMIX, "seed": 1}, "'seed': 1"),
    "empty": ({"methods": {}}, "found {}"),
    "text": ({"methods": "HiMix"}, "found 'HiMix'"),
    "a task of text": ({"methods": {"u": "HiMix"}}, "found 'HiMix'"),
    "a task with a dot": ({"methods": {"a.b": HIMIX}}, "'a.b'"),
    "an unknown class": ({"methods": HIMIX | {"class_path": "tokendrop.HiMax"}}, "class_path='tokendrop.HiMax'"),
    "a class of another package": ({"methods": HIMIX | {"class_path": "os.system"}}, "class_path='os.system'"),
    "a public name that is no method": ({"methods": HIMIX | {"class_path": "tokendrop.apply"}}, "tokendrop.apply"),
    "a number as a class": ({"methods": {"u": {"class_path": 3}}}, "class_path=3"),
    "an unknown field": ({"methods": HIMIX | {"init_args": {"depth": 2}}}, r"no fields \['depth'\]; it has layers"),
    "fields of text": ({"methods": HIMIX | {"init_args": "x"}}, "no fields 'x'"),
    "a field that is missing": ({"methods": {"class_path": "tokendrop.Drop"}}, "keep"),
    "a value that makes no sense": (
        {"methods": {"class_path": "tokendrop.FastV", "init_args": {"layer": 2, "keep": 3.5}}},
        "keep=3.5",
    ),
    "an unknown field of the schedule": ({"methods": HIMIX, "schedule": {"stop": 3}}, r"Schedule has no fields"),
    "a schedule of text": ({"methods": HIMIX, "schedule": "late"}, "no fields 'late'"),
    "a schedule that makes no sense": ({"methods": HIMIX, "schedule": {"start": -1}}, "start=-1"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_config_is_refused(case):
    config, message = WRONG[case]
    with pytest.raises(td.MethodError, match=message):
        td.from_config(config)


def test_a_layer_range_is_checked():
    with pytest.raises(td.LayerRangeError, match="'1-2'"):
        td.from_config({"methods": HIMIX | {"init_args": {"layers": "1-2"}}})


def test_a_function_is_refused_with_the_way_out_and_named_in_a_checkpoint():
    method = td.Drop("1:", 0.5, score=fraction)
    with pytest.raises(td.MethodError, match=r"Drop\(score=.*no plain data.*built-in score"):
        td.to_config({"u": method})
    config = described({"u": method})
    assert json.loads(json.dumps(config)) == config
    with pytest.raises(td.MethodError, match=r"Drop\(score=.*fraction\) was no plain data.*in code"):
        td.from_config(config)


def test_methods_of_somebody_else():
    method, schedule = Mine(2, ("b", "c")), td.Schedule(steps=4)
    config = json.loads(json.dumps(td.to_config({"u": method, "g": td.HiMix()}, schedule)))
    with pytest.raises(td.MethodError, match=r"Mine' is unknown.*classes="):
        td.from_config(config)
    assert td.from_config(config, classes=[Mine]) == ({"u": method, "g": td.HiMix()}, schedule)
    # The script that trained calls it otherwise than the one that imports it.
    config["methods"]["u"]["class_path"] = "__main__.Mine"
    assert td.from_config(config, classes=[Mine])[0]["u"] == method
    # A class of theirs never stands for one of ours.
    named = dataclasses.make_dataclass("HiMix", ["x"], namespace={"route": Mine.route, "separate": "none"})
    assert td.from_config(td.to_config(td.HiMix()), classes=[named])[0] == td.HiMix()
    assert td.to_config(named(1))["methods"]["class_path"] != "tokendrop.HiMix"


def test_what_is_no_dataclass_is_refused_and_named_in_a_checkpoint():
    with pytest.raises(td.MethodError, match=r"NoDataclass.*no dataclass"):
        td.to_config(NoDataclass())
    assert described(NoDataclass())["methods"]["class_path"].endswith("NoDataclass")
    with pytest.raises(td.MethodError, match=r"classes: expected.*NoDataclass"):
        td.from_config(td.to_config(td.HiMix()), classes=[NoDataclass])


def checkpoint(path, **more):
    state = td.to_config({"u": td.HiMix("1:"), "g": td.HMGen((1, 2))}, td.Schedule(steps=3))
    torch.save({"callbacks": {"TokenDrop": state | {"progress": {"steps": 2}}}, "state_dict": {}} | more, path)


def test_a_checkpoint_tells_its_methods(tmp_path):
    expected = {"u": td.HiMix("1:"), "g": td.HMGen((1, 2))}, td.Schedule(steps=3)
    checkpoint(tmp_path / "one.ckpt")
    assert td.methods_of(tmp_path / "one.ckpt") == expected
    assert td.methods_of(str(tmp_path / "one.ckpt")) == expected
    (tmp_path / "sharded").mkdir()
    checkpoint(tmp_path / "sharded" / "meta.pt")
    assert td.methods_of(tmp_path / "sharded") == expected
    torch.save(torch.load(tmp_path / "one.ckpt"), tmp_path / "old.ckpt", _use_new_zipfile_serialization=False)
    assert td.methods_of(tmp_path / "old.ckpt") == expected


class Foreign:
    pass


def test_what_is_no_checkpoint_is_refused(tmp_path):
    files = {name: tmp_path / name for name in ("text", "list", "dense", "foreign", "weights")}
    files["text"].write_text("no checkpoint")
    torch.save([1], files["list"])
    torch.save({"callbacks": {"Other": {}}}, files["dense"])
    torch.save({"state_dict": {}}, files["weights"])
    checkpoint(files["foreign"], hyper_parameters={"x": Foreign()})
    for name, message in (
        ("nowhere", "found no file"),
        ("text", "cannot be read as plain data"),
        ("list", "holds a list"),
        ("dense", "holds no methods.*without TokenDrop"),
        ("weights", "holds no methods.*save_weights_only"),
        ("foreign", "cannot be read as plain data.*safe_globals"),
    ):
        with pytest.raises(td.MethodError, match=message):
            td.methods_of(tmp_path / name)
    with pytest.raises(td.MethodError, match=r"found no file .*meta\.pt"):
        td.methods_of(tmp_path)
    with pytest.raises(td.MethodError, match="found 3"):
        td.methods_of(3)
