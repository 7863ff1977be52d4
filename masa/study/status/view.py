"""A survey as text: lines that fit the width of a terminal, or plain columns for a pipe."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence

from rich.text import Text
from tabulate import tabulate

from masa.runs.progress import clock
from masa.study.cost.report import duration
from masa.study.status.runs import Status
from masa.study.status.survey import Survey

COLOURS = {"running": "green", "silent": "yellow", "failed": "red", "interrupted": "yellow", "waiting": "dim"}
UNITS = {"tokens": "tok", "images": "img"}
NAME, HOST = (12, 34), 96
"""Columns of a name, at least and at most; width of a terminal from which hosts are shown."""


def plain(survey: Survey) -> str:
    """One line a run in aligned columns, with its state first; for pipes and files."""
    rows = [
        [run.state, clean(run.run), *_cells(run), clean(run.host or ""), "yes" if run.evaluated else "no", _note(run)]
        for run in survey.runs
    ]
    headers = ("state", "run", "step", "loss", "held-out", "per second", "ETA", "age", "host", "evaluated", "")
    align = ("left", "left", "right", "right", "right", "right", "right", "right", "left", "left", "left")
    table = tabulate(rows, headers, "plain", disable_numparse=True, colalign=align) if rows else ""
    lines = [*(line.rstrip() for line in table.splitlines()), *notes(survey), summary(survey)]
    return "\n".join(lines)


def rendered(survey: Survey, width: int, height: int | None = None) -> Text:
    """For a terminal: runs grouped by state and scale.

    Args:
        width: columns.
        height: lines; what does not fit is counted in the last of them. None for all.
    """
    head = [Text(note, "yellow") for note in notes(survey)]
    body, owners = _body(survey, width, whole=height is None)
    foot = Text(summary(survey), "bold")
    if height is not None:
        notes_and_summary = sum(len(textwrap.wrap(text.plain, width)) for text in (*head, foot))
        room = max(1, height - notes_and_summary - 1)
        if len(body) > room:
            hidden = len({run for run in owners[room - 1 :] if run is not None})
            body = [*body[: room - 1], Text(f"… and {hidden} more (a taller terminal shows them)", "dim")]
    for line in body:
        line.truncate(width, overflow="ellipsis")
    return Text("\n").join([*head, *body, foot])


def summary(survey: Survey) -> str:
    """One line about all of them."""
    counts = survey.counts
    evaluated = sum(run.evaluated for run in survey.runs)
    words = [f"{counts['done']} of {len(survey.runs)} runs done ({evaluated} evaluated)"]
    words += [f"{count} {state}" for state, count in counts.items() if count and state != "done"]
    line = ", ".join(words)
    if survey.eta_seconds is not None:
        line += f"; the last of the running in {clock(survey.eta_seconds)}"
    done, every = survey.compressions
    return f"{line}; {done} of {every} compression sweeps done" if every else line


def notes(survey: Survey) -> list[str]:
    """Sentences about what is unusual."""
    found = list(survey.notes)
    extra = sum(not run.configured for run in survey.runs)
    if extra and not survey.notes:
        found.append(f"{extra} of these runs {'are' if extra > 1 else 'is'} not in the configuration.")
    if survey.clock != "file system" and any(run.age_seconds is not None for run in survey.runs):
        found.append("Nothing can be written beside the results: ages are by this machine's clock, not by the disk's.")
    return found


def _body(survey: Survey, width: int, whole: bool) -> tuple[list[Text], list[str | None]]:
    """Lines, and the run that each of them is about; ``whole`` wraps notes that are too long for one line."""
    heading = ("step", "loss", "held-out", "per second", "ETA", "age")
    cells = {run.directory: _cells(run) for run in survey.runs}
    widths = [max(map(len, column)) for column in zip(heading, *cells.values(), strict=True)]
    longest = max((len(_short(run)) for run in survey.runs), default=0)
    host = max((len(run.host or "") for run in survey.runs), default=0) if width >= HOST else 0
    spare = width - 2 - sum(widths) - len(widths) - (host + 1 if host else 0)
    name = max(NAME[0], min(longest, spare - 5, NAME[1]))
    bar = max(3, min(20, spare - name - 1))
    lines: list[Text] = []
    owners: list[str | None] = []
    if survey.runs:
        words = (word.rjust(w) for word, w in zip(heading, widths, strict=True))
        lines.append(
            Text(" ".join(["  run".ljust(2 + name), " " * bar, *words, "host" if host else ""]).rstrip(), "dim")
        )
        owners.append(None)
    for title, runs in _groups(survey.runs).items():
        lines.append(Text(title, "bold"))
        owners.append(None)
        for run in runs:
            words = (cell.rjust(w) for cell, w in zip(cells[run.directory], widths, strict=True))
            line = Text("  " + _fit(_short(run), name) + " ")
            line.append(_bar(run, bar), COLOURS.get(run.state, "cyan"))
            line.append(" " + " ".join([*words, clean(run.host or "") if host else ""]).rstrip())
            lines.append(line)
            owners.append(run.directory)
            if note := _note(run):
                parts = textwrap.wrap(note, max(20, width - 4)) if whole else [note]
                lines += [Text(f"    {part}", COLOURS.get(run.state, "")) for part in parts]
                owners += [run.directory] * len(parts)
    return lines, owners


def _groups(runs: Sequence[Status]) -> dict[str, list[Status]]:
    """Title -> the runs of one state and scale, in the order in which they come first."""
    found: dict[str, list[Status]] = {}
    mark = "  (not in the configuration)" if any(run.configured for run in runs) else ""
    for run in runs:
        state = "done, not evaluated" if run.state == "done" and not run.evaluated else run.state
        title = f"{state}  {_scale(run)}{mark if not run.configured else ''}"
        found.setdefault(title, []).append(run)
    return found


def _scale(run: Status) -> str:
    parts = clean(run.run).split("/")
    return parts[0] if len(parts) == 3 else "directories"


def _short(run: Status) -> str:
    """A run's id without the scale that it stands under."""
    parts = clean(run.run).split("/")
    return "/".join(parts[1:]) if len(parts) == 3 else "/".join(parts)


