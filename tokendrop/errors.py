"""What can go wrong, one class per kind; each is also the builtin that a caller would catch."""

import inspect
from collections.abc import Hashable


class TokenDropError(Exception):
    """Every error of this package."""


class MissingLayoutError(TokenDropError, RuntimeError):
    """A dropped model ran without knowing what its tokens are."""


class LayoutError(TokenDropError, ValueError):
    """A token layout that contradicts itself, the methods or the hidden states."""


class LayoutTypeError(TokenDropError, TypeError):
    """A token layout made of the wrong kinds of things."""


class NeededRowError(LayoutError):
    """A row whose output is trained or sampled from would hold a stale state."""


class LayerRangeError(TokenDropError, ValueError):
    """A layer range that is malformed, empty or outside the model."""


class MethodError(TokenDropError, ValueError):
    """A method, a schedule or a set of methods with values that make no sense."""


class DecoderError(TokenDropError, LookupError):
    """No decoder, or more than one, where one was looked for."""


class AppliedError(TokenDropError, RuntimeError):
    """A method applied twice, or removed from where it is not."""


class UnsupportedError(TokenDropError, NotImplementedError):
    """A combination that would give wrong results and is refused."""


class BatchError(TokenDropError, KeyError):
    """A batch without the keys that the layout needs."""

    def __str__(self) -> str:
        # KeyError prints the repr of its argument, which would quote a whole sentence.
        return str(self.args[0]) if self.args else ""


class TaskLossError(TokenDropError, ValueError):
    """A task's loss or gradient of which nothing can be said."""


def check_integer(
    name: str, value: object, least: int | None = None, error: type[TokenDropError] = MethodError
) -> None:
    """Refuse what is no whole number, or one below `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or (least is not None and value < least):
        above = "" if least is None else f" of {least} or more"
        raise error(f"{name}={value!r}: expected a whole number{above}")


def check_callable(name: str, value: object, *arguments: str) -> None:
    """Refuse what cannot be called, or not with so many `arguments`, which say what they are."""
    if not callable(value):
        raise MethodError(f"{name}: expected a function; found {value!r}")
    try:
        signature = inspect.signature(value)
    except (TypeError, ValueError):  # a builtin that does not say
        return
    try:
        if arguments:
            signature.bind(*arguments)
    except TypeError as error:
        named = getattr(value, "__qualname__", type(value).__name__)
        raise MethodError(
            f"{name}: expected a function of ({', '.join(arguments)}); found {named}{signature}, {error}"
        ) from error


def check_hashable(name: str, value: object, *arguments: str) -> None:
    """Refuse what is no function of so many `arguments`, or one that cannot be hashed."""
    check_callable(name, value, *arguments)
    if not isinstance(value, Hashable):
        raise MethodError(f"{name}={value!r}: expected a function that can be hashed, such as a frozen dataclass")


def check_flag(name: str, value: object) -> None:
    """Refuse what is neither True nor False; other values would count as True in silence."""
    if not isinstance(value, bool):
        raise MethodError(f"{name}={value!r}: expected True or False")


class SynergyWarning(UserWarning):
    """The tasks' gradients point away from each other, or cannot be compared."""


class NoEffectWarning(UserWarning):
    """Something was asked for and nothing will happen."""


class MethodChangedWarning(UserWarning):
    """A checkpoint was made under other methods than those in force."""


class LayoutWarning(UserWarning):
    """A token layout that says too little to train on, or something else than the model does."""
