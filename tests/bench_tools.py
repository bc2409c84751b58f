"""What the tests of ``leank bench`` share."""

import json

from typer.testing import CliRunner

from leank.cli import app


def bench(command, *words):
    """Run the command in a terminal of 80 columns."""
    env = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, ["bench", command, *map(str, words)], env=env)


def found(command, folder, *words):
    """Run the command; return its tables and what it printed, after looking at its picture."""
    files = "--json", folder / "out.json", "--png", folder / "out.png"
    result = bench(command, *words, *files)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80 and "…" not in result.stdout
    assert (folder / "out.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "out.json").read_text())["tables"], result.stdout


def one_line(result, code=2):
    """Return the single line of a command that failed."""
    assert result.exit_code == code and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    return line
