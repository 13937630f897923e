"""What the user's own code gives a command: a function by name, its model, batches, layout and loss."""

import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokendrop.errors import TokenDropError

if TYPE_CHECKING:
    from torch import nn

FORM = "expected package.module:function"
OURS = (str(Path(__file__).parents[1]), sysconfig.get_paths()["purelib"], sysconfig.get_paths()["stdlib"], "<frozen")


class SourceError(TokenDropError, ImportError):
    """A name that leads to nothing that can be run, or code of the user's that raised."""


def call(name: str, **arguments: Any) -> Any:
    """What a function of the user's returns.

    Args:
        name: "package.module:function"; modules of the working directory are found.
        arguments: that it is called with, in order; it may name them otherwise.

    Raises:
        SourceError: no such function, one that takes other arguments, or one that raised.
    """
    function = _function(name)
    try:
        inspect.signature(function).bind(*arguments.values())
    except (TypeError, ValueError) as error:
        expected = f"({', '.join(arguments)})" if arguments else "no arguments"
        raise SourceError(f"{name!r}: expected a function of {expected}; {error}") from error
    with blamed(name):
        return function(*arguments.values())


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    path = Path(module)
    if path.suffix == ".py":
        raise SourceError(f"{name!r}: {FORM}; write {'.'.join(path.with_suffix('').parts)}:{function or 'function'}")
    if not all(module.split(".")) or not function.isidentifier():
        raise SourceError(f"{name!r}: {FORM}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    with blamed(name):
        try:
            found = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError) as error:
            raise SourceError(f"{name!r}: {FORM}; {error}") from error
    if not callable(found):
        raise SourceError(f"{name!r}: {FORM}; found {type(found).__name__} {found!r}")
    return found


@contextmanager
def blamed(name: str) -> Generator[None]:
    """Say of an exception in the user's code what it was and where.

    Raises:
        SourceError: in place of it; our own errors stay as they are.
    """
    try:
        yield
    except TokenDropError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [one for one in frames if not one.filename.startswith(OURS)]
        where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
        raise SourceError(f"{name!r} raised {type(error).__name__}: {error}{where}") from error


def read_source(name: str) -> tuple["nn.Module", Any, Any, Any]:
    """Model, batches, layout, and the loss of a batch or None, as a function of the user's returns them.

    Args:
        name: see `call`; one batch may stand in place of a list.

    Raises:
        SourceError: as `call`, or a function that returns other things.
    """
    from torch import Tensor, nn

    made = call(name)
    if not isinstance(made, tuple) or len(made) not in (3, 4) or not isinstance(made[0], nn.Module):
        kinds = f"({', '.join(type(one).__name__ for one in made)})" if isinstance(made, tuple) else type(made).__name__
        raise SourceError(f"{name!r} returned {kinds}; expected (model, batches, layout) or with a loss as a fourth")
    model, batches, layout, *loss = made
    return model, [batches] if isinstance(batches, Mapping | Tensor) else batches, layout, *(loss or [None])


def read_run(name: str, tasks: tuple[str, ...], methods: dict[str, Any], seed: int) -> tuple[Any, Any, Any]:
    """Module, datamodule or None, and a Trainer's arguments, as a function of the user's makes them for a run.

    Args:
        name: see `call`.
        tasks: that the run trains.
        methods: each of these tasks' method, or None for dense.
        seed: of the run.

    Raises:
        SourceError: as `call`, or a function that returns other things.
    """
    import lightning as L

    made = call(name, tasks=tasks, methods=methods, seed=seed)
    kinds: tuple[Any, ...] = (L.LightningModule, L.LightningDataModule | None, Mapping)
    if not isinstance(made, tuple) or len(made) != 3 or not all(map(isinstance, made, kinds)):
        found = f"({', '.join(type(one).__name__ for one in made)})" if isinstance(made, tuple) else type(made).__name__
        raise SourceError(
            f"{name!r} returned {found}; expected (a LightningModule, a LightningDataModule or None, a mapping of "
            "Trainer arguments)"
        )
    return made


def read_model(name: str) -> "nn.Module":
    """The model of a config, or of a function of the user's.

    Args:
        name: a config.json, the folder it is in, one of the configs that come with tokendrop, or a function's name as
            in `call`, which returns a model, a config, or what `read_source` takes.

    Raises:
        DecoderError: no such file, or no config of a model.
        SourceError: as `call`.
    """
    from torch import nn

    from tokendrop.engine.model.from_config import model_from_config

    made: Any = name
    if ":" in name and not Path(name).exists():
        made = call(name)
        made = made[0] if isinstance(made, tuple) and made else made
    return made if isinstance(made, nn.Module) else model_from_config(made)
