"""The vocabulary ids that a forward is given, seen by hooks, and held against the layout.

Shape letters: B batch, T tokens of the layout, R rows of a forward, Q tokens behind them.
"""

import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tokendrop.errors import LayoutError
from tokendrop.layout import TokenLayout


class SeenIds:
    """The ids of a forward, the first that its modules are given, before one of them changes some.

    Args:
        here: whether a forward that runs now is looked at.
    """

    def __init__(self, here: Callable[[], bool] = lambda: True) -> None:
        self._here = here
        self._first: Tensor | None = None

    @contextmanager
    def watching(self, model: nn.Module, path: str) -> Generator[None]:
        """See the ids that the modules on the way to the decoder's layers, and the embeddings, are given inside."""
        names = path.split(".")
        way = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        models: list[Any] = [module for module in way if callable(getattr(module, "get_input_embeddings", None))]
        hooks = [module.register_forward_pre_hook(self._given, with_kwargs=True) for module in models]
        embeddings = models[0].get_input_embeddings() if models else None
        if isinstance(embeddings, nn.Module):
            hooks.append(embeddings.register_forward_pre_hook(self._given, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _given(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        seen = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        if seen and self._first is None and self._here():
            self._first = ids

    def __reduce__(self) -> tuple[Any, ...]:
        # A module that is copied or saved inside a layout takes its hooks along; elsewhere, they see nothing.
        return SeenIds, (_nowhere,)

    def taken(self) -> Tensor | None:
        """The ids of the forward that begins; those of the next are seen afresh."""
        ids, self._first = self._first, None
        return ids


def _nowhere() -> bool:
    return False


def check_rows(layout: TokenLayout, order: Sequence[int], ids: Tensor | None, shape: tuple[int, int]) -> None:
    """Refuse rows whose images are not those of the layout.

    Args:
        layout: of the (B, T) prompt.
        order: the sample of the layout that each of the R rows comes from.
        ids: (R, T + Q) vocabulary ids; None where nobody saw them.
        shape: (R, T + Q).

    Raises:
        LayoutError: other images than the layout's.
    """
    tokens = layout.image.shape[1]
    if ids is None or layout.image_ids is None or tuple(ids.shape) != shape or torch.compiler.is_compiling():
        return
    found = torch.isin(ids[:, :tokens], layout.image_ids.to(ids.device))
    wrong = int((found != layout.image[list(order)].to(ids.device)).sum())
    if wrong:
        raise LayoutError(
            f"the ids say of {wrong} of {found.numel()} tokens something else than the layout's image=, so this is "
            "another prompt, or its rows are in another order; enter the layout of this very batch. Leave image_ids "
            "out of a layout whose images are not those of its ids"
        )


def generating() -> bool:
    """Whether a function named `generate` runs; transformers says it nowhere else, and models have one of their own."""
    frame = sys._getframe()
    while frame is not None and frame.f_code.co_name != "generate":
        frame = frame.f_back
    return frame is not None
