"""What a model thinks of each answer of lm-eval's tasks, kept raw, and a measure of it that is not at chance.

A small model that is at chance in every accuracy may still give right answers more probability than another one does:
bits per byte of the correct answers, given their questions, see that.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masa.runs.files import whole_file


def compact(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """lm-eval's samples as task -> ``{"id", "gold", "nll", "bytes"}`` of every example.

    ``nll`` is the negative log-likelihood of each answer in nats, ``bytes`` its length in UTF-8, the space before it
    included, ``gold`` the number of the correct one. Tasks whose examples are not answers that are scored, such as
    whole documents, have no entry.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for task, examples in samples.items():
        kept = {example["doc_id"]: record for example in examples if (record := _answers(example)) is not None}
        if kept:
            found[task] = list(kept.values())
    return found


def _answers(example: Mapping[str, Any]) -> dict[str, Any] | None:
    """One example; None where it is of another kind, or which answer is right is not told."""
    asked, given = example["arguments"], example["resps"]
    if not all(len(a) == 2 and isinstance(a[1], str) for a in asked):
        return None
    scores = [answer[0] for answer in given]
    if not all(isinstance(score, Sequence) and not isinstance(score, str) and len(score) == 2 for score in scores):
        return None
    target = example["target"]
    target = target[0] if isinstance(target, list) and target else target
    answers = [a[1] for a in asked]
    if len(answers) == 1:
        gold = 0
    elif isinstance(target, int) and 0 <= target < len(answers):
        gold = target
    elif isinstance(target, str) and target.strip() in [answer.strip() for answer in answers]:
        gold = [answer.strip() for answer in answers].index(target.strip())
    else:
        return None
    return {
        "id": example["doc_id"],
        "gold": gold,
        "nll": [round(-float(score[0]), 5) for score in scores],
        "bytes": [len(answer.encode()) for answer in answers],
    }


def bits_per_byte(examples: Sequence[Mapping[str, Any]]) -> float:
    """Of the correct answers, all bytes alike: the sum of their bits over the sum of their bytes."""
    nats = sum(example["nll"][example["gold"]] for example in examples)
    return nats / math.log(2) / sum(example["bytes"][example["gold"]] for example in examples)


def write(answers: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """``answers.jsonl.gz``: a line an example, the same bytes for the same numbers."""
    lines = (json.dumps({"task": task, **example}) + "\n" for task, of in answers.items() for example in of)
    with whole_file(out) as path, path.open("wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        packed.write("".join(lines).encode())
