"""How `make docs` makes pages: of Markdown in docs/ and elsewhere, of docstrings, and of --help."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from typer.main import get_command
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import leank  # noqa: E402
from leank.cli import app as command  # noqa: E402

project, release = "LeanK", leank.__version__
copyright = "LeanK contributors"  # a name that Sphinx reads
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme, html_title = "furo", "LeanK"
myst_heading_anchors = 3
default_role = "py:obj"
napoleon_google_docstring = False
autodoc_mock_imports = ["leank._cuda"]  # leank.cuda is described without it
napoleon_use_ivar = True  # else attributes that are properties too come twice
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # docstrings say types, and shapes in letters
exclude_patterns = ["README.md"]

# A page that is one link shows the file that it leads to.
_ONE_LINK = re.compile(r"\[[^]]+\]\((\.\./[^)]+)\)\s*")
_LINK = re.compile(r"(!?)\[([^]]*)\]\((?!https?:)([^)#]*)(#[^)]*)?\)")
_CODE = re.compile(r"^```.*?^```$", re.M | re.S)


def _sources() -> dict[Path, str]:
    """Return the pages, by the file that has their text."""
    pages = {}
    for page in (ROOT / "docs").glob("*.md"):
        link = _ONE_LINK.fullmatch(page.read_text(encoding="utf-8"))
        pages[(page.parent / link[1]).resolve() if link else page] = page.stem
    return pages


_PAGES = _sources()
_FILES = {page: file for file, page in _PAGES.items()}


def read_page(app: Sphinx, page: str, content: list[str]) -> None:
    """Put the text of a page's file in its place, with links that lead to pages."""
    file = _FILES[page]
    text = file.read_text(encoding="utf-8")
    app.env.note_dependency(str(file))

    def link(found: re.Match[str]) -> str:
        image, words, path, anchor = found[1], found[2], found[3], found[4] or ""
        target = (file.parent / path).resolve() if path else file
        if not target.exists():
            raise ExtensionError(f"{file}: expected a file, got a link to {path}")
        if image:
            return f"![{words}]({target.relative_to(ROOT / 'docs')})"
        if target in _PAGES:
            return f"[{words}]({_PAGES[target]}.md{anchor})"
        return f"{words} (`{target.relative_to(ROOT)}`)"

    code = [*_CODE.finditer(text), None]
    parts, start = [], 0
    for block in code:  # brackets in code are no links
        parts.append(_LINK.sub(link, text[start : block.start() if block else None]))
        parts.append(block[0] if block else "")
        start = block.end() if block else None
    content[0] = "".join(parts)
    if page == "index":
        content[0] += _CONTENTS
    if page == "cli":
        content[0] += "".join(_help(get_command(command), ["leank"]))


_CONTENTS = """
```{toctree}
:hidden:

Home <self>
quickstart
generate
learn
evaluate
masks
cli
api
kernels
cpu
contributing
changelog
```
"""


def _help(group: object, names: list[str]) -> list[str]:
    """Return a section for a command and those below it: --help in 80 columns."""
    env = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    words = [*names[1:], "--help"]
    shown = CliRunner().invoke(command, words, env=env, prog_name="leank", catch_exceptions=False)
    lines = "\n".join(line.rstrip() for line in shown.stdout.strip().splitlines())
    parts = [f"\n## {' '.join(names)}\n\n```text\n{lines}\n```\n"]
    for name, below in getattr(group, "commands", {}).items():
        parts += _help(below, [*names, name])
    return parts


def check_public_names(app: Sphinx, error: Exception | None) -> None:
    """Fail unless api.md documents each public name, and each of those has a docstring."""
    if error is not None:
        return
    documented = app.env.get_domain("py").objects
    for name in leank.__all__:
        value = getattr(leank, name)
        full = value.__name__ if inspect.ismodule(value) else f"leank.{name}"
        if full not in documented or not inspect.getdoc(value):
            raise ExtensionError(f"docs/api.md: expected {full}, which is public, got nothing")


def setup(app: Sphinx) -> None:
    """Connect what is above to Sphinx."""
    app.connect("source-read", read_page)
    app.connect("build-finished", check_public_names)
