"""What was added to a model, on its way into a file and back.

Shape letters: L layers.
"""

import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
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
        files = _in_folder(Path(name)) if os.path.isdir(name) else _in_cache(name)
        if files:
            _take(model, added, _read(files), name)
            return
        below = [one for one in Path(name).glob("*/model*.safetensors") if _keys(one)] if os.path.isdir(name) else []
        if below:
            _say(
                f"{name} holds no model file, and {below[0].parent} one with such parameters as apply adds; these are "
                "new. Load the model from that folder itself, without subfolder="
            )


def _take(model: nn.Module, added: nn.ModuleList, found: dict[str, Tensor], name: str) -> None:
    present = added.state_dict()
    saved = {key.removeprefix(PREFIX): value for key, value in found.items() if key.startswith(PREFIX)}
    if not saved:
        return
    if {key: value.shape for key, value in saved.items()} != {key: value.shape for key, value in present.items()}:
        _say(
            f"{name} holds {len(saved)} parameters of another apply, such as {PREFIX}{min(saved)}, which do not fit "
            f"the {len(present)} of these methods, such as {PREFIX}{min(present)}; these are new"
        )
    elif other := _other(model, found):
        _say(
            f"{name} holds parameters as apply adds, beside another {other} than the model has, which was loaded from "
            "another revision or folder, or changed since; these are new. Load the model from a folder of its own, and "
            "call apply at once"
        )
    else:
        added.load_state_dict(saved)


def _other(model: nn.Module, found: dict[str, Tensor]) -> str:
    # A weight that was saved beside what was added and is not the model's: neither says which file it was made of.
    # Names behind the last "layers." are those of whatever prefix, so of a vision encoder's layers, too.
    for name, value in found.items():
        if name.startswith(PREFIX):
            continue
        ours = [one for key, one in model.state_dict().items() if _behind(key) == _behind(name)]
        ours = [one for one in ours if one.shape == value.shape and one.is_floating_point() and not one.is_meta]
        if ours and not any(torch.equal(one.cpu(), value.to(one.dtype)) for one in ours):
            return name
    return ""


def _behind(name: str) -> str:
    return name.rpartition("layers.")[2]


def _say(message: str) -> None:
    warnings.warn(message, NoEffectWarning, stacklevel=5)


def _in_folder(folder: Path) -> list[Path]:
    # As `from_pretrained` looks: one file, else its parts; a variant, such as model.fp16, only where it is alone.
    whole, every = folder / "model.safetensors", sorted(folder.glob("model*.safetensors"))
    parts = [one for one in every if re.fullmatch(r"model-\d+-of-\d+\.safetensors", one.name)]
    return [whole] if whole in every else parts or every


def _in_cache(name: str) -> list[Path]:
    try:
        from huggingface_hub import try_to_load_from_cache  # whoever has loaded a model by its name has it

        def cached(file: str) -> Path | None:
            found = try_to_load_from_cache(name, file)
            return Path(found) if isinstance(found, str) else None

        whole, index = cached("model.safetensors"), cached("model.safetensors.index.json")
    except (ImportError, ValueError):  # a name that the hub could not have
        return []
    if whole is not None or index is None:
        return [] if whole is None else [whole]
    parts = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [path for part in parts if (path := cached(part)) is not None]


def _keys(path: Path) -> list[str]:
    from safetensors import safe_open  # whoever has loaded such a file has it

    with safe_open(path, framework="pt") as file:
        return [key for key in file.keys() if key.startswith(PREFIX)]  # noqa: SIM118


def _read(paths: list[Path]) -> dict[str, Tensor]:
    # What was added, and the first matrix of a layer that is there besides.
    from safetensors import safe_open

    found = {}
    for path in paths:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if "layers." in name and not name.startswith(PREFIX)]  # noqa: SIM118
            matrix = next((name for name in names if len(file.get_slice(name).get_shape()) == 2), None)
            found |= {name: file.get_tensor(name) for name in [*_keys(path), *filter(None, [matrix])]}
    return found
