"""Methods written as text, as a command line takes them."""

import ast
import difflib
import inspect
import re
from collections.abc import Sequence
from dataclasses import fields

from tokendrop import methods
from tokendrop.errors import MethodError, TokenDropError
from tokendrop.roles import Method

KNOWN = {name.lower(): getattr(methods, name) for name in methods.__all__}
# Fields that hold the layers of the decoder in which a method does something.
LAYERS = ("layers", "layer", "shallow", "text_layers")
# A range such as 8:24:2, or a word, that is a whole argument without quotes.
BARE = re.compile(r"(?<=[(,=])\s*(-?\d*:-?\d*(?::-?\d*)?|[A-Za-z][A-Za-z-]*)\s*(?=[,)])")


def methods_from_text(texts: Sequence[str], layers: str | None = None) -> Method | dict[str, Method]:
    """One method for whatever task, or task name -> method where each text begins with its task, as in 'u=HiMix'.

    Args:
        texts: see `method_from_text`.
        layers: likewise, for all of them.

    Raises:
        MethodError: several methods without tasks, or a task twice; as `method_from_text`.

    Example:
        >>> methods_from_text(["understanding=HiMix(layers='2:')"])
        {'understanding': HiMix(layers='2:', separate='none')}
    """
    found = {task: method_from_text(text, layers) for task, text in map(_with_task, texts)}
    if len(found) < len(texts) or ("" in found and len(found) > 1):
        raise MethodError(f"found the methods {list(texts)}; give one, or one for each task as in 'task=HiMix'")
    return found.get("", found)


def each_from_text(texts: Sequence[str], layers: str | None = None) -> list[Method | dict[str, Method]]:
    """What is compared: each method without a task by itself; those with tasks together, until a task comes again.

    Args:
        texts: see `method_from_text`.
        layers: likewise, for all of them.

    Raises:
        MethodError: as `method_from_text`.

    Example:
        >>> [len(one) for one in each_from_text(["u=HiMix", "g=HMGen('1:3')", "u=FastV"])]
        [2, 1]
    """
    found: list[Method | dict[str, Method]] = []
    for task, text in map(_with_task, texts):
        method = method_from_text(text, layers)
        last = found[-1] if found else None
        if not task:
            found.append(method)
        elif isinstance(last, dict) and task not in last:
            last[task] = method
        else:
            found.append({task: method})
    return found


def _with_task(text: str) -> tuple[str, str]:
    task, _, method = text.partition("=") if "=" in text.partition("(")[0] else ("", "", text)
    return task.strip(), method


def method_from_text(text: str, layers: str | None = None) -> Method:
    """The method that a name, in whatever case, says, or a name with arguments; literals only, nothing is executed.

    Args:
        text: such as 'HiMix' or 'HMGen("8:24:2")'.
        layers: the layers of the method in the decoder where `text` gives none, as a range ("2:") or a Python literal.

    Raises:
        LayerRangeError: layers that are no range.
        MethodError: an unknown name, arguments that are no literals or that the method does not take, or `layers` for
            one that has none.

    Example:
        >>> method_from_text("hmgen", layers="8:24:2")
        HMGen(shallow='8:24:2', separate='none')
    """
    try:
        return _method(text, layers)
    except TokenDropError:
        raise
    except (KeyError, SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        reason = error.msg if isinstance(error, SyntaxError) else error
        given = repr(text) if layers is None else f"{text!r} with layers={layers!r}"
        raise MethodError(
            f"{given} is no method ({type(error).__name__}: {reason}); {_advice(text, layers)}"
        ) from error


def _method(text: str, layers: str | None) -> Method:
    node = ast.parse(text.strip(), mode="eval").body
    call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
    made = KNOWN[ast.unparse(call.func).lower()]
    given = [ast.literal_eval(one) for one in call.args]
    named = {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    bound = inspect.signature(made).bind_partial(*given, **named)
    if layers is not None:
        name = next((field.name for field in fields(made) if field.name in LAYERS), None)
        if name is None:
            raise MethodError(
                f"{made.__name__} has no layers of its own to choose, and found --layers {layers}; leave it out, and "
                "give other methods theirs as in \"HiMix(layers='2:')\""
            )
        bound.arguments.setdefault(name, layers if ":" in layers else ast.literal_eval(layers))
    return made(**bound.arguments)


def _advice(text: str, layers: str | None) -> str:
    """What to type instead: the same with its ranges and words in quotes, or the name that looks most like it."""
    name, bracket, rest = text.partition("(")
    close = difflib.get_close_matches(name.strip().lower(), KNOWN, 1)
    meant = (KNOWN[close[0]].__name__ if close else name) + BARE.sub(r'"\1"', bracket + rest)
    try:
        _method(meant, layers)
    except Exception:  # whatever was wrong is wrong still
        return f"write one of {', '.join(sorted(methods.__all__))}, with arguments as in 'HMGen(\"8:24:2\")'"
    return f"write '{meant}'"
