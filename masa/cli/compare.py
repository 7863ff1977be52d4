"""The verb that puts runs side by side."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from masa.cli.base import Verbs, add_out
from masa.runs.outputs import tried
from masa.study import config


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    v = verbs.add(
        "compare",
        _compare,
        "print and plot the numbers of runs side by side",
        "masa compare nano/vanilla nano/masa-qkvo --out comparison.png",
    )
    v.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="run ids or directories; nano/vanilla for all its seeds; MODEL/NAME/PERCENT of compressions. Differences "
        "are to the first",
    )
    v.add_argument("--results", metavar="DIR", help="where ids are looked for; default: the configuration's")
    add_out(v, "FILE", "also draw the curves: .png, .pdf or .svg", lock="beside", required=False)
    v.add_argument("--csv", metavar="FILE", help="also write the table, one row a run")
    v.add_argument("--json", action="store_true", help="all numbers, for scripts")


def _compare(given: argparse.Namespace) -> None:
    from masa.report import compare, compare_text, runs

    given.csv = given.csv and str(tried(Path(given.csv), False, "--csv"))
    results = Path(given.results or config.load(given.configfile)["results"])
    found = compare.compare(runs.find(given.runs, results))
    if given.out:
        from masa.report import compare_figure

        compare_figure.draw(found, Path(given.out))
    if given.csv:
        compare.write_csv(found, Path(given.csv))
    if given.json:
        print(found.as_json())
    else:
        width = os.get_terminal_size(sys.stdout.fileno()).columns if sys.stdout.isatty() else None
        print(compare_text.text(found, width or None))
    for path in filter(None, (given.out, given.csv)):
        print(f"written to {path}", file=sys.stderr)
