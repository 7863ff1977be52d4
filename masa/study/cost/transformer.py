"""Work and memory of one pass of a model over a batch, and the seconds that a device needs for it.

Time is that of three things: FLOPs of matrix products, elements of activations that are touched between them, and
operators that are launched, whatever their size. A CPU does one after the other; a GPU launches while it works, so the
slower of the two counts.
"""

from __future__ import annotations

from dataclasses import dataclass

from masa.study.cost.devices import Device
from masa.study.cost.sizes import Sizes

NORMS_AND_RESIDUALS = 11
"""Elements that a block touches for every number of a token's width d, forward: two norms (a read and a write each, and
their statistics), two residuals, transposes around attention, biases."""

ROTARY = {"language": 15, "llama": 6}
"""More of them in language models: q and k are rotated by six operators each and made contiguous. In the wider Llamas,
whose k has fewer heads, it is less."""

OF_FFN = 3
"""Elements touched a number of the FFN's width: written, activated, read. A gated FFN has two of them."""

OF_SCORES = 2
"""Elements touched a score of attention: exponentiated and multiplied, on a CPU. A GPU keeps scores on the chip."""

OF_LOGITS = {"forward": 3, "training": 9}
"""Elements touched a logit: written, turned into float32, softmax; in training also their gradients."""

OPERATORS = {"language": 180, "llama": 190, "vit": 107, "yolos": 155}
"""Operators (of ATen, wrappers included) of one block forward, counted with torch's profiler; backward 1.8 times."""

OUTSIDE_OPERATORS = 120
"""The same before the first block and after the last, with the loss."""

PER_TENSOR = 11
"""Operators a parameter tensor of clipping, AdamW and clearing the gradients."""

STEP_OPERATORS = 2500
"""What a step of Hugging Face's Trainer costs beside the model, in operators: batches, callbacks, logging."""


@dataclass(frozen=True)
class Work:
    """What a device has to do.

    Attributes:
        flops: of matrix products.
        elements: of activations or parameters, each time one is touched.
        scores: elements of attention that a GPU never writes.
        launches: operators.
    """

    flops: float = 0.0
    elements: float = 0.0
    scores: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops,
            self.elements + other.elements,
            self.scores + other.scores,
            self.launches + other.launches,
        )

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.elements * times, self.scores * times, self.launches * times)

    __rmul__ = __mul__

    def seconds(self, device: Device, dtype: str = "float32", threads: int = 1) -> float:
        """Time on one device, or on some threads of a CPU."""
        busy = self.flops / device.rate(dtype)
        elements = self.elements + (0 if device.gpu else self.scores)
        # plain float32 is twice as long as what a GPU's cost of an element refers to
        busy += elements * device.element_seconds * (2 if device.gpu and dtype == "float32" else 1)
        launches = self.launches * device.launch_seconds
        if device.gpu:
            return max(busy, launches)
        return busy / speedup(threads / device.threads) + launches


def speedup(threads: float) -> float:
    """How much faster some threads are than one: 0.8 of each further one arrives."""
    return 1 + 0.8 * (threads - 1) if threads > 1 else 1.0


def forward(sizes: Sizes, sequences: float, tokens: int | None = None, logits: bool = True) -> Work:
    """One forward pass without gradients, matrices made already.

    Args:
        sequences: of the batch.
        tokens: of each; by default the model's own T.
        logits: whether what follows the last block runs, too.
    """
    T = sizes.tokens if tokens is None else tokens
    n, L, d = sequences * T, sizes.layers, sizes.width
    flops = n * L * (2 * sizes.block_matrices + 4 * T * sizes.attention_width)
    llama = sizes.family == "llama"
    touched = NORMS_AND_RESIDUALS + ROTARY.get(sizes.family, 0)
    elements = n * L * (touched * d + OF_FFN * sizes.ffn * (2 if llama else 1))
    launches = L * OPERATORS[sizes.family] + OUTSIDE_OPERATORS
    if sizes.patch:
        patches = sequences * T
        flops += 2 * patches * sizes.patch * d
        elements += patches * (sizes.patch + 2 * d)
    if logits:
        flops += n * sizes.head_flops
        elements += OF_LOGITS["forward"] * n * sizes.vocabulary
    return Work(flops, elements, OF_SCORES * n * L * sizes.heads * T, launches)


def training_pass(sizes: Sizes, sequences: float, tokens: int | None = None) -> Work:
    """Forward and backward of one micro-batch: three times forward, and the shared matrices made once."""
    once = forward(sizes, sequences, tokens)
    n = sequences * (sizes.tokens if tokens is None else tokens)
    return Work(
        3 * (once.flops + sizes.factors),
        3 * once.elements + (OF_LOGITS["training"] - 3 * OF_LOGITS["forward"]) * n * sizes.vocabulary + 6 * sizes.made,
        3 * once.scores,
        2.8 * once.launches,
    )


def optimiser_step(sizes: Sizes, devices: int = 1) -> Work:
    """Clipping, AdamW, clearing; with several devices gradients are also summed."""
    return Work(
        elements=(8 + (4 if devices > 1 else 0)) * sizes.parameters,
        launches=PER_TENSOR * sizes.tensors + STEP_OPERATORS,
    )


# ---------------------------------------------------------------------------------------------------------- memory

KEPT = {"float32": (32.5, 8.0), "half": (25.5, 4.5)}
"""Bytes that a block keeps for backward, for each number of a token's width d and of the FFN's f: counted with torch's
saved-tensor hooks, with autocast for "half", for all three kinds of models. A gated FFN keeps twice as much."""

OF_LOSS = {"float32": 16, "half": 18}
"""Bytes a logit at the peak, which is the loss's backward: as computed, in float32, their log-softmax, gradients."""


def training_bytes(sizes: Sizes, sequences: int, dtype: str) -> float:
    """Peak of weights, gradients, AdamW's two moments and the activations of one micro-batch.

    Args:
        sequences: of a micro-batch on one device.
        dtype: of autocast; parameters are float32. Attention keeps no scores.
    """
    n, kind = sequences * sizes.tokens, "float32" if dtype == "float32" else "half"
    of_width, of_ffn = KEPT[kind]
    kept = of_width * sizes.width + of_ffn * sizes.ffn * (2 if sizes.family == "llama" else 1)
    made = sizes.made * (8 if kind == "float32" else 4)  # matrices made once a pass, and their gradients
    return 16.0 * sizes.parameters + n * sizes.layers * kept + n * sizes.vocabulary * OF_LOSS[kind] + made


def inference_bytes(sizes: Sizes, sequences: int, tokens: int, dtype: str) -> float:
    """Weights, one block's activations and the logits with their log-softmax in float32."""
    width = 4 if dtype == "float32" else 2
    n = sequences * tokens
    dense = sizes.parameters + sizes.made
    block = n * (12 * sizes.width + 3 * sizes.ffn) * width
    return dense * width + block + n * sizes.vocabulary * (width + 8)
