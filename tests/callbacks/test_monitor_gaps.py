"""What the monitor and the allocation do where a module or a batch is not as they would like it: measure, or say so.

Shape letters: none.
"""

import math
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lit_llama import LIGHTNING_WARNS, WIDTH, Batches, Lit, Validated, batch, llama, loader, trainer
from torch import nn
from transformers import BatchEncoding

import tokendrop as td
from tokendrop.callbacks.batch import batch_layout
from tokendrop.callbacks.evaluation import as_given, model_loss, runnable
from tokendrop.synergy import heat_map, read_history

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
TASKS = ("u", "g")


class Named(Validated):
    """The tiny Llama under a name of the user's own, and the text's keys only handed to it."""

    def __init__(self, name="net", made="init"):
        super().__init__("never")
        del self.model
        self.where, self.when = name, made
        self.own("init")

    def own(self, hook):
        if hook == self.when and self.where not in self._modules:
            self.add_module(self.where, llama())

    def configure_model(self):
        self.own("configure_model")

    def loss(self, given):
        names = ("input_ids", "attention_mask", "labels")
        return getattr(self, self.where)(**{name: given[name] for name in names}).loss


class Listed(Named):
    """In a dictionary of modules, which cannot be called."""

    def own(self, hook):
        if hook == "init":
            self.parts = nn.ModuleDict({"vision": nn.Linear(2, 2), "text": llama()})

    def loss(self, given):
        names = ("input_ids", "attention_mask", "labels")
        return self.parts["text"](**{name: given[name] for name in names}).loss


class Bare(Validated):
    """Its layers are its own, so that there is no module to give a batch to."""

    def __init__(self):
        super().__init__("never")
        del self.model
        self.whole = [llama()]  # a list, which hides it
        self.layers = self.whole[0].model.layers

    def loss(self, given):
        names = ("input_ids", "attention_mask", "labels")
        return self.whole[0](**{name: given[name] for name in names}).loss


def pairs():
    return Batches(*(batch(n, "ug"[n % 2]) for n in range(4)))


def monitor(tmp_path, **options):
    return td.SynergyMonitor(TASKS, **({"every_n_steps": 1, "history": str(tmp_path / "synergy.jsonl")} | options))


def events(tmp_path):
    return read_history(tmp_path / "synergy.jsonl")


def reference(tmp_path, *given):
    """What the monitor says of a module that leaves its batch as it is."""
    trainer(monitor(tmp_path / "plain")).fit(Lit(), Batches(*given))
    return events(tmp_path / "plain")[-1]


class Popping(Lit):
    """A step that takes out of the batch what it needs, and more."""

    def training_step(self, given, index):
        labels = given.pop("labels")
        given.pop("task")
        logits = self.model(given.pop("input_ids"), attention_mask=given.pop("attention_mask")).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("kind", [dict, BatchEncoding], ids=["dict", "BatchEncoding"])
@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_may_take_keys_out_of_its_batch(kind, mixed, tmp_path):
    tasks = (["u", "g"], ["g", "u"]) if mixed else ("u", "g", "u", "g")
    given = [batch(seed, task) for seed, task in enumerate(tasks)]
    trainer(monitor(tmp_path)).fit(Popping(), Batches(*(kind(dict(one)) for one in given)))
    found, expected = events(tmp_path)[-1], reference(tmp_path, *given)
    assert "gap" not in found
    for kind in ("losses", "products", "noise_floor"):
        assert found[kind] == pytest.approx(expected[kind], rel=1e-4)


class Marked(nn.Module):
    """A model whose own forward takes the image mask, and whose loss tells."""

    def __init__(self):
        super().__init__()
        self.inner = llama()
        self.kind = nn.Embedding(2, WIDTH)
        nn.init.constant_(self.kind.weight, 0.0)
        nn.init.constant_(self.kind.weight[1], 1.0)

    def forward(self, input_ids, attention_mask=None, labels=None, image_mask=None):
        embedded = self.inner.get_input_embeddings()(input_ids)
        if image_mask is not None:
            embedded = embedded + self.kind(image_mask.long())
        return self.inner(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels)


class Marking(Lit):
    """It does not move."""

    def __init__(self):
        super().__init__("never")
        self.model = Marked()

    def loss(self, given):
        return self.model(**{key: value for key, value in given.items() if key != "task"}).loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("own", [False, True], ids=["by default", "a loss of one's own"])
