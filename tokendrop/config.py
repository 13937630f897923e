"""Methods and schedules as plain data, and back; also out of a checkpoint."""

import dataclasses
import math
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch

from tokendrop import methods as published
from tokendrop.engine.support import Methods, check_methods
from tokendrop.errors import MethodError
from tokendrop.roles import Method
from tokendrop.schedule import Schedule

Config = dict[str, Any]
OURS: dict[str, type] = {f"tokendrop.{name}": getattr(published, name) for name in published.__all__}
NOT_PLAIN = "not_plain"
STATE_KEY = "TokenDrop"  # under which a checkpoint holds what the callback says
FOLDED = "meta.pt"  # what Lightning writes beside the shards of a distributed checkpoint


def to_config(methods: Methods, schedule: Schedule | None = None) -> Config:
    """Methods and a schedule as plain data, in the form of a LightningCLI file.

    Args:
        methods: a method, or task name -> method; None for a dense task.
        schedule: of a training under them.

    Returns:
        {"methods": {"class_path", "init_args"} or task name -> such, "schedule": fields or None}: dicts, lists, text,
        numbers and None, for JSON and YAML.

    Raises:
        MethodError: no methods, a method that is no dataclass, or a field that is no plain data, such as a function.

    Example:
        >>> import tokendrop as td
        >>> to_config({"u": td.HiMix("1:")})["methods"]
        {'u': {'class_path': 'tokendrop.HiMix', 'init_args': {'layers': '1:', 'separate': 'none', 'parts': 'qkv'}}}

    Source: ours; the form is jsonargparse's.
    """
    _check_schedule(schedule)
    return _config(methods, schedule, plain=True)


def described(methods: Methods, schedule: Schedule | None = None) -> Config:
    """The same for any methods: what is no plain data is named, and `from_config` refuses it."""
    return _config(methods, schedule, plain=False)


def from_config(config: Mapping[str, Any], classes: Iterable[type] = ()) -> tuple[Methods, Schedule | None]:
    """The methods and the schedule that `to_config` wrote.

    Args:
        config: of `to_config`. Names are looked up, never imported.
        classes: methods of your own, dataclasses, that it may name.

    Returns:
        A method, or task name -> method; and the schedule, or None.

    Raises:
        MethodError: a name or a field that is unknown, or something that is no such config.
        LayerRangeError: a layer range that is none.

    Example:
        >>> import tokendrop as td
        >>> from_config(to_config(td.HiMix(), td.Schedule(start=5)))[0]
        HiMix(layers=':', separate='none')

    Source: ours.
    """
    own = _own(classes)
    if not isinstance(config, Mapping) or "methods" not in config or set(config) - {"methods", "schedule"}:
        raise MethodError(f"config: expected 'methods' and 'schedule', as to_config writes them; found {config!r}")
    given = config["methods"]
    if not isinstance(given, Mapping):
        raise MethodError(f"methods: expected a class_path with init_args, or one for each task; found {given!r}")
    read: Methods
    if isinstance(given.get("class_path"), str):
        read = _method(given, own)
    else:
        read = {task: None if one is None else _method(one, own) for task, one in given.items()}
    check_methods(read)
    return read, schedule_of(config)


def schedule_of(config: Mapping[str, Any]) -> Schedule | None:
    """The schedule in a config."""
    fields = config.get("schedule")
    return None if fields is None else cast(Schedule, _made(Schedule, fields))


def methods_of(path: str | os.PathLike[str], classes: Iterable[type] = ()) -> tuple[Methods, Schedule | None]:
    """The methods and the schedule under which a Lightning checkpoint was made.

    `td.apply(model, td.methods_of(path)[0])` is the way back without a Trainer. A schedule whose `final` is 0 ended
    dense: such a model runs inside `drop.disabled()`.

    Args:
        path: of a checkpoint, or of the folder of a distributed one; read as plain data, weights are not loaded.
        classes: as for `from_config`.

    Raises:
        MethodError: no such file, none that plain data can be read from, or one without methods; what `from_config`
            refuses.

    Example:
        >>> import tempfile
        >>> import tokendrop as td
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     torch.save({"callbacks": {"TokenDrop": td.to_config(td.FastV(2))}}, file.name)
        ...     methods_of(file.name)
        (FastV(layer=2, keep=0.5, per='sample'), None)

    Source: ours.
    """
    state = saved_state(_checkpoint(path))
    if state is None:
        raise MethodError(
            f"{os.fspath(path)} holds no methods; it was made without TokenDrop, with save_weights_only, or before "
            "TokenDrop saved them"
        )
    return from_config(state_config(state), classes)


