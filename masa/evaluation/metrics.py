"""The columns of all tables: what they are called, where they stand in a metrics file, and how they are printed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masa.errors import MasaError, is_plain
from masa.runs import run

MEND = "masa evaluate` or `masa sweep"
"""The commands that write metrics files."""

AVERAGED = ("piqa", "hellaswag", "lambada_acc", "arc_easy", "arc_challenge", "sciq", "race", "mmlu")
"""The eight accuracies whose plain mean is the paper's average."""


@dataclass(frozen=True)
class Metric:
    """One column.

    Args:
        name: column of the CSV, the paper's own name where it has one.
        label: heading, with the unit.
        digits: decimals printed.
        better: "higher", "lower" or "" where neither.
    """

    name: str
    label: str
    digits: int
    better: str = ""


METRICS = (
    Metric("parameters", "Parameters", 0),
    Metric("attention_parameters", "Attention parameters", 0),
    Metric("requested_pct", "Requested reduction (%)", 1),
    Metric("achieved_pct", "Achieved (%)", 2),
    Metric("file_mb", "File (MB)", 1, "lower"),
    Metric("resident_mb", "Resident (MB)", 1, "lower"),
    Metric("attn_cr_pct", "Attention reduction (%)", 1),
    Metric("model_cr_pct", "Model reduction (%)", 1),
    Metric("tokens", "Training tokens", 0),
    Metric("validation_loss", "Held-out loss (nats/token)", 4, "lower"),
    Metric("held_out_ppl", "Held-out perplexity (token)", 2, "lower"),
    Metric("held_out_times", "Of the original's", 3, "lower"),
    Metric("loss_increase", "Loss above the original (nats/token)", 4, "lower"),
    Metric("share_of_svd_llm_pct", "Of SVD-LLM's increase (%)", 1, "lower"),
    Metric("wikitext_token_ppl", "WikiText-2 perplexity (token)", 2, "lower"),
    Metric("wikitext_times", "Of the original's on WikiText-2", 3, "lower"),
    Metric("wikitext_share_of_svd_llm_pct", "Of SVD-LLM's increase on WikiText-2 (%)", 1, "lower"),
    Metric("word_ppl", "Held-out word perplexity", 0, "lower"),
    Metric("byte_ppl", "Held-out byte perplexity", 3, "lower"),
    Metric("images", "Training images", 0),
    Metric("top1_pct", "Top-1 (%)", 2, "higher"),
    Metric("top5_pct", "Top-5 (%)", 2, "higher"),
    Metric("test_loss", "Test loss (nats/image)", 4, "lower"),
    Metric("calibration_error", "Calibration error", 4, "lower"),
    Metric("map_pct", "mAP (%)", 2, "higher"),
    Metric("map_50_pct", "mAP at IoU 0.5 (%)", 2, "higher"),
    Metric("map_75_pct", "mAP at IoU 0.75 (%)", 2, "higher"),
    Metric("map_small_pct", "mAP, small (%)", 2, "higher"),
    Metric("map_medium_pct", "mAP, medium (%)", 2, "higher"),
    Metric("map_large_pct", "mAP, large (%)", 2, "higher"),
    Metric("mar_100_pct", "Recall, 100 boxes (%)", 2, "higher"),
    Metric("piqa", "PIQA", 3, "higher"),
    Metric("hellaswag", "HellaSwag", 3, "higher"),
    Metric("lambada_acc", "LAMBADA acc", 3, "higher"),
    Metric("arc_easy", "ARC-E", 3, "higher"),
    Metric("arc_challenge", "ARC-C", 3, "higher"),
    Metric("sciq", "SciQ", 3, "higher"),
    Metric("race", "RACE", 3, "higher"),
    Metric("mmlu", "MMLU", 3, "higher"),
    Metric("avg_pct", "Average (%)", 2, "higher"),
    Metric("avg_available_pct", "Average of available tasks (%)", 2, "higher"),
    Metric("answer_bits", "Correct answers (bits/byte)", 3, "lower"),
    Metric("wikitext_ppl", "WikiText-2 word perplexity", 2, "lower"),
    Metric("lambada_ppl", "LAMBADA perplexity", 2, "lower"),
    Metric("regularised", "Matrices regularised", 0),
    Metric("seconds", "Compression (s)", 1),
    Metric("heal_seconds", "Healing (s)", 1),
    Metric("peak_gib", "Peak memory of the process (GiB)", 2),
)

ANSWER_BITS = "answer_bits_per_byte"
"""What :mod:`masa.evaluation.answers` adds to a task's scores; its column is the mean over tasks."""

METRIC_NAMES = tuple(metric.name for metric in METRICS)

TASKS = {
    "piqa": ("piqa", "acc_norm"),
    "hellaswag": ("hellaswag", "acc_norm"),
    "lambada_acc": ("lambada_openai", "acc"),
    "arc_easy": ("arc_easy", "acc_norm"),
    "arc_challenge": ("arc_challenge", "acc_norm"),
    "sciq": ("sciq", "acc_norm"),
    "race": ("race", "acc"),
    "mmlu": ("mmlu", "acc"),
    "wikitext_ppl": ("wikitext", "word_perplexity"),
    "lambada_ppl": ("lambada_openai", "perplexity"),
}
"""Column -> lm-eval's task and metric; acc_norm where it exists, which fits the paper better (docs/deviations.md)."""


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """One metrics file, of a training or a compression, as column -> number; what could not be had has no entry."""
    parameters = metrics["parameters"]
    flat = {
        "parameters": parameters["total"],
        "attention_parameters": parameters["attention"],
        "attn_cr_pct": 100 * parameters["attention_reduction"],
        "model_cr_pct": 100 * parameters["model_reduction"],
    }
    for part, columns in _PARTS.items():
        if part in metrics:
            flat |= columns(metrics)
    return flat


