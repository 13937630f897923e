"""What is to happen right after a method of a LightningModule, where Lightning has no hook.

Shape letters: none.
"""

import functools
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def followed(module: nn.Module, name: str, then: Callable[[], None]) -> Generator[None]:
    """Inside, every call of `module.name` is followed by `then`; the method itself is wrapped on the instance."""
    original, before = getattr(module, name), module.__dict__.get(name)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        then()
        return out

    module.__dict__[name] = wrapped
    try:
        yield
    finally:
        module.__dict__.pop(name, None)
        if before is not None:
            module.__dict__[name] = before
