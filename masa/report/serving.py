"""How factored models serve, one line a model: what ``benchmarks/serving.py`` measured, turned round."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from masa.errors import MasaError

COLUMNS = {
    "disk": "disk, MiB",
    "memory after loading": "memory, MiB",
    "peak in prefill": "peak in prefill, MiB",
    "prefill : original": "prefill",
    "decoding, batch 1 : original": "decoding",
    "decoding, batch 1, measured : limit": "of its limit",
    "decoding, batch 8 : original": "8 at once",
    "decoding, batch 1, share of bandwidth": "of bandwidth",
}
"""What a row of the benchmark is called -> its column; the last five are ratios, to the original where nothing else."""


def table(path: Path) -> list[dict[str, Any]]:
    """One entry a model: ``name``, and ``cells``, one a column, each a text and whether it missed its target.

    Args:
        path: ``serving.csv``.

    Raises:
        MasaError: it is not one of this benchmark.
    """
    models: dict[str, dict[str, tuple[str, bool]]] = {}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                name, colon, what = row["what"].partition(": ")
                if colon and what in COLUMNS:
                    models.setdefault(name, {})[what] = (_text(what, float(row["value"])), row["met"] == "no")
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise MasaError(f"{path} is not one of benchmarks/serving.py ({error}); make it again.") from error
    return [
        {"name": name, "cells": [cells.get(what, ("", False)) for what in COLUMNS]} for name, cells in models.items()
    ]


def _text(what: str, value: float) -> str:
    return f"{value:,.0f}" if list(COLUMNS).index(what) < 3 else f"{value:.2f}"
