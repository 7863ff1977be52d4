"""Sections of training-free compression: calibrations, named compressions, how they are scored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from masa.settings import Letters, Name, Positive, Reductions, Section, key
from masa.study.sections.evaluation import Limits


class Calibration(Section):
    """Calibration statistics; all methods that name one share it."""

    text: str = key("Name of a text.")
    samples: Positive = key("Sequences (SVD-LLM's default: 256).")
    length: Positive = key("Tokens a sequence (SVD-LLM's default: 2048).")
    seed: int = key("Of the sequences drawn.", ge=0)
    gradient_samples: int = key("Sequences that also run backward, for the *-fisher methods.", ge=0)
    projections: Letters = key("Letters whose inputs are measured.")
    batch_size: Positive = key("Sequences at once.")


class Heal(Section):
    """A short fine-tune of the compressed parts: arguments of masa.compression.heal."""

    objective: Literal["kl", "lm"] = key("Kullback-Leibler to the original, or the tokens' cross-entropy.", "kl")
    steps: Positive = key("Optimiser steps.", 20)
    layer_samples: int = key("Sequences on which every layer is solved for first; 0 leaves that out.", 0, ge=0)
    batch_size: Positive = key("Windows a step.", 4)
    length: Positive | None = key("Tokens of a window; null: whole sequences.", 128)
    lr: float = key("Peak learning rate, as a fraction of each tensor's root mean square.", 3e-4, gt=0)
    temperature: float = key("Of both distributions of kl.", 1.0, gt=0)
    seed: int = key("Of the order of the windows.", 0)
    dtype: Literal["bfloat16", "float16"] | None = key("For autocast; null: the model's own.", None)


class Storage(Section):
    """How a compressed model is stored, and counted in bytes of its file."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = key("Of weights; null: as the model has them.", "float16")
    embeddings: Literal[8, 4] | None = key("Bits of embeddings and head; null: those of the dtype.", None)
    gguf: str | None = key("One of llama.cpp's types, q4_k_m and so on, for the model as it then is.", None)


class Compression(Section):
    """A named compression."""

    label: str = key("Name in tables and figures.")
    method: str = key("original, or a key of masa.compression.COMPRESSORS.")
    options: dict[str, Any] = key("Hyperparameters of the method.", {})
    projections: str = key("Letters that are compressed: q, k, v, o, and g, u, d of the FFN.", "qkvo")
    calibration: str | None = key("Name of a calibration.", "attention")
    reductions: Reductions = key("Reductions in percent instead of the grid's.", None)
    heal: Heal = key(
        "Short fine-tune of the compressed parts: arguments of masa.compression.heal. Not training-free any more.", None
    )
    storage: Storage = key("How it is stored; without it bytes of files are not counted.", None)
    paper: dict[str, Any] = key("Which row of the paper's table this corresponds to.", None)


class CompressionEvaluation(Section):
    """How compressed models are scored."""

    texts: Annotated[list[Name], Field(min_length=1)] = key(
        "Texts whose perplexity is taken; the first is the held-out text, which must be available."
    )
    window: Positive = key("Tokens of a window; windows do not overlap.")
    dtype: Literal["float32", "bfloat16", "float16"] = key("Arithmetic of the folded model under test.")
    tasks: list[str] = key("lm-eval tasks, some of evaluation.tasks.")
    limit: Positive | None = key("Examples a task; null: all.")
    limit_per_task: Limits = key("Examples for single tasks (mmlu: a subject).")
    max_length: Positive = key("Tokens of context and continuation together.")
    batch_size: Positive = key("Sequences a forward pass.")


class CompressionSettings(Section):
    """What all compressions have in common."""

    threads: Positive = key("CPU threads of one calibration or compression.")
    keep_models: bool = key(
        "Also write every factored model (results/compression/MODEL/NAME/PERCENT/model), for masa.load."
    )
    evaluation: CompressionEvaluation
