"""What tables of compression have beyond others: each row against the original and against SVD-LLM, paired."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from masa.evaluation import metrics as m

BASELINE = "svd-llm"


def add_comparisons(frame: pd.DataFrame, spec: Mapping[str, Any], results: Path) -> None:
    """Add ``loss_increase`` with its standard error, and shares of SVD-LLM's increase, to a table, in place.

    Perplexities as multiples of the original's (``held_out_times``, ``wikitext_times``) where the table asks for them.

    Args:
        frame: one row for each of ``spec["rows"]``.
        spec: from :func:`masa.study.artefacts.artefact_spec`.
        results: directory with ``compression/``.
    """
    records = [m.load(results, row["records"][0]) for row in spec["rows"]]
    originals: dict[str, Any] = {}  # the first of each model: others are stored in another way
    for row, record in zip(spec["rows"], records, strict=True):
        if record["compression"] is None:
            originals.setdefault(row["scale"], record)
    baselines = {
        _key(row, record): record
        for row, record in zip(spec["rows"], records, strict=True)
        if record["compression"] and record["compression"]["method"] == BASELINE and not record["healing"]
    }
    for index, (row, record) in enumerate(zip(spec["rows"], records, strict=True)):
        original = originals.get(row["scale"])
        if original is None or record is original:
            continue
        baseline = baselines.get(_key(row, record))
        mean, error = paired(record["corpus"], original["corpus"])
        frame.loc[index, ["loss_increase", "loss_increase_se"]] = mean, error
        for text, column in (("held_out", "share_of_svd_llm_pct"), ("wikitext", "wikitext_share_of_svd_llm_pct")):
            if text not in record["texts"]:
                continue
            dense, ours = (x["texts"][text]["token_perplexity"] for x in (original, record))
            if f"{text}_times" in spec.get("columns", ()):
                frame.loc[index, f"{text}_times"] = ours / dense
            if baseline and (theirs := baseline["texts"][text]["token_perplexity"]) > dense:
                frame.loc[index, column] = 100 * (ours - dense) / (theirs - dense)


def _key(row: Mapping[str, Any], record: Mapping[str, Any]) -> tuple[str, float, str]:
    """Rows are compared at the same model, reduction and projections."""
    return row["scale"], row["reduction"], record["compression"]["projections"]


def paired(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[float, float]:
    """Difference of two models' losses on the same documents, in nats a token, and its standard error over documents.

    The loss is a ratio of sums over documents, so the error is that of a ratio estimator with the token counts as
    weights.
    """
    tokens = ours["tokens_by_document"]
    differences = [a - b for a, b in zip(ours["nll_by_document"], theirs["nll_by_document"], strict=True)]
    mean, n = sum(differences) / sum(tokens), len(tokens)
    if n < 2:
        return mean, math.nan
    spread = sum((d - mean * t) ** 2 for d, t in zip(differences, tokens, strict=True))
    return mean, math.sqrt(spread * n / (n - 1)) / sum(tokens)


def notes(first: Mapping[str, Any]) -> list[str]:
    """What a reader must know of such a table.

    Args:
        first: record of the original.
    """
    parts = [
        "Nothing is trained, but for PostShare and healed rows. Perplexities are of folded models in "
        f"{first['settings']['dtype']}, windows of {first['settings']['window']} tokens without overlap. Loss above "
        "the original: paired over documents, ± standard error. Of SVD-LLM's increase: the rise of the perplexity "
        "relative to uniform SVD-LLM at the same reduction. In brackets the paper's value. Accuracies are zero-shot, "
        "acc_norm where lm-eval has it, ± standard error over examples; n/a: not scored, or the data could not be had "
        "here. Compression time and peak memory (of the whole process, mapped weights included) "
        "are of one job that shares the machine; calibration, which all share, is not in it."
    ]
    for name, record in first["text_data"].items():
        if "unavailable" in record:
            parts.append(f"{name}: unavailable ({record['unavailable']}).")
        else:
            score = first["texts"][name]
            parts.append(f"{name}: {score['documents']} documents, {score['tokens']} tokens of {record['source']}.")
    return parts
