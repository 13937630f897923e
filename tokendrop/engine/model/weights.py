"""The weights of somebody else's linear, however they are stored: packed, adapted, offloaded.

Shape letters: D hidden.
"""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokendrop.engine.model.linears import base_linear, is_transposed, linear_shape
from tokendrop.errors import UnsupportedError

_ROWS = 1024  # unit vectors at once


@contextmanager
def onloaded(module: nn.Module) -> Generator[None]:
    """Where accelerate keeps a module's weights elsewhere, bring them inside."""
    if "_hf_hook" not in vars(module):
        yield
        return
    from accelerate.utils import align_module_device  # whoever has such a hook has accelerate

    with align_module_device(module):
        yield


def check_one_device(layers: nn.ModuleList, path: str) -> None:
    """Refuse layers on several devices: compact rows and what they are put back into would lie on different ones.

    Raises:
        UnsupportedError: with the devices.
    """
    hooks = [vars(module).get("_hf_hook") for module in layers.modules()]
    named = [*(p.device for p in layers.parameters()), *(getattr(hook, "execution_device", None) for hook in hooks)]
    found = {torch.device(device) for device in named if device is not None}
    devices = sorted({f"{device.type}:{device.index or 0}" for device in found if device.type != "meta"})
    if len(devices) > 1:
        raise UnsupportedError(
            f"the layers of {path!r} run on {len(devices)} devices, {', '.join(devices)}; load the decoder on one, as "
            "with device_map={'': 0}, or shard it with fully_shard"
        )


def readable(linear: nn.Module) -> bool:
    """Whether a linear's `weight` is the numbers it multiplies with, and not packed or beneath an adapter."""
    weight = getattr(linear, "weight", None)
    if base_linear(linear) is not linear or not isinstance(weight, Tensor) or not weight.is_floating_point():
        return False
    return weight.dtype.itemsize > 1 and weight.dim() == 2 and not is_traceable_wrapper_subclass(weight)


def multiplies(linear: nn.Module) -> bool:
    """Whether a linear's class computes x W^T + b, so that a part of a readable W makes that part of its output."""
    forward: Any = getattr(type(linear), "_tokendrop_base", type(linear)).forward
    return forward is nn.Linear.forward or forward.__qualname__.startswith("Conv1D.")


def home(linear: nn.Module, layer: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Where a parameter beside a linear of `layer` belongs, and the floating dtype of what the layer computes in."""
    found = base_linear(linear)
    with onloaded(found):
        weight = next(iter(found.parameters(recurse=False)), None)
        weight = next(layer.parameters()) if weight is None else weight
        device, dtype = weight.device, weight.dtype
    if not dtype.is_floating_point or dtype.itemsize == 1:
        # Packed: a norm's vector says what the hidden states are.
        dtypes = [p.dtype for p in layer.parameters() if p.dim() == 1 and p.is_floating_point()]
        dtype = dtypes[0] if dtypes else torch.get_default_dtype()
    return device, dtype


def weights_of(linear: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight (out, in) and bias (out,) that a linear multiplies with, adapters included.

    Raises:
        UnsupportedError: they are elsewhere, or the linear does not run.
    """
    if not readable(linear):
        return _probed(linear, layer)
    with onloaded(linear):
        weight, bias = cast(Tensor, linear.weight), getattr(linear, "bias", None)
        if weight.is_meta and any("_hf_hook" in vars(module) for module in layer.modules()):
            raise UnsupportedError(
                f"the weights of {type(linear).__name__} are offloaded with a module around it, so image-only "
                "projections cannot be copies of them; call apply before accelerate's hooks"
            )
        weight = weight.T if is_transposed(linear) else weight
        bias = None if bias is None else bias.detach().clone()
        return weight.detach().clone(memory_format=torch.contiguous_format), bias


def _probed(linear: nn.Module, layer: nn.Module) -> tuple[Tensor, Tensor | None]:
    # What a linear makes of unit vectors is its weight, whoever packed it and whatever adapts it.
    (out, width), (device, dtype) = linear_shape(linear), home(linear, layer)
    dropouts = [module for module in linear.modules() if isinstance(module, nn.Dropout) and module.training]
    weight, has_bias = torch.empty(out, width, device=device, dtype=dtype), _biased(linear)
    if weight.is_meta:
        return weight, weight.new_empty(out) if has_bias else None
    try:
        for dropout in dropouts:
            dropout.training = False
        bias = _output(linear, torch.zeros(1, width, device=device, dtype=dtype))[0]
        for start in range(0, width, _ROWS):
            units = torch.zeros(min(_ROWS, width - start), width, device=device, dtype=dtype)
            units.diagonal(start).fill_(1)
            weight[:, start : start + len(units)] = (_output(linear, units) - bias).T
    except (RuntimeError, ValueError, TypeError, NotImplementedError, AssertionError, ImportError) as error:
        raise UnsupportedError(
            f"image-only projections are copies of the text's, and {type(linear).__name__} of {out} x {width} features "
            f"does not give its weights, nor run on {device} to show them: {error}; use separate='none'"
        ) from error
    finally:
        for dropout in dropouts:
            dropout.training = True
    return weight, bias.to(dtype) if has_bias or bool(bias.any()) else None


def _output(linear: nn.Module, rows: Tensor) -> Tensor:
    # As in training: for inference, some kernels repack the weight and round.
    with torch.enable_grad(), torch.autocast(rows.device.type, enabled=False):
        return linear(rows.requires_grad_()).detach()


def _biased(linear: nn.Module) -> bool:
    held = (*linear.named_parameters(), *linear.named_buffers())  # a packed linear keeps it beside its weight
    return any(name.rpartition(".")[2] == "bias" for name, _ in held)
