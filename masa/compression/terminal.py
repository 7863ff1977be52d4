"""Progress of calibration and compression on a terminal or in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from masa.runs.progress import Progress


@contextmanager
def terminal(quiet: bool = False) -> Iterator[Any]:
    """A progress callback: a bar for each phase on a terminal, a line now and then elsewhere (a log, a workflow)."""
    if quiet or not sys.stderr.isatty():
        yield _silent if quiet else _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield show
        for task in bars.tasks:
            bars.update(task.id, completed=task.total)


def _silent(what: str, done: int, of: int) -> None:
    pass


class _Lines:
    """One :class:`~masa.runs.progress.Progress` a phase."""

    def __init__(self) -> None:
        self.phase, self.progress, self.done = "", Progress("", 1, ""), 0

    def __call__(self, what: str, done: int, of: int) -> None:
        if what != self.phase or done < self.done:
            self.phase, self.progress = what, Progress(what, of, "steps")
        self.done = done
        self.progress.update(done)
