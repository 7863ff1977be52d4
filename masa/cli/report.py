"""Verbs that make tables and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from masa.cli.base import Verbs, add_out, spec_of
from masa.errors import MasaError
from masa.runs.hold import exclusive
from masa.study import config, experiments
from masa.study.artefacts import OWN_TABLES, artefact_spec, table_names, table_spec
from masa.study.inputs import parameters_spec


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    v = verbs.add("parameters", _parameters, "count parameters without memory", "masa parameters --out parameters.json")
    v.add_argument("--spec", metavar="JSON", help="list of resolved runs; default: from the configuration")
    add_out(v, "FILE", lock="beside")

    v = verbs.add("tables", _tables, "make tables from evaluations", "masa tables table1 table2 --out tables")
    _add_artefacts(v, "tables")

    v = verbs.add("figures", _figures, "draw figures from evaluations", "masa figures validation_loss --out figures")
    _add_artefacts(v, "figures")


def _add_artefacts(v: argparse.ArgumentParser, kind: str) -> None:
    v.add_argument("names", nargs="*", metavar="NAME", help=f"{kind} of the configuration (default: all of them)")
    v.add_argument("--spec", metavar="JSON", help="the only one as data; default: from the configuration")
    v.add_argument("--results", metavar="DIR", help="where the evaluations are; default: from the configuration")
    add_out(v, lock=None)


def _parameters(given: argparse.Namespace) -> None:
    spec = spec_of(given, parameters_spec, "parameters")
    from masa.study import accounting

    accounting.count(spec, Path(given.out))


def _tables(given: argparse.Namespace) -> None:
    from masa.report import own_tables, tables
    from masa.report.headline import headline

    def make(name: str, spec: Any, results: Path, out: Path) -> str:
        if name in OWN_TABLES:
            own_tables.write(name, spec, results, out)
            return f"{out / name}.csv"
        frame = tables.build(spec, results)
        tables.write(frame, spec, out, tables.note_for(spec, results))
        return f"{out / name}.md  {headline(frame, spec)}".rstrip()

    _each(given, table_names, table_spec, make)


def _figures(given: argparse.Namespace) -> None:
    from masa.report import figures

    def make(name: str, spec: Any, results: Path, out: Path) -> str:
        figures.write(spec, results, out)
        return f"{out / name}.png  {spec['title']}"

    _each(given, lambda c: experiments.active(c, "figures"), lambda c, n: artefact_spec(c, "figures", n), make)


def _each(
    given: argparse.Namespace,
    names: Callable[[config.Config], Iterable[str]],
    spec: Callable[[config.Config, str], Any],
    make: Callable[[str, Any, Path, Path], str],
) -> None:
    """Make the named artefacts, or all, and say what of each; what is wrong with one is found before any is made."""
    if given.spec is not None and len(given.names) != 1:
        raise MasaError("--spec is of one artefact: give its name, and no other.")
    needed = given.spec is None or given.results is None
    c = config.load(given.configfile) if needed else {}
    specs = {
        name: spec_of(given, lambda c, name=name: spec(c, name), f"table {name}" if name in OWN_TABLES else "artefact")
        for name in given.names or names(c)
    }
    results = Path(given.results or c["results"])
    for name, found in specs.items():
        with exclusive(Path(given.out) / name, wait=not given.no_wait, beside=True):  # others are made beside it
            said = make(name, found, results, Path(given.out))
        print(f"{name}: {said}", file=sys.stderr)
