"""What was added to a model, on its way into a file and back.

Shape letters: L layers.
"""

import os
import re
import sys
import warnings
from collections.abc import Sequence
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
    """Fill what was just added from where `from_pretrained` loaded the model: a folder, or the hub's cache.

    Args:
        model: the module that `apply` was given.
        added: image-only projections and router of each of the L layers, as copies of the text's.
    """
    present = added.state_dict()
    if not present or any(value.is_meta for value in present.values()):
        return
    names = (getattr(module, "name_or_path", None) for module in model.modules())
    for name in dict.fromkeys(one for one in names if isinstance(one, str) and one):
        folders = [Path(name)] if os.path.isdir(name) else _revisions(name)
        if not folders:
            continue
        saved = [found for folder in folders if (found := _read(_files(folder)))]
        if saved and len(folders) == 1:
            _take(added, present, saved[0], name)
        elif saved:
            _say(
                f"the hub's cache has {len(folders)} revisions of {name}, {len(saved)} with such parameters as apply "
                "adds, and nothing says which was loaded; these are new. Load the model from a folder: "
                "huggingface_hub.snapshot_download(..., revision=..., local_dir=...)"
            )
        elif below := [one.parent for folder in folders for one in folder.glob("*/*.safetensors") if _read([one])]:
            _say(
                f"{name} has no such parameters as apply adds, and {below[0]} has; these are new. If the model was "
                "loaded from there, load it from that folder itself, without subfolder="
            )
        return


def _take(added: nn.ModuleList, present: dict[str, Tensor], saved: dict[str, Tensor], name: str) -> None:
    if {key: value.shape for key, value in saved.items()} == {key: value.shape for key, value in present.items()}:
        added.load_state_dict(saved)
        return
    _say(
        f"{name} holds {len(saved)} parameters of another apply, such as {PREFIX}{min(saved)}, which do not fit the "
        f"{len(present)} of these methods, such as {PREFIX}{min(present)}; these are new"
    )


def _say(message: str) -> None:
    warnings.warn(message, NoEffectWarning, stacklevel=4)


def _revisions(name: str) -> list[Path]:
    # The snapshots of a model in the hub's cache that hold weights.
    try:
        from huggingface_hub.constants import HF_HUB_CACHE  # whoever has loaded a model by its name has it
    except ImportError:
        return []
    folders = Path(HF_HUB_CACHE, "--".join(["models", *name.split("/")]), "snapshots").glob("*")
    return [one for one in sorted(folders) if next(one.glob("**/*.safetensors"), None)]


def _files(folder: Path) -> list[Path]:
    # As `from_pretrained` looks: one file, else its parts; a variant, such as model.fp16, only where it is alone.
    whole, every = folder / "model.safetensors", sorted(folder.glob("model*.safetensors"))
    parts = [one for one in every if re.fullmatch(r"model-\d+-of-\d+\.safetensors", one.name)]
    return [whole] if whole in every else parts or every


def _read(paths: Sequence[Path]) -> dict[str, Tensor]:
    from safetensors import safe_open  # whoever has loaded such a file has it

    found = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            found |= {key.removeprefix(PREFIX): file.get_tensor(key) for key in file.keys() if key.startswith(PREFIX)}  # noqa: SIM118
    return found
