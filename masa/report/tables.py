"""Tables: one row a run (mean and std over its seeds), the paper's number beside every one of ours."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masa.evaluation import metrics as m
from masa.report import compression_tables, vision_tables
from masa.report.paper import judgement, match, published_rows
from masa.runs.files import whole_file

NA = "n/a"
_KEYS = ("scale", "method", "label", "seeds")


def build(spec: Mapping[str, Any], results: Path) -> pd.DataFrame:
    """Make one table.

    Args:
        spec: from :func:`masa.study.artefacts.artefact_spec`.
        results: directory with ``evaluations/``.

    Returns:
        One row a run with columns ``scale, method, label, seeds``, then for every metric its mean over seeds,
        ``*_std`` (sample standard deviation, empty for one seed), ``*_paper``, ``*_difference``, and at the end
        ``unavailable_tasks``, ``paper_scale`` and ``verdict``.
    """
    paper = published_rows(spec.get("paper"))
    rows = [_row(row, results, paper, spec) for row in spec["rows"]]
    frame = pd.DataFrame(rows)
    if "reduction" in spec["rows"][0]:
        compression_tables.add_comparisons(frame, spec, results)
        frame = frame.drop(columns="seeds")
    names = [x.name for x in m.METRICS if {x.name, f"{x.name}_paper"} & set(frame)]
    frame = frame.reindex(columns=[*frame.columns, *(n for n in names if n not in frame)])  # not available: empty
    order = [*(k for k in _KEYS if k in frame), *names]
    for suffix in ("_std", "_se", "_paper", "_difference"):
        order += [n + suffix for n in names if n + suffix in frame]
    order += [c for c in ("unavailable_tasks", "paper_scale", "verdict") if c in frame]
    return frame[order]


def _row(row: Mapping[str, Any], results: Path, paper: Sequence[Mapping[str, Any]], spec: Mapping[str, Any]) -> dict:
    evaluated = [m.load(results, record) for record in row["records"]]
    flat = [m.flatten(e) for e in evaluated]
    out: dict[str, Any] = {
        "scale": row["scale"],
        "method": row["experiment"],
        "label": row["label"],
        "seeds": len(flat),
    }
    published = match(row["paper"], paper, spec)
    if published:
        published |= {
            k: v
            for k, v in m.averages({n: published[n] for n in flat[0] if n in published}).items()
            if k == "avg_available_pct"
        }  # the paper's mean over the tasks that we have
    for metric in m.METRICS:
        values = [f[metric.name] for f in flat if metric.name in f]
        if len(values) == len(flat):
            out[metric.name] = statistics.fmean(values)
            if len(values) > 1:
                out[f"{metric.name}_std"] = statistics.stdev(values)
        if metric.name in published:
            out[f"{metric.name}_paper"] = published[metric.name]
            if metric.name in out:
                out[f"{metric.name}_difference"] = out[metric.name] - published[metric.name]
    if len(flat) == 1:
        out |= m.standard_errors(evaluated[0])
    task_data = evaluated[0].get("task_data", {})
    out["unavailable_tasks"] = ";".join(t for t, r in task_data.items() if "unavailable" in r)
    if "paper" in spec:
        out["paper_scale"] = row["paper"].get("scale")
        out["verdict"] = _verdict(row, out, *judgement(spec))
    return out


def _verdict(row: Mapping[str, Any], out: Mapping[str, Any], judged: str, tolerance: float) -> str:
    if row["paper"].get("scale") is None:
        return "not in the paper"
    if row["scale"] != row["paper"]["scale"]:
        return "another model" if "reduction" in row else "another scale"
    if f"{judged}_paper" not in out:
        return "not in the paper"
    if f"{judged}_difference" not in out:
        return f"incomplete: {out['unavailable_tasks']}"
    return "agrees" if abs(out[f"{judged}_difference"]) <= tolerance else "differs"


# -------------------------------------------------------------------------------------------------------- writing


def write(frame: pd.DataFrame, spec: Mapping[str, Any], folder: Path, note: str = "") -> None:
    """Write ``NAME.csv`` (numbers), ``NAME.md`` and ``NAME.tex`` (for people)."""
    write_files(frame, readable(frame, spec.get("columns")), spec, folder, note)


def write_files(frame: pd.DataFrame, shown: pd.DataFrame, spec: Mapping[str, Any], folder: Path, note: str) -> None:
    name = spec["name"]
    with whole_file(folder / f"{name}.csv") as path:
        frame.to_csv(path, index=False)
    with whole_file(folder / f"{name}.md") as path:
        path.write_text(f"# {spec['title']}\n\n{shown.to_markdown(index=False, disable_numparse=True)}\n\n{note}\n")
    with whole_file(folder / f"{name}.tex") as path:
        path.write_text(_latex(shown, spec["title"], note))


def readable(frame: pd.DataFrame, chosen: Sequence[str] | None = None) -> pd.DataFrame:
    """The table for people: one cell a metric, ``ours ± std (paper, difference)``, n/a where a task is missing.

    Args:
        frame: from :func:`build`.
        chosen: the metrics shown, by name; all by default.
    """
    columns: dict[str, list[str]] = {}
    for key in ("scale", "label"):
        if key in frame:
            heading = ("Model" if "requested_pct" in frame else "Scale") if key == "scale" else "Method"
            columns[heading] = [str(v) for v in frame[key]]
    for metric in m.METRICS:
        shown = chosen is None or metric.name in chosen
        if shown and (metric.name in frame or f"{metric.name}_paper" in frame):
            columns[metric.label] = [_cell(record, metric) for record in frame.to_dict("records")]
    for key, label in (("seeds", "Seeds"), ("verdict", "Against the paper")):
        if key in frame:
            columns[label] = [str(v) for v in frame[key]]
    return pd.DataFrame(columns)


def _cell(record: Mapping[str, Any], metric: m.Metric) -> str:
    """The difference is shown only to the paper's own model: to another it would mean nothing."""
    value, paper, difference = (_get(record, metric.name + s) for s in ("", "_paper", "_difference"))
    std = _get(record, f"{metric.name}_std")
    std = _get(record, f"{metric.name}_se") if std is None else std

    def show(number: float, sign: str = "") -> str:
        return f"{number:{sign}.3g}" if abs(number) >= 1e7 else f"{number:{sign},.{metric.digits}f}"

    text = NA if value is None else show(value)
    if std is not None and (std > 0 or metric.better):
        text += f" ± {show(std)}"
    if paper is not None:
        comparable = difference is not None and not str(record.get("verdict", "")).startswith("another")
        text += f" ({show(paper)}" + (f", {show(difference, '+')})" if comparable else ")")
    return text


