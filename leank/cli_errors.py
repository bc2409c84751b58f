"""How a command of ``leank`` ends when it cannot do its work: one line, and an exit status.

==========  =======================================================================================
1           it ran, and something was wrong on the way
2           what the user asked for cannot be done
130         Ctrl-C
==========  =======================================================================================
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from leank._versions import old_transformers

# What typer raises for an option that does not exist and the like; it has no name for it.
_UsageError = typer.BadParameter.__base__
_METAVARS = {"bool": "", "int": "N", "float": "X", "str": "TEXT"}


class CommandError(Exception):
    """What ends a command; its text becomes one line.

    Parameters
    ----------
    message : str
        What was expected, what came, and the remedy.
    status : int
        Of the process.
    once : bool
        All processes that torchrun started on a machine come to it, so only the first one says it.
    """

    def __init__(self, message: object, status: int = 2, *, once: bool = False) -> None:
        super().__init__(message)
        self.status, self.once = status, once


class _Plain:
    """--help without a column of "<bool>" and "<int range>", and mistakes in one line."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        """Read the words of the command."""
        if not args and self.no_args_is_help:  # an error, too: typer prints the help
            return super().make_context(info_name, args, parent, **extra)
        names = [] if parent is None else [_name(parent), info_name]
        with _usage_in_one_line(*names):
            return super().make_context(info_name, args, parent, **extra)

    def get_params(self, ctx: typer.Context) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            # Typer's own, and not in each version: without it, its names stay.
            bare_type = getattr(param, "bare_type", None)
            if param.metavar is None and bare_type and param.param_type_name == "option":
                param.metavar = _METAVARS.get(bare_type())
        return params


class Group(_Plain, TyperGroup):
    """Commands under one name."""

    def resolve_command(self, ctx: typer.Context, args: list[str]) -> Any:
        """Find the command that is asked for."""
        with _usage_in_one_line(_name(ctx)):
            return super().resolve_command(ctx, args)


class Command(_Plain, TyperCommand):
    """A command that ends as this module says; ``leank --debug`` prints the traceback as well."""

    def invoke(self, ctx: typer.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):  # typer knows what to do
            raise
        except (Exception, KeyboardInterrupt) as error:
            message, status, is_told = _ending(error, _name(ctx))
            if ctx.find_root().params.get("debug"):
                traceback.print_exception(error)
            if is_told:
                typer.echo(f"leank {_name(ctx)}: {' '.join(message.split())}", err=True)
            raise typer.Exit(status) from error


@contextlib.contextmanager
def _usage_in_one_line(*names: str) -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        command = " ".join(("leank", *filter(None, names)))
        message = " ".join(error.format_message().split()).rstrip(".")
        typer.echo(f"{command}: {message}; {command} --help lists what there is", err=True)
        raise typer.Exit(error.exit_code) from error


def _ending(error: BaseException, command: str) -> tuple[str, int, bool]:
    """Return the message, the exit status, and whether this process is to tell it."""
    if isinstance(error, CommandError):
        is_first = os.environ.get("LOCAL_RANK", "0") == "0"
        return str(error), error.status, is_first or not error.once
    if isinstance(error, KeyboardInterrupt):
        return "stopped", 130, True
    what = f"unexpected {type(error).__name__}: {error}"
    return f"{what}; leank --debug {command} tells where", 1, True


@contextlib.contextmanager
def needing(extra: str, *packages: str, option: str = "") -> Iterator[None]:
    """Tell which extra to install where one of its packages cannot be imported, or is too old.

    Parameters
    ----------
    extra : str
    *packages : str
    option : str
        What needs them, if it is not the whole command.
    """
    try:
        yield
    except ImportError as error:
        package = (error.name or "").partition(".")[0]
        if package not in packages:
            raise
        if package == "transformers" and (problem := old_transformers()):
            raise CommandError(problem) from error
        what = f"{option}: needs" if option else "needs"
        raise CommandError(f"{what} {package}: pip install 'leank[{extra}]'") from error


def _name(ctx: typer.Context) -> str:
    names = []
    while ctx.parent is not None:
        names.append(ctx.info_name)
        ctx = ctx.parent
    return " ".join(reversed(names))
