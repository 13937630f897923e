"""What a method adds is trained, or refused: whatever the optimizers are, and however they were wrapped."""

import types
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lit_llama import LIGHTNING_WARNS, Batches, Lit, batch, dropped_keys, trainer

import tokendrop as td
from tokendrop.callbacks.optimizers import check_optimizers

pytestmark = pytest.mark.filterwarnings(LIGHTNING_WARNS)
SHARED = td.HiMix(separate="shared")
ROUTED = td.MixtureOfDepths(layers="1:3", keep=0.5)


def loader(count=3):
    return Batches(*(batch(seed, "u") for seed in range(count)))


class Given(Lit):
    """Optimizers by a function of the module; trained by hand where there are several."""

    def __init__(self, made, where="init"):
        super().__init__(where)
        self.optimizers_of = made

    def training_step(self, given, index):
        loss = super().training_step(given, index)
        if not self.automatic_optimization:
            optimizers = self.optimizers()
            self.manual_backward(loss)
            for optimizer in optimizers if isinstance(optimizers, list) else [optimizers]:
                optimizer.step()
                optimizer.zero_grad()
            return None
        return loss

    def configure_optimizers(self):
        return self.optimizers_of(self)


def sgd(parameters, **more):
    return torch.optim.SGD(parameters, lr=0.1, **more)


def groups(module):
    decay = [p for p in module.model.parameters() if p.dim() > 1]
    rest = [p for p in module.model.parameters() if p.dim() < 2]
    return sgd([{"params": decay, "weight_decay": 0.1}, {"params": rest}])


def scheduled(module):
    optimizer = sgd(module.model.parameters())
    return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer)}


def by_hand(module):
    module.automatic_optimization = False
    return [sgd(module.model.model.parameters()), sgd(module.model.lm_head.parameters())]


def own(module):
    module.automatic_optimization = False
    module.mine = sgd(module.model.parameters())


def own_by_name(module):
    module.automatic_optimization = False
    module.mine = {"model": sgd(module.model.model.parameters()), "head": sgd(module.model.lm_head.parameters())}


def own_in_a_list(module):
    module.automatic_optimization = False
    module.mine = [sgd(module.model.parameters())]


MISSED = {
    "the model's": lambda module: sgd(module.model.parameters()),
    "groups by module": groups,
    "with a schedule": scheduled,
    "several, by hand": by_hand,
    "an attribute, and none returned": own,
    "a dict of them": own_by_name,
    "a list of them": own_in_a_list,
}


@pytest.mark.parametrize("where", ["init", "configure_model"])
@pytest.mark.parametrize("made", MISSED.values(), ids=MISSED)
@pytest.mark.filterwarnings("ignore:.LightningModule.configure_optimizers. returned")
def test_what_no_optimizer_holds_is_refused_before_the_first_step(made, where):
    module = Given(made, where)
    with pytest.raises(td.UnsupportedError, match="no optimizer holds 8 of the 8 parameters that HiMix") as caught:
        trainer(td.TokenDrop(SHARED)).fit(module, loader())
    assert "'tokendrop.layers.0.image.k.weight'" in str(caught.value)
    assert "Given.configure_optimizers" in str(caught.value)
    assert module.losses == []


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (ROUTED, r"2 of the 2 .*MixtureOfDepths.*'tokendrop\.layers\.1\.router"),
        (td.Sprint("1:3"), r"3 of the 3 .*Sprint.*'tokendrop\.layers\.1\.fusion\.mask"),
    ],
)
def test_routers_and_fusions_are_named_too(method, found):
    with pytest.raises(td.UnsupportedError, match=found):
        trainer(td.TokenDrop(method)).fit(Given(MISSED["the model's"]), loader())


def test_a_part_of_them_is_counted():
    def half(module):
        held = list(td.handle(module).layers[:2].parameters())
        return sgd([*module.model.parameters(), *held])

    with pytest.raises(td.UnsupportedError, match="holds 4 of the 8") as caught:
        trainer(td.TokenDrop(SHARED)).fit(Given(half), loader())
    assert "layers.2.image.k" in str(caught.value)


def added_by_handle(module):
    return sgd([{"params": module.model.parameters()}, {"params": td.handle(module).parameters(), "lr": 0.01}])


