"""The device that the tests run on: TOKENDROP_TEST_DEVICE, by default the CPU.

With the variable set, what a test makes without naming a device lies there; draws from a CPU generator are made on the
CPU and moved, so that they are the same numbers everywhere.
"""

import os

import torch
from torch.overrides import TorchFunctionMode

DEVICE = torch.device(os.environ.get("TOKENDROP_TEST_DEVICE", "cpu"))
ACCELERATOR = {"cuda": "gpu"}.get(DEVICE.type, DEVICE.type)  # as Lightning calls it


class _SameDraws(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if generator is None or generator.device.type != "cpu" or "device" in kwargs or "out" in kwargs:
            return func(*args, **kwargs)
        if args and isinstance(args[0], torch.Tensor):  # in place, on a tensor that is there
            drawn = func(args[0].detach().cpu(), *args[1:], **kwargs)
            return args[0].detach().copy_(drawn) if func.__name__.endswith("_") else drawn.to(args[0].device)
        return func(*args, **kwargs, device="cpu").to(DEVICE)


def use():
    """Make it the default device of this process, if the variable is set."""
    if "TOKENDROP_TEST_DEVICE" in os.environ:
        torch.set_default_device(DEVICE)
        _SameDraws().__enter__()
