"""What a checkpoint says of the methods it was made under, beside those in force.

Shape letters: none.
"""

import dataclasses
import warnings
from collections.abc import Mapping, Set
from typing import Any

from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from tokendrop.callbacks.standing import evaluated, saved_progress
from tokendrop.config import Config, described, from_config, schedule_of, state_config
from tokendrop.engine.support import Methods, check_methods
from tokendrop.errors import MethodChangedWarning, TokenDropError, UnsupportedError
from tokendrop.schedule import Schedule


def warn_of_difference(
    state: Mapping[str, Any], methods: Methods, schedule: Schedule | None, fits: bool, said: Set[str]
) -> set[str]:
    """Say once what `difference` finds.

    Args:
        state: what the callback left in a checkpoint.
        methods: in force.
        schedule: in force.
        fits: whether training goes on.
        said: what was said before.

    Returns:
        What is said now.
    """
    message = difference(state, methods, schedule, fits)
    if message is None or message in said:
        return set()
    warnings.warn(message, MethodChangedWarning, stacklevel=2)
    return {message}


def difference(state: Mapping[str, Any], methods: Methods, schedule: Schedule | None, fits: bool) -> str | None:
    """What is to be said of a checkpoint made under other methods, or another schedule; None where nothing is.

    Args:
        state: what the callback left in it.
        methods: in force.
        schedule: in force.
        fits: whether training goes on; an evaluation asks for the strength only.
    """
    before, now = _filled(state_config(state), methods), described(methods, schedule)
    if _dropping(before["methods"]) != _dropping(now["methods"]):
        return f"the checkpoint was made under {_shown(before['methods'])}; TokenDrop runs {_shown(now['methods'])}"
    if before.get("schedule") == now["schedule"] or (not fits and _evaluated_alike(before, state, schedule)):
        return None
    return f"the checkpoint was made under the schedule {before.get('schedule')}; TokenDrop has {now['schedule']}"


def _filled(config: Config, methods: Methods) -> Config:
    # Read and written again, fields that are newer than the checkpoint have their defaults.
    kinds = {type(one) for one in check_methods(methods).values() if dataclasses.is_dataclass(one)}
    try:
        return described(*from_config(config, kinds))
    except TokenDropError:
        return config


def _evaluated_alike(before: Config, state: Mapping[str, Any], schedule: Schedule | None) -> bool:
    progress = saved_progress(state)
    try:
        return evaluated(schedule_of(before), progress) == evaluated(schedule, progress)
    except TokenDropError:
        return False


def _dropping(methods: Config) -> Config:
    # A task that is named and dense is like one that is not named.
    return {task: one for task, one in methods.items() if one is not None}


def _shown(methods: Config) -> str:
    if isinstance(methods.get("class_path"), str):
        fields = ", ".join(f"{name}={value!r}" for name, value in methods.get("init_args", {}).items())
        return f"{methods['class_path'].rpartition('.')[2]}({fields})"
    return ", ".join(f"{task!r}: {'dense' if one is None else _shown(one)}" for task, one in methods.items())


def tell_of_added(checkpoint: Mapping[str, Any]) -> bool:
    """Say how a checkpoint with added parameters is loaded; whether it has any."""
    added = [name for name in checkpoint.get("state_dict", {}) if "tokendrop.layers." in name]
    if added:
        rank_zero_info(
            f"The checkpoint holds {len(added)} parameters that TokenDrop added, such as {added[0]}. A module that "
            "is not dropped has no place for them: load_from_checkpoint refuses them, or leaves them out with "
            "strict=False. Make the module, call tokendrop.apply(module, tokendrop.methods_of(path)[0]), and then "
            "module.load_state_dict(torch.load(path)['state_dict'])."
        )
    return bool(added)


def check_added(pl_module: nn.Module, checkpoint: Mapping[str, Any], methods: Methods) -> None:
    """Refuse to go on with training from a checkpoint that lacks all parameters that the methods add.

    Raises:
        UnsupportedError: its optimiser states do not fit.
    """
    added = [name for name, _ in pl_module.named_parameters() if "tokendrop." in name]
    saved = checkpoint.get("state_dict", {})
    # Weights are filled in from the text's; what an optimiser remembers of weights that were not there is not.
    if added and saved and not any("tokendrop." in name for name in saved):
        raise UnsupportedError(
            f"the checkpoint was made without the {len(added)} image-only projections that {methods} adds, so "
            f"its optimiser states do not fit, from {added[0]!r} on; load its weights only, by "
            "load_state_dict(checkpoint['state_dict']), and fit without ckpt_path"
        )
