"""What a layer does with its FFN: learned by running the layer's own forward with nothing in its large parts.

Shape letters: B batch, T tokens, D hidden.
"""

import inspect
from collections import OrderedDict
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tokendrop.engine.model.decoder import LayerSpec
from tokendrop.engine.model.ffn import ffn_names, holds_weights
from tokendrop.engine.model.linears import is_linear, linear_shape, linears
from tokendrop.engine.model.swap import HUNG

_TOKENS = 5


class _Nothing(nn.Module):
    """Stands for a part of a layer, and adds nothing; of (2, T, D) it gives what also unpacks into two."""

    def __init__(self, width: int | None) -> None:
        super().__init__()
        self.width, self.calls, self.gives = width, 0, 0.0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls += 1
        x = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
        return x.new_full((*x.shape[:-1], self.width or x.shape[-1]), self.gives)


def skip_refusal(layer: nn.Module, spec: LayerSpec, adds: float = 0.0) -> str | None:
    """Why a row of a layer cannot go without its FFN and be x + attention(norm x), or None.

    The layer's own forward runs on a copy whose attention and FFN give zeros and whose norms have weights at random: it
    must hand on its input, whatever they are; or its input and `adds`, which the FFN gives then.
    """
    names, name = ffn_names(layer), type(layer).__name__
    if len(names) != 1:
        found = f"finds {' and '.join(map(repr, names))}" if names else "finds none"
        return f"it takes one child of {name} that is its FFN, and inspection {found}"
    failure: Exception | None = None
    with unset_fake_temporarily(), torch.device("cpu"), torch.no_grad():
        for batch in (2, 3):  # of parts that return two and three things
            try:
                return _found(layer, spec, names[0], batch, adds)
            except Exception as error:  # whatever somebody else's forward does without its arguments
                failure = failure or error
    return f"{name}.forward does not run without its attention and {names[0]!r} ({type(failure).__name__}: {failure})"


def _found(layer: nn.Module, spec: LayerSpec, name: str, batch: int, adds: float) -> str | None:
    generator = Generator("cpu").manual_seed(0)
    hollow = _hollow(layer, generator)
    hollow._modules = {child: _part(module, generator) for child, module in layer._modules.items()}
    ffn = hollow._modules[name]
    if isinstance(ffn, _Nothing):
        ffn.gives = adds
    x = torch.randn(batch, _TOKENS, _width(layer), generator=generator, device="cpu")
    parameters = list(inspect.signature(spec.layer_class.forward).parameters.values())[2:]
    needed = {
        one.name: None
        for one in parameters
        if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
    }
    out = spec.layer_class.forward(hollow, x.clone(), **needed)
    out = out[0] if isinstance(out, tuple) else out
    if not isinstance(ffn, _Nothing) or ffn.calls != 1:
        return f"{type(layer).__name__}.forward does not call its {name!r} as a module, once"
    if not isinstance(out, Tensor) or out.shape != x.shape or not torch.equal(out, x + adds if adds else x):
        return (
            f"{type(layer).__name__} does not add what its {name!r} makes to x + attention, and nothing else: there is "
            "a norm behind the sum, a bias, a scale, or the sum is made inside"
        )
    return None


def _part(module: nn.Module | None, generator: Generator) -> nn.Module | None:
    if module is None:
        return None
    if holds_weights(module):
        return _Nothing(linear_shape(module)[0] if is_linear(module) else None)
    made = _hollow(module, generator)
    made._modules = {name: _part(child, generator) for name, child in module._modules.items()}
    return made


def _hollow(module: nn.Module, generator: Generator) -> nn.Module:
    # The same module without its children, in evaluation, its tensors others at random; the module is not touched.
    made = object.__new__(type(module))
    made.__dict__.update({name: value for name, value in vars(module).items() if name not in HUNG})
    hooks = [name for name in vars(made) if name.endswith("_hooks")]
    made.__dict__.update({name: OrderedDict() for name in hooks} | {"training": False})
    made._parameters = {
        name: None if one is None else nn.Parameter(_random(one, generator), one.is_floating_point())
        for name, one in module._parameters.items()
    }
    made._buffers = {name: None if one is None else _random(one, generator) for name, one in module._buffers.items()}
    return made


def _random(like: Tensor, generator: Generator) -> Tensor:
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype, device="cpu")
    return 0.5 + torch.rand(like.shape, generator=generator, device="cpu")


def _width(layer: nn.Module) -> int:
    return linear_shape(linears(layer)[0])[1]
