"""What a user's own metrics say: which are a task's, which way is better, and figures by hand."""

import lightning as L
import pytest
import torch
from kernels_stand_in import kernels, with_attention
from lightning.pytorch.callbacks import LambdaCallback
from transformers import LlamaConfig, LlamaForCausalLM

import tokendrop as td
from tokendrop.errors import BatchError
from tokendrop.study.intervals import interval
from tokendrop.study.own import JOINT, Counted, OwnStudy
from tokendrop.study.own_summary import direction, notes, qualities, summarised, table, task_of

STUDY = OwnStudy("mine:made", lambda *_: None, ("vqa", "vqa_long"), [{"vqa": td.HiMix()}])
DROPPED = "joint, vqa=HiMix()"


def row(name, seed, flops=100.0, **metrics):
    tasks = [name.removesuffix(" alone")] if name.endswith("alone") else list(STUDY.tasks)
    made = {"name": name, "seed": seed, "tasks": tasks, "flops": flops, "steps": 6, "stage": "test", "seconds": 1.0}
    return made | {"metrics": metrics, "batches_counted": 4}


def rows(seeds=(0, 1, 2)):
    for seed in seeds:
        yield row("vqa alone", seed, acc_vqa=0.5 + seed / 10)
        yield row("vqa_long alone", seed, loss_vqa_long=2.0)
        yield row(JOINT, seed, 120.0, acc_vqa=0.7 + seed / 10, loss_vqa_long=1.5)
        yield row(DROPPED, seed, 90.0, acc_vqa=0.4 + seed / 5, loss_vqa_long=2.5)


@pytest.mark.parametrize(
    ("metric", "task", "better"),
    [
        ("test/vqa/accuracy", "vqa", 1),
        ("vqa_acc", "vqa", 1),
        ("vqa_acc_epoch/dataloader_idx_0", "vqa", 1),
        ("acc/vqa_long", "vqa_long", 1),
        ("vqa/MulticlassF1Score", "vqa", 1),
        ("vqa/BinaryAccuracy", "vqa", 1),
        ("val_loss_vqa", "vqa", -1),
        ("vqa/fid_score", "vqa", -1),
        ("vqa/error_rate", "vqa", -1),
        ("vqa/Perplexity", "vqa", -1),
        ("vqa/accuracy_se", "vqa", 0),
        ("vqa/margin", "vqa", 0),
        ("vqa/accuracy_loss", "vqa", 0),
        ("vqa/tokens", "vqa", 0),
        ("vqa/mIoU", "vqa", 1),
        ("vqa/PSNR", "vqa", 1),
        ("vqa/ExactMatch", "vqa", 1),
        ("vqa/MeanAbsoluteError", "vqa", -1),
        ("vqa/TokenCrossEntropy", "vqa", -1),
        *(
            (f"test/vqa/{word}", "vqa", 0)
            for word in (
                "inaccuracy",
                "Inaccuracy",
                "disagreement",
                "mismatch",
                "exact_mismatch",
                "inexact",
                "imprecision",
                "insensitivity",
                "MulticlassInaccuracy",
            )
        ),
        ("test_loss", None, -1),
        ("vqaacc", None, 0),
        ("vqa_to_vqa_long/acc", None, 1),
    ],
)
def test_whose_a_metric_is_and_which_way_is_better(metric, task, better):
    owner, words = task_of(metric, STUDY.tasks)
    assert owner == task
    assert direction(words) == better


def test_figures_by_hand():
    held = list(rows())
    found, silent = qualities(STUDY, held)
    assert [(one.task, one.metric, one.sign) for one in found] == [
        ("vqa", "acc_vqa", 1),
        ("vqa_long", "loss_vqa_long", -1),
    ]
    assert silent == []
    said = {(one["run"], one["task"]): one for one in summarised(STUDY, held, found)}
    assert said["vqa alone", "vqa"]["synergy"] is None
    assert said[JOINT, "vqa"]["synergy"]["values"] == pytest.approx([0.2, 0.2, 0.2])
    assert said[JOINT, "vqa_long"]["synergy"]["mean"] == pytest.approx(0.5)
    assert said[DROPPED, "vqa"]["synergy"]["values"] == pytest.approx([-0.1, 0.0, 0.1])
    # 95 %: t of two degrees of freedom, 4.3027, times 0.1 / sqrt(3).
    assert said[DROPPED, "vqa"]["synergy"]["high"] == pytest.approx(4.3027 * 0.1 / 3**0.5, rel=1e-4)
    assert said[DROPPED, "vqa_long"]["synergy"]["mean"] == pytest.approx(-0.5)
    assert said[DROPPED, "vqa"]["flops_ratio"]["mean"] == 0.75
    assert said["vqa alone", "vqa"]["flops_ratio"]["mean"] == 1.0
    shown = {line[:2]: line for line in table(list(said.values())).rows}
    assert shown[DROPPED, "vqa"][2:6] == ("acc_vqa (higher is better)", "0.6 ±0.5", "+0.0 ±0.2", "0.75x")
    assert shown[JOINT, "vqa_long"][3:5] == ("1.500", "+0.500")
    assert "3 seeds, 95 % intervals" in notes(STUDY, held, silent)[0]


