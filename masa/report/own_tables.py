"""Tables that every configuration has: all runs, all training curves, throughput, counted parameters, claims."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masa.evaluation import metrics as m
from masa.report import claims, power
from masa.report.paper import published_rows
from masa.report.tables import write_files
from masa.runs import run
from masa.runs.files import PROJECT, whole_file

PUBLISHED = PROJECT / "config" / "paper" / "other.csv"
REDUCTIONS = "config/paper/table1.csv"
REDUCTION_TOLERANCE = 0.1
"""Points of attention reduction: the paper gives one decimal, and ranks are rounded down."""


def write(name: str, spec: Any, results: Path, folder: Path) -> None:
    """Make one of them.

    Args:
        name: a key of :data:`WRITERS`.
        spec: from :func:`masa.study.artefacts.table_spec`.
        results: directory with ``evaluations/``, ``runs/`` and the like.
    """
    WRITERS[name](spec, results, folder)


def runs(run_ids: Sequence[str], results: Path, folder: Path) -> None:
    """``runs.csv``: one row a seed with every number, acc and acc_norm both; the tidy table behind all others."""
    rows = []
    for run_id in run_ids:
        record = m.load(results, f"evaluations/{run_id}")
        rows.append(
            _of_run(run_id)
            | m.flatten(record)
            | {f"training_{k}": v for k, v in record["training"].items() if "second" in k}
            | m.every_score(record)
        )
    with whole_file(folder / "runs.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False)


def metrics(run_ids: Sequence[str], results: Path, folder: Path) -> None:
    """``metrics.csv``: the curves of all runs, one row a logged step; empty where a line does not have a column."""
    rows: list[dict[str, Any]] = []
    for run_id in run_ids:
        log = m.below(results / "runs", run_id) / "metrics.jsonl"
        rows += [_of_run(run_id) | record for record in run.read_jsonl(log)]
    with whole_file(folder / "metrics.csv") as path:
        pd.DataFrame(rows).to_csv(path, index=False)


def _of_run(run_id: str) -> dict[str, Any]:
    """The first columns of a run's rows."""
    scale, experiment, seed = run_id.split("/")
    return {"run": run_id, "scale": scale, "method": experiment, "seed": int(seed[4:])}


def throughput(spec: Mapping[str, Any], results: Path, folder: Path) -> None:
    """``throughput.*``: tokens per second and ratio to vanilla, for training and for folded inference."""
    paper, labels = _published(), spec["labels"]
    ratio = paper["throughput_masa_qkvo"] / paper["throughput_vanilla"]
    rows = []
    for scale in spec["scales"]:
        data = run.read_json(results / "throughput" / f"{scale}.json", "masa throughput")
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


def parameters(spec: Mapping[str, Any], results: Path, folder: Path) -> None:
    """``parameters.*``: counted parameters and reductions of every scale and method, beside the paper's."""
    paper, labels = _published(), spec["labels"]
    reductions = {(row["scale"], row["method"]): row["attn_cr_pct"] for row in published_rows({"file": REDUCTIONS})}
    rows = []
    for record in run.read_json(results / "parameters.json", "masa parameters"):
        scale, method = record["scale"], record["experiment"]
        row = {
            "scale": scale,
            "method": method,
            "label": labels[method],
            "parameters_m": record["total"] / 1e6,
            "parameters_m_paper": paper.get(f"params_{scale}") if method == "vanilla" else None,
            "attention_m": record["attention"] / 1e6,
            "attention_m_paper": paper.get(f"attention_params_{scale}") if method == "vanilla" else None,
            "attn_cr_pct": 100 * record["attention_reduction"],
            "attn_cr_pct_paper": reductions.get((scale, method)),
            "model_cr_pct": 100 * record["model_reduction"],
        }
        row |= {
            f"{key}_difference": None if row[f"{key}_paper"] is None else row[key] - row[f"{key}_paper"]
            for key in ("parameters_m", "attention_m", "attn_cr_pct")
        }
        rows.append(row | {"verdict": _verdict(row)})
    headings = {
        "parameters_m": "Parameters (M)",
        "parameters_m_paper": "Paper (M)",
        "attention_m": "Attention (M)",
        "attention_m_paper": "Paper (M) ",
        "attn_cr_pct": "Attention reduction (%)",
        "attn_cr_pct_paper": "Paper (%)",
        "model_cr_pct": "Model reduction (%)",
        "verdict": "Against the paper",
    }
    note = (
        "Counted on models built without memory: atoms, coefficients and factors all included, biases not. A row "
        "agrees where its counts round to the paper's own digits and its reduction is within "
        f"{REDUCTION_TOLERANCE:g} points."
    )
    _write_plain(pd.DataFrame(rows), headings, {"name": "parameters", "title": "Parameter counts"}, folder, note)


def _verdict(row: Mapping[str, Any]) -> str:
    """Whether every number that the paper has of a row is ours, at the paper's precision."""
    agree = [
        abs(row[key] - row[f"{key}_paper"]) <= REDUCTION_TOLERANCE
        if key == "attn_cr_pct"
        else round(row[key], len(f"{row[f'{key}_paper']:g}".partition(".")[2])) == row[f"{key}_paper"]
        for key in ("parameters_m", "attention_m", "attn_cr_pct")
        if row[f"{key}_paper"] is not None
    ]
    return "not in the paper" if not agree else "agrees" if all(agree) else "differs"


def _write_plain(
    frame: pd.DataFrame, headings: Mapping[str, str], spec: Mapping[str, Any], folder: Path, note: str
) -> None:
    shown = pd.DataFrame({"Scale": frame["scale"], "Method": frame["label"]})
    for column, heading in headings.items():
        shown[heading] = [_cell(v, exact=heading.startswith("Paper")) for v in frame[column]]
    write_files(frame, shown, spec, folder, note)


def _cell(value: Any, exact: bool) -> str:
    """A number with two decimals, large ones whole, small ones with three digits; the paper's as they are."""
    if isinstance(value, str) or pd.isna(value):
        return value if isinstance(value, str) else ""
    return (
        f"{value:g}" if exact else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value < 1 else f"{value:.2f}"
    )


def _published() -> dict[str, float]:
    """Single numbers of the paper."""
    with PUBLISHED.open(newline="") as file:
        return {row["quantity"]: float(row["value"]) for row in csv.DictReader(file)}


WRITERS: dict[str, Callable[[Any, Path, Path], None]] = {
    "runs": runs,
    "metrics": metrics,
    "throughput": throughput,
    "parameters": parameters,
    "claims": claims.write,
    "power": power.write,
}
"""One for each of :data:`masa.study.artefacts.OWN_TABLES`."""
