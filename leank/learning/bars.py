"""The progress bars of learning and of the test at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from leank.learning.run import Event


class Bars:
    """A context manager to be given as `progress`; draws on stderr.

    Parameters
    ----------
    console : Console, optional
    """

    def __init__(self, console: Console | None = None) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=console or Console(stderr=True),
        )
        self._task: TaskID | None = None
        self._test: TaskID | None = None
        self._validation = ""

    def __enter__(self) -> Bars:
        """Start to draw."""
        self._bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the last state on the screen."""
        self._bars.stop()

    def __call__(self, event: Event) -> None:
        """Show a step."""
        step = event.step
        if self._task is None:
            # What a run that goes on has done already must not count for the time that is left.
            self._task = self._bars.add_task(
                "", total=event.n_total, completed=event.n_done - 1, numbers=""
            )
        if step.validation is not None:
            self._validation = f" valid {step.validation:.3g}"
        self._bars.update(
            self._task,
            completed=event.n_done,
            description="stage 1" if event.target is None else f"stage 2 {event.target}",
            numbers=f"loss {step.loss:.3g}{self._validation} alpha {step.mean_alpha:.2f} "
            f"<0.1 {step.low_share:.0%}",
        )

    def tested(self, n_done: int, n_total: int) -> None:
        """Show how many items of the test are done."""
        if self._test is None:
            self._test = self._bars.add_task("test", total=n_total, numbers="")
        self._bars.update(self._test, completed=n_done)