def _of_training(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {unit: metrics["training"][unit] for unit in ("tokens", "images") if unit in metrics["training"]}


def _of_text(metrics: Mapping[str, Any]) -> dict[str, float]:
    corpus = metrics["corpus"]
    return {
        "validation_loss": corpus["loss"],
        "word_ppl": corpus["word_perplexity"],
        "byte_ppl": corpus["byte_perplexity"],
    }


def _of_tasks(metrics: Mapping[str, Any]) -> dict[str, float]:
    tasks = metrics["tasks"]
    flat = {column: tasks[task][name] for column, (task, name) in TASKS.items() if name in tasks.get(task, {})}
    bits = [scores[ANSWER_BITS] for scores in tasks.values() if ANSWER_BITS in scores]
    return flat | averages(flat) | ({"answer_bits": statistics.fmean(bits)} if bits else {})


def _of_images(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Accuracies; five of ten classes would still be a top-5 accuracy, of five classes it is none."""
    scores = metrics["classification"]
    flat = {"top1_pct": 100 * scores["top1"], "test_loss": scores["loss"]}
    flat |= {"calibration_error": scores["calibration_error"]}
    return flat | ({} if scores["top5"] is None else {"top5_pct": 100 * scores["top5"]})


def _of_compression(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Of a compressed model; the original has no reduction, time or memory of its own."""
    flat = {"held_out_ppl": metrics["corpus"]["token_perplexity"], "requested_pct": metrics["requested_pct"]}
    flat |= {f"{name}_token_ppl": t["token_perplexity"] for name, t in metrics["texts"].items()}
    if report := metrics["compression"]:
        flat["achieved_pct"] = 100 * report["reduction_achieved"]
        flat["regularised"] = len(report["regularisation"])
        flat |= {"seconds": report["seconds"], "peak_gib": report["peak_rss_bytes"] / 2**30}
    for name, key in (("file_mb", "file_bytes"), ("resident_mb", "resident_bytes")):
        if (value := (metrics.get("storage") or {}).get(key)) is not None:
            flat[name] = value / 1e6
    if metrics["healing"]:
        flat["heal_seconds"] = metrics["healing"]["seconds"]
    return flat


def _of_boxes(metrics: Mapping[str, Any]) -> dict[str, float]:
    """COCO's scores; a size of object that no test image has, has none."""
    scores = metrics["detection"]
    flat = {f"{k}_pct": 100 * v for k, v in scores.items() if k.startswith(("map", "mar")) and v is not None}
    return flat | {"test_loss": scores["loss"]}


_PARTS = {
    "training": _of_training,
    "corpus": _of_text,
    "compression": _of_compression,
    "tasks": _of_tasks,
    "classification": _of_images,
    "detection": _of_boxes,
}
"""Part of a metrics file -> the columns in it."""


def standard_errors(metrics: Mapping[str, Any]) -> dict[str, float]:
    """``*_se`` of accuracies over their examples, binomial, and of their mean; for one run, where no seeds vary."""
    if "classification" in metrics:
        return {"top1_pct_se": 100 * metrics["classification"]["top1_stderr"]}
    if "tasks" not in metrics:
        return {}
    found: dict[str, float] = {}
    for column, (task, name) in TASKS.items():
        examples = metrics["examples"].get(task)
        if name.startswith("acc") and name in metrics["tasks"].get(task, {}) and examples:
            share = metrics["tasks"][task][name]
            found[f"{column}_se"] = math.sqrt(share * (1 - share) / examples)
    errors = [found[f"{name}_se"] for name in AVERAGED if f"{name}_se" in found]
    if errors:
        mean = 100 * math.sqrt(sum(e * e for e in errors)) / len(errors)
        found["avg_available_pct_se"] = mean
        if len(errors) == len(AVERAGED):
            found["avg_pct_se"] = mean
    return found


def averages(row: Mapping[str, float]) -> dict[str, float]:
    """Mean of the eight accuracies, in percent: ``avg_pct`` only if all are there, and over those that are."""
    found = [row[name] for name in AVERAGED if name in row]
    result = {"avg_available_pct": 100 * statistics.fmean(found)} if found else {}
    return result | ({"avg_pct": result["avg_available_pct"]} if len(found) == len(AVERAGED) else {})


def every_score(metrics: Mapping[str, Any]) -> dict[str, float]:
    """All that lm-eval gave, as ``task/metric`` -> number: acc and acc_norm both."""
    tasks = metrics.get("tasks", {})
    return {f"{task}/{name}": value for task, scores in tasks.items() for name, value in scores.items()}


def load(results: Path, record: str) -> dict[str, Any]:
    """The metrics file in one directory below ``results``, e.g. ``evaluations/S/vanilla/seed0``.

    Raises:
        MasaError: it is missing, corrupt or of something else, or the directory is not below ``results``.
    """
    path = below(results, record) / "metrics.json"
    metrics = run.read_json(path, MEND)
    try:
        flatten(metrics)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise MasaError(
            f"{path} is no metrics file of masa ({type(error).__name__}: {error}); delete it and make it anew with "
            f"`{MEND}`."
        ) from error
    return metrics


def is_of(metrics: Any, identity: Any) -> bool:
    """Whether an evaluation is of the training with this identity, and of no earlier one in the same directory."""
    try:
        return identity is not None and metrics["provenance"]["inputs"]["run"] == identity
    except (KeyError, TypeError):
        return False


def below(results: Path, record: str) -> Path:
    """A directory below ``results``.

    Raises:
        MasaError: the name leads elsewhere.
    """
    if not isinstance(record, str) or not all(map(is_plain, record.split("/"))):
        raise MasaError(f"{record!r} names no directory of results: plain names with / between them are expected.")
    return results / record
