"""A wheel that was unpacked into the current folder, away from the checkout, is whole; `make dist` runs it."""

from importlib.metadata import distribution
from pathlib import Path

import tokendrop as td
from tokendrop.analysis.report import Section, render
from tokendrop.engine.model.from_config import presets

HERE = Path.cwd()


def main() -> None:
    """Break where something is missing."""
    assert Path(td.__file__).is_relative_to(HERE), td.__file__
    (found,) = HERE.glob("tokendrop-*.dist-info")
    metadata = distribution("tokendrop").metadata
    assert found.name == f"tokendrop-{td.__version__}.dist-info"
    assert metadata["Version"] == td.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "](" not in metadata.get_payload().replace("](http", ""), "a link of the README leads nowhere on an index"
    assert all(hasattr(td, name) for name in td.__all__)
    assert (HERE / "tokendrop/py.typed").exists()
    assert not [one.name for one in HERE.iterdir() if one.name.startswith(("tests", "benchmarks", "docs"))]
    assert "one" in render("one", [Section("two")])
    assert td.flops(presets()["llava-1.5-7b"], td.HiMix(), text=64, image=576).ratio < 1
    (command,) = [one for one in distribution("tokendrop").entry_points if one.group == "console_scripts"]
    assert callable(command.load())
    print(f"the wheel of tokendrop {td.__version__} is whole")


if __name__ == "__main__":
    main()