def saved_state(checkpoint: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What the callback left in a checkpoint; None where it left nothing."""
    callbacks = checkpoint.get("callbacks")
    state = callbacks.get(STATE_KEY) if isinstance(callbacks, Mapping) else None
    return state if isinstance(state, Mapping) and "methods" in state else None


def state_config(state: Mapping[str, Any]) -> Config:
    """The config in what the callback left."""
    return {key: state[key] for key in ("methods", "schedule") if key in state}


def _checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    if not isinstance(path, str | os.PathLike):
        raise MethodError(f"path: expected that of a checkpoint; found {path!r}")
    file = Path(path)
    file = file / FOLDED if file.is_dir() else file
    if not file.is_file():
        raise MethodError(f"path={os.fspath(path)!r}: found no file {file}; expected a Lightning checkpoint")
    try:
        # Mapped, so that weights are not read; older files cannot be.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file) or None)
    except Exception as reason:  # whatever a file of somebody else's makes torch raise
        raise MethodError(
            f"{file} cannot be read as plain data: {str(reason).splitlines()[0] if str(reason) else reason!r}; if you "
            "trust it and it holds classes of your own, name them with torch.serialization.safe_globals"
        ) from reason
    if not isinstance(found, Mapping):
        raise MethodError(f"{file} holds a {type(found).__name__}; expected a Lightning checkpoint")
    return found


def _config(methods: Methods, schedule: Schedule | None, plain: bool) -> Config:
    written = {t: None if m is None else _written(m, plain) for t, m in check_methods(methods).items()}
    fields = None if schedule is None else dataclasses.asdict(schedule)
    return {"methods": written.get(None, written), "schedule": fields}


def _written(method: Method, plain: bool) -> Config:
    kind, fields = type(method), {}
    if dataclasses.is_dataclass(method):
        fields = {f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.init}
    elif plain:
        raise MethodError(f"{method!r} is no dataclass; make {kind.__name__} one, with fields of plain data")
    return {"class_path": _path(kind), "init_args": {n: _value(method, n, one, plain) for n, one in fields.items()}}


def _value(method: Method, name: str, value: Any, plain: bool) -> Any:
    if value is None or isinstance(value, bool):
        return value
    # Subclasses, such as NumPy's float64, are no plain data to YAML and to torch.load.
    for kind in (str, int, float):
        if isinstance(value, kind) and (kind is not float or math.isfinite(value)):
            return kind(value)
    if isinstance(value, list | tuple):
        return [_value(method, name, one, plain) for one in value]
    if plain:
        raise MethodError(
            f"{type(method).__name__}({name}={value!r}) is no plain data, which a config could hold; use the name of a "
            "built-in score, or a method class of your own whose fields are numbers and text"
        )
    named = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    return {NOT_PLAIN: _path(named)}


def _path(named: Any) -> str:
    path = f"{named.__module__}.{named.__qualname__}"
    return next((ours for ours, kind in OURS.items() if kind is named), path)


def _own(classes: Iterable[type]) -> list[type]:
    listed = list(classes) if isinstance(classes, Iterable) and not isinstance(classes, str) else [classes]
    for one in listed:
        if not isinstance(one, type) or not dataclasses.is_dataclass(one) or not hasattr(one, "route"):
            raise MethodError(f"classes: expected methods of your own, which are dataclasses; found {one!r}")
    return cast(list[type], listed)


def _method(config: Any, own: list[type]) -> Method:
    if not isinstance(config, Mapping) or not {"class_path"} <= set(config) <= {"class_path", "init_args"}:
        raise MethodError(f"expected a method as 'class_path' and 'init_args'; found {config!r}")
    path = config["class_path"]
    # By the last name: a class of the script that trained is in another module when it is imported.
    named = {one.__name__: one for one in own} if isinstance(path, str) and path not in OURS else OURS
    kind = named.get(str(path) if named is OURS else path.rpartition(".")[2])
    if kind is None:
        raise MethodError(
            f"class_path={path!r} is unknown; use one of {', '.join(OURS)}, or give methods of your own as "
            f"classes=[...], now {[one.__name__ for one in own]}"
        )
    return cast(Method, _made(kind, config.get("init_args", {})))


def _made(kind: Any, fields: Any) -> object:
    names = [one.name for one in dataclasses.fields(kind) if one.init]
    if not isinstance(fields, Mapping) or set(fields) - set(names):
        unknown = sorted(map(str, set(fields) - set(names))) if isinstance(fields, Mapping) else fields
        raise MethodError(f"{kind.__name__} has no fields {unknown!r}; it has {', '.join(names)}")
    for name, value in fields.items():
        if isinstance(value, Mapping):
            raise MethodError(
                f"{kind.__name__}({name}={value.get(NOT_PLAIN, value)}) was no plain data, so the config only names "
                "it; make the method in code"
            )
    try:
        return kind(**{name: _tuples(value) for name, value in fields.items()})
    except TypeError as reason:
        raise MethodError(f"{kind.__name__}: {reason}; found the fields {dict(fields)!r}") from reason


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def _check_schedule(schedule: Any) -> None:
    if schedule is not None and not isinstance(schedule, Schedule):
        raise MethodError(f"schedule: expected a Schedule, or None; found {schedule!r}")
