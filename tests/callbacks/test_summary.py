"""What is seen at the start of a fit: the table, the same in repr, and methods among the hyperparameters.

Shape letters: none.
"""

import re

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lit_llama import INNER, LAYERS, LIGHTNING_WARNS, WIDTH, Batches, Lit, batch, llama, trainer

import tokendrop as td
from tokendrop.callbacks.summary import summary_notes, summary_rows

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS, "ignore:The ..noload.. loader strategy")
METHODS = {"u": td.HiMix("1:"), "g": td.HMGen("1:4:2"), "[d]": None}
LINES = [
    "u: HiMix(layers='1:', separate='none'), CONTEXT in 1:4, 25% of image token-layers computed",
    "g: HMGen(shallow='1:4:2', separate='none'), BYPASS in 1:4:2, 50% of image token-layers computed",
    "[d]: dense",
]


def ratio(context):
    """FLOPs of 576 image and then 64 text tokens in a layer, 576 of them not computing, over a dense layer and head."""
    d, kv, all_, text = WIDTH, WIDTH // 2, 640, 64
    row = 3 * 2 * (2 * d * d + 2 * d * kv + 3 * d * INNER)
    dense, head = all_ * row + all_ * all_ * 14 * d, 3 * all_ * 2 * d * 50
    seen = all_ if context else text
    light = text * row + (576 * 3 * 2 * 2 * d * kv if context else 0) + text * seen * 14 * d
    lights = 3 if context else 2
    return (lights * light + (LAYERS - lights) * dense + head) / (LAYERS * dense + head)


def test_the_rows():
    drop = td.apply(llama(), METHODS, multiple=1)
    u, g, d = summary_rows(drop)
    assert u == ("u", "HiMix(layers='1:', separate='none')", "CONTEXT in 1:4", "25%", f"{ratio(True):.0%}")
    assert g == ("g", "HMGen(shallow='1:4:2', separate='none')", "BYPASS in 1:4:2", "50%", f"{ratio(False):.0%}")
    assert d == ("[d]", "dense", "", "100%", "100%")


@pytest.mark.parametrize(
    ("method", "words", "share"),
    [
        (
            td.PyramidDrop((1, 2, 3)),
            "GONE in 1 but for 288 of 576, GONE in 2 but for 144 of 576, GONE in 3 but for",
            47,
        ),
        (td.HiDrop(1, (2,), (0.5,), 3), "BYPASS in 0, GONE in 2 but for 288 of 576, GONE in 3, 38%", 38),
        (td.RandomLTD(keep=0.25), "BYPASS in 1:3 but for 144 of 576, 62% of image token-layers computed (training", 62),
        (td.HiMix((0, 1, 3)), "CONTEXT in 0 1 3", 25),
    ],
    ids=str,
)
def test_what_image_tokens_do_in_words(method, words, share):
    said = repr(td.apply(llama(), method))
    assert f"any task: {method}, {words}" in said
    assert f", {share}% of image token-layers computed" in said


def test_repr_says_the_same_of_callback_and_handle():
    drop = td.TokenDrop(METHODS, schedule=td.Schedule(start=5))
    before = repr(drop)
    assert before.startswith("TokenDrop(not applied yet, Schedule(start=5")
    assert [line.split(",")[0] for line in before.splitlines()[1:-1]] == [
        "  u: HiMix(layers='1:'", "  g: HMGen(shallow='1:4:2'", "  [d]: dense",
    ]  # fmt: skip
    module = Lit()
    trainer(drop, max_steps=1).fit(module, Batches(batch(0)))
    for one in (drop, td.handle(module), module):
        lines = [line.strip() for line in repr(one).splitlines()]
        assert all(line in lines for line in LINES), one
    assert "model.model.layers: 4 x LlamaDecoderLayer, strength 0.00" in repr(td.handle(module))


def fit(**options):
    trainer(td.TokenDrop(METHODS, schedule=options.pop("schedule", None)), max_steps=1, **options).fit(
        Lit(), Batches(batch(0))
    )