def test_synergy_is_paired_by_seed_also_where_seeds_are_missing():
    held = [one for one in rows() if (one["name"], one["seed"]) != ("vqa alone", 1)]
    said = {(one["run"], one["task"]): one for one in summarised(STUDY, held, qualities(STUDY, held)[0])}
    assert said[DROPPED, "vqa"]["synergy"]["values"] == pytest.approx([-0.1, 0.1])


def test_one_seed_has_no_interval():
    held = list(rows((0,)))
    one = summarised(STUDY, held, qualities(STUDY, held)[0])[0]["quality"]
    assert (one["low"], one["high"], one["n"]) == (None, None, 1)
    assert "one seed" in notes(STUDY, held, [])[0]
    assert interval([0.5]) == "0.500"
    assert interval([]) == interval([float("nan"), 1.0]) == "-"


def test_what_is_stated_counts_and_nothing_else():
    held = [one | {"metrics": one["metrics"] | {"margin_vqa": 1.0} if "vqa" in one["tasks"] else one["metrics"]}
            for one in rows()]  # fmt: skip
    assert qualities(STUDY, held)[1] == ["margin_vqa"]
    found, _ = qualities(STUDY, held, ["margin_vqa"], ["loss_vqa_long"])
    assert {one.metric: one.sign for one in found} == {"margin_vqa": 1, "loss_vqa_long": -1}


@pytest.mark.parametrize(
    ("change", "stated", "message"),
    [
        (lambda one: one, ["nope"], "found no metric ['nope'] of a task"),
        (lambda one: one, ["acc_vqa"], "task 'vqa_long': found no quality"),
        (lambda one: one | {"metrics": {"loss": 1.0}}, [], "task 'vqa': found no quality among the logged ['loss']"),
        (
            lambda one: one | {"metrics": {}} if one["name"] == DROPPED else one,
            [],
            f"{DROPPED}, seed 0: expected ['acc_vqa', 'loss_vqa_long'], which other runs log; found []",
        ),
    ],
)
def test_metrics_that_do_not_do(change, stated, message):
    with pytest.raises(BatchError) as said:
        qualities(STUDY, [change(one) for one in rows()], stated)
    assert message in str(said.value)


def test_runs_that_are_all_the_same_are_told():
    same = [
        row(name, 0, acc_vqa=0.5, loss_vqa_long=2.0) for name in ("vqa alone", "vqa_long alone", JOINT, DROPPED)
    ]  # fmt: skip
    assert "does mine:made train only the tasks" in notes(STUDY, same, [])[1]
    assert len(notes(STUDY, list(rows()), [])) == 1


def test_flash_attention_is_counted_as_sdpa_is():
    """Its kernels have no formula, so that a counter would see no attention at all."""

    def spent(attention):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = with_attention(LlamaForCausalLM(LlamaConfig(vocab_size=50, **sizes)), attention)
        counted, ids = Counted(), torch.randint(50, (2, 8))
        counted.on_train_batch_start(None, model, None, 0)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        counted.taken()
        assert model.config._attn_implementation == attention
        return counted.flops

    with kernels():
        assert spent("flash_attention_2") == spent("sdpa") != [0]


class Spending(L.Callback):
    """Runs the module when a batch begins and ends, as a monitor does."""

    def on_train_batch_start(self, trainer, pl_module, *_):
        pl_module(torch.ones(3, 4))

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module(torch.ones(3, 4)).sum().backward()


class Line(L.LightningModule):
    def __init__(self, brings=()):
        super().__init__()
        self.linear, self.brings = torch.nn.Linear(4, 5), list(brings)

    def configure_callbacks(self):
        return self.brings

    def forward(self, x):
        return self.linear(x)

    def training_step(self, x, index):
        return self(x).sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning", "ignore:.*bottleneck")
@pytest.mark.parametrize("whose", ["alone", "the trainer's", "the module's"])
def test_what_other_callbacks_spend_does_not_count(whose):
    others, brought = ([Spending()] if whose == name else [] for name in ("the trainer's", "the module's"))
    counted = Counted()
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    run = L.Trainer(callbacks=[counted, *others], max_epochs=1, enable_model_summary=False, **silent)
    run.fit(Line([*brought, LambdaCallback()]), torch.utils.data.DataLoader(torch.ones(4, 4), batch_size=2))
    # 2 samples, 4 inputs, 5 outputs: once forward, and once backward, for the weight alone.
    assert counted.flops == [2 * 2 * 4 * 5 * 2] * 2
