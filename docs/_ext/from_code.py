"""Pages that are made of the code itself: ``<!-- from code: NAME -->`` becomes what :data:`WRITERS` says.

So verbs, keys of the configuration, methods and columns are written once, where they are used.
"""

from __future__ import annotations

import argparse
import pkgutil
import re
from collections.abc import Callable, Iterable
from importlib import import_module

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

PLACE = re.compile(r"<!-- from code: (.+?) -->")


def _table(headings: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(headings)]
    lines += [["---"] * len(lines[0]), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines) + "\n"


def config_keys() -> str:
    """Every key of the configuration, a section of the page for each at the top."""
    from masa.study import config

    groups: dict[str, list[list[str]]] = {}
    for line in config.describe().splitlines()[2:]:
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        groups.setdefault(cells[0].strip("`").split(".")[0], []).append(cells)
    parts = []
    for name, rows in groups.items():
        parts.append(f"(config-{name})=\n## `{name}`\n")
        if rows[0][0] == f"`{name}`":
            parts.append(_key(*rows.pop(0)[1:]) + "\n")
        parts += [f"{key}\n: {_key(kind, default, effect)}\n" for key, kind, default, effect in rows]
    return "\n".join(parts)


def _key(kind: str, default: str, effect: str) -> str:
    return f"{effect} *{kind}*{f', default {default}' if default else ''}"


def cli_verbs() -> str:
    """Every verb with its arguments and example."""
    from masa.cli import make_parser
    from masa.cli.base import EXIT

    return "\n".join(
        f"(masa-{name})=\n## masa {name}\n\n{_verb(parser, EXIT)}" for name, parser in _subparsers(make_parser())
    )


def _subparsers(parser: argparse.ArgumentParser) -> list[tuple[str, argparse.ArgumentParser]]:
    action = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return list(action.choices.items())


def _verb(parser: argparse.ArgumentParser, exit_status: str) -> str:
    rows = []
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        words = [f"`{word}`" for word in action.option_strings or [str(action.metavar or action.dest)]]
        if action.option_strings and action.nargs != 0:
            words[-1] = f"{words[-1][:-1]} {action.metavar or action.dest.upper()}`"
        required = action.required and bool(action.option_strings)
        rows.append([", ".join(words), f"{action.help or ''}{' (required)' if required else ''}".strip()])
    epilog = (parser.epilog or "").replace(exit_status, "").strip()
    example = re.sub(r"^example:\s*", "", epilog)
    return f"{parser.description}\n\n```console\n{example}\n```\n\n{_table(('argument', 'what it is'), rows)}"


def sharing_methods() -> str:
    """The methods of training, with the fields that each reads."""
    from masa.sharing.spec import METHODS

    def show(value: object) -> str:
        return f"`{value}`"

    return _table(
        ("method", "what it is", "reads", "defaults"),
        (
            [
                show(name),
                m.summary,
                ", ".join(map(show, m.fields)),
                ", ".join(f"`{k}: {v}`" for k, v in m.defaults.items()),
            ]
            for name, m in METHODS.items()
        ),
    )


