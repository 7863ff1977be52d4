"""Scores of single examples, document by document or image by image: what paired comparisons are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from masa.errors import MasaError
from masa.evaluation.metrics import MEND

Record = Mapping[str, Any]
Scores = tuple[list[float], list[int]]
"""The score of every example, in the metric's unit (perplexities: nats a token), and its weight in their mean."""


def scores(metric: str, record: Record) -> Scores | None:
    """What a metric of one metrics file is the mean of; None for a metric that is not kept example by example.

    Raises:
        MasaError: the file was made before these scores were kept.
    """
    if metric not in _SCORES:
        return None
    try:
        return _SCORES[metric](record)
    except KeyError as error:
        raise MasaError(
            f"The evaluation of {record['run']} was made before claims were judged ({error} is missing); make it anew "
            f"with `{MEND}`."
        ) from None


def _documents(part: Record) -> Scores:
    tokens = part["tokens_by_document"]
    if "loss_by_document" in part:
        return part["loss_by_document"], tokens
    return [nll / count for nll, count in zip(part["nll_by_document"], tokens, strict=True)], tokens


def _images(record: Record) -> Scores:
    right = record["classification"]["correct_by_image"]
    return [100.0 * int(digit) for digit in right], [1] * len(right)


_SCORES: dict[str, Callable[[Record], Scores]] = {
    "validation_loss": lambda record: _documents(record["corpus"]),
    "held_out_ppl": lambda record: _documents(record["corpus"]),
    "wikitext_token_ppl": lambda record: _documents(record["texts"]["wikitext"]),
    "top1_pct": _images,
}
