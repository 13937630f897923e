"""What was added to a model, on its way into a file and back.

Shape letters: L layers.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tokendrop.errors import NoEffectWarning

PREFIX = "tokendrop.layers."
# Functions of other libraries that choose what is saved, and the name of the module that they save.
_SAVERS = {"get_peft_model_state_dict": "model", "save_pretrained": "self"}
_DEPTH = 60  # frames: a traversal enters one for each module around the decoder


def notice_saving(handle: nn.Module, added: nn.ModuleList) -> None:
    """Warn where another library is saving a model without what was added to it.

    Neither PEFT nor transformers has a hook for what it saves; both go through the names of the layers, which tell.

    Args:
        handle: of the dropped model.
        added: image-only projections and router of each of the L layers.
    """
    frame: Any = sys._getframe(1)
    for _ in range(_DEPTH):
        if frame is None:
            return
        saver = frame.f_code.co_name
        if saver in _SAVERS and isinstance(root := frame.f_locals.get(_SAVERS[saver]), nn.Module):
            if names := _lost(handle, added, root, saver):
                _warn(handle, names, type(root).__name__)
            return
        frame = frame.f_back


def _lost(handle: nn.Module, added: nn.ModuleList, root: nn.Module, saver: str) -> list[str]:
    if saver == "save_pretrained":
        return [] if _holds(root, handle) else [name for name, _ in added.named_parameters()]
    # PEFT saves what its own wrappers hold, whose names are others than those that were made.
    made = vars(added).get("_made", ())
    return [name for name, p in added.named_parameters() if p.requires_grad and name in made]


def _holds(root: nn.Module, handle: nn.Module) -> bool:
    pending: list[nn.Module | None] = [root]
    while pending:
        module = pending.pop()
        if module is handle:
            return True
        pending += [] if module is None else module._modules.values()
    return False


def _warn(handle: nn.Module, names: list[str], saved: str) -> None:
    if handle.__dict__.get("_said_lost"):
        return
    handle.__dict__["_said_lost"] = True
    warnings.warn(
        f"{saved} is saved without the {len(names)} parameters that apply added, such as {PREFIX}{names[0]}; keep them "
        "with torch.save(tokendrop.handle(model).state_dict(), path), and load them into the handle after apply "
        "(docs/saving.md)",
        NoEffectWarning,
        stacklevel=2,
    )


def take_saved(model: nn.Module, added: nn.ModuleList) -> None:
    """Fill what was just added from the folder that `from_pretrained` loaded the model from, where it is there.

    Args:
        model: the module that `apply` was given.
        added: image-only projections and router of each of the L layers, as copies of the text's.
    """
    present = added.state_dict()
    folders = (getattr(module, "name_or_path", None) for module in model.modules()) if present else ()
    folder = next((one for one in folders if isinstance(one, str) and os.path.isdir(one)), None)
    found = {} if folder is None else _read(Path(folder))
    if not found or any(value.is_meta for value in present.values()):
        return
    if {key: value.shape for key, value in found.items()} == {key: value.shape for key, value in present.items()}:
        added.load_state_dict(found)
        return
    warnings.warn(
        f"{folder} holds {len(found)} parameters of another apply, such as {PREFIX}{min(found)}, which do not fit the "
        f"{len(present)} of these methods, such as {PREFIX}{min(present)}; these are new",
        NoEffectWarning,
        stacklevel=3,
    )


def _read(folder: Path) -> dict[str, Tensor]:
    from safetensors import safe_open  # whoever has loaded such a folder has it

    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys() if key.startswith(PREFIX)}  # noqa: SIM118
    return found