def _get(record: Mapping[str, Any], key: str) -> float | None:
    value = record.get(key)
    return None if value is None or (isinstance(value, float) and math.isnan(value)) else float(value)


def _latex(shown: pd.DataFrame, title: str, note: str) -> str:
    body = shown.map(_escape)
    body.columns = [_escape(c) for c in shown.columns]
    tabular = body.to_latex(index=False, escape=False, column_format="l" * 2 + "r" * (len(shown.columns) - 2))
    return (
        "% needs \\usepackage{booktabs,graphicx}\n\\begin{table}\n\\centering\n\\caption{"
        + _escape(f"{title}. {note}".strip())
        + "}\n\\resizebox{\\linewidth}{!}{%\n"
        + tabular
        + "}\n\\end{table}\n"
    )


_LATEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "‖": r"$\|$"}
    | {"<": "$<$", ">": "$>$"}
)


def _escape(text: str) -> str:
    return text.translate(_LATEX)


NOTE = (
    "Cells: ours, mean ± sample standard deviation over seeds (one seed: accuracies ± standard error over examples); "
    "in brackets the paper's value and, at the paper's own scales, our difference. Accuracies are zero-shot, acc_norm "
    "where lm-eval has it. n/a: the task's data could not be had here."
)


def note_for(spec: Mapping[str, Any], results: Path) -> str:
    """What a reader must know to read the table: scale, limits, where task data came from and what is missing."""
    first = m.load(results, spec["rows"][0]["records"][0])
    if vision_tables.is_vision(first):
        return vision_tables.note(spec, results)
    parts = compression_tables.notes(first) if "reduction" in spec["rows"][0] else [NOTE]
    parts += spec.get("left_out", [])
    scales = {(row["scale"], row["paper"].get("scale")) for row in spec["rows"]}
    for scale, other in sorted(scales, key=str):
        if other and scale != other and "paper" in spec:
            parts.append(
                f"{scale} is not in the paper; its numbers stand beside the paper's {other} for orientation only, and "
                "at this size most accuracies are near chance."
            )
    limits = {task: first["examples"].get(task) for task in first["tasks"]}
    if limits:
        parts.append("Examples a task: " + ", ".join(f"{task} {count}" for task, count in limits.items()) + ".")
    for task, record in first["task_data"].items():
        if "unavailable" in record:
            parts.append(f"{task}: unavailable ({record['unavailable']}).")
        elif "note" in record:
            parts.append(f"{task}: {record['note']}.")
    return " ".join(parts)
