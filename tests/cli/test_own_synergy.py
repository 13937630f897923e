"""`tokendrop synergy` on a user's own module: its runs are those of a written-out trainer, its figures by hand."""

import json
import sys
import warnings

import lightning as L
import pytest
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.cli import app
from tokendrop.cli.source import read_run

MODULE = """
import lightning as L
import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
import tokendrop as td

SAID = []

def batch(task, seed):
    ids = torch.randint(1, 20, (2, 12), generator=torch.Generator().manual_seed(seed + 100 * (task == "draw")))
    image = torch.zeros(2, 12, dtype=torch.bool)
    image[:, 2:8] = True
    labels = ids.clone()
    labels[:, :9] = -100
    return {"input_ids": ids, "image_mask": image, "labels": labels, "task": task}

class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_hidden_layers=4)
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes))

    def loss(self, batch):
        return self.model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss

    def training_step(self, batch, batch_idx):
        return self.loss(batch)

    def evaluate(self, stage, batch):
        loss = self.loss(batch)
        self.log(f"{stage}/{batch['task']}/nll", loss, batch_size=2)
        self.log(f"{stage}/{batch['task']}/accuracy", -loss, batch_size=2)
        self.log(f"{stage}/{batch['task']}/margin", loss, batch_size=2)
        self.log(f"{stage}_loss", loss, batch_size=2)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.evaluate("test", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

class Validated(Module):
    test_step = L.LightningModule.test_step

    def validation_step(self, batch, batch_idx):
        self.evaluate("val", batch)

class Data(L.LightningDataModule):
    def __init__(self, tasks, seed):
        super().__init__()
        self.tasks, self.seed = tasks, seed

    def loader(self, steps, seed):
        batches = [batch(task, step + seed) for step in range(steps) for task in self.tasks]
        return DataLoader(batches, batch_size=None)

    def train_dataloader(self):
        return self.loader(3, 10 * self.seed)

    def val_dataloader(self):
        return self.loader(1, 999)

    test_dataloader = val_dataloader

def made(tasks, methods, seed, module=Module, callbacks=lambda methods: []):
    SAID.append((tasks, methods, seed))
    return module(), Data(tasks, seed), {"max_epochs": 1, "accelerator": "cpu", "callbacks": callbacks(methods)}

def drops(tasks, methods, seed): return made(tasks, methods, seed, callbacks=lambda methods: td.TokenDrop(methods))
def validated(tasks, methods, seed): return made(tasks, methods, seed, Validated)
def ignores(tasks, methods, seed): return made(("vqa", "draw"), methods, seed)
def others(tasks, methods, seed): return made(tasks, methods, seed, callbacks=lambda _: [td.TokenDrop(td.HMGen(":2"))])
def dense(tasks, methods, seed):
    return made(tasks, methods, seed, callbacks=lambda _: [td.TokenDrop({"vqa": None, "draw": None})])
def untested(tasks, methods, seed): return L.LightningModule(), None, {}
def one_of_two(tasks, methods, seed): return Module(), Data(tasks, seed)
def no_mapping(tasks, methods, seed): return Module(), Data(tasks, seed), 3
def argument(tasks, methods, seed): return Module(), Data(tasks, seed), {"epochs": 1}
def raises(tasks, methods, seed): raise ValueError("boom")
def too_few(tasks, methods): return made(tasks, methods, 0)
def nothing_trained(tasks, methods, seed): return Module(), Data(tasks, seed), {"max_steps": 0, "accelerator": "cpu"}
"""
METHODS = ["--method", "vqa=HiMix", "--method", "draw=HMGen('1:3')"]
NAMES = ["vqa alone", "draw alone", "joint, dense", "joint, vqa=HiMix(), draw=HMGen(shallow='1:3')"]
REFUSED = {
    "others": ("MethodError", "give it the methods that the function gets, or leave it out"),
    "dense": ("MethodError", "give it the methods that the function gets, or leave it out"),
    "untested": ("UnsupportedError", "has neither a test_step with a test_dataloader nor"),
    "one_of_two": ("SourceError", "returned (Module, Data); expected (a LightningModule"),
    "no_mapping": ("SourceError", "returned (Module, Data, int); expected"),
    "argument": ("SourceError", "raised TypeError: Trainer.__init__() got an unexpected keyword argument 'epochs'"),
    "raises": ("SourceError", "raised ValueError: boom (users_tasks.py, line"),
    "too_few": ("SourceError", "expected a function of (tasks, methods, seed); too many positional arguments"),
    "nothing_trained": ("UnsupportedError", "the Trainer ran no training batch"),
    "other": ("SourceError", "has no attribute 'other'"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    (tmp_path / "users_tasks.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    yield
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    monkeypatch.delenv("PL_SEED_WORKERS", raising=False)
    sys.modules.pop("users_tasks", None)


def run(name, *given, methods=METHODS, seeds=1):
    return CliRunner().invoke(app, ["synergy", f"users_tasks:{name}", *methods, "--seeds", str(seeds), *given])


def by_hand(tasks, methods, seed):
    """The metrics of a trainer written out."""
    L.seed_everything(seed, verbose=False)
    module, data, arguments = read_run("users_tasks:made", tasks, dict.fromkeys(tasks), seed)
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callbacks = [td.TokenDrop(methods)] if methods else []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = L.Trainer(**quiet | arguments | {"callbacks": callbacks})
        trainer.fit(module, datamodule=data)
        (found,) = trainer.test(module, datamodule=data, verbose=False)
    return {key: value for key, value in found.items() if not key.startswith("tokendrop/")}


def test_the_runs_are_those_of_a_written_out_trainer_and_the_figures_by_hand(tmp_path):
    result = run("made", "--json", seeds=2)
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    runs = {(row["name"], row["seed"]): row for row in said["runs"]}
    assert list(runs) == [(name, seed) for seed in (0, 1) for name in NAMES]
    both = ("vqa", "draw")
    for seed in (0, 1):
        wanted = by_hand(both, {"vqa": td.HiMix(), "draw": td.HMGen("1:3")}, seed)
        assert runs[NAMES[3], seed]["metrics"] == pytest.approx(wanted, rel=1e-5)
        assert runs[NAMES[2], seed]["metrics"] == pytest.approx(by_hand(both, {}, seed), rel=1e-5)
        assert runs[NAMES[0], seed]["metrics"] == pytest.approx(by_hand(("vqa",), {}, seed), rel=1e-5)
    vqa, draw = td.HiMix(), td.HMGen("1:3")
    assert sys.modules["users_tasks"].SAID[:4] == [
        (("vqa",), {"vqa": None}, 0),
        (("draw",), {"draw": None}, 0),
        (both, {"vqa": None, "draw": None}, 0),
        (both, {"vqa": vqa, "draw": draw}, 0),
    ]
    found = {(one["run"], one["metric"]): one for one in said["results"]}
    assert {one["metric"] for one in said["results"]} == {
        f"test/{task}/{kind}" for task in both for kind in ("nll", "accuracy")
    }
    for name in NAMES[2:]:
        for task, (kind, sign) in zip(both, (("nll", -1), ("accuracy", 1)), strict=True):
            metric = f"test/{task}/{kind}"
            gains = [
                sign * (runs[name, seed]["metrics"][metric] - runs[f"{task} alone", seed]["metrics"][metric])
                for seed in (0, 1)
            ]
            one = found[name, metric]
            assert one["synergy"]["values"] == pytest.approx(gains)
            # Student's t of two values: 12.706 * |a - b| / 2.
            half = 12.7062 * abs(gains[0] - gains[1]) / 2
            assert one["synergy"]["high"] - one["synergy"]["mean"] == pytest.approx(half, rel=1e-4)
    assert found["vqa alone", "test/vqa/nll"]["synergy"] is None
    assert found[NAMES[2], "test/vqa/nll"]["flops_ratio"]["values"] == [1.0, 1.0]
    assert 0.3 < found[NAMES[3], "test/vqa/nll"]["flops_ratio"]["mean"] < 0.9
    assert "margin" in said["notes"][1]
    assert (tmp_path / "synergy" / "report.html").read_text().count("joint, dense") >= 2


def test_a_callback_of_the_functions_own_is_the_same():
    ours, theirs = (json.loads(run(one, "--json", "--out", one).stdout)["runs"] for one in ("made", "drops"))
    assert [row["metrics"] for row in ours] == [row["metrics"] for row in theirs]


def test_a_broken_study_goes_on_and_prints_a_table(tmp_path):
    assert run("made").exit_code == 0
    path = tmp_path / "synergy" / "runs.jsonl"
    held = path.read_text().splitlines(keepends=True)
    path.write_text("".join([held[0], held[2], held[3], held[1][:40]]))
    result = run("made")
    assert result.exit_code == 0, result.output
    assert result.stderr.startswith("1 of 1: draw alone, seed 0")
    shown = " ".join(result.stdout.split())
    assert "test/vqa/nll" in shown
    assert "Careful" not in shown
    assert "one seed, so that nothing says how sure they are" in shown
    # Rows of another function are not taken.
    assert run("drops").stderr.startswith("1 of 4")


def test_qualities_may_be_stated_and_validation_stands_in_for_a_test():
    given = ("--higher", "val/vqa/margin", "--lower", "val/draw/nll", "--json")
    said = json.loads(run("validated", *given).stdout)
    assert {(one["metric"], one["better"]) for one in said["results"]} == {
        ("val/vqa/margin", "higher"),
        ("val/draw/nll", "lower"),
    }
    assert {row["stage"] for row in said["runs"]} == {"validate"}
    unknown = run("validated", "--higher", "val/vqa/nope")
    assert unknown.exit_code == 1
    assert unknown.stderr.strip().splitlines()[-1].startswith("BatchError: found no metric ['val/vqa/nope'] of a task")


def test_a_function_that_ignores_its_tasks_is_told():
    result = run("ignores")
    assert "does users_tasks:ignores train only the tasks that it is given?" in " ".join(result.stdout.split())


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_one_line(tmp_path, name):
    result = run(name)
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code == 1
    line = result.stderr.strip().splitlines()[-1]
    error, message = REFUSED[name]
    assert line.startswith(f"{error}: ")
    assert message in line
    assert result.stdout == ""
    assert not (tmp_path / "synergy" / "report.html").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["synergy", "--task", "u"], "--task: for a function of your own, and none is named"),
        (["synergy", "users_tasks:made", "--quick"], "--quick: for the demo's study"),
        (["synergy", "users_tasks:made", "--more-seeds", "1"], "--more-seeds: for the demo's study"),
        (["synergy", "users_tasks:made", "--method", "u=HiMix"], "tasks: expected two or more, each once; found ['u']"),
        (["synergy", "users_tasks:made", "--task", "u", "--task", "u"], "each once; found ['u', 'u']"),
        (
            ["synergy", "users_tasks:made", "--task", "u", "--task", "g", "--method", "v=HiMix"],
            "found methods for ['v'], which are none of the tasks ['u', 'g']",
        ),
    ],
)
def test_options_that_make_no_sense(tmp_path, given, message):
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 1
    assert result.stderr.startswith("MethodError: ")
    assert message in result.stderr
    assert not (tmp_path / "synergy").exists()


def test_without_options_tasks_and_methods_are_the_papers():
    from tokendrop.cli.synergy import _asked

    names = ("understanding", "generation")
    assert _asked([], []) == (names, [dict(zip(names, (td.HiMix(), td.HMGen("1:-1:2")), strict=True))])
    assert _asked(["HiMix"], []) == (names, [td.HiMix()])
    assert _asked([], ["a", "b"]) == (("a", "b"), [])
