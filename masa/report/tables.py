"""Tables: one row a run (mean and std over its seeds), the paper's number beside every one of ours."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masa import run
from masa.report import compression_tables, vision_tables
from masa.report import metrics as m
from masa.report.paper import match, published_rows
from masa.sources import whole_file

NA = "n/a"
_KEYS = ("scale", "method", "label", "seeds")


def build(spec: Mapping[str, Any], results: Path) -> pd.DataFrame:
    """Make one table.

    Args:
        spec: from :func:`masa.experiments.artefact_spec`.
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
        out["verdict"] = _verdict(row, out, spec.get("judged", "avg_pct"), spec.get("tolerance", 1.0))
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
    _write_files(frame, readable(frame, spec.get("columns")), spec, folder, note)


def _write_files(frame: pd.DataFrame, shown: pd.DataFrame, spec: Mapping[str, Any], folder: Path, note: str) -> None:
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


def _escape(text: str) -> str:
    for old, new in (("\\", r"\textbackslash{}"), *((c, "\\" + c) for c in "&%$#_{}"), ("±", r"$\pm$"), ("‖", r"$\|$")):
        text = text.replace(old, new) if old != "\\" else text
    return text


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


def write_runs(run_ids: Sequence[str], results: Path, folder: Path) -> None:
    """``runs.csv``: one row a seed with every number, acc and acc_norm both; the tidy table behind all others."""
    rows = []
    for run_id in run_ids:
        record = m.load(results, f"evaluations/{run_id}")
        scale, experiment, seed = run_id.split("/")
        rows.append(
            {"run": run_id, "scale": scale, "method": experiment, "seed": int(seed[4:])}
            | m.flatten(record)
            | {f"training_{k}": v for k, v in record["training"].items() if "second" in k}
            | m.every_score(record)
        )
    with whole_file(folder / "runs.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False)


def write_throughput(files: Mapping[str, Path], labels: Mapping[str, str], folder: Path, published: Path) -> None:
    """``throughput.*``: tokens per second and ratio to vanilla, for training and for folded inference."""
    paper = {row["quantity"]: float(row["value"]) for row in csv.DictReader(published.open(newline=""))}
    ratio = paper["throughput_masa_qkvo"] / paper["throughput_vanilla"]
    rows = []
    for scale, file in files.items():
        data = run.read_json(file)
        for name in data["training"]:
            row: dict[str, Any] = {"scale": scale, "method": name, "label": labels[name]}
            for kind in ("training", "inference"):
                row |= {f"{kind}_tokens_per_second": data[kind][name]["tokens_per_second"]}
                row |= {f"{kind}_ratio": data[kind][name]["ratio"]}
            row["training_ratio_paper"] = ratio if name == "masa-qkvo" else None
            rows.append(row | {"device": data["device"], "threads": data["threads"]})
    frame = pd.DataFrame(rows)
    headings = {
        "training_tokens_per_second": "Training (tokens/s)",
        "training_ratio": "Training / vanilla",
        "training_ratio_paper": "Paper",
        "inference_tokens_per_second": "Folded inference (tokens/s)",
        "inference_ratio": "Inference / vanilla",
    }
    note = (
        "Optimiser steps and folded forward passes timed alternately in one process; ratio: median over rounds. "
        "The paper's 1240 : 1352 is for Transformer-S, sequence 256, batch 16, on an A100."
    )
    _write_plain(frame, headings, {"name": "throughput", "title": "Throughput"}, folder, note)


def write_parameters(file: Path, labels: Mapping[str, str], folder: Path, published: Path) -> None:
    """``parameters.*``: counted parameters and reductions of every scale and method, beside the paper's."""
    paper = {row["quantity"]: float(row["value"]) for row in csv.DictReader(published.open(newline=""))}
    rows = []
    for record in run.read_json(file):
        known = record["experiment"] == "vanilla"
        rows.append(
            {
                "scale": record["scale"],
                "method": record["experiment"],
                "label": labels[record["experiment"]],
                "parameters_m": record["total"] / 1e6,
                "parameters_m_paper": paper.get(f"params_{record['scale']}") if known else None,
                "attention_m": record["attention"] / 1e6,
                "attention_m_paper": paper.get(f"attention_params_{record['scale']}") if known else None,
                "attn_cr_pct": 100 * record["attention_reduction"],
                "model_cr_pct": 100 * record["model_reduction"],
            }
        )
    headings = {
        "parameters_m": "Parameters (M)",
        "parameters_m_paper": "Paper (M)",
        "attention_m": "Attention (M)",
        "attention_m_paper": "Paper (M) ",
        "attn_cr_pct": "Attention reduction (%)",
        "model_cr_pct": "Model reduction (%)",
    }
    note = "Counted on models built without memory: atoms, coefficients and factors all included, biases not."
    _write_plain(pd.DataFrame(rows), headings, {"name": "parameters", "title": "Parameter counts"}, folder, note)


def _write_plain(
    frame: pd.DataFrame, headings: Mapping[str, str], spec: Mapping[str, Any], folder: Path, note: str
) -> None:
    shown = pd.DataFrame({"Scale": frame["scale"], "Method": frame["label"]})
    for column, heading in headings.items():
        shown[heading] = [
            "" if pd.isna(v) else f"{v:,.0f}" if v >= 1000 else f"{v:.3g}" if v < 1 else f"{v:.2f}"
            for v in frame[column]
        ]
    _write_files(frame, shown, spec, folder, note)
