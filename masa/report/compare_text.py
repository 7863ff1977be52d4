"""A comparison as text: letters for runs, a table of what differs, and one of numbers that fits the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from tabulate import tabulate

from masa.report.compare import HEADINGS, Comparison
from masa.report.runs import COMPRESSION
from masa.study.status.view import clean

LONGEST = 20
"""Characters of a value of a spec; sha256 sums and lists are longer."""


def text(found: Comparison, width: int | None = None) -> str:
    """For people.

    Args:
        width: columns of the terminal; runs that do not fit follow in another table. None: one table for all.
    """
    blocks = [_legend(found)]
    differs = [[key, *map(_short, values)] for key, values in found.differs.items()]
    same = "made alike: nothing differs in specs and provenance"
    blocks.append(_tables("differs", differs, [[name] for name in letters(found)], width) if differs else same)
    rows = [[found.heading(column), *_cells(found, column)] for column in found.numbers]
    columns = [[name, f"{name} - A"][: 1 + (i > 0)] for i, name in enumerate(letters(found))]
    blocks.append(_tables("", rows, columns, width))
    if found.paired:
        blocks.append(_paired(found, width))
    return "\n\n".join([*blocks, *_remarks(found)])


def letters(found: Comparison) -> list[str]:
    """A short name for each run: A, B, …, Z, A1, …"""
    return [chr(65 + i % 26) + (str(i // 26) if i > 25 else "") for i in range(len(found.runs))]


def _legend(found: Comparison) -> str:
    rows = []
    for name, r in zip(letters(found), found.runs, strict=True):
        state = "" if r.done else "still in training, or interrupted"
        if r.done and not r.scores:
            state = "not evaluated"
        rows.append([name, clean(r.name), state])
    return "\n".join(line.rstrip() for line in tabulate(rows, tablefmt="plain", disable_numparse=True).splitlines())


def _cells(found: Comparison, column: str) -> list[str]:
    values, better = found.numbers[column], HEADINGS[column].better if found.comparable(column) else ""
    known = [v for v in values if v is not None]
    best = {"lower": min, "higher": max}[better](known) if better and len(set(known)) > 1 else None
    cells = []
    for i, (value, difference) in enumerate(zip(values, found.differences(column), strict=True)):
        cells.append("" if value is None else _number(column, value) + ("*" if value == best else " " * bool(better)))
        if i:
            cells.append("" if difference is None else _number(column, difference, sign="+"))
    return cells


def _number(column: str, value: float, sign: str = "") -> str:
    if column == "training_hours":
        return f"{value:{sign}z.3f}" if abs(value) < 10 else f"{value:{sign},.3g}"
    if isinstance(value, float) and abs(value) >= 1e6:  # perplexities of models that know nothing
        return f"{value:{sign}.2e}"
    return f"{value:{sign},.{HEADINGS[column].digits}f}"


def _tables(corner: str, rows: Sequence[Sequence[str]], columns: Sequence[Sequence[str]], width: int | None) -> str:
    """One table, or several where its columns are too many for the width; columns of one run stay together."""
    tables, start = [], 0
    while start < len(columns):
        for end in range(len(columns), start, -1):
            table = _table(corner, rows, columns, start, end)
            if width is None or end == start + 1 or max(map(len, table.splitlines())) <= width:
                break
        tables.append(table)
        start = end
    return "\n\n".join(tables)


def _table(corner: str, rows: Sequence[Sequence[str]], columns: Sequence[Sequence[str]], start: int, end: int) -> str:
    first, last = 1 + sum(map(len, columns[:start])), 1 + sum(map(len, columns[:end]))
    heads = [corner, *(name for names in columns[start:end] for name in names)]
    cells = [[row[0], *row[first:last]] for row in rows]
    align = ["left"] + ["right"] * (len(heads) - 1)
    table = tabulate(cells, heads, "plain", disable_numparse=True, colalign=align, preserve_whitespace=True)
    return "\n".join(line.rstrip() for line in table.splitlines())


def _paired(found: Comparison, width: int | None) -> str:
    base = found.paired[0].base
    groups = list(dict.fromkeys(p.group for p in found.paired))
    metrics = list(dict.fromkeys(p.metric for p in found.paired))
    known = {(p.group, p.metric): p for p in found.paired}
    rows = []
    for metric in metrics:
        cells = []
        for group in groups:
            p = known.get((group, metric))
            spread = f" ± {_number(metric, p.std)}" if p and p.std is not None else ""
            cells.append(f"{_number(metric, p.mean, '+')}{spread} ({p.seeds})" if p else "")
        rows.append([found.heading(metric), *cells])
    title = f"Paired differences to {clean(base)}: mean ± standard deviation over common seeds (their number)"
    return f"{title}\n{_tables('', rows, [[clean(group)] for group in groups], width)}"


def _remarks(found: Comparison) -> list[str]:
    said = []
    if any("*" in cell for column in found.numbers for cell in _cells(found, column)):
        said.append("* the best of its row.")
    names = [name for i, name in enumerate(letters(found)) if i and found.pairs(i)]
    if names:
        said.append(f"{', '.join(names)} had A's seed and data, so the differences to A are paired.")
    if found.runs[0].unit != COMPRESSION and "held_out_loss_at" not in found.at:
        said.append("There is no point yet at which all of them have been scored on held-out data.")
    return [" ".join(said)] if said else []


def _short(value: Any) -> str:
    text = "-" if value is None else clean(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"
