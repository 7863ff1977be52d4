"""Tables of the page, from their CSV files: ours, the paper's value and the difference in one cell, and verdicts."""

from __future__ import annotations

import base64
import csv
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masa.evaluation import metrics as m
from masa.report.page.found import Found, number
from masa.report.paper import judgement
from masa.study import artefacts

CURVES = "metrics"
"""The table of all logged steps: the page draws it instead."""

LARGEST = 400_000
"""Bytes of a CSV up to which the page holds a copy to download."""

JUDGED = {
    "parameters": "counts and reductions: agrees at the paper's own precision",
    "claims": "the whole 95 % interval of the gain: holds above minus the margin, does not hold below it",
}
"""How rows of a table are judged that no entry of the configuration says that of."""

SUFFIXES = ("_std", "_se", "_paper", "_difference")
HIDDEN = {"label", "method", "unavailable_tasks", "paper_scale", "verdict"}
VERDICTS = {"agrees": "agrees", "differs": "differs", "incomplete": "incomplete"}
"""First word of a verdict -> its class; every other one says that there is nothing to judge."""

LABELS = {
    "scale": "Scale",
    "run": "Run",
    "seed": "Seed",
    "seeds": "Seeds",
    "device": "Device",
    "threads": "Threads",
    "parameters_m": "Parameters (M)",
    "attention_m": "Attention parameters (M)",
    "training_tokens_per_second": "Training (tokens/s)",
    "training_images_per_second": "Training (images/s)",
    "training_training_seconds": "Training (s)",
    "training_ratio": "Training / vanilla",
    "inference_tokens_per_second": "Folded inference (tokens/s)",
    "inference_ratio": "Inference / vanilla",
}
"""Headings of columns that are no metric of :data:`masa.evaluation.metrics.METRICS`."""

METRICS = {metric.name: metric for metric in m.METRICS}


def views(found: Found) -> list[dict[str, Any]]:
    """Every table of the configuration: ``name``, ``title``, ``caption``, ``note``, ``command``, ``columns`` and so on.

    A table that is missing or damaged has no ``columns``; the reason of damage is among the page's problems.
    """
    own = [name for name in reversed(artefacts.OWN_TABLES) if name != CURVES]
    chosen = [name for name in artefacts.table_names(found.config) if name not in artefacts.OWN_TABLES]
    return [_view(found, name) for name in [*chosen, *own]]


