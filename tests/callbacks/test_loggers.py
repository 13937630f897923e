"""Figures and unknown numbers in real loggers, each in its offline mode.

Shape letters: none.
"""

import csv
import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lit_llama import LIGHTNING_WARNS, Batches, Validated, batch, loader, trainer
from PIL import Image

import tokendrop as td
from tokendrop.callbacks.loggers import log_figure

# MLflow 3.17 asks SQLAlchemy 2.1 for a loader that this deprecates.
pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS, "ignore:The ..noload.. loader strategy")
TASKS = ("u", "g")
SHARED = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}
ALIGNMENT, ALLOCATION = "synergy/alignment/u/g", "allocation"


def run(logger, tmp_path):
    watch = td.SynergyMonitor(TASKS, every_n_steps=1, window=4, history=str(tmp_path / "synergy.jsonl"))
    made = trainer(td.TokenDrop(SHARED), watch, td.AttentionAllocation(), logger=logger, log_every_n_steps=1)
    made.fit(Validated(), loader(6), Batches(batch(7, "u"), batch(8, "g")))
    return made


def is_picture(path):
    """Whether a file is a picture that shows something."""
    with Image.open(path) as found:
        return min(found.size) > 200 and len(found.convert("RGB").getcolors(2**24)) > 20


def test_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run(TensorBoardLogger(tmp_path), tmp_path)
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    held = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    held.Reload()
    assert set(held.Tags()["images"]) == {ALIGNMENT, ALLOCATION}
    # Both tasks have two batches from step 4 on; the end is the first occasion for a picture of fewer than 4 events.
    assert [one.step for one in held.Images(ALIGNMENT)] == [6]
    assert [one.step for one in held.Images(ALLOCATION)] == [6]
    (tmp_path / "map.png").write_bytes(held.Images(ALIGNMENT)[0].encoded_image_string)
    assert is_picture(tmp_path / "map.png")
    assert {"allocation/u/image", "allocation/g/output"} <= set(held.Tags()["scalars"])
    assert len([name for name in held.Tags()["scalars"] if name.startswith("allocation/")]) == 8