def test_the_table_is_printed_where_lightning_prints_its_own(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    fit(enable_model_summary=True, schedule=td.Schedule(steps=3))
    shown = capsys.readouterr().out
    found = {cells[0]: cells for line in shown.splitlines() if len(cells := re.split(r"\s*[│┃]\s*", line)[1:-1]) == 5}
    drop = td.apply(llama(), METHODS)
    assert [tuple(found[task]) for task in ("u", "g", "[d]")] == summary_rows(drop)
    assert "576 image and 64 text tokens" in shown
    assert "Schedule(start=0, steps=3" in shown
    assert "any other task run dense" in shown
    fit(enable_model_summary=False)
    assert "TokenDrop" not in capsys.readouterr().out


def test_other_ranks_print_nothing_and_log_nothing(capsys, tmp_path, monkeypatch):
    from tokendrop.callbacks.summary import log_methods, show_summary

    made = trainer(ModelSummary(), logger=CSVLogger(tmp_path))
    module = Lit()
    drop = td.apply(module, METHODS)
    monkeypatch.setattr(type(made.strategy), "is_global_zero", False)
    monkeypatch.setattr(CSVLogger, "log_hyperparams", lambda *_: pytest.fail("logged"))
    show_summary(made, drop, None)
    log_methods(made, module, METHODS, None)
    assert capsys.readouterr().out == ""


def test_the_notes_say_what_is_refused_and_what_runs_dense():
    model = llama()
    model.config._attn_implementation = "eager"
    notes = "\n".join(summary_notes(td.apply(model, td.RandomLTD()), None))
    assert "Evaluation runs dense under RandomLTD" in notes
    assert "Refused" not in notes
    drop = td.apply(llama(), td.HMGen("1:3"))
    drop.decoder_layers[0].register_parameter("experts", torch.nn.Parameter(torch.ones(2, 2, 2)))
    assert "FLOPs are unknown: LlamaDecoderLayer holds weights of more than two dimensions" in "\n".join(
        summary_notes(drop, None)
    )
    assert summary_rows(drop)[0][-1] == "unknown"


class Saved(Lit):
    """A module with hyperparameters of its own, one of which has our name."""

    def __init__(self, tokendrop="mine", width=3):
        super().__init__()
        self.save_hyperparameters()


WRITTEN = td.to_config(METHODS, td.Schedule(start=2))


def fit_logged(logger, module, methods=METHODS):
    run = trainer(td.TokenDrop(methods, schedule=td.Schedule(start=2)), max_steps=1, logger=logger, log_every_n_steps=1)
    run.fit(module, Batches(batch(0)))


@pytest.mark.parametrize("kind", [CSVLogger, TensorBoardLogger])
def test_methods_are_hyperparameters_beside_the_users_own(kind, tmp_path):
    fit_logged(kind(tmp_path, "a", "0"), Lit())
    assert yaml.safe_load((tmp_path / "a/0/hparams.yaml").read_text()) == {"tokendrop": WRITTEN}
    fit_logged(kind(tmp_path, "b", "0"), Saved())
    found = yaml.safe_load((tmp_path / "b/0/hparams.yaml").read_text())
    assert found == {"tokendrop": "mine", "width": 3, "tokendrop_": WRITTEN}
    assert td.from_config(found["tokendrop_"]) == (METHODS, td.Schedule(start=2))


def test_tensorboard_shows_all_of_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    fit_logged(TensorBoardLogger(tmp_path), Saved())
    held = EventAccumulator(str(next(tmp_path.rglob("events.out.*")).parent))
    held.Reload()
    content = held.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["width"].number_value == 3
    assert shown["tokendrop_/methods/u/class_path"].string_value == "tokendrop.HiMix"


def test_wandb_and_mlflow_take_them(tmp_path, monkeypatch):
    for name, value in {"MODE": "offline", "SILENT": "true", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    import wandb

    board = WandbLogger(save_dir=tmp_path, offline=True)
    store = MLFlowLogger("a", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}", artifact_location=tmp_path.as_uri())
    methods = {"u": METHODS["u"], "g": METHODS["g"]}  # MLflow takes no brackets in a name
    fit_logged([board, store], Lit(), methods)
    assert dict(board.experiment.config)["tokendrop"] == td.to_config(methods, td.Schedule(start=2))
    wandb.finish()
    said = store.experiment.get_run(store.run_id).data.params
    assert said["tokendrop/methods/g/init_args/shallow"] == "1:4:2"
    assert said["tokendrop/schedule/start"] == "2"


def test_a_logger_that_refuses_them_ends_nothing(tmp_path):
    class Refusing(CSVLogger):
        def log_hyperparams(self, params):
            raise ValueError("no such parameter")

    with pytest.warns(td.NoEffectWarning, match="Refusing took no methods as hyperparameters: no such parameter"):
        fit_logged(Refusing(tmp_path), Lit())


def test_a_method_that_is_no_plain_data_is_named(tmp_path):
    drop, logger = td.TokenDrop(td.Drop("1:3", 0.5, score=score)), CSVLogger(tmp_path, "a", "0")
    trainer(drop, max_steps=1, logger=logger, log_every_n_steps=1).fit(Lit(), Batches(batch(0)))
    found = yaml.safe_load((tmp_path / "a/0/hparams.yaml").read_text())["tokendrop"]
    assert found["methods"]["init_args"]["score"]["not_plain"].endswith(".score")


def score(scoring):
    return scoring.states.norm(dim=-1)
