"""Verbs that put runs side by side: two or more by their numbers, and all that anybody made, on a board."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from masa.cli.base import Verbs, add_out
from masa.errors import MasaError
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

    v = verbs.add(
        "board",
        _board,
        "sort the results of many methods on a page, or make one method's entry for it",
        "masa board --of nano/masa-qkvo --out boards/masa-qkvo.json",
    )
    what = v.add_mutually_exclusive_group(required=True)
    what.add_argument("folder", nargs="?", metavar="FOLDER", help="make the page of all entries (JSON) below it")
    what.add_argument("--of", metavar="RUN", help="make an entry: SCALE/EXPERIMENT for all its seeds, or one run")
    v.add_argument("--results", metavar="DIR", help="where --of is looked for; default: the configuration's")
    v.add_argument("--label", metavar="TEXT", help="of an entry: its name on the page")
    v.add_argument("--note", metavar="TEXT", default="", help="of an entry: a sentence, such as what did not help")
    add_out(v, "FILE", "the page (Markdown), or the entry (JSON)", lock="beside")


def _board(given: argparse.Namespace) -> None:
    from masa.report import board, runs
    from masa.runs.run import write_json

    if given.folder:
        for name in ("results", "label", "note"):
            if getattr(given, name):
                raise MasaError(f"--{name} is of an entry; give --of RUN with it, or FOLDER without it.")
        found = board.read(Path(given.folder))
        board.write(found, Path(given.out))
        print(f"{len(found)} entr{'y' if len(found) == 1 else 'ies'} written to {given.out}", file=sys.stderr)
        return
    c = config.load(given.configfile)
    found = runs.seeds_of(given.of, Path(given.results or c["results"]))
    known = c["experiments"].get(found[0].group.rpartition("/")[2]) or {}
    made = board.entry(found, given.label or known.get("label"), given.note)
    write_json(given.out, made)
    print(
        f"{made['label']}, {len(made['seeds'])} seed{'s' * (len(made['seeds']) != 1)}: written to {given.out}",
        file=sys.stderr,
    )


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
