"""Verbs about runs that are there: their status, TensorBoard's files, and results that are taken over."""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masa.cli.base import Verbs, add_out
from masa.errors import MasaError
from masa.study import config
from masa.study.adopting import ABSENT, STATES

if TYPE_CHECKING:
    from masa.study.status.survey import Surveyor

SECONDS = 2.0
"""Between two looks, unless the user says otherwise."""


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    v = verbs.add(
        "status",
        _status,
        "show step, loss, speed and state of every run, also while they are trained",
        "masa status --watch",
    )
    v.add_argument("runs", nargs="*", metavar="RUN", help="run ids, patterns such as 'nano/*', or run directories")
    _add_common(v)
    v.add_argument("--json", action="store_true", help="all fields, for scripts")

    v = verbs.add(
        "tensorboard",
        _tensorboard,
        "write TensorBoard's event files from the metrics of runs",
        "masa tensorboard --out results/tensorboard",
    )
    v.add_argument("runs", nargs="*", metavar="RUN", help="as of `masa status`; default: all that lie in the results")
    _add_common(v)
    add_out(v, "DIR", "for `tensorboard --logdir`; one folder a run")

    v = verbs.add(
        "adopt",
        _adopt,
        "take over finished results of the same configuration from another folder",
        "masa adopt results/reference/whole --configfile config/whole.yaml",
    )
    v.add_argument("source", metavar="RESULTS", help="a folder of results, of another machine or of this repository")
    v.add_argument("--results", metavar="DIR", help="where the workflow writes; default: the configuration's")


def _add_common(v: argparse.ArgumentParser) -> None:
    v.add_argument("--results", metavar="DIR", help="directory of results; default: the configuration's")
    v.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=SECONDS,
        metavar="SECONDS",
        help="look again every so many seconds (default 2), until all is over or Ctrl-C",
    )


def _status(given: argparse.Namespace) -> None:
    surveyor = _surveyor(given)
    if given.json:
        if given.watch is not None:
            raise MasaError("--json and --watch exclude each other: call `masa status --json` again and again instead.")
        print(surveyor.survey().as_json())
        return
    from rich.console import Console

    from masa.study.status import view

    console = Console(highlight=False, soft_wrap=False)
    if given.watch is not None and console.is_terminal:
        from rich.live import Live

        with Live(console=console, auto_refresh=False, vertical_overflow="crop") as live:

            def show() -> bool:
                found = surveyor.survey()
                live.update(view.rendered(found, console.width, console.height), refresh=True)
                return found.over

            _again(show, given.watch)
    else:

        def show() -> bool:
            found = surveyor.survey()
            text = view.rendered(found, console.width) if console.is_terminal else view.plain(found)
            console.print(text, soft_wrap=not console.is_terminal, markup=False)
            return found.over

        _again(show, given.watch)


def _tensorboard(given: argparse.Namespace) -> None:
    surveyor = _surveyor(given)
    from masa.report.events import Events

    events = Events(Path(given.out))

    def follow() -> bool:
        found = surveyor.survey()
        events.update(run for run in found.runs if run.state != "waiting")
        return found.over

    try:
        _again(follow, given.watch)
    finally:
        events.close()
    runs = f"{events.count} run{'s' * (events.count != 1)}"
    print(f"{runs} written to {given.out}; see with `tensorboard --logdir {given.out}`", file=sys.stderr)


def _adopt(given: argparse.Namespace) -> None:
    from masa.study.adopting import adopt

    c = config.load(given.configfile)
    results = Path(given.results or c["results"])
    found = adopt(Path(given.source), c, results)
    for result in found:
        if result.why and result.why != ABSENT:
            print(f"{result.state:8} {result.name}: {result.why}")
    count = {state: sum(result.state == state for result in found) for state in STATES}
    absent = sum(result.why == ABSENT for result in found)
    print(
        f"{count['adopted']} of {len(found)} results adopted into {results}; {count['there']} were there, "
        f"{count['left'] - absent} are of something else and {absent} not in {given.source}: the workflow makes those."
    )


def _surveyor(given: argparse.Namespace) -> Surveyor:
    from masa.study.status.survey import Surveyor

    if given.watch is not None and not given.watch > 0:
        raise MasaError(f"--watch = {given.watch:g} must be above 0 seconds.")
    c = config.load(given.configfile)
    results = Path(given.results or c["results"])
    ours = bool(given.configfile) or results.resolve() == Path(c["results"]).resolve()
    return Surveyor(results, c, given.runs, ours)


def _again(look: Callable[[], bool], seconds: float | None) -> None:
    """Once, or until it says that all is over or Ctrl-C is pressed: a look that has begun is finished, then.

    A second Ctrl-C ends it at once.
    """
    if seconds is None:
        look()
        return
    enough = False

    def stop(number: int, _: Any) -> None:
        nonlocal enough
        enough = True
        signal.signal(number, before)

    before = signal.signal(signal.SIGINT, stop)
    try:
        while not look():
            until = time.monotonic() + seconds
            while not enough and (left := until - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
            if enough:
                return
    finally:
        signal.signal(signal.SIGINT, before)
