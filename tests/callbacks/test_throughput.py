"""FLOPs that are spent, where Lightning's ThroughputMonitor looks for them.

Shape letters: none.
"""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ThroughputMonitor
from lightning.pytorch.loggers import CSVLogger
from lit_llama import LIGHTNING_WARNS, Batches, Lit, Validated, batch, llama, trainer
from torch import nn

import tokendrop as td
from tokendrop.analysis.flops import counter

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
METHODS = {"u": td.HiMix("1:"), "g": td.HMGen("1:3")}


def reported(method, backward=True):
    """Of a batch of two samples, by `td.flops`; the image stands behind three of eight text tokens."""
    report = td.flops(llama(), method, text=8, image=8, before=3, multiple=1, backward=backward)
    return 2 * report.dropped


class Seen(L.Callback):
    """What the module says at the end of each batch."""

    def __init__(self):
        self.training, self.evaluated = [], []

    def on_train_batch_end(self, trainer, module, *_):
        self.training.append(module.flops_per_batch)

    def on_validation_batch_end(self, trainer, module, *_):
        self.evaluated.append(module.flops_per_batch)


def fit(module, *batches, methods=METHODS, schedule=None, held=None, callbacks=(), **options):
    seen = Seen()
    drop = td.TokenDrop(methods, schedule=schedule, multiple=1)
    run = trainer(drop, seen, *callbacks, **options)
    run.fit(module, Batches(*batches), None if held is None else Batches(*held))
    return seen


def test_they_follow_batch_and_stage():
    module = Validated()
    seen = fit(module, batch(0, "u"), batch(1, "g"), held=[batch(2, "u")], num_sanity_val_steps=0)
    assert seen.training == [reported(METHODS["u"]), reported(METHODS["g"])]
    assert seen.evaluated == [reported(METHODS["u"], backward=False)]
    assert not hasattr(module, "flops_per_batch")


def test_they_follow_the_schedule():
    seen = fit(Lit(), *[batch(seed) for seed in range(4)], schedule=td.Schedule(start=1, dense_tail=1))
    dense = 2 * td.flops(llama(), METHODS["u"], text=8, image=8, backward=True).dense
    assert seen.training == [dense, reported(METHODS["u"]), reported(METHODS["u"]), dense]


@pytest.mark.parametrize(
    "method", [td.HiMix("1:"), td.HMGen("1:3"), td.FastV(1), td.MixtureOfDepths("1::2", 0.5), td.Sprint("1:3")], ids=str
)
def test_they_are_what_a_run_counts(method):
    class Counting(Lit):
        def training_step(self, given, index):
            with counter() as self.forward_count:
                return super().training_step(given, index)

        def backward(self, loss, *args, **kwargs):
            with counter() as self.backward_count:
                super().backward(loss, *args, **kwargs)

    module = Counting()
    seen = fit(module, batch(0), methods={"u": method})
    assert seen.training == [module.forward_count.get_total_flops() + module.backward_count.get_total_flops()]


def test_the_throughput_monitor_logs_them(tmp_path):
    rows = []

    class Log(CSVLogger):
        def log_metrics(self, metrics, step=None):
            rows.append(metrics)

    watch = ThroughputMonitor(batch_size_fn=lambda given: len(given["input_ids"]), window_size=3)
    options = {"logger": Log(tmp_path), "log_every_n_steps": 1, "callbacks": [watch]}
    fit(Lit(), batch(0, "u"), batch(1, "g"), batch(2, "u"), **options)
    (row,) = [row for row in rows if "train/device/flops_per_sec" in row]
    times = [row["train/time"] for row in rows if "train/time" in row]
    spent = reported(METHODS["g"]) + reported(METHODS["u"])  # of the window but for its first batch
    assert row["train/device/flops_per_sec"] == pytest.approx(spent / (times[2] - times[0]))
    assert row["train/device/samples_per_sec"] == pytest.approx(4 / (times[2] - times[0]))


class Attribute(Lit):
    def __init__(self):
        super().__init__()
        self.flops_per_batch = 7


class Property(Lit):
    flops_per_batch = property(lambda self: 7)


class Later(Lit):
    def training_step(self, given, index):
        self.flops_per_batch = 7
        return super().training_step(given, index)


@pytest.mark.parametrize("kind", [Attribute, Property, Later])
def test_the_users_own_stay(kind):
    module = kind()
    assert fit(module, batch(0), batch(1)).training == [7, 7]
    assert module.flops_per_batch == 7


def test_what_nobody_knows_is_none():
    class Step(Lit):
        def training_step(self, given, index):
            layout = td.TokenLayout(given["a"]["image_mask"], "u", labels=given["a"]["labels"])
            with td.handle(self).layout(layout):
                return super().training_step(given["a"], index)

    module = Step()
    assert fit(module, {"a": batch(0), "b": batch(1)}).training == [None]


def test_an_exception_takes_them_away():
    class Failing(Lit):
        def training_step(self, given, index):
            raise RuntimeError("in the step")

    module = Failing()
    with pytest.raises(RuntimeError, match="in the step"):
        fit(module, batch(0))
    assert not hasattr(module, "flops_per_batch")


def stacked(mlp):
    mlp.register_parameter("experts", nn.Parameter(torch.ones(2, 2, 2)))


def listed(mlp):
    """As models of remote code keep them; only some run on a row."""
    mlp.experts = nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.SiLU()) for _ in range(2))


def named(mlp):
    mlp.experts = nn.ModuleDict({"text": nn.Linear(2, 2), "image": nn.Linear(2, 2)})


@pytest.mark.parametrize("experts", [stacked, listed, named])
def test_experts_have_no_flops_ratio_rather_than_a_wrong_one(experts):
    module = Lit()
    experts(module.model.model.layers[0].mlp)
    drop, seen = td.TokenDrop(METHODS), Seen()
    run = trainer(drop, seen)
    run.fit(module, Batches(batch(0)))
    assert seen.training == [None]
    assert {name for name in run.logged_metrics if name.startswith("tokendrop/")} == {"tokendrop/kept_ratio/u"}


@pytest.mark.parametrize("experts", [stacked, listed, named])
def test_what_experts_spend_is_refused_by_formula(experts):
    model = llama()
    experts(model.model.layers[1].mlp)
    with pytest.raises(td.UnsupportedError, match=r"LlamaDecoderLayer holds .*experts.*; count a run of your model"):
        td.flops(model, METHODS["u"], text=8, image=8)
    with pytest.raises(td.UnsupportedError, match=r"no recipe for understanding in LlamaForCausalLM: .*experts"):
        td.recipe(model, "understanding", 0.7)


def test_lists_without_linears_are_no_experts():
    model = llama()
    model.model.layers[1].mlp.norms = nn.ModuleList(nn.LayerNorm(2) for _ in range(2))
    assert td.flops(model, METHODS["u"], text=8, image=8) == td.flops(llama(), METHODS["u"], text=8, image=8)
