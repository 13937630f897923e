"""Whether what a method adds is trained: which parameters the optimizers hold."""

import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import BaseFinetuning
from torch import nn
from torch.optim import Optimizer

from tokendrop.engine.handle import Handle
from tokendrop.errors import NoEffectWarning, UnsupportedError

# DeepSpeed's optimizers have partitions of their own in `param_groups`, and the model's parameters in one of these.
DEEPSPEED_GROUPS = ("bit16_groups", "bf16_groups", "fp16_groups")


def check_optimizers(trainer: L.Trainer, pl_module: L.LightningModule, handle: Handle) -> None:
    """Refuse added parameters that no optimizer holds: they would stay what they are, and nobody would notice.

    Optimizers are the trainer's, and those that are attributes of the module, also in a list, tuple or dict. Where they
    hold none of the module's parameters (flattened by classic FSDP, no optimizer at all), nothing can be said, and
    nothing is.

    Args:
        trainer: whose optimizers are made, and no forward has run: FSDP2 shows other parameters after one.
        pl_module: that is trained.
        handle: of the dropped model; its frozen parameters are left out.

    Raises:
        UnsupportedError: with names and the ways out. A warning where a finetuning callback may still add them.
    """
    optimizers = [*trainer.optimizers, *_optimizers(vars(pl_module).values())]
    held = {id(one) for optimizer in optimizers for one in _parameters(optimizer)}
    if held.isdisjoint(map(id, pl_module.parameters())):
        return
    added = {id(one) for one in handle.parameters() if one.requires_grad}
    missing = [name for name, one in pl_module.named_parameters() if id(one) in added - held]
    if not missing:
        return
    message = (
        f"no optimizer holds {len(missing)} of the {len(added)} parameters that {_named(handle)} adds, from "
        f"{missing[0]!r} on, so they would not be trained"
    )
    later = [type(one).__name__ for one in getattr(trainer, "callbacks", ()) if isinstance(one, BaseFinetuning)]
    if later:
        warnings.warn(f"{message} unless {later[0]} adds them later", NoEffectWarning, stacklevel=2)
        return
    raise UnsupportedError(
        f"{message}; let {type(pl_module).__name__}.configure_optimizers return them too: self.parameters() has them, "
        "and so has tokendrop.handle(self).parameters(). To keep them as they are on purpose, call "
        "tokendrop.handle(self).requires_grad_(False) there"
    )


def _optimizers(values: Iterable[Any]) -> Iterator[Optimizer]:
    for value in values:
        held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
        yield from (one for one in held if isinstance(one, Optimizer))


def _parameters(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    groups = [group["params"] for group in optimizer.param_groups]
    for name in DEEPSPEED_GROUPS:
        groups.extend(getattr(optimizer, name, ()))
    return (one for group in groups for one in group)


def _named(handle: Handle) -> str:
    return " and ".join(map(str, dict.fromkeys(filter(None, handle.methods.values()))))
