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

# A page that is one link shows the file that it leads to.
_ONE_LINK = re.compile(r"\[[^]]+\]\((\.\./[^)]+)\)\s*")
# Brackets in code are no links.
_CODE_OR_LINK = re.compile(
    r"^```.*?^```$|`[^`\n]+`|(!?)\[([^]]*)\]\((?!https?:)([^)#]*)(#[^)]*)?\)", re.M | re.S
)


def _file_of(page: Path) -> Path:
    link = _ONE_LINK.fullmatch(page.read_text(encoding="utf-8"))
    return (page.parent / link[1]).resolve() if link else page


_FILES = {page.stem: _file_of(page) for page in (ROOT / "docs").glob("*.md")}
_PAGES = {file: name for name, file in _FILES.items()}
_PAGES |= {ROOT / "docs" / f"{name}.md": name for name in _FILES}


def read_page(app: Sphinx, page: str, content: list[str]) -> None:
    """Put the text of a page's file in its place, with links that lead to pages."""
    file = _FILES[page]
    text = file.read_text(encoding="utf-8")
    app.env.note_dependency(str(file))

    def link(found: re.Match[str]) -> str:
        image, words, path, anchor = found.groups()
        if path is None:
            return found[0]
        target = (file.parent / path).resolve() if path else file
        if not target.exists():
            raise ExtensionError(f"{file}: expected a file, got a link to {path}")
        if image:
            return f"![{words}]({target.relative_to(ROOT / 'docs')})"
        if target in _PAGES:
            return f"[{words}]({_PAGES[target]}.md{anchor or ''})"
        where = str(target.relative_to(ROOT))
        return f"`{where}`" if where.endswith(words) else f"{words} (`{where}`)"

    content[0] = _CODE_OR_LINK.sub(link, text)
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
