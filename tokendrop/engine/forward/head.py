"""Logits where there is a label: the output head and the loss on labelled rows only.

Shape letters: B batch, T tokens, N rows with a label, D hidden, V vocabulary.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.engine.forward.state import Frame, frames
from tokendrop.engine.model.swap import Swapped, swap
from tokendrop.engine.model.swap import restore as swap_restore
from tokendrop.errors import LayoutError, UnsupportedError
from tokendrop.kernels import gather_tokens


class _LabelledHead(Swapped):
    """Mixin of an output head that runs on labelled rows."""

    def __call__(self, hidden: Tensor) -> Tensor:
        frame = _entered(self.__dict__["_tokendrop_key"])
        if frame is None or frame.labelled is None or hidden.shape[:2] != frame.plan.shape:
            return super().__call__(hidden)
        return super().__call__(gather_tokens(hidden.reshape(1, -1, hidden.shape[-1]), frame.labelled.index))


@dataclass(eq=False)
class _LabelledLoss:
    """A Hugging Face loss function that takes the logits of labelled rows.

    Args:
        key: of the handle.
        base: the model's own.
    """

    key: str
    base: Callable[..., Tensor]

    def __call__(self, logits: Tensor, labels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        frame = _entered(self.key)
        if frame is None or frame.labelled is None or logits.shape[:2] != frame.labelled.index.shape:
            return self.base(logits, labels, *args, **kwargs)
        given = frame.layout.labels
        if (
            not torch.compiler.is_compiling()
            and labels is not given
            and given is not None
            and not torch.equal(labels, given)
        ):
            raise LayoutError(
                f"the loss is given labels of shape {tuple(labels.shape)} that differ from the layout's; give both the "
                "same, or leave labelled_logits out"
            )
        return self.base(logits, labels, *args, **kwargs | {"shift_labels": frame.labelled.targets})


def _entered(key: str) -> Frame | None:
    entered = frames(key)
    return entered[-1] if entered else None


def find_head(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The model that makes a loss from labels, and its output head.

    Raises:
        UnsupportedError: no such model, or a loss that takes no shifted labels.
    """
    for module in model.modules():
        find = getattr(module, "get_output_embeddings", None)
        head = find() if callable(find) else None
        # By its class: a wrapper such as PEFT's hands on the attributes of the model within, which makes the loss.
        if isinstance(head, nn.Module) and hasattr(type(module), "loss_function"):
            loss: Any = module.loss_function
            if "shift_labels" not in inspect.signature(loss).parameters:
                raise UnsupportedError(
                    f"labelled_logits: {type(module).__name__}.loss_function takes no 'shift_labels', through which it "
                    "would be given the labels of its rows; leave labelled_logits out"
                )
            return module, head
    raise UnsupportedError(
        f"labelled_logits: {type(model).__name__} holds no Hugging Face model with an output head and a loss function; "
        "leave labelled_logits out, or run your head on the rows that have a label"
    )


def inject(model: nn.Module, head: nn.Module, key: str) -> None:
    """Make a head and the loss of its model work on labelled rows."""
    loss: Any = model.loss_function
    model.__dict__["_loss_function"] = _LabelledLoss(key, loss)
    _label(head, key)


def _label(head: nn.Module, key: str) -> None:
    head.__dict__["_tokendrop_key"] = key
    swap(head, _LabelledHead)


def settle(model: nn.Module) -> None:
    """Follow a head that was exchanged since, as by `resize_token_embeddings`, or wrapped by an adapter."""
    for module in model.modules():
        loss = module.__dict__.get("_loss_function")
        if isinstance(loss, _LabelledLoss):
            head: Any = module.get_output_embeddings()  # ty: ignore[not-callable]
            if not isinstance(head, _LabelledHead):
                _unlabel(module)
                _label(head, loss.key)


def _unlabel(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _LabelledHead):
            swap_restore(module)


def restore(model: nn.Module) -> None:
    """Give every head and loss their own back."""
    for module in model.modules():
        loss = module.__dict__.get("_loss_function")
        if isinstance(loss, _LabelledLoss):
            del module.__dict__["_loss_function"]
            if module.loss_function is not loss.base:
                module.__dict__["_loss_function"] = loss.base
    _unlabel(model)