def compressors() -> str:
    """The methods of compression: the first sentence of each class, and its hyperparameters."""
    import inspect

    from masa.compression import COMPRESSORS
    from masa.compression.names import METHODS

    def row(name: str) -> list[str]:
        cls = COMPRESSORS[name]
        first = inspect.getdoc(cls).split("\n\n")[0].replace("\n", " ")
        first = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", first).replace("``", "`")
        arguments = [p for p in inspect.signature(cls.__init__).parameters.values() if p.name != "self"]
        return [f"`{name}`", first, ", ".join(f"`{p.name}={p.default!r}`" for p in arguments)]

    return _table(("method", "what it is", "options (`--option KEY=VALUE`)"), map(row, METHODS))


def columns() -> str:
    """The columns of tables."""
    from masa.evaluation.metrics import METRICS

    return _table(("column", "heading", "better"), ([f"`{m.name}`", m.label, m.better] for m in METRICS))


def tables_and_figures() -> str:
    """Tables and figures of the default configuration."""
    from masa.study import artefacts, config

    c = config.load()
    rows = [[f"`{name}`", "table", "see [](own-tables)"] for name in artefacts.OWN_TABLES]
    for kind in ("tables", "figures"):
        rows += [[f"`{name}`", kind.removesuffix("s"), a["title"]] for name, a in c[kind].items() if a]
    return _table(("name", "kind", "title"), rows)


def figure_kinds() -> str:
    """Kinds of figures, and the data of the models that each can draw."""
    from masa.study.checks import FIGURES

    return _table(("kind", "about models of"), ([f"`{k}`", ", ".join(v)] for k, v in FIGURES.items()))


def devices() -> str:
    """Devices that a plan can be made for."""
    from masa.study.cost.devices import DEVICES

    return ", ".join(f"`{name}`" for name in DEVICES)


def api(*chosen: str) -> str:
    """Modules with their public members, what ``masa`` itself exports left out: that has a page of its own."""
    return "\n".join(f"## {name}\n\n```{{eval-rst}}\n{_module(name)}```\n" for name in chosen)


def _module(name: str) -> str:
    module = import_module(name)
    exported = {(package, n) for package in ("masa", "masa.compression") for n in import_module(package).__all__}
    here = sorted(n for p, n in exported if getattr(getattr(import_module(p), n, None), "__module__", "") == name)
    if name in ("masa.sharing.spec", "masa.compression.base"):  # tables of methods, which have no __module__
        here += ["METHODS"] if name == "masa.sharing.spec" else ["COMPRESSORS"]
    assert module.__doc__, f"{name} has no docstring"
    excluded = ", ".join([*here, "model_config"])  # the last is pydantic's
    return f".. automodule:: {name}\n   :members:\n   :ignore-module-all:\n   :exclude-members: {excluded}\n"


def modules_of(room: str) -> list[str]:
    """Names of a room's modules; :mod:`masa.compression` itself has a page of its own, ``__main__`` nothing to tell."""
    name = f"masa.{room}"
    inner = pkgutil.walk_packages(getattr(import_module(name), "__path__", ()), f"{name}.")
    return [
        *([] if room == "compression" else [name]),
        *sorted(m.name for m in inner if not m.name.endswith("__main__")),
    ]


WRITERS: dict[str, Callable[[], str]] = {
    "config keys": config_keys,
    "verbs": cli_verbs,
    "sharing methods": sharing_methods,
    "compressors": compressors,
    "columns": columns,
    "artefacts": tables_and_figures,
    "figure kinds": figure_kinds,
    "devices": devices,
}


def replace(app: Sphinx, name: str, content: list[str]) -> None:
    """Fill the places of one page."""

    def fill(found: re.Match[str]) -> str:
        what = found[1]
        if what.startswith("modules "):
            return "\n".join(api(*modules_of(room)) for room in what.split()[1:])
        if what not in WRITERS:
            raise ExtensionError(f"{name}: nothing is made from code under the name {what!r}: {', '.join(WRITERS)}")
        return WRITERS[what]()

    if PLACE.search(content[0]):
        app.env.note_reread()  # the code may have changed where the page has not
        content[0] = PLACE.sub(fill, content[0])


def markdown_tables(app: Sphinx, what: str, name: str, documented: object, options: object, lines: list[str]) -> None:
    """Tables in docstrings are Markdown's, which can be read in the source; Sphinx is given what it knows."""
    rows = [(i, line) for i, line in enumerate(lines) if line.strip().startswith("|") and line.strip().endswith("|")]
    if len(rows) < 3 or set(rows[1][1]) - set("|-: "):
        return
    start, stop = rows[0][0], rows[-1][0] + 1
    table = [".. list-table::", "   :header-rows: 1", ""]
    for cells in (line.strip().strip("|").split("|") for i, line in rows if i != rows[1][0]):
        table += [f"   {'*' if j == 0 else ' '} - {cell.strip()}" for j, cell in enumerate(cells)]
    lines[start:stop] = [*table, ""]


def sections(app: Sphinx, what: str, name: str, documented: object, *_: object) -> tuple[str, str] | None:
    """A section's keys are on the page of the configuration; in the signature of its class nobody could read them."""
    from masa.settings import Section

    return ("", "") if isinstance(documented, type) and issubclass(documented, Section) else None


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect to the reading of sources and docstrings."""
    app.connect("source-read", replace)
    app.connect("autodoc-process-docstring", markdown_tables)
    app.connect("autodoc-process-signature", sections)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