def test_a_forward_that_names_our_keys_gets_them(own, tmp_path):
    module, given = Marking(), pairs()
    options = {"loss": lambda pl_module, one: pl_module.loss(one)} if own else {}
    trainer(td.TokenDrop(td.HMGen("1:3")), monitor(tmp_path, **options)).fit(module, given)
    with td.handle(module).layout(batch_layout(given.made[2], module)):
        expected = module.loss(given.made[2]).item()
    assert events(tmp_path)[-1]["losses"]["u"] == pytest.approx(expected, rel=1e-6)
    td.handle(module).remove()
    without = {key: value for key, value in given.made[2].items() if key not in ("task", "image_mask")}
    assert abs(module.model(**without).loss.item() - expected) > 1e-3, "the mask tells"


def test_a_loss_of_ones_own_gets_what_a_step_gets(tmp_path):
    seen = []

    def loss(module, given):
        seen.append(set(given))
        return module.loss({"image_mask": None} | given)

    for consume in (False, True):
        trainer(td.TokenDrop(td.HMGen("1:3"), consume=consume), monitor(tmp_path, loss=loss)).fit(Marking(), pairs())
        ours = {"image_mask", "task"} & seen[-1]
        assert ours == (set() if consume else {"image_mask", "task"})


class Noise(L.LightningModule):
    """Gradients that are noise alone, of the data and of dropout, around a mean of zero."""

    def __init__(self):
        super().__init__()
        self.w, self.drop = nn.Parameter(torch.ones(64)), nn.Dropout(0.5)

    def loss(self, given):
        return (self.drop(self.w) - self.w).sum() + (self.w * given["noise"]).sum() + 100

    def training_step(self, given, index):
        return self.loss(given)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.parametrize("seed", [0, -3])
def test_samples_share_no_dropout(seed, tmp_path):
    def made(at):
        return {"noise": torch.randn(64, generator=torch.Generator().manual_seed(at)), "task": "ug"[at % 2]}

    watch = monitor(tmp_path, every_n_steps=4, loss=lambda module, given: module.loss(given), seed=seed)
    trainer(watch).fit(Noise(), Batches(*map(made, range(84))))
    parts = events(tmp_path)[-1]["products"]
    # Each mask has entries of -1 and 1: with one mask for all, every product would be about 64.
    assert all(abs(value) < 16 for value in parts.values()), parts


def test_another_training_begins_anew(tmp_path):
    watch = monitor(tmp_path, every_n_steps=3)
    for _ in range(2):
        trainer(watch).fit(Lit(), Batches(*(batch(n, "ug"[n % 2]) for n in range(12))))
        assert (watch.events, len(watch.figures.products.grams)) == (3, 3)


def test_random_selections_of_a_model_with_layouts_of_its_own_go_on_as_without_it(tmp_path):
    """They follow the layouts that were entered."""
    runs = []
    for callbacks in ([], [monitor(tmp_path)]):
        module = Marking()
        drop = td.apply(module.model, td.RandomLTD("1:3", 2), layout="auto")
        trainer(*callbacks).fit(module, Batches(*(batch(n, "ug"[n % 2]) for n in range(8))))
        runs.append((drop.entered, module.losses))
    assert runs[0] == runs[1]
    assert len(runs[0][1]) == 8
    assert len(events(tmp_path)) > 1


class Unfreezing(Lit):
    """A layer that is trained from the sixth step on."""

    def __init__(self):
        super().__init__()
        self.model.model.layers[0].requires_grad_(False)

    def on_train_batch_start(self, given, index):
        if index == 6:
            self.model.model.layers[0].requires_grad_(True)


def test_events_of_other_parameters_are_no_part_of_a_mean(tmp_path):
    watch = monitor(tmp_path)
    trainer(watch).fit(Unfreezing(), Batches(*(batch(n, "ug"[n % 2]) for n in range(10))))
    assert len({gram.shape for gram in watch.figures.products.grams}) == 1
    before, after = events(tmp_path)[2:4]
    assert len(after["groups"]["names"]) == len(before["groups"]["names"]) + 3
    assert after["alignment"]["u/g"]["low"] is None, "an interval of one event"


@pytest.mark.parametrize("tasks", [("g", "u"), ("u", "x"), ("u", "g", "x")], ids="-".join)
def test_events_of_other_tasks_are_not_taken_over(tasks, tmp_path):
    watch = monitor(tmp_path, affinity=0.1)
    trainer(watch).fit(Lit(), pairs())
    other = td.SynergyMonitor(tasks)
    other.load_state_dict(watch.state_dict())
    assert other.figures.products.grams == []
    assert other.figures.direct == {}
    same = td.SynergyMonitor(TASKS)
    same.load_state_dict(watch.state_dict())
    assert len(same.figures.products.grams) == watch.events
    assert same.figures.direct == watch.figures.direct


