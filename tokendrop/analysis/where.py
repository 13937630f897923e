"""What was measured, where, when and with what; in rows of results and at the foot of a report."""

import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from torch import nn

PACKAGES = ("tokendrop", "torch", "lightning", "transformers", "torchmetrics", "scikit-learn", "mlxtend")


def made_where(packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Versions of Python and of those packages that are installed, and the date."""
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return {"versions": versions | {"python": platform.python_version()}, "date": date}


def subject_of(model: nn.Module) -> str:
    """Class and size of a model.

    Example:
        >>> subject_of(nn.Linear(1000, 1000, bias=False))
        'Linear, 1,000,000 parameters'
    """
    return f"{type(model).__name__}, {sum(p.numel() for p in model.parameters()):,} parameters"


def foot(subject: str, made: Mapping[str, Any]) -> list[str]:
    """The lines at the foot of a report.

    Args:
        subject: the model that was measured, and on what.
        made: `versions` and `date`, and where it has one `device` and `commit`.

    Example:
        >>> foot("a model", {"versions": {"torch": "2.6"}, "date": "2026-11-26T12:00:00+00:00"})[0]
        'Measured: a model.'
    """
    device = made.get("device") or f"cpu {platform.machine()}"
    commit = [f"commit {made['commit']}"] if made.get("commit") else []
    date = str(made["date"]).replace("T", " ").replace("+00:00", " UTC")
    versions = ", ".join(f"{name} {found}" for name, found in made["versions"].items())
    return [f"Measured: {subject}.", f"Where and when: {', '.join([device, date, *commit])}.", f"With: {versions}."]
