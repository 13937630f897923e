"""What somebody else wrote, in a config or a report, neither runs nor reaches the terminal or the page as it is."""

import ast
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import tokendrop as td
from tokendrop.cli import app

HOSTILE = "\x1b[2J[red]<script>alert(1)</script>\x07"
CONFIGS = {
    "nothing": "",
    "no JSON": "{" * 50,
    "a list": "[]",
    "an unknown type": json.dumps({"model_type": HOSTILE}),
    "an unknown class": json.dumps({"model_type": "clip", "architectures": [HOSTILE]}),
    "a module as class": json.dumps({"model_type": "llama", "architectures": ["logging"], "hidden_size": HOSTILE}),
    "a number as class": json.dumps({"model_type": "llama", "architectures": [3], "num_attention_heads": 0}),
    "code of its own": json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}),
    "no layers": json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 0}),
    "negative": json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": -4}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONFIGS)
def test_a_hostile_config_is_an_error_in_one_line_and_runs_nothing(case, tmp_path):
    (tmp_path / "config.json").write_text(CONFIGS[case])
    (tmp_path / "evil.py").write_text("raise SystemExit('code of a config ran')")
    result = CliRunner().invoke(app, ["inspect", str(tmp_path)])
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert "DecoderError" in result.output
    assert "code of a config ran" not in result.output
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", result.output)


def test_a_report_escapes_what_it_is_given():
    from tokendrop.analysis.report import Grid, Image, Section, Table, render

    table, grid = Table([HOSTILE], [[HOSTILE]], [0], HOSTILE), Grid([HOSTILE], [(HOSTILE, [Image(HOSTILE, b"")])])
    page = render(HOSTILE, [Section(HOSTILE, HOSTILE, table, [Image(HOSTILE, b"")], HOSTILE, grid)], [HOSTILE])
    assert "<script>" not in page
    assert page.count("&lt;script&gt;") == 14


FORBIDDEN = {"pickle", "subprocess", "shelve", "marshal", "dill", "cloudpickle", "joblib"}
CALLS = {"eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "compile", "__import__"}
CALLS |= {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}
SOURCES = sorted(Path(td.__file__).parent.rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(Path(td.__file__).parent).as_posix())
def test_no_shell_and_no_pickle_of_foreign_data(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
            assert not {name.split(".")[0] for name in names} & FORBIDDEN
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in CALLS
            assert not any(word.arg == "shell" for word in node.keywords)
            if called == "torch.load":
                assert any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