def test_a_smaller_interval_holds_from_a_resume_on(tmp_path):
    run = trainer(monitor(tmp_path, every_n_steps=50))
    run.fit(Lit(), pairs())
    run.save_checkpoint(tmp_path / "fit.ckpt")
    watch = monitor(tmp_path, every_n_steps=2)
    trainer(watch, max_epochs=2).fit(Lit(), pairs(), ckpt_path=tmp_path / "fit.ckpt")
    assert watch.events == 2


def test_a_batch_is_kept_as_it_was_given():
    inner, tensor = {"labels": 1}, torch.ones(2)
    given = {"x": tensor, "inner": inner, "list": [inner], "pair": (inner, 2)}
    kept = as_given(given)
    assert kept["x"] is tensor
    inner.pop("labels")
    given.pop("x")
    assert kept == {"x": tensor, "inner": {"labels": 1}, "list": [{"labels": 1}], "pair": ({"labels": 1}, 2)}
    encoded = BatchEncoding({"x": tensor})
    kept = as_given(encoded)
    encoded.pop("x")
    assert kept["x"] is tensor
    assert type(kept) is BatchEncoding
    other = SimpleNamespace()
    assert as_given(other) is other
    listed = [{"labels": 1}]
    assert as_given(listed) == listed
    assert as_given(listed)[0] is not listed[0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_reentrant_checkpointing_is_a_gap_said_once(reentrant, tmp_path, recwarn):
    module = Lit()
    module.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    plain = Lit()
    plain.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    run = trainer(monitor(tmp_path), max_epochs=2)
    run.fit(module, pairs())
    trainer(max_epochs=2).fit(plain, pairs())
    said = [str(one.message) for one in recwarn if issubclass(one.category, td.SynergyWarning)]
    assert [("gap" in event) for event in events(tmp_path)] == [reentrant] * 5
    assert len(said) == reentrant
    if reentrant:
        assert "re-entrant activation checkpointing" in said[0]
        assert "use_reentrant=False" in said[0]
        assert math.isnan(run.callback_metrics["synergy/alignment/u/g"])
    assert all(torch.equal(value, plain.state_dict()[name]) for name, value in module.state_dict().items())


def test_another_error_of_a_backward_is_not_hidden(tmp_path):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(context, x):
            return x.clone()

        @staticmethod
        def backward(context, x):
            raise RuntimeError("the user's own")

    watch = monitor(tmp_path, loss=lambda module, given: Broken.apply(module.model(**given).loss))
    with pytest.raises(RuntimeError, match="the user's own"):
        trainer(watch).fit(Lit(), Batches(*({k: v for k, v in one.items() if k != "image_mask"} for one in pairs())))


@pytest.mark.parametrize("module", [Named, Listed, lambda: Named("decoder", "configure_model")])
def test_any_name_of_the_model_will_do(module, tmp_path):
    with torch.random.fork_rng():
        module, watched = module(), td.AttentionAllocation(3)
        trainer(monitor(tmp_path), watched).fit(module, pairs(), loader())
    assert "gap" not in events(tmp_path)[-1]
    assert events(tmp_path)[-1]["losses"] == pytest.approx(reference(tmp_path, *pairs())["losses"])
    model = next(one for one in module.modules() if hasattr(one, "lm_head"))
    expected = td.attention_allocation(
        model,
        list(loader()),
        lambda one: batch_layout(one, model),
        loss=lambda one: model(one["input_ids"], one["attention_mask"]),
    )
    torch.testing.assert_close(watched.allocation.share, expected.share)


def test_a_module_without_one_is_refused_in_setup():
    with pytest.raises(td.DecoderError, match=r"Bare has no `model`, and no other module.*loss=fn\(pl_module, batch\)"):
        trainer(td.AttentionAllocation()).fit(Bare(), pairs(), loader())
    module = Bare()
    trainer(td.AttentionAllocation(loss=lambda module, given: module.loss(given))).validate(module, loader())
    assert module.seen == []  # Bare's own loss was run, not Lit's


def test_a_module_without_a_decoder_is_refused_where_the_stage_begins():
    class Blind(Validated):
        def __init__(self):
            super().__init__("never")
            self.model = nn.Linear(2, 2)

        def loss(self, given):
            raise AssertionError("trained")

    with pytest.raises(td.DecoderError, match="Blind has no list of layers with causal self-attention"):
        trainer(td.AttentionAllocation()).fit(Blind(), pairs(), loader())
    with pytest.raises(td.DecoderError, match="Blind has no list of layers with causal self-attention"):
        trainer(td.AttentionAllocation()).validate(Blind(), loader())


def test_the_monitor_says_the_same_as_a_gap(tmp_path):
    with pytest.warns(td.SynergyWarning, match=r"left out step 4: Bare has no `model`, and no other module"):
        trainer(monitor(tmp_path)).fit(Bare(), pairs(), loader())
    module = Lit()
    assert runnable(module) is module.model
    with pytest.raises(td.TaskLossError, match=r"whose keys LlamaForCausalLM is called with; found tuple.*loss=fn"):
        model_loss(module, (1, 2))


class PoppingValidation(Validated):
    def validation_step(self, given, index):
        given.pop("labels")
        given.pop("image_mask")
        self.model(given.pop("input_ids"), given.pop("attention_mask"))


def test_allocation_of_batches_that_lose_keys():
    kept, popped = td.AttentionAllocation(3), td.AttentionAllocation(3)
    trainer(kept).validate(Validated(), loader(), verbose=False)
    trainer(popped).validate(PoppingValidation(), loader(), verbose=False)
    assert torch.equal(kept.allocation.share, popped.allocation.share)


def test_allocation_needs_no_loss():
    class Unlabelled(Validated):
        def validation_step(self, given, index):
            self.model(given["input_ids"])

    watched = td.AttentionAllocation()
    given = {key: value for key, value in batch(0).items() if key != "labels"}
    trainer(watched).validate(Unlabelled(), Batches(given), verbose=False)
    assert watched.allocation.tasks == ("u",)


def test_an_allocation_that_cannot_be_measured_is_said_once_and_nan(recwarn):
    watched = td.AttentionAllocation(1, rows="output")
    given, blank = batch(0), batch(1)
    blank["labels"] = torch.full_like(blank["labels"], -100)

    class Quiet(Validated):
        def validation_step(self, given, index):
            self.model(given["input_ids"])

    module, run = Quiet(), trainer(watched)
    (found,) = run.validate(module, Batches(given), verbose=False)
    assert all(map(math.isfinite, found.values()))
    for _ in range(2):
        (gone,) = run.validate(module, Batches(blank), verbose=False)
    assert gone.keys() == found.keys()
    assert all(map(math.isnan, gone.values()))
    assert watched.allocation is None
    said = [str(one.message) for one in recwarn if issubclass(one.category, td.NoEffectWarning)]
    assert len(said) == 1
    assert "found no row to count in the 1 batches of the tasks ['u']" in said[0]


def test_the_layers_given_to_token_drop_hold_here_too():
    class Two(Validated):
        def __init__(self):
            super().__init__()
            self.teacher = llama()

    drop, watched = td.TokenDrop(td.HMGen("1:3"), layers="model.model.layers"), td.AttentionAllocation()
    trainer(drop, watched).validate(Two(), loader(), verbose=False)
    assert watched.allocation is not None


def test_a_picture_every_window_and_at_the_end(tmp_path, monkeypatch):
    drawn = []
    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(
        type(logger.experiment), "add_figure", lambda self, name, figure, step: drawn.append((name, step))
    )
    run = trainer(monitor(tmp_path, window=2), logger=logger, log_every_n_steps=1)
    run.fit(Lit(), Batches(*(batch(n, "ug"[n % 2]) for n in range(8))))
    # Events from step 4 on.
    assert drawn == [("synergy/alignment/u/g", step) for step in (5, 7, 8)]


def test_a_resumed_run_without_an_event_draws_nothing(tmp_path):
    watch = monitor(tmp_path / "gone")
    watch.load_state_dict(td.SynergyMonitor(TASKS).state_dict() | {"events": 3, "grams": (), "shares": ()})
    logger = TensorBoardLogger(tmp_path)
    trainer(watch, logger=logger, log_every_n_steps=1).fit(Lit(), Batches(batch(0, "u"), batch(1, "g")))
    assert not (tmp_path / "gone").exists()


def test_the_picture_is_blank_where_nothing_is_known():
    def event(step, values, names=("a", "b", "c")):
        return {"step": step, "groups": {"names": list(names), "alignment": {"u/g": values}}}

    found = heat_map([event(1, [0.1], ["old"]), event(2, [0.5, 1.41, None]), event(3, [-1.0, -1.2, 1.0005])], "u/g")
    shown = found.axes[0].images[0].get_array()
    assert shown.mask.tolist() == [[False, False], [True, True], [True, False]]
    assert shown[0].tolist() == [0.5, -1.0]
    many = heat_map([event(step, [0.0] * 3) for step in range(2000)], "u/g")
    assert many.get_size_inches()[0] == 20
