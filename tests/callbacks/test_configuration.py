"""TokenDrop written in a YAML file, as LightningCLI reads it."""

from pathlib import Path

import pytest
import yaml
from lit_llama import LIGHTNING_WARNS, Batches, Lit, batch

import tokendrop as td
from tokendrop import methods

jsonargparse = pytest.importorskip("jsonargparse", minversion="4.40")
pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)


@pytest.fixture(autouse=True)
def _no_deprecations(monkeypatch):
    # jsonargparse 4.53 renamed instantiate_classes to instantiate; Lightning 2.6.6 still calls the former.
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")


HIMIX = {"class_path": "tokendrop.HiMix", "init_args": {"layers": "1:", "separate": "shared"}}
HMGEN = {"class_path": "tokendrop.HMGen", "init_args": {"shallow": [1, 2], "separate": "per-task"}}


def parsed(init_args):
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(td.TokenDrop, "drop")
    given = parser.parse_object({"drop": {"class_path": "tokendrop.TokenDrop", "init_args": init_args}})
    return parser.instantiate_classes(given).drop


def test_methods_by_task():
    callback = parsed({"methods": {"understanding": HIMIX, "generation": HMGEN, "captioning": None}})
    assert callback.methods == {
        "understanding": td.HiMix("1:", separate="shared"),
        "generation": td.HMGen((1, 2), separate="per-task"),
        "captioning": None,
    }


METHODS = [
    td.HiMix("1:", separate="shared"),
    td.HMGen((1, 2)),
    td.Drop("1:", keep=3, score="norm", then="gone", seed=4),
    td.Drop("1:", keep=0.25, then="context"),
    td.Drop("1:", keep=0.25, then="merge"),
    td.Drop("1:", keep=0.25),
    td.Drop("1:", keep=0.25, per="frame"),
    td.RandomLTD(keep=7),
    td.SkipVision("1:", keep=0.25, score="random", seed=2),
    td.Drop("1:", keep=3, then="attend"),
    td.MixtureOfDepths("2:", 0.25),
    td.MixtureOfTransformers("2:", parts="o+ffn"),
    td.HMGen("1:3", "shared", "qkv+norm"),
    td.SVDPrune(),
    td.PMoD(0.25, 0.75, 0.25, 0.5),
    td.Sprint("1:-1", 0.5, 3),
    td.CDPruner(0.25),
    td.DivPrune(0.25),
    td.DART(3, 7, image_pivots=2, text_pivots=3),
    td.VisionZip(0.25, 0.05, vision_layer=-1),
    td.VScan(),
    td.FastV(3, keep=0.25),
    td.PyramidDrop((2, 4), keep=(0.5, 7), positions="renumber"),
    td.HiDrop(1, (2, 3), (0.5, 4), 5),
    td.DuetVLM((2, 4), (0.5, 0), dominant=0.65, contextual=0.05, cluster_width=3, vision_layer=-1),
    td.VScan(0.25, (2,), (0.5,), local_layer=1, global_layer=-1, window=2, merge=False),
    td.SVDPrune(0.5, rank=4),
]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_every_method_stays_itself(method):
    written = {"class_path": f"tokendrop.{type(method).__name__}", "init_args": vars(method)}
    assert parsed({"methods": {"u": written}}).methods == {"u": method}
    assert parsed({"methods": written}).methods == method


