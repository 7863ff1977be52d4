"""The verb that writes the report: one HTML file that opens offline."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from masa.cli.base import Verbs, add_out, read_spec
from masa.errors import MasaError
from masa.runs.hold import exclusive
from masa.runs.outputs import tried
from masa.study import config


def add(verbs: Verbs) -> None:
    """Add the verb."""
    v = verbs.add("report", _report, "write one HTML page of all results, finished or not", "masa report")
    v.add_argument("--results", metavar="DIR", help="what the page is about; default: from the configuration")
    add_out(v, "FILE", "default: report.html in that directory", lock=None, required=False)
    v.add_argument("--spec", metavar="JSON", help="the whole configuration as data; files then give but the order")
    v.add_argument("--json", action="store_true", help="print the page's file and what was found wrong, as JSON")


def _report(given: argparse.Namespace) -> None:
    from masa.report.page import build

    c = config.load(given.configfile)
    if given.spec is not None:
        c = _in_order(_whole(given.spec), c)
    results = Path(given.results or c["results"])
    out = tried(Path(given.out) if given.out else results / "report.html", False)
    with exclusive(out, wait=not given.no_wait, beside=True):
        found = build.write(c, results, out, given.configfile)
    for problem in found.problems:
        print(f"masa: warning: {problem}", file=sys.stderr)
    if given.json:
        print(json.dumps({"page": str(out), "bytes": out.stat().st_size, "problems": found.problems}, indent=1))
    else:
        print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB, open it in any browser", file=sys.stderr)


def _whole(text: str) -> config.Config:
    """A whole configuration, as JSON or a file of it.

    Raises:
        MasaError: it is no JSON object, or no configuration.
    """
    data = read_spec(text)
    if not isinstance(data, dict):
        raise MasaError(f"--spec must hold a mapping of keys, found {type(data).__name__}.")
    config.check(data)
    return data


def _in_order(data: Any, like: Any) -> Any:
    """The same data with the keys of mappings in the order of another: tables and figures stand as in the files."""
    if not isinstance(data, dict) or not isinstance(like, dict):
        return data
    return {key: _in_order(data[key], like.get(key)) for key in [*(k for k in like if k in data), *data]}
