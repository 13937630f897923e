"""What the command line answers without waiting for torch, and that names are imported when they are asked for."""

import subprocess
import sys

import pytest
import typer
from rich.text import Text

import tokendrop
from tokendrop import cli

HEAVY = ("torch", "lightning", "transformers", "numpy", "matplotlib")
COMMANDS = ("demo", "inspect", "flops", "bench", "analyze", "synergy")


def alone(code):
    """What code prints in an interpreter of its own."""
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_help_and_version_do_not_import_torch():
    given = [["--version"], ["--help"], [], *([one, "--help"] for one in COMMANDS)]
    said = alone(f"""
import sys
from typer.testing import CliRunner
from tokendrop.cli import app
for given in {given!r}:
    print(CliRunner().invoke(app, given).output)
print("heavy:", *(name for name in {HEAVY!r} if name in sys.modules))
""")
    assert said.splitlines()[0] == tokendrop.__version__
    assert said.splitlines()[-1] == "heavy:"
    assert said.count("Usage") == len(given) - 1


def test_help_is_shown_as_it_is_written():
    app = typer.main.get_command(cli.app)
    written = [one.help for one in (app, *app.commands.values())]
    written += [one.help for command in app.commands.values() for one in command.params if getattr(one, "help", None)]
    assert len(written) > 20
    assert [Text.from_markup(text).plain for text in written] == written  # ":-1:" is a thumb to rich, "[demo]" a style


def test_nothing_heavy_is_imported_until_a_name_is_asked_for_and_a_part_can_come_first():
    said = alone(f"""
import sys, tokendrop as td
print([name for name in {HEAVY!r} if name in sys.modules])
from tokendrop import methods
print("torch" in sys.modules, "lightning" in sys.modules)
from tokendrop import *
print(HiMix is methods.HiMix is td.HiMix, td.callbacks.__name__)
""")
    assert said.splitlines() == ["[]", "True False", "True tokendrop.callbacks"]


def test_names_are_those_of_the_public_module():
    from tokendrop import public

    assert tokendrop.__all__ == public.__all__
    assert len(set(public.__all__)) == len(public.__all__)
    assert set(tokendrop.__all__) | {"__version__", "__all__"} <= set(dir(tokendrop))
    assert all(getattr(tokendrop, name) is getattr(public, name) for name in tokendrop.__all__)
    assert "tokendrop.methods" not in tokendrop.__all__
    for name in ("no_such_name", "_private", "__wrapped__"):
        with pytest.raises(AttributeError, match=f"module 'tokendrop' has no attribute '{name}'"):
            getattr(tokendrop, name)
