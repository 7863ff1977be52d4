"""Perplexity of whole documents, over tokens and over words, in stated windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.gradients import LOGITS
from masa.data import tokenizers
from masa.errors import BEYOND, MasaError
from masa.models.positions import positions_of

GROUP = 4096
"""Documents whose windows are in memory at once."""


@dataclass(frozen=True)
class Perplexity:
    """``exp`` of the negative log-likelihood per token and per word.

    Attributes:
        token_perplexity: depends on the tokenizer.
        word_perplexity: over ``str.split()`` words, as lm-eval's ``word_perplexity``; comparable between tokenizers.
        byte_perplexity: over UTF-8 bytes.
        nll: summed negative log-likelihood, in nats.
        tokens, words, documents: scored.
        window, stride: tokens of a window, and how far it moves; ``stride == window`` means no overlap.
        start_token: that a document's first token is predicted from; it is never scored.
        nll_by_document, tokens_by_document: their parts, for paired comparisons.
    """

    token_perplexity: float
    word_perplexity: float
    byte_perplexity: float
    nll: float
    tokens: int
    words: int
    documents: int
    window: int
    stride: int
    start_token: str
    nll_by_document: list[float]
    tokens_by_document: list[int]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def perplexity(
    model: nn.Module,
    tokenizer: Any,
    documents: Iterable[str],
    *,
    window: int = 512,
    stride: int | None = None,
    batch_size: int = 4,
    progress: Callable[[str, int, int], None] = lambda what, done, of: None,
) -> Perplexity:
    """Score every token of every document exactly once.

    A document is preceded by the tokenizer's start token (the end token where it has none), so that its first token is
    predicted too; the start token itself is never scored, here and in :func:`masa.evaluation.language.harness`. A
    document is cut into windows of ``window`` tokens that begin ``stride`` apart; where windows overlap, a token is
    scored in the first that holds it, so from the second window on every scored token has at least ``window - stride``
    tokens of context.

    Args:
        model: a causal LM.
        tokenizer: its tokenizer.
        documents: texts; of an iterable that can be gone through again, at most :data:`GROUP` are in memory at once.
        window: at most the model's ``max_position_embeddings``.
        stride: 1 .. window; by default ``window``, no overlap.
        batch_size: windows that run at once.
        progress: called with ("scoring", done, of).

    Returns:
        Perplexities over tokens, words and bytes, ``exp(nll / count)``, and the sums that they are made of, in nats.

    Raises:
        MasaError: no documents, a window or stride that does not fit, or a model that yields NaN.
    """
    documents = list(documents) if isinstance(documents, Iterator) else documents
    if isinstance(documents, str) or not any(document.split() for document in documents):
        raise MasaError("perplexity needs a list of documents with at least one word.")
    stride = window if stride is None else stride
    limit = positions_of(model) or window
    if not 1 <= stride <= window <= limit:
        raise MasaError(f"Need 1 <= stride <= window <= {limit}, got stride = {stride}, window = {window}.")
    prefix = tokenizers.first_of(tokenizer)
    nll: list[float] = []
    counts: list[int] = []
    words = size = 0
    left = iter(documents)
    while group := list(itertools.islice(left, GROUP)):
        losses, scored = _score(model, tokenizer, group, prefix, window, stride, batch_size, progress)
        nll, counts = nll + losses, counts + scored
        words += sum(len(document.split()) for document in group)
        size += sum(len(document.encode()) for document in group)
    total, tokens = sum(nll), sum(counts)
    if not math.isfinite(total):
        raise MasaError(f"The model's likelihood is not finite: its weights or the documents are broken, or {BEYOND}.")
    return Perplexity(
        token_perplexity=_exp(total / tokens),
        word_perplexity=_exp(total / words),
        byte_perplexity=_exp(total / size),
        nll=total,
        tokens=tokens,
        words=words,
        documents=len(nll),
        window=window,
        stride=stride,
        start_token=tokenizer.convert_ids_to_tokens(prefix),
        nll_by_document=[round(x, 4) for x in nll],
        tokens_by_document=counts,
    )


def _score(
    model: nn.Module,
    tokenizer: Any,
    documents: Sequence[str],
    prefix: int,
    window: int,
    stride: int,
    batch_size: int,
    progress: Callable[[str, int, int], None],
) -> tuple[list[float], list[int]]:
    """Negative log-likelihood of each document, in nats, and how many of its tokens were scored."""
    windows: list[tuple[Tensor, Tensor]] = []
    owner: list[int] = []
    for index, document in enumerate(documents):
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        windows += _windows([prefix, *ids], window, stride)
        owner += [index] * (len(windows) - len(owner))
    if not windows:
        return [0.0] * len(documents), [0] * len(documents)
    _check_ids(windows, model)
    device, nll, counts = model.get_input_embeddings().weight.device, [0.0] * len(documents), [0] * len(documents)
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i][0]))  # equal lengths together
    for start in range(0, len(order), batch_size):
        progress("scoring", start, len(order))
        batch = [windows[i] for i in order[start : start + batch_size]]
        inputs = nn.utils.rnn.pad_sequence([w[0] for w in batch], batch_first=True).to(device)
        targets = nn.utils.rnn.pad_sequence([w[1] for w in batch], batch_first=True, padding_value=-100).to(device)
        logits = model(input_ids=inputs, use_cache=False).logits  # padding comes last: causal attention ignores it
        rows = max(1, LOGITS // logits.shape[-1])
        parts = zip(logits.flatten(0, 1).split(rows), targets.flatten().split(rows), strict=True)
        losses = torch.cat([nn.functional.cross_entropy(x.float(), y, reduction="none") for x, y in parts])
        losses = losses.view(targets.shape).double().sum(1)
        for i, loss, scored in zip(order[start:], losses.tolist(), (targets != -100).sum(1).tolist(), strict=False):
            nll[owner[i]] += loss
            counts[owner[i]] += scored
    progress("scoring", len(order), len(order))
    return nll, counts


def _check_ids(windows: Sequence[tuple[Tensor, Tensor]], model: nn.Module) -> None:
    largest = max(int(torch.cat(window).max()) for window in windows)
    known = model.get_input_embeddings().num_embeddings
    if largest >= known:
        raise MasaError(
            f"The tokenizer gives id {largest}, but the vocabulary has {known}. Use the tokenizer of this model."
        )


def _exp(x: float) -> float:
    """exp, or infinity: a language without spaces has few words."""
    return math.exp(x) if x < 700 else math.inf


def _windows(ids: list[int], window: int, stride: int) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of each window; -100 marks targets that an earlier window scores."""
    inputs, targets = torch.tensor(ids[:-1]), torch.tensor(ids[1:])
    found, scored, start = [], 0, 0
    while scored < len(targets):
        end = min(start + window, len(targets))
        target = targets[start:end].clone()
        target[: scored - start] = -100
        found.append((inputs[start:end], target))
        scored, start = end, start + stride
    return found
