"""What figures of training share: the held-out losses of a run, and rows by their scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.evaluation import metrics as m
from masa.runs import run


def by_scale(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Rows of a figure by the scale that they were trained at, in their order."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["scale"], []).append(row)
    return found


def at(scales: Mapping[str, Any]) -> str:
    """The scale, where a figure has only one and so no panels that name it."""
    return f"Scale: {next(iter(scales))}." if len(scales) == 1 else ""


def curve(results: Path, run_id: str, unit: str) -> dict[int, float]:
    """Tokens or images seen -> held-out loss.

    Raises:
        MasaError: the run has been evaluated nowhere yet.
    """
    path = m.below(results / "runs", run_id) / "metrics.jsonl"
    found = {r[unit]: r["validation_loss"] for r in run.read_jsonl(path) if "validation_loss" in r}
    if not found:
        raise MasaError(f"{path} has no held-out loss yet; finish the run with `masa pretrain`.")
    return found