SCHEDULES = [None, td.Schedule(), td.Schedule(1, 2, 3, "out", 4, True, 5)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_what_to_config_writes_is_what_the_command_line_reads(method, schedule):
    text = yaml.safe_dump(td.to_config({"u": method, "g": None}, schedule))
    callback = parsed(yaml.safe_load(text))
    assert (callback.methods, callback.schedule) == td.from_config(yaml.safe_load(text))
    assert (callback.methods, callback.schedule) == ({"u": method, "g": None}, schedule)


EXAMPLE = Path(__file__).parents[2] / "examples" / "lightning_cli.yaml"


@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
def test_the_example_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    import lightning_cli

    config = yaml.safe_load(EXAMPLE.read_text())
    given = config["trainer"]["callbacks"][0]["init_args"]
    folder = f"--trainer.logger.init_args.save_dir={tmp_path}"
    monkeypatch.setattr("sys.argv", ["lightning_cli.py", "fit", "--config", str(EXAMPLE), folder])
    cli = lightning_cli.main()
    drop = next(one for one in cli.trainer.callbacks if isinstance(one, td.TokenDrop))
    methods, schedule = drop.methods, drop.schedule
    assert methods == {"understanding": td.HiMix("2:"), "generation": td.HMGen("1:3", separate="shared")}
    assert schedule == td.Schedule(start=1, dense_tail=1)
    written = td.to_config(methods, schedule)
    assert td.from_config({"methods": given["methods"], "schedule": written["schedule"]}) == (methods, schedule)
    assert td.from_config(written) == (methods, schedule)
    assert cli.trainer.global_step == 4
    assert "understanding" in capsys.readouterr().out  # the table
    rows = (next(tmp_path.rglob("metrics.csv"))).read_text().splitlines()
    ratios = [dict(zip(rows[0].split(","), row.split(","), strict=True)) for row in rows[1:]]
    kept = [float(row["tokendrop/kept_ratio/understanding"]) for row in ratios]
    assert kept == [1, 0.625, 0.625, 1]  # (32 + 32 + 8 + 8) / 128 between a dense step and a dense tail
    saved = yaml.safe_load(next(tmp_path.rglob("hparams.yaml")).read_text())
    assert td.from_config(saved["tokendrop"]) == (methods, schedule)


def test_all_methods_are_in_the_test_above():
    assert {type(method).__name__ for method in METHODS} == set(methods.__all__)


def test_one_method_for_whatever_task():
    assert parsed({"methods": HIMIX}).methods == td.HiMix("1:", separate="shared")


def test_the_other_arguments():
    schedule = {"class_path": "tokendrop.Schedule", "init_args": {"start": 10, "steps": 20, "dense_tail": 5}}
    plain = {
        "image_ids": [7, 8],
        "consume": True,
        "layers": "model.model.layers",
        "multiple": 8,
        "labelled_logits": True,
    }
    callback = parsed({"methods": HIMIX, "schedule": schedule, **plain})
    assert callback.schedule == td.Schedule(10, 20, 5)
    assert (callback.image_ids, callback.consume) == ((7, 8), True)
    assert (callback.layers, callback.multiple, callback.labelled_logits) == ("model.model.layers", 8, True)


def test_a_schedule_of_plain_values():
    assert parsed({"methods": HIMIX, "schedule": {"start": 3, "steps": 4}}).schedule == td.Schedule(3, 4)


@pytest.mark.parametrize("init_args", [{"layers": "1-2"}, {"separate": "sometimes"}, {"depth": 3}])
def test_bad_values_are_refused(init_args):
    bad = {"class_path": "tokendrop.HiMix", "init_args": init_args}
    with pytest.raises((jsonargparse.ArgumentError, ValueError)):
        parsed({"methods": {"u": bad}})


WRONG = {
    "no methods": ({}, "methods"),
    "a method of a number": ({"methods": {"u": 3}}, "3"),
    "an unknown class": ({"methods": {"u": {"class_path": "tokendrop.HiMax"}}}, "HiMax"),
    "a class that is no method": (
        {"methods": {"u": {"class_path": "os.system", "init_args": {"command": "no"}}}},
        "os",
    ),
    "per-task without tasks": ({"methods": {**HIMIX, "init_args": {"separate": "per-task"}}}, "per-task"),
    "an unknown argument": ({"methods": HIMIX, "keep": 3}, "keep"),
    "a row count of text": ({"methods": HIMIX, "multiple": "many"}, "many"),
    "a row count of zero": ({"methods": HIMIX, "multiple": 0}, "multiple=0"),
    "image ids of text": ({"methods": HIMIX, "image_ids": ["a"]}, "a"),
    "a negative schedule": ({"methods": HIMIX, "schedule": {"start": -3}}, "start=-3"),
    "a schedule of text": ({"methods": HIMIX, "schedule": "late"}, "late"),
    "a flag of text": ({"methods": HIMIX, "consume": "sometimes"}, "sometimes"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_with_the_value(case):
    init_args, value = WRONG[case]
    with pytest.raises((jsonargparse.ArgumentError, ValueError, TypeError)) as caught:
        parsed(init_args)
    assert value in str(caught.value)
    assert parsed({"methods": HIMIX}).methods == td.HiMix("1:", separate="shared")


YAML = """
trainer:
  logger: false
  max_epochs: 1
  accelerator: cpu
  devices: 1
  enable_progress_bar: false
  enable_model_summary: false
  enable_checkpointing: false
  callbacks:
    - class_path: tokendrop.TokenDrop
      init_args:
        methods:
          u:
            class_path: tokendrop.HiMix
            init_args:
              layers: "1:"
              separate: shared
          g:
            class_path: tokendrop.HMGen
            init_args:
              shallow: "1:3:2"
        schedule:
          class_path: tokendrop.Schedule
          init_args:
            start: 1
"""


def test_lightning_cli_trains_what_a_yaml_file_says(tmp_path, monkeypatch):
    from lightning.pytorch.cli import LightningCLI

    (tmp_path / "config.yaml").write_text(YAML)
    monkeypatch.setattr("sys.argv", ["train.py", "--config", str(tmp_path / "config.yaml")])
    cli = LightningCLI(Lit, run=False, save_config_callback=None, seed_everything_default=False)
    callback = next(one for one in cli.trainer.callbacks if isinstance(one, td.TokenDrop))
    assert callback.methods == {"u": td.HiMix("1:", separate="shared"), "g": td.HMGen("1:3:2")}
    assert callback.schedule == td.Schedule(start=1)
    cli.trainer.fit(cli.model, Batches(batch(0, "u"), batch(1, "u")))
    assert cli.trainer.logged_metrics["tokendrop/kept_ratio/u"] == (16 + 3 * 8) / 64
    assert len(callback.handle.layers[1]["image"]) == 2
