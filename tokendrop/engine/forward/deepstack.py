"""Features that a model adds to its image tokens between decoder layers (DeepStack), inside a span.

The model adds them at full length. Inside a span the rows that compute get theirs, and so do the states of the others:
a token that skips a layer skips what the layer would add to it, and nothing else.

Shape letters: B batch, T tokens, K computed rows, D hidden.
"""

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.state import Forward, frames
from tokendrop.engine.model.deepstack import ADDS_FEATURES
from tokendrop.engine.model.swap import Swapped, swap
from tokendrop.kernels import gather_tokens


class _Stacked(Swapped):
    """Mixin of a decoder with a method of this name, which adds features to hidden states (B, T, D)."""

    def _deepstack_process(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        process = cast(Any, super())._deepstack_process
        entered = frames(self.__dict__["_tokendrop_key"])
        forward = entered[-1].forward if entered and entered[-1] is not None else None
        if forward is None or forward.full is None:
            return process(hidden_states, *args, **kwargs)
        return _add(forward, hidden_states, process(torch.zeros_like(forward.full), *args, **kwargs))


def _add(forward: Forward, states: Tensor, features: Tensor) -> Tensor:
    span, width = cast(Any, forward.span), features.shape[-1]
    forward.full = cast(Tensor, forward.full) + features
    forward.context = tuple(
        None if frozen is None else frozen + gather_tokens(features[group.samples], group.context.index)
        for frozen, group in zip(forward.context, span.groups, strict=True)
    )
    # The rows of a folded span are those of all samples in one.
    return states + gather_tokens(features.reshape(len(states), -1, width), span.rows.index)


def inject(model: nn.Module, path: str, key: str) -> None:
    """Make a decoder that adds features between its layers add them to the rows that are there.

    Args:
        model: the module given to `apply`.
        path: of the decoder's layer list.
        key: of the handle.
    """
    decoder = model.get_submodule(path.rpartition(".")[0])
    if hasattr(decoder, ADDS_FEATURES):
        swap(decoder, _Stacked)
        decoder.__dict__["_tokendrop_key"] = key


def injected(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that `inject` changed."""
    return (one for one in model.modules() if isinstance(one, _Stacked))
