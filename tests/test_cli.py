"""What all commands of ``leank`` have in common: help, errors of one line, --debug and Ctrl-C."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest

typer = pytest.importorskip("typer")

from typer.testing import CliRunner  # noqa: E402

from leank import ChannelMask, cli  # noqa: E402
from leank.cli_errors import Command, CommandError, Group  # noqa: E402

from .processes import interrupt  # noqa: E402


def leank(*words, columns=80):
    env = {"COLUMNS": str(columns), "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(cli.app, list(map(str, words)), env=env)


def commands(group=None, names=()):
    """Yield each command with its names, groups among them."""
    group = group or typer.main.get_command(cli.app)
    yield names, group
    for name, command in getattr(group, "commands", {}).items():
        yield from commands(command, (*names, name))


ALL = dict(commands())


@pytest.mark.parametrize("names", ALL, ids=" ".join)
def test_help_fits_a_terminal_and_all_end_alike(names):
    assert isinstance(ALL[names], Group if hasattr(ALL[names], "commands") else Command)
    result = leank(*names, "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 80
    for unclear in ("<bool>", "<int", "<float"):
        assert unclear not in result.stdout
    # A name that is folded in the middle is not found by those who look for it.
    options = [name for p in ALL[names].params for name in p.opts if name.startswith("-")]
    assert [name for name in options if name not in result.stdout.split()] == []


def own_app(error):
    """Make an app like that of leank with a command that raises."""
    app = typer.Typer(cls=Group, pretty_exceptions_enable=False)
    app.callback()(cli._leank)

    def fails() -> None:
        raise error

    app.command(cls=Command)(fails)
    app.command("other", cls=Command)(lambda: None)
    return app


@pytest.mark.parametrize(
    "error, status, line",
    [
        (CommandError("a: expected b,\n  got c", 7), 7, "a: expected b, got c"),
        (KeyboardInterrupt(), 130, "stopped"),
        (
            ZeroDivisionError("our\nmistake"),
            1,
            "unexpected ZeroDivisionError: our mistake; leank --debug fails tells where",
        ),
    ],
)
def test_errors_are_one_line_and_tracebacks_are_for_debug(error, status, line):
    app = own_app(error)
    plain = CliRunner().invoke(app, ["fails"])
    assert (plain.exit_code, plain.stdout) == (status, "")
    assert plain.stderr == f"leank fails: {line}\n"
    debug = CliRunner().invoke(app, ["--debug", "fails"])
    assert (debug.exit_code, debug.stdout) == (status, "")
    assert debug.stderr.startswith("Traceback") and "in fails" in debug.stderr
    assert debug.stderr.endswith(f"\nleank fails: {line}\n")


def test_one_process_of_a_machine_speaks_for_all(monkeypatch):
    def said(error):
        return CliRunner().invoke(own_app(error), ["fails"])

    monkeypatch.setenv("LOCAL_RANK", "1")
    silent, own = said(CommandError("x", once=True)), said(CommandError("x"))
    assert (silent.exit_code, silent.stderr) == (2, "")
    assert (own.exit_code, own.stderr) == (2, "leank fails: x\n")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert said(CommandError("x", once=True)).stderr == "leank fails: x\n"


def test_debug_of_a_real_mistake(tmp_path):
    result = leank("--debug", "inspect", tmp_path / "none")
    assert result.exit_code == 2 and "in load_mask" in result.stderr
    plain = leank("inspect", tmp_path / "none")
    assert plain.exit_code == 2
    assert result.stderr.splitlines()[-1] == plain.stderr.splitlines()[0]
    assert len(plain.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "words, who, what",
    [
        (["--nope"], "leank", "--nope"),
        (["evil"], "leank", "eval"),
        (["bench", "decod"], "leank bench", "decode"),
        (["learn", "--ratoi", "0.5"], "leank learn", "--ratio"),
        (["learn", "--ratio"], "leank learn", "'--ratio' requires"),
        (["bench", "decode", "--rounds", "x"], "leank bench decode", "integer"),
        (["bench", "decode", "--device", "tpu"], "leank bench decode", "'cpu', 'cuda'"),
        (["inspect"], "leank inspect", "MASK"),
        (["eval", "a", "b"], "leank eval", "(b)"),
    ],
)
def test_a_mistake_in_the_words_themselves_is_one_line(words, who, what):
    result = leank(*words)
    assert result.exit_code == 2 and result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"{who}: ") and what in line
    assert line.endswith(f"; {who} --help lists what there is")


@pytest.mark.parametrize("words", [[], ["bench"]], ids=["leank", "leank bench"])
def test_without_a_command_there_is_help(words):
    result = leank(*words)
    assert result.exit_code == 2 and "Usage" in result.output and "lists what" not in result.output


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m leank masks | head -n 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    assert done.returncode in (0, 1) and done.stderr == ""


# ------------------------------------------------------------------------------ Ctrl-C


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    """Make a model, a mask and a text; return the words of an evaluation, but for its folder."""
    folder = tmp_path_factory.mktemp("eval")
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from .learn_run_tools import write_model, write_text

    write_model(folder / "model")
    write_text(folder / "text.txt")
    keep = np.broadcast_to(np.arange(16) < 8, (3, 2, 16))
    ChannelMask(keep, sink=3, recent=5).save(folder / "mask")
    return ["eval", folder / "model", "--mask", folder / "mask", "--text", folder / "text.txt",
            "--tasks", "copy", "--lengths", 700, "--fast", "--device", "cpu"]  # fmt: skip


def test_a_signal_during_an_evaluation_keeps_what_is_done(evaluation, tmp_path):
    log = tmp_path / "results" / "log.jsonl"

    def is_ready():
        return log.exists() and len(log.read_bytes().splitlines()) > 3

    words = [*evaluation, "-o", tmp_path / "results", "--items"]
    status, stdout, stderr = interrupt([*words, 20_000], is_ready)
    assert (status, stdout) == (130, "")
    header, *records = map(json.loads, log.read_text().splitlines())
    kept = rf"they are kept in {tmp_path / 'results'}, --resume goes on"
    said = re.fullmatch(
        rf"leank eval: stopped after (\d+) of 20000 items; {kept}", stderr.splitlines()[-1]
    )
    n = int(said[1])
    # The signal may come between an item's line in the log and its count.
    assert 3 <= n <= len(records) <= n + 1 and "Traceback" not in stderr
    # The same evaluation goes on behind them: fewer items are another one.
    again = leank(*words, 5, "--resume")
    assert again.exit_code == 2 and "resume: expected" in again.stderr
    status, _, stderr = interrupt(
        [*words, 20_000, "--resume"],
        lambda: len(log.read_bytes().splitlines()) > len(records) + 3,
    )
    assert status == 130
    lines = log.read_text().splitlines()
    assert [json.loads(line) for line in lines[1 : 1 + len(records)]] == records
    assert len(lines) > len(records) + 3


def test_a_signal_before_an_evaluation(evaluation, tmp_path):
    before = """if True:
        from leank.loading import Source
        def model(*args):
            open(PATH, "x").close()
            import time
            time.sleep(60)
        Source.model = model
        """.replace("PATH", repr(str(tmp_path / "begun")))
    words = [*evaluation, "-o", tmp_path / "results"]
    status, stdout, stderr = interrupt(words, (tmp_path / "begun").exists, before)
    assert (status, stdout) == (130, "")
    assert stderr == "leank eval: stopped before the first item was done\n"
    assert not (tmp_path / "results").exists()


def test_a_signal_while_the_command_is_still_imported():
    """The first second, before any command knows its name."""
    code = """if True:
        import importlib.abc, sys
        from leank.__main__ import main
        class Finder(importlib.abc.MetaPathFinder):
            def find_spec(self, name, *args):
                if name == "typer":
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Finder())
        sys.exit(main())
        """
    done = subprocess.run([sys.executable, "-c", code, "info"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "leank: stopped\n")
