"""Sections of what is trained: sizes and recipes of language models, Vision Transformers and detectors."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from masa.models import vit, yolos
from masa.models.recipes import Optimizer
from masa.settings import Amount, Positive, Section, key


class Training(Section):
    """The recipe of language models."""

    tokens: Positive | None = key(
        "Training tokens of every run at this scale, rounded down to whole steps. null: tokens_per_parameter times the "
        "parameters of the vanilla model, so that all methods see equal tokens."
    )
    tokens_per_parameter: float = key("Tokens per parameter of the vanilla model (paper: 20).", gt=0)
    learning_rate: float = key("Peak learning rate, the same for every method at one scale.", gt=0)
    min_learning_rate_ratio: float = key("Final learning rate as a fraction of the peak.", ge=0, le=1)
    warmup_fraction: float = key("Linear warmup over this fraction of the steps, then cosine.", ge=0, le=1)
    weight_decay: Amount = key(
        "AdamW weight decay of matrices and token embeddings; norms, biases, coefficients and block embeddings take "
        "none."
    )
    optimizer: Optimizer = key(
        "adamw; or muon, which orthogonalises the updates of the matrices inside the blocks (each atom, factor and set "
        "for itself), with AdamW for all else and the same learning rate and weight decay.",
        "adamw",
    )
    adam_betas: list[float] = key("AdamW betas.", min_length=2, max_length=2)
    max_grad_norm: float = key("Gradients are clipped to this norm.", gt=0)
    coefficients_learning_rate_ratio: float = key(
        "Learning rate of MASA's coefficients relative to all other parameters.", gt=0
    )
    average_fraction: float = key(
        "The model that is scored last and kept is the mean of the weights over this fraction of the steps, at the end "
        "(0: the last weights); it takes noise off comparisons.",
        0,
        ge=0,
        le=1,
    )
    data_seed: int | None = key(
        "Seed of the order of the data; null: the run's own, so that seeds differ in order and in first weights. A "
        "number leaves them the weights alone.",
        None,
        ge=0,
    )
    context: Positive = key("Tokens a sequence.")
    batch_size: Positive = key("Sequences an optimiser step, over all devices.")
    micro_batch_size: Positive | None = key(
        "Sequences a device and pass; must divide batch_size (gradient accumulation). null: batch_size."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = key(
        "Arithmetic of the linear layers; auto is bfloat16 on a GPU that has it, float32 elsewhere."
    )
    evaluations: Positive = key("How many times the held-out loss is taken, evenly spaced, the last at the end.")
    checkpoint_minutes: float = key("Minutes between checkpoints of a running training.", gt=0)
    threads: Positive = key(
        "CPU threads of one process of a training; part of what makes a run reproducible to the bit."
    )
    nodes: Positive = key(
        "Machines that one training runs on; more than one needs Slurm, or the same command on each with "
        "MASA_RENDEZVOUS=HOST:PORT.",
        1,
    )
    processes_per_node: Positive = key(
        "Processes of one training on each machine, one a GPU (on a CPU: gloo). batch_size is over all of them.", 1
    )
    parallel: Literal["ddp", "fsdp"] = key(
        "What several processes do: ddp, each holds the whole model; fsdp, each holds a part of weights, gradients and "
        "optimiser states, for models that do not fit.",
        "ddp",
    )
    compile: Literal["auto"] | bool = key(
        "torch.compile of the model; auto: on a GPU, from 1,000 steps, since compiling takes about a minute.", "auto"
    )


class LanguageModel(Section):
    """Sizes of a language model."""

    num_layers: Positive = key("L.")
    hidden_size: Positive = key("d.")
    num_attention_heads: Positive = key("H; must divide d into heads of even width (RoPE).")
    vocab_size: Positive = key("Vocabulary; by default the tokenizer's.", None)
    intermediate_size: Positive = key("Width of the FFN.")


class Scale(Section):
    """A size of language models."""

    compare_with: str | None = key("Scale of the paper whose numbers stand beside ours.", None)
    model: LanguageModel
    training: Training.partly() | None = key("What differs from the section training.", None)  # type: ignore[valid-type]


VisionTraining = vit.Recipe.changed(
    "VisionTraining",
    batch_size=None,
    learning_rate=None,
    horizontal_flip=(bool, yolos.Recipe.model_fields["horizontal_flip"]),
)
"""Keys of both recipes; a run's own kind checks that they are its own, that none is missing, and has the defaults."""

VisionModel = Annotated[vit.Model | yolos.Model, Field(discriminator="family")]


class VisionScale(Section):
    """A size of Vision Transformers or detectors."""

    data: str = key("Name of an entry of images, or of boxes for a detector.")
    compare_with: str | None = key("Row of the paper whose numbers stand beside ours.", None)
    model: VisionModel = key("family (vit or yolos) and its sizes.")
    training: VisionTraining = key("The recipe; a detector's lacks label_smoothing, augmentation, mixup and ema_decay.")  # type: ignore[valid-type]
