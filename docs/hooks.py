"""MkDocs: the README, the changelog and the examples are pages too, and links to files outside `docs/` lead there."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
SHOWN = {ROOT / "CITATION.cff": "citation.md"} | {  # files that are shown as code
    file: f"examples/{file.stem}{'_yaml' * (file.suffix == '.yaml')}.md"
    for file in sorted((ROOT / "examples").iterdir())
    if file.suffix in (".py", ".yaml")
}
LINK = re.compile(r"(\]\()([^)#:\s]+)(#[^)\s]*)?\)")


def _page(file: Path) -> str:
    # Where a file of the repository is in the site.
    name = file.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    return SHOWN[file] if file in SHOWN else name.removeprefix("docs/")


def on_files(files: Files, config: Any) -> Files:
    """Add pages of files outside `docs/`."""
    for name, page in PAGES.items():
        text = _relinked((ROOT / name).read_text(), ROOT / name)
        files.append(File.generated(config, page, content=text))
    for file, page in SHOWN.items():
        language = "python" if file.suffix == ".py" else "yaml"
        files.append(File.generated(config, page, content=f"# {file.name}\n\n```{language}\n{file.read_text()}```\n"))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Lead links to files outside `docs/` to their pages."""
    source = page.file.abs_src_path
    return markdown if source is None else _relinked(markdown, Path(source))


def _relinked(text: str, source: Path) -> str:
    depth = _page(source).count("/")

    def lead(found: re.Match[str]) -> str:
        target = (source.parent / found[2]).resolve()
        if not target.is_file() or not target.is_relative_to(ROOT):
            return found[0]  # mkdocs says what is wrong with it
        return f"{found[1]}{'../' * depth}{_page(target)}{found[3] or ''})"

    return LINK.sub(lead, text)
