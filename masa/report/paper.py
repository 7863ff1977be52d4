"""The paper's numbers: read from config/paper, and found for a row of ours."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from masa.errors import MasaError
from masa.runs.files import PROJECT
from masa.study.sections.artefacts import Table


def published_rows(paper: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Rows of the CSV that an artefact's ``paper`` names, numbers as numbers; empty cells are left out."""
    if not paper:
        return []
    with (PROJECT / paper["file"]).open(newline="") as file:
        return [{k: _number(v) for k, v in row.items() if v != ""} for row in csv.DictReader(file)]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def match(wanted: Mapping[str, Any], paper: Sequence[Mapping[str, Any]], spec: Mapping[str, Any]) -> dict[str, Any]:
    """The paper's row that agrees with ``wanted`` in every column to match that both have."""
    if not paper:
        return {}
    columns = spec["paper"]["match"]
    keys = [k for k in columns if k in wanted]
    if columns[0] not in keys or len(keys) < 2:
        return {}
    found = [row for row in paper if all(row.get(k) == wanted[k] for k in keys)]
    if len(found) > 1:
        raise MasaError(f"{spec['paper']['file']}: {len(found)} rows match {dict(wanted)}; add columns to paper.match.")
    return {k: v for k, v in found[0].items() if isinstance(v, float)} if found else {}


def judgement(spec: Mapping[str, Any]) -> tuple[str, float]:
    """The metric that a table's verdicts go by, and the points within which a row agrees."""
    judged, tolerance = ({**Table.defaults(), **spec}[key] for key in ("judged", "tolerance"))
    return judged, float(tolerance)
