"""Result rows of the benchmarks: one JSON object a line, one schema."""

import datetime
import json
import platform
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import tokendrop
from tokendrop.analysis.timing import spread

ROOT = Path(__file__).resolve().parents[1]
SCHEMA = {
    "case": str, "provider": str, "metric": str, "unit": str, "median": (int, float), "p20": (int, float),
    "p80": (int, float), "n": int, "config": dict, "device": str, "versions": dict, "commit": str, "date": str,
}  # fmt: skip


def environment(device: str | None = None) -> dict[str, Any]:
    """What every row of a run shares: device, versions, commit and date.

    Args:
        device: its name; None for the accelerator, or the CPU where there is none.
    """
    if device is None:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu {platform.machine()}"
    versions = {"python": platform.python_version(), "tokendrop": tokendrop.__version__}
    versions |= {name: version(name) for name in ("torch", "triton")}
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return {"device": device, "versions": versions, "commit": _commit(), "date": date}


def row(
    case: str, provider: str, metric: str, unit: str, values: Sequence[float], config: dict[str, Any], **shared: Any
) -> dict[str, Any]:
    """A row with the median and the 20th and 80th percentile of `values`.

    Args:
        case: what was measured.
        provider: whose implementation.
        metric: what of it.
        unit: in which unit.
        values: the repetitions.
        config: sizes and settings.
        shared: what `environment` returned.
    """
    return {
        "case": case, "provider": provider, "metric": metric, "unit": unit, **spread(values), "config": config, **shared
    }  # fmt: skip


def append(path: str | Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write `rows` at the end of `path`, or nothing if one of them does not follow the schema.

    Raises:
        ValueError: a row with other keys, or a value of another type.
    """
    rows = list(rows)
    for found in rows:
        if list(found) != list(SCHEMA):
            raise ValueError(f"expected the keys {', '.join(SCHEMA)}; found {', '.join(found)}")
        for key, kind in SCHEMA.items():
            if not isinstance(found[key], kind) or isinstance(found[key], bool):
                raise ValueError(f"{key}: expected {kind}; found {found[key]!r}")
    lines = [json.dumps(found, allow_nan=False) + "\n" for found in rows]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with Path(path).open("a") as file:
        file.writelines(lines)


def _commit() -> str:
    if shutil.which("git") is None:
        return "unknown"
    # New results do not make the code another one.
    code = ["--", ".", ":!benchmarks/results"]
    head, changed = (
        subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout.strip()  # noqa: S603, S607
        for arguments in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no", *code])
    )
    return f"{head or 'unknown'}{'-dirty' if changed else ''}"