def _cells(run: Status) -> list[str]:
    step = f"{run.step or 0:,}/{run.steps:,}" if run.steps else f"{run.step:,}" if run.step else ""
    speed = f"{_amount(run.per_second)} {UNITS.get(run.unit or '', '')}" if run.per_second else ""
    eta = clock(run.eta_seconds) if run.eta_seconds is not None else ""
    age = _age(run.age_seconds) if run.age_seconds is not None and run.state != "done" else ""
    return [step, _loss(run.loss), _loss(run.validation_loss), speed.strip(), eta, age]


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}" if abs(value) < 100 else f"{value:.3g}"


def _amount(value: float) -> str:
    """1,234 or 12.3k: at most five characters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= size:
            scaled = value / (1e3 if letter == "k" else size)
            return f"{scaled:.1f}{letter}" if scaled < 100 else f"{scaled:.0f}{letter}"
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def _age(seconds: float) -> str:
    return duration(seconds).replace(" days", "d").replace(" min", "m").replace(" ", "")


def _bar(run: Status, width: int) -> str:
    share = 1.0 if run.state == "done" else (run.step or 0) / run.steps if run.steps else 0.0
    full = min(width, math.floor(share * width))
    return "█" * full + "░" * (width - full)


def _note(run: Status) -> str:
    words = [clean(run.note)] if run.note else []
    if run.outdated:
        words.append("the configuration asks for another spec now")
    return "; ".join(words)


def _fit(name: str, width: int) -> str:
    """A name in exactly so many columns; its end, with the seed, is kept."""
    return (
        name.ljust(width)
        if len(name) <= width
        else f"{name[: width // 2 - 1]}…{name[len(name) - (width - width // 2) :]}"
    )


def clean(text: str) -> str:
    """Words of a file as one line without control characters, which could move a terminal's cursor."""
    return re.sub(r"\s*[\x00-\x1f\x7f-\x9f]+\s*", " ", text).strip()