def apart(module):
    module.automatic_optimization = False
    return [sgd(module.model.parameters()), sgd(td.handle(module).parameters())]


@pytest.mark.parametrize("made", [added_by_handle, apart, lambda module: sgd(module.parameters())])
@pytest.mark.parametrize("method", [SHARED, ROUTED])
def test_held_by_whichever_optimizer_they_move(made, method):
    module = Given(made)
    started = {}

    class Started(L.Callback):
        def on_train_start(self, trainer, pl_module):
            started.update({name: pl_module.get_parameter(name).clone() for name in dropped_keys(pl_module)})

    trainer(td.TokenDrop(method), Started()).fit(module, loader(4))
    assert started
    assert not [name for name, value in started.items() if torch.equal(module.get_parameter(name), value)]


def test_frozen_on_purpose_is_no_fault():
    def frozen(module):
        td.handle(module).requires_grad_(False)
        return sgd(module.model.parameters())

    module = Given(frozen)
    trainer(td.TokenDrop(SHARED)).fit(module, loader())
    assert len(module.losses) == 3


@pytest.mark.parametrize("method", [td.HiMix(), td.HMGen("1:3")])
def test_methods_that_add_nothing_take_any_optimizer(method):
    module = Given(lambda module: sgd(module.model.lm_head.parameters()))
    trainer(td.TokenDrop(method)).fit(module, loader())
    assert len(module.losses) == 3


@pytest.mark.filterwarnings("ignore:.LightningModule.configure_optimizers. returned")
def test_no_optimizer_at_all_is_lightnings_to_tell():
    module = Given(lambda module: None)
    trainer(td.TokenDrop(SHARED)).fit(module, loader())
    assert len(module.losses) == 3


class Later(BaseFinetuning):
    def freeze_before_training(self, pl_module):
        pass

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.tokendrop, optimizer, lr=0.1)


class FromTheStart(BaseFinetuning):
    """Frozen, which is what Lightning's documentation does, and added later."""

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module.tokendrop)

    finetune_function = Later.finetune_function


def test_a_finetuning_that_may_add_them_later_is_told_and_not_refused():
    module = Given(MISSED["the model's"])
    with pytest.warns(td.NoEffectWarning, match="unless Later adds them later"):
        trainer(td.TokenDrop(SHARED), Later(), max_epochs=2).fit(module, loader())
    text = module.model.model.layers[0].self_attn.k_proj.weight
    assert not torch.equal(module.tokendrop.layers[0]["image"]["k"].weight, text)


def test_a_finetuning_that_froze_them_says_nothing():
    module = Given(MISSED["the model's"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", td.NoEffectWarning)
        trainer(td.TokenDrop(SHARED), FromTheStart(), max_epochs=2).fit(module, loader())
    held = {id(p) for group in module.optimizers().param_groups for p in group["params"]}
    assert {id(p) for p in td.handle(module).parameters()} <= held


def test_a_backbone_does_not_have_them():
    module = Given(lambda module: sgd(module.model.lm_head.parameters()))
    module.backbone = module.model.model.embed_tokens
    with pytest.warns(td.NoEffectWarning, match="8 of the 8 .* unless BackboneFinetuning"):
        trainer(td.TokenDrop(SHARED), BackboneFinetuning(5)).fit(module, loader())


def fake(optimizers):
    return types.SimpleNamespace(optimizers=optimizers, callbacks=[])


def zero(groups_name, parameters):
    """DeepSpeed's shape, as its sources have it: flat partitions in `param_groups`, the model's own in another list."""
    made = sgd([torch.zeros(3, requires_grad=True)])
    setattr(made, groups_name, [list(parameters)])
    return made


@pytest.mark.parametrize("name", ["bit16_groups", "bf16_groups", "fp16_groups"])
def test_deepspeeds_own_groups_are_read(name):
    module = Lit()
    handle = td.apply(module, SHARED)
    check_optimizers(fake([zero(name, module.parameters())]), module, handle)
    with pytest.raises(td.UnsupportedError, match="8 of the 8"):
        check_optimizers(fake([zero(name, module.model.parameters())]), module, handle)


def test_of_flattened_parameters_nothing_is_said():
    module = Lit()
    check_optimizers(fake([sgd([torch.zeros(3, requires_grad=True)])]), module, td.apply(module, SHARED))
