"""Multiple choice on CPU in a third of the time: a question is read once, not once an answer.

lm-eval scores every (context, continuation) by itself. Here the continuations of one context follow it in one
sequence, each at the positions that it would have alone and seeing the context and itself, no other: the same
log-likelihoods, but for the order of sums. In 16 bits that order decides near ties, so only models in 32 or 64 bits are
scored this way; and only those that this is true of, which is seen by scoring the longest question both ways.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Request = tuple[Any, list[int], list[int]]
"""lm-eval's: a key, tokens of the context, tokens of the continuation."""

Score = tuple[float, bool]
"""Log-likelihood of the continuation in nats, and whether it is the most likely one token by token."""

WORTH = 0.2
"""Part of the tokens that reading a context once must save; below it, requests are left as they are."""


@dataclass
class Question:
    """A context and the requests that continue it.

    Attributes:
        context: c tokens.
        places: which of the requests they are.
        continuations: m_i tokens each.
    """

    context: list[int]
    places: list[int]
    continuations: list[list[int]]

    @property
    def length(self) -> int:
        """Of the sequence: the last token of a continuation is predicted and never read."""
        return len(self.context) + sum(len(c) - 1 for c in self.continuations)

    @property
    def alone(self) -> int:
        """Tokens that are read if every request is scored by itself."""
        return sum(len(self.context) + len(c) - 1 for c in self.continuations)


def scored(lm: Any, requests: Sequence[Request], each: Callable[[list[Request]], list[Score]]) -> list[Score]:
    """Log-likelihoods of requests, in their order.

    Args:
        lm: lm-eval's ``HFLM`` of a causal model: its model, ``batch_size``, ``max_length`` and ``softmax_dtype``.
        each: scores requests one by one, as lm-eval does.
    """
    found: list[Score | None] = [None] * len(requests)
    if questions := _questions(lm, requests):
        chosen = [requests[place] for place in questions[0].places]  # the longest
        if _agree(each(chosen), _tried(lm, questions[0])):
            size = lm.batch_size if isinstance(lm.batch_size, int) else 8
            for start in range(0, len(questions), size):
                batch = questions[start : start + size]
                for question, scores in zip(batch, _batch(lm, batch), strict=True):
                    for place, score in zip(question.places, scores, strict=True):
                        found[place] = score
    left = [place for place, score in enumerate(found) if score is None]
    if left:
        for place, score in zip(left, each([requests[place] for place in left]), strict=True):
            found[place] = score
    return [score for score in found if score is not None]


def _questions(lm: Any, requests: Sequence[Request]) -> list[Question]:
    """What is worth reading once, the longest first."""
    model = lm.model
    if model.dtype not in (torch.float32, torch.float64) or not _takes(model, "position_ids"):
        return []
    window = getattr(model.config, "sliding_window", None)  # the mask of which would be lost
    limit = min(lm.max_length, window or lm.max_length)
    groups: dict[tuple[int, ...], Question] = {}
    done: list[Question] = []
    for place, (_, context, continuation) in enumerate(requests):
        if len(context) + len(continuation) - 1 > limit:  # lm-eval cuts it from the left
            continue
        question = groups.setdefault(tuple(context), Question(context, [], []))
        if question.places and question.length + len(continuation) - 1 > limit:
            done.append(question)
            question = groups[tuple(context)] = Question(context, [], [])
        question.places.append(place)
        question.continuations.append(continuation)
    worth = [q for q in (*done, *groups.values()) if q.alone - q.length > WORTH * q.alone]
    return sorted(worth, key=lambda q: q.length, reverse=True)


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


def _tried(lm: Any, question: Question) -> list[Score]:
    """One question's scores; none where the model takes no such mask."""
    try:
        return _batch(lm, [question])[0]
    except (IndexError, RuntimeError, TypeError, ValueError):
        return []


@torch.no_grad()
def _batch(lm: Any, questions: Sequence[Question]) -> list[list[Score]]:
    """The scores of every continuation of some questions, in one pass."""
    longest = max(question.length for question in questions)
    ids = torch.zeros(len(questions), longest, dtype=torch.long)
    positions = torch.zeros_like(ids)
    seen = torch.eye(longest, dtype=torch.bool).repeat(len(questions), 1, 1)  # padding sees itself, which gives numbers
    for i, question in enumerate(questions):
        ids[i, : question.length], positions[i, : question.length], seen[i, : question.length, : question.length] = (
            _sequence(question)
        )
    first = min(len(question.context) for question in questions) - 1  # whose logits are needed
    keep = {"logits_to_keep": longest - first} if _takes(lm.model, "logits_to_keep") else {}
    logits = lm.model(
        input_ids=ids.to(lm.device),
        attention_mask=seen[:, None].to(lm.device),
        position_ids=positions.to(lm.device),
        use_cache=False,
        **keep,
    ).logits
    first = longest - logits.shape[1]
    return [_scores(question, rows, first, lm.softmax_dtype) for question, rows in zip(questions, logits, strict=True)]


def _sequence(question: Question) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (T,), their positions (T,), and what each sees (T, T)."""
    c = len(question.context)
    ids, positions = list(question.context), list(range(c))
    seen = torch.zeros(question.length, question.length, dtype=torch.bool)
    seen[:, :c] = True
    seen[:c, :c] = torch.ones(c, c, dtype=torch.bool).tril()
    for continuation in question.continuations:
        start, more = len(ids), len(continuation) - 1
        ids += continuation[:-1]
        positions += range(c, c + more)
        seen[start : start + more, start : start + more] = torch.ones(more, more, dtype=torch.bool).tril()
    return torch.tensor(ids), torch.tensor(positions), seen


def _scores(question: Question, logits: Tensor, first: int, dtype: torch.dtype | None) -> list[Score]:
    """Of every continuation.

    Args:
        logits: of the tokens from ``first`` on, (T - first, vocabulary).
    """
    c, start, found = len(question.context), len(question.context), []
    for continuation in question.continuations:
        more = len(continuation) - 1
        rows = torch.cat([logits[c - 1 - first : c - first], logits[start - first : start - first + more]])
        start += more
        log_p = torch.nn.functional.log_softmax(rows, dim=-1, dtype=dtype)
        wanted = torch.tensor(continuation, device=rows.device)
        greedy = bool((log_p.argmax(-1) == wanted).all())
        found.append((float(log_p.gather(-1, wanted[:, None]).sum()), greedy))
    return found


def _agree(alone: Sequence[Score], together: Sequence[Score]) -> bool:
    """Whether two ways of scoring differ by no more than rounding; numbers that are none do not."""
    same = (abs(a - b) <= 1e-3 + 1e-4 * abs(a) for (a, _), (b, _) in zip(alone, together, strict=False))
    return len(alone) == len(together) and all(same)
