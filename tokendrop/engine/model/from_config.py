"""A model without weights, from a Hugging Face config."""

import copy
from pathlib import Path
from typing import Any

from torch import nn

from tokendrop.errors import DecoderError


def model_from_config(config: Any) -> nn.Module:
    """A model without weights, on the meta device.

    Args:
        config: a Hugging Face config, its config.json, the folder that is in, or one of `presets`; nothing is
            downloaded.

    Raises:
        DecoderError: no such file, or nothing that transformers makes a model of.
    """
    import torch
    import transformers

    named = repr(config) if isinstance(config, str | Path) else type(config).__name__
    try:
        if isinstance(config, str | Path):
            config = config if Path(config).exists() else _preset(str(config))
            config = transformers.AutoConfig.from_pretrained(config, local_files_only=True, trust_remote_code=False)
        if not isinstance(config, transformers.PretrainedConfig):
            raise DecoderError(f"{named} is neither a model, nor a Hugging Face config, nor the path of one")
        with torch.device("meta"):
            return _built(copy.deepcopy(config))
    except DecoderError:
        raise
    except Exception as error:  # whatever a file of somebody else's makes transformers raise
        raise DecoderError(f"{named} is no Hugging Face config that a model can be made of: {error}") from error


def presets() -> dict[str, Path]:
    """The configs that come with this package, which were tried: name -> file."""
    return {file.stem: file for file in sorted((Path(__file__).parents[2] / "configs").glob("*.json"))}


def _preset(name: str) -> Path:
    known = presets()
    if name not in known:
        raise DecoderError(
            f"{name!r} does not exist here, and nothing is downloaded; give the config.json of a Hugging Face model, "
            f"or its folder, or a config that was tried: {', '.join(known)}"
        )
    return known[name]


def _built(config: Any) -> nn.Module:
    import transformers

    name = (config.architectures or [""])[0]
    found, reason = getattr(transformers, name, None) if isinstance(name, str) and name else None, ""
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found(config)
    for auto in (transformers.AutoModelForImageTextToText, transformers.AutoModelForCausalLM):
        try:
            return auto.from_config(config, trust_remote_code=False)
        except ValueError as error:
            reason = str(error)
    raise DecoderError(f"no model for the architecture {config.architectures!r} of {type(config).__name__}: {reason}")