def verdicts(tables: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many rows of all tables were judged how: "agrees", "differs", "incomplete", "another scale" …"""
    counts: Counter[str] = Counter()
    for table in tables:
        counts.update(row["verdict"].split(":")[0] for row in table["rows"] if row["verdict"])
    return {"agrees": 0, "differs": 0} | dict(counts)


def standing(verdict: str) -> str:
    """The class of a verdict's cell: "agrees", "differs", "incomplete" or "neutral"."""
    return VERDICTS.get(verdict.split(":")[0], "neutral")


def within(difference: float, tolerance: float) -> str:
    """Whether a difference "agrees" or "differs"; one equal to the tolerance agrees (:mod:`masa.report.tables`)."""
    return "agrees" if abs(difference) <= tolerance else "differs"


def _view(found: Found, name: str) -> dict[str, Any]:
    spec = found.config["tables"].get(name) or {}
    title, note = _words(found.artefact("tables", name, "md"))
    titles = {"runs": "Every single run"}
    view: dict[str, Any] = {
        "name": name,
        "title": spec.get("title") or title or titles.get(name, name.capitalize()),
        "caption": spec.get("caption", ""),
        "note": note,
        "command": found.command(name),
        "columns": None,
        "rows": [],
        "judged": "",
        "csv": "",
    }
    path = found.artefact("tables", name, "csv")
    if not path:
        return view
    try:
        text = path.read_text(encoding="utf-8")
        records = list(csv.DictReader(text.splitlines(), strict=True))
        if not records or any(None in record or None in record.values() for record in records):
            raise ValueError("rows and header do not fit" if records else "no rows")
    except (OSError, ValueError, csv.Error) as error:
        found.problems.append(f"{path} is no table ({error}); delete it and make it anew with `{view['command']}`.")
        return view
    judged, tolerance = judgement(spec)
    if "verdict" in records[0]:
        view["judged"] = JUDGED.get(name, f"{_label(judged)}: agrees within ± {tolerance:g}")
    keys = _keys(records[0], spec.get("columns"))
    view["columns"] = [{"label": _label(key), "number": _numeric(records, key)} for key in keys]
    view["rows"] = [_row(record, keys, judged, tolerance, _reasons(found, record)) for record in records]
    view["first"] = "Method" if "label" in records[0] else view["columns"].pop(0)["label"]
    if len(text) <= LARGEST:
        view["csv"] = f"data:text/csv;base64,{base64.b64encode(text.encode()).decode()}"
    return view


def _words(path: Path | None) -> tuple[str, str]:
    """Title and note of the table for people that lies beside the CSV."""
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    title = re.match(r"# (.+)\n", text)
    return title[1] if title else "", text.rpartition("|\n")[2].strip() if "|\n" in text else ""


def _keys(record: Mapping[str, str], chosen: Sequence[str] | None) -> list[str]:
    """Columns that are shown: a metric that is left out of the table for people is in the CSV alone."""
    plain = [k for k in record if k not in HIDDEN and not k.endswith(SUFFIXES)]
    plain += [k.removesuffix("_paper") for k in record if k.endswith("_paper")]  # the paper has it, and we have not
    keys = [k for k in dict.fromkeys(plain) if chosen is None or k not in METRICS or k in chosen]
    if "label" in record:
        return [*(k for k in keys if k != "seeds"), *(k for k in keys if k == "seeds")]
    return keys


def _label(key: str) -> str:
    return METRICS[key].label if key in METRICS else LABELS.get(key, key.replace("_", " "))


def _numeric(records: Sequence[Mapping[str, str]], key: str) -> bool:
    values = [record.get(key, "") for record in records]
    return all(_number(value) is not None for value in values if value)


def _row(
    record: Mapping[str, str], keys: Sequence[str], judged: str, tolerance: float, reasons: Mapping[str, str]
) -> dict[str, Any]:
    verdict = record.get("verdict", "")
    first, rest = (record["label"], keys) if "label" in record else (record[keys[0]], keys[1:])
    cells = [_cell(record, key, reasons) for key in rest]
    if standing(verdict) in ("agrees", "differs"):
        for key, cell in zip(rest, cells, strict=True):
            if key == judged and (difference := _number(record.get(f"{key}_difference"))) is not None:
                cell["standing"] = within(difference, tolerance)
    return {"first": first, "cells": cells, "verdict": verdict, "standing": standing(verdict)}


def _cell(record: Mapping[str, str], key: str, reasons: Mapping[str, str]) -> dict[str, Any]:
    """One cell: ``text`` and ``sort`` (a number, or the text), ``spread``, ``paper``, ``difference``, ``reason``."""
    raw = record.get(key, "")
    value, paper = _number(raw), _number(record.get(f"{key}_paper"))
    cell: dict[str, Any] = dict.fromkeys(("text", "spread", "paper", "difference", "reason", "standing"), "")
    cell |= {"text": raw if value is None else _show(value, key), "sort": (raw or None) if value is None else value}
    if raw == "" and (key in METRICS or paper is not None):
        cell["reason"] = reasons.get(key, reasons[""])
    spread = _number(record.get(f"{key}_std"))
    spread = _number(record.get(f"{key}_se")) if spread is None else spread
    if spread is not None and (spread > 0 or getattr(METRICS.get(key), "better", "")):
        cell["spread"] = _show(spread, key)
    if paper is not None:
        cell["paper"] = _show(paper, key)
        difference = _number(record.get(f"{key}_difference"))
        if difference is None and "verdict" not in record and value is not None:
            difference = value - paper  # tables that judge nothing, whose rows are the paper's own models
        if difference is not None and not record.get("verdict", "").startswith("another"):
            cell["difference"] = _show(difference, key, "+")
    return cell


def _reasons(found: Found, record: Mapping[str, str]) -> dict[str, str]:
    """Why a cell of a row is empty, by column; "" for all others."""
    missing = [task for task in record.get("unavailable_tasks", "").split(";") if task]
    said = {task: why for task in missing if (why := _unavailable(found, task))}
    reasons = {"": "does not apply to this row, or was not measured"}
    for column, (task, _) in m.TASKS.items():
        if task in missing:
            reasons[column] = f"{task}: no data here{f' ({said[task]})' if task in said else ''}"
    if missing:
        reasons["avg_pct"] = f"needs every task; without data: {', '.join(missing)}"
    return reasons


def _unavailable(found: Found, task: str) -> str:
    """What an evaluation says of a task whose data it could not have."""
    for record in (*found.evaluations.values(), *found.compressions.values()):
        data = record.get("task_data")
        if isinstance(data, dict) and isinstance(data.get(task), dict) and "unavailable" in data[task]:
            return str(data[task]["unavailable"])
    return ""


def _number(text: str | None) -> float | None:
    try:
        return number(float(text or ""))
    except ValueError:
        return None


def _show(value: float, key: str, sign: str = "") -> str:
    """A metric with its own digits; other columns as whole numbers or with four digits."""
    if abs(value) >= 1e7:
        return f"{value:{sign},.0f}" if key.endswith(("parameters", "tokens", "images")) else f"{value:{sign}.3g}"
    if key in METRICS:
        return f"{value:{sign}z,.{METRICS[key].digits}f}"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:{sign},.0f}"
    return f"{value:{sign}.4g}"
