"""Evaluations: how many requests lm-eval makes of each task, and what they and the rest of an evaluation cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from masa.study.cost.devices import Device
from masa.study.cost.sizes import Sizes
from masa.study.cost.transformer import Work, forward


@dataclass(frozen=True)
class Task:
    """One task of lm-eval, zero-shot.

    Attributes:
        examples: in its test split (with pip's data: its validation split, which is smaller).
        passes: forward passes an example: its choices, or one where all choices are single tokens of one context.
        tokens: typical length of one, context and continuation, in tokens of a vocabulary of 32,000 or more.
        longest: tokens of the longest that a batch is padded to.
        subjects: subtasks that a limit counts for separately.
    """

    examples: int
    passes: int
    tokens: int
    longest: int
    subjects: int = 1


TASKS = {
    # examples: lm-eval's own test splits. Tokens: means with SmolLM2's tokenizer, over every hundredth example of
    # hellaswag (its first ones are half as long), three a subject of mmlu, or the first hundred; race, wikitext: rough
    "piqa": Task(1838, 2, 37, 140),
    "hellaswag": Task(10042, 4, 77, 140),
    "lambada_openai": Task(5153, 1, 79, 120),
    "arc_easy": Task(2376, 4, 33, 110),
    "arc_challenge": Task(1172, 4, 42, 135),
    "sciq": Task(1000, 4, 111, 480),
    "race": Task(1045, 4, 430, 1024),
    "mmlu": Task(14042, 1, 94, 1024, subjects=57),
    "wikitext": Task(62, 4, 1024, 1024),
}
"""Tasks of :data:`masa.study.config.TASKS`."""

OTHER = Task(2000, 4, 100, 1024)
"""What is assumed of a task that is not among them."""

PIP = ("piqa", "hellaswag", "lambada_openai", "arc_easy", "arc_challenge", "sciq", "mmlu")
"""Tasks whose data pip has; the others need a mirror or the hub."""

SMALL_VOCABULARY = 1.8
"""Tokens a task's text has more under a vocabulary of 2,048 from another kind of text."""

# in units of a process's start-up, so that a slow machine is slow here, too
HARNESS = 0.35
"""Importing lm-eval and its data sets."""
LOADING = 0.011
"""Reading one task or subject and building its prompts."""
REQUEST = 0.0007
"""Python of one request: tokenising, collating, reading off."""


def available(tasks: Iterable[str], sources: Iterable[str], mirrored: bool) -> list[str]:
    """Tasks whose data can be had from these sources."""
    everything = "hub" in sources or ("mirror" in sources and mirrored)
    return [task for task in tasks if everything or task in PIP]


def harness(
    sizes: Sizes, tasks: Iterable[str], settings: Mapping[str, Any], device: Device, dtype: str, threads: int
) -> tuple[float, Work, int]:
    """lm-eval on one model.

    Args:
        tasks: that are available.
        settings: ``limit``, ``limit_per_task``, ``max_length``, ``batch_size``.

    Returns:
        Seconds, work, and the tokens of the longest sequence.
    """
    seconds, work, longest, loaded = 0.0, Work(), 0, 0
    unit = device.startup_seconds
    longer = SMALL_VOCABULARY if sizes.vocabulary < 8192 else 1.0
    for name in tasks:
        task = TASKS.get(name, OTHER)
        limit = settings["limit_per_task"].get(name, settings["limit"])
        examples = task.examples if limit is None else min(task.examples, limit * task.subjects)
        passes, tokens = examples * task.passes, min(settings["max_length"], round(task.tokens * longer))
        one = forward(sizes, 1, tokens)
        batches = max(1.0, passes / settings["batch_size"])
        work += Work(one.flops * passes, one.elements * passes, one.scores * passes, one.launches * batches)
        seconds += unit * (LOADING * task.subjects + REQUEST * passes)
        longest = max(longest, min(settings["max_length"], round(task.longest * longer)))
        loaded += 1
    if not loaded:
        return 0.0, Work(), 0
    return seconds + unit * HARNESS + work.seconds(device, dtype, threads), work, longest


def held_out_work(sizes: Sizes, tokens: float) -> Work:
    """The corpus's held-out loss, 16 windows at once."""
    windows = tokens / sizes.tokens
    one = forward(sizes, 1)
    return Work(one.flops * windows, one.elements * windows, one.scores * windows, one.launches * windows / 16)


def describe_flops(sizes: Sizes) -> float:
    """Singular values of all attention matrices, in units of LAPACK (9 n^3 an eigendecomposition; less without
    vectors)."""
    return sizes.layers * (2 * sizes.width**3 + 2 * sizes.kv_width * sizes.width**2) * 3.0
