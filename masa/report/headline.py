"""One line of a table's content, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from masa.evaluation import metrics as m

TOLD = ("held_out_ppl", "validation_loss", "top1_pct", "map_pct")
"""What a table is read for: the first of these that it has."""


def headline(frame: pd.DataFrame, spec: Mapping[str, Any]) -> str:
    """The best and the worst row of a table by its main metric; empty where it has none.

    Args:
        frame: from :func:`masa.report.tables.build`.
        spec: of the table.
    """
    told = next((n for n in TOLD if n in frame and frame[n].notna().any()), None)
    if told is None:
        return ""
    metric = next(x for x in m.METRICS if x.name == told)
    rows = frame[frame[told].notna()].sort_values(told, ascending=metric.better == "lower")
    ends = [_row(row, metric) for row in (rows.iloc[0], rows.iloc[-1])]
    return (
        f"{metric.label} from {' to '.join(ends)}, {len(rows)} rows" if len(rows) > 1 else f"{metric.label} {ends[0]}"
    )


def _row(row: Any, metric: m.Metric) -> str:
    where = f" at {row['requested_pct']:g} %" if row.get("requested_pct", 0) > 0 else ""
    std = row.get(f"{metric.name}_std")
    spread = f" ± {std:.{metric.digits}f}" if std is not None and pd.notna(std) else ""
    return f"{row[metric.name]:.{metric.digits}f}{spread} ({row['label']}{where})"
