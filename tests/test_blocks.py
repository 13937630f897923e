"""Every block of code in the README and the docs runs, or says why not; commands and YAML are those that exist."""

import re
import shlex
import socket
import sys
from pathlib import Path

import lightning as L
import prelude
import pytest
import torch
import transformers
import typer
import yaml
from blocks import PAGES, ROOT, blocks, read_first, run

import tokendrop as td
from tokendrop.cli import app

LANGUAGES = {"python", "sh", "yaml", "text"}
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]
FOUND = [(page, block) for page in PAGES for block in blocks(page.read_text())]
HERE = {page: page.relative_to(ROOT).as_posix() for page in PAGES}


@pytest.fixture
def short(monkeypatch, tmp_path):
    """Trainers of a page are short and quiet, in a folder of their own."""
    monkeypatch.setattr(L, "Trainer", prelude.ShortTrainer)
    monkeypatch.chdir(tmp_path)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning")
@pytest.mark.parametrize("page", WITH_PYTHON, ids=HERE.get)
def test_python_runs(page, short, monkeypatch):
    if "init_process_group" in page.read_text():  # what torchrun says to one rank
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            said = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free.getsockname()[1], "RANK": 0, "WORLD_SIZE": 1}
        for name, value in said.items():
            monkeypatch.setenv(name, str(value))
    assert run(page.read_text(), HERE[page]) > 0 or all(one.not_run for one in blocks(page.read_text()))


@pytest.mark.parametrize(("page", "block"), FOUND, ids=[f"{HERE[page]}:{block.line}" for page, block in FOUND])
def test_a_block_says_its_language(page, block):
    assert block.language in LANGUAGES
    assert block.not_run is None or block.language == "python"


def commands(block):
    """Words of each command; what is set before it is no word of it."""
    lines = [line for line in block.code.splitlines() if line.strip()]
    for words in (shlex.split(part, comments=True) for line in lines for part in line.split("&&")):
        yield words[next(at for at, word in enumerate(words) if not re.fullmatch(r"\w+=.*", word)) :]


@pytest.mark.parametrize("block", [one for _, one in FOUND if one.language == "sh"], ids=lambda one: one.code[:40])
def test_commands_exist(block, monkeypatch):
    monkeypatch.chdir(ROOT)
    for program, *arguments in commands(block):
        assert program in {"tokendrop", "python", "torchrun", "pytest"} or Path(program).exists()
        if program == "tokendrop":  # parsed, with every option, and not run
            command = typer.main.get_command(app)
            name, found, rest = command.resolve_command(command.make_context("tokendrop", list(arguments)), arguments)
            assert found.make_context(name, rest).params
        else:
            assert all(Path(one).exists() for one in arguments if one.startswith(("examples/", "benchmarks/")))


@pytest.mark.parametrize("block", [one for _, one in FOUND if one.language == "yaml"], ids=lambda one: one.code[:20])
def test_yaml_is_what_lightning_cli_reads(block, monkeypatch, short):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    monkeypatch.setattr(sys, "argv", ["lightning_cli.py"])
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import lightning_cli
    from lightning.pytorch.cli import LightningCLI

    Path("page.yaml").write_text("seed_everything: 0\n" + block.code)
    found = LightningCLI(lightning_cli.Model, lightning_cli.Data, args=["--config", "page.yaml"], run=False)
    (drop,) = [one for one in found.trainer.callbacks if isinstance(one, td.TokenDrop)]
    (given,) = [one["init_args"] for one in yaml.safe_load(block.code)["trainer"]["callbacks"]]
    assert (drop.methods, drop.schedule) == td.from_config({key: given[key] for key in ("methods", "schedule")})


PAGE = """
# One
```python
a = td.HiMix()
```
# Two
<!-- not run: needs a GPU -->
```python
raise AssertionError
```
```python
{code}
```
"""


def test_a_block_that_breaks_is_seen(short):
    assert run(PAGE.format(code="b = 1")) == 2
    for code in ("a", "model(1, 2, 3)", "undefined_name"):  # a section begins empty
        with pytest.raises(Exception, match=r"."):
            run(PAGE.format(code=code))


def test_names_that_are_read_before_they_are_bound():
    import ast

    code = "x = f(x)\ndef g(a):\n    b = a\n    return b + c\nimport d\nd.e\nfor h in i:\n    h\nprint(x)"
    assert read_first(ast.parse(code)) == ["f", "x", "c", "i"]


def test_what_is_not_run_says_why():
    reasons = {HERE[page]: block.not_run for page, block in FOUND if block.not_run}
    assert reasons == {"docs/trainers/deepspeed.md": "needs CUDA and DeepSpeed"}


def test_text_is_what_is_printed():
    ((page, shown),) = [(HERE[page], block.code) for page, block in FOUND if block.language == "text"]
    assert page == "docs/lightning.md"
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "vocab_size": 8}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=32, **sizes))
    td.apply(model, {"understanding": td.HiMix("2:"), "generation": td.HMGen("8:24:2")})
    assert str(td.handle(model)) == shown