def test_wandb_offline(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    run(WandbLogger(save_dir=tmp_path, offline=True, name="run"), tmp_path)
    wandb.finish()
    pictures = {path.as_posix().split("images/")[1].rsplit("_", 2)[0]: path for path in tmp_path.rglob("*.png")}
    assert set(pictures) == {ALIGNMENT, ALLOCATION}
    assert all(map(is_picture, pictures.values()))


@pytest.fixture(scope="module")
def mlflow_logger(tmp_path_factory):
    """Its database is made once, by some thirty migrations."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        folder = tmp_path_factory.mktemp("mlflow")

        def made(artifacts):
            uri = f"sqlite:///{folder / 'mlflow.db'}"
            return MLFlowLogger(artifacts.name, tracking_uri=uri, artifact_location=(artifacts / "artifacts").as_uri())

        yield made


def test_mlflow_offline(tmp_path, mlflow_logger):
    run(mlflow_logger(tmp_path), tmp_path)
    found = {path.parent.as_posix().split("/artifacts/")[-1]: path for path in tmp_path.rglob("*.png")}
    assert set(found) == {ALIGNMENT, ALLOCATION}
    assert found[ALIGNMENT].name == "00000006.png"
    assert all(map(is_picture, found.values()))


def loss(module, given):
    """Its gradient is the batch's own vector, so that every product is known."""
    return 5 + (module.model.lm_head.weight[0, :2] * given["vector"]).sum()


# Two samples of u, then two of g: without noise; norms that noise makes small, and one that it makes negative.
KNOWN = [(1.0, 0.0), (1.0, 0.0), (0.6, 0.8), (0.6, 0.8)]  # .6
OUTSIDE = [(1.0, 0.0), (0.1, 1.0), (1.0, 0.0), (0.1, 1.0)]  # (1 + .1 + .1 + 1.01) / 4 / .1 = 5.525
NEGATIVE = [(1.0, 0.0), (-1.0, 0.1), (1.0, 0.0), (1.0, 0.0)]


def measured(*events, callbacks=(), folder, window=1, **options):
    """A run whose monitor makes one event of each four vectors."""
    batches = [
        batch(0, "uugg"[at]) | {"vector": torch.tensor(vector)}
        for vectors in events
        for at, vector in enumerate(vectors)
    ]
    watch = td.SynergyMonitor(
        TASKS, every_n_steps=4, window=window, loss=loss, affinity=0.1, history=str(folder / "synergy.jsonl")
    )
    watch.next_step = 4
    made = trainer(watch, *callbacks, log_every_n_steps=1, **options)
    made.fit(Validated(), Batches(*batches), Batches(batch(9)))
    return made


@pytest.mark.parametrize("bad", [OUTSIDE, NEGATIVE], ids=["outside", "negative"])
def test_what_is_unknown_is_not_the_last_value(bad, tmp_path):
    made = measured(KNOWN, bad, logger=CSVLogger(tmp_path, "", ""), folder=tmp_path)
    with (tmp_path / "metrics.csv").open() as file:
        rows = {int(row["step"]): row for row in csv.DictReader(file) if row[ALIGNMENT]}
    assert float(rows[3][ALIGNMENT]) == pytest.approx(0.6)
    assert math.isnan(float(rows[7][ALIGNMENT]))
    assert math.isfinite(made.callback_metrics["synergy/conflict/u/g"])
    assert not {ALIGNMENT + "/low", ALIGNMENT + "/high"} & made.callback_metrics.keys()  # there was no interval


def test_an_interval_that_is_gone_is_not_the_last_one(tmp_path):
    made = measured(KNOWN, KNOWN, KNOWN, window=3, folder=tmp_path / "known").callback_metrics
    assert [float(made[ALIGNMENT + end]) for end in ("", "/low", "/high")] == pytest.approx([0.6] * 3)
    made = measured(KNOWN, KNOWN, KNOWN, *[OUTSIDE] * 3, window=3, folder=tmp_path).callback_metrics
    assert all(math.isnan(made[ALIGNMENT + end]) for end in ("", "/low", "/high"))


def test_the_history_keeps_the_raw_parts(tmp_path):
    measured(KNOWN, OUTSIDE, folder=tmp_path)
    first, second = map(json.loads, (tmp_path / "synergy.jsonl").read_text().splitlines())
    assert first["alignment"]["u/g"]["known"]
    assert second["alignment"]["u/g"]["value"] == pytest.approx(5.525)
    assert not second["alignment"]["u/g"]["known"]
    assert not second["alignment"]["u/g"]["resolved"]
    assert second["products"] == pytest.approx({"u/u": 0.1, "g/g": 0.1, "u/g": 2.21 / 4})


def test_a_gap_is_unknown_too(tmp_path):
    with pytest.warns(td.SynergyWarning, match="left out step 8: the loss of task 'u' is"):
        made = measured(KNOWN, [(math.nan, 0.0)] * 4, folder=tmp_path)
    kinds = ("alignment", "conflict", "magnitude", "affinity")
    found = {name: float(made.callback_metrics[f"synergy/{name}/u/g"]) for name in kinds}
    assert all(map(math.isnan, found.values())), found


def test_mlflows_store_of_files_is_refused(tmp_path):
    logger = MLFlowLogger.__new__(MLFlowLogger)  # which would ask for leave to use it
    logger._tracking_uri = "file:" + str(tmp_path)
    module, watch = Validated(), td.SynergyMonitor(TASKS)
    with pytest.raises(td.UnsupportedError, match=r"store of files.*'synergy/alignment/u/g' beside .*/low.*sqlite"):
        watch.setup(trainer(logger=logger), module, "fit")


def test_tensorboard_and_mlflow_take_what_is_unknown(tmp_path, mlflow_logger):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    loggers = [TensorBoardLogger(tmp_path), mlflow_logger(tmp_path)]
    measured(KNOWN, OUTSIDE, logger=loggers, folder=tmp_path)
    held = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent))
    held.Reload()
    values = {one.step: one.value for one in held.Scalars(ALIGNMENT)}
    said = loggers[1].experiment.get_metric_history(loggers[1].run_id, ALIGNMENT)
    for found in (values, {one.step: one.value for one in said}):
        assert found[3] == pytest.approx(0.6)
        assert math.isnan(found[7])


def test_a_checkpoint_is_never_best_where_the_figure_is_unknown(tmp_path):
    saver = ModelCheckpoint(tmp_path, monitor=ALIGNMENT, mode="max", every_n_train_steps=4, filename="{step}")
    measured(KNOWN, OUTSIDE, callbacks=[saver], enable_checkpointing=True, folder=tmp_path)
    assert saver.best_model_score == pytest.approx(0.6)
    assert saver.best_model_path.endswith("step=4.ckpt")


def test_early_stopping_on_such_a_figure_is_warned_of(tmp_path):
    stop = EarlyStopping(monitor=ALIGNMENT, mode="max")
    with pytest.warns(td.NoEffectWarning, match=r"EarlyStopping\(monitor='synergy/alignment/u/g'\) ends training"):
        measured(OUTSIDE, callbacks=[stop], max_epochs=2, folder=tmp_path)
    goes_on = EarlyStopping(monitor=ALIGNMENT, mode="max", check_finite=False)
    made = measured(OUTSIDE, callbacks=[goes_on], max_epochs=2, folder=tmp_path)
    assert made.global_step == 8


def test_a_logger_that_takes_no_figure_costs_no_drawing(tmp_path):
    def draw():
        raise AssertionError("drawn")

    log_figure(trainer(logger=CSVLogger(tmp_path)), "name", draw)
    log_figure(trainer(), "name", draw)


def test_other_ranks_draw_nothing(tmp_path, monkeypatch):
    made = trainer(logger=TensorBoardLogger(tmp_path))
    monkeypatch.setattr(type(made.strategy), "global_rank", 1, raising=False)
    monkeypatch.setattr(type(made.strategy), "is_global_zero", False)
    log_figure(made, "name", lambda: pytest.fail("drawn"))
