"""Compression of pretrained models: calibration, and every method at all its reductions, with scores.

Dimensions as in :mod:`masa.study.cost.sizes`; n tokens of the calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa.study.cost.devices import Device
from masa.study.cost.evaluation import harness
from masa.study.cost.sizes import Sizes
from masa.study.cost.transformer import Work, forward

READ = 1.5e9
"""Bytes a second at which a model's file is mapped, copied and hashed from the file system's cache."""

PREPARE = {
    "original": 0.0,
    "direct-share": 0.0,
    "post-share": 0.0,
    "basis-sharing": 1.2,
    "matrix-pca-data": 2.0,
    "matrix-pca": 1.2,
    "matrix-pca-fisher": 1.8,
    "svd-fisher": 1.6,
    "sparse-magnitude": 0.0,
    "sparse-wanda": 0.0,
    "sparse-gpt": 0.0,
    "sparse-2-4": 0.0,
    "sparse-fisher": 0.0,
    "sparse-dictionary": 12.0,
    "sparse-dictionary-fisher": 3.0,
    "dictionary-pairs": 12.0,
    "dictionary-pairs-fisher": 9.0,
    "low-rank-sparse": 12.0,
    "low-rank-sparse-fisher": 12.0,
    "mixed": 22.0,
    "mixed-fisher": 22.0,
    "drop-blocks": 4.0,
    "replace-me": 4.0,
}
"""Decompositions a matrix that a method makes once, in units of one in the metric of the data; 1 for all others."""

LOGITS = 2**25
"""Logits that calibration with gradients holds at once (masa.compression.calibration.gradients)."""

SOLVE = {
    "original": 0.0,
    "direct-share": 0.0,
    "post-share": 0.0,
    "sparse-magnitude": 0.5,
    "sparse-wanda": 0.5,
    "sparse-gpt": 1.5,
    "sparse-2-4": 0.5,
    "sparse-fisher": 3.5,
    "sparse-dictionary": 1.1,
    "sparse-dictionary-fisher": 7.0,
    "dictionary-pairs": 7.0,
    "dictionary-pairs-fisher": 7.0,
    "low-rank-sparse": 6.0,
    "low-rank-sparse-fisher": 6.0,
    "mixed": 1.5,
    "mixed-fisher": 1.5,
    "drop-blocks": 0.0,
    "replace-me": 0.1,
}
"""The same for every reduction: ranks, factors, options and sources; 0.25 for all others."""


def decompositions(sizes: Sizes, projections: str) -> float:
    """FLOPs, in units of LAPACK (9 n^3), of one truncation of every matrix: n is the shorter side of each."""
    d, a, kv, f = sizes.width, sizes.attention_width, sizes.kv_width, sizes.ffn
    shapes = {"q": (a, d), "k": (kv, d), "v": (kv, d), "o": (d, a), "u": (f, d), "g": (f, d), "d": (d, f)}
    total = 0.0
    for letter in projections:
        out, inner = shapes[letter]
        n = min(out, inner)
        total += 9.0 * n**3 + 2 * (2.0 * out * inner * inner) / 4  # and W H W^T; plain products run four times as fast
        if out > inner:
            total += 9.0 * n**3 + 9.0 * inner**3  # a square root of H, and a singular value decomposition
    return sizes.layers * total


def grams(sizes: Sizes, projections: str, tokens: float) -> Work:
    """``X^T X`` of the inputs of the projections, float32."""
    inputs = 0.0
    if set(projections) & set("qkv"):
        inputs += sizes.width**2
    if "o" in projections:
        inputs += sizes.attention_width**2
    if set(projections) & set("ug"):
        inputs += sizes.width**2
    if "d" in projections:
        inputs += sizes.ffn**2
    return Work(2.0 * tokens * sizes.layers * inputs)


def gradient_work(sizes: Sizes, projections: str, samples: int, length: int) -> Work:
    """Forward again, backward to the activations alone, labels, and ``G^T G`` of the outputs of the projections."""
    once = forward(sizes, samples, length)
    n = samples * length
    outputs = {"q": sizes.attention_width, "k": sizes.kv_width, "v": sizes.kv_width, "o": sizes.width}
    outputs |= {"u": sizes.ffn, "g": sizes.ffn, "d": sizes.width}
    squares = sum(outputs[letter] ** 2 for letter in projections)
    return Work(
        2 * once.flops + 2.0 * n * sizes.layers * squares,
        2.5 * once.elements + 12.0 * n * sizes.vocabulary,
        2.5 * once.scores,
        2.5 * once.launches,
    )


def calibrate(
    sizes: Sizes, entry: Mapping[str, Any], stored: str, device: Device, threads: int
) -> tuple[float, float, float, float]:
    """Seconds, FLOPs, peak bytes and bytes written of one calibration.

    Args:
        entry: of the configuration's ``calibrations``.
        stored: dtype of the model's file, in which it runs.
    """
    N, T, letters = entry["samples"], entry["length"], entry["projections"]
    work = forward(sizes, N, T, logits=False)
    batches = max(1, N / entry["batch_size"])
    work = Work(work.flops, work.elements, work.scores, work.launches * batches)
    gram = grams(sizes, letters, N * T)
    gradient = gradient_work(sizes, letters, entry["gradient_samples"], T) if entry["gradient_samples"] else Work()
    seconds = work.seconds(device, stored, threads) + gram.seconds(device, "float32", threads)
    seconds += gradient.seconds(device, stored, threads) + 1.5 * device.startup_seconds
    written = sizes.layers * 8.0 * (2 * sizes.width**2 + (sizes.ffn**2 if "d" in letters else 0))
    if gradient.flops:
        written += sizes.layers * 8.0 * (2 * sizes.width**2 + 2 * sizes.kv_width**2)
    width = 2 if stored != "float32" else 4
    file = sizes.parameters * width
    seconds += 2 * file / READ + 2 * written / READ
    hidden = 2.0 * N * T * sizes.width * width
    batch = entry["batch_size"] * T
    peak = file + hidden + written / sizes.layers * 4
    if gradient.flops:  # one block's graph, or a chunk of logits with what is made of them
        inputs = entry["gradient_samples"] * T * sizes.layers * sizes.width * width  # of every block
        if device.gpu:
            peak += inputs
        else:
            seconds += 2 * inputs / READ  # files
        graph = batch * (20 * sizes.width + 8 * sizes.ffn) * width
        peak += max(graph, 4 * 4 * min(LOGITS, batch * sizes.vocabulary))
    else:
        peak += batch * 8 * (sizes.width + sizes.ffn) * width
    return seconds, work.flops + gram.flops + gradient.flops, peak, written


def compress(
    sizes: Sizes,
    spec: Mapping[str, Any],
    calibration: Mapping[str, Any] | None,
    text_tokens: float,
    tasks: list[str],
    stored: str,
    device: Device,
) -> tuple[float, float, float, float]:
    """Seconds, FLOPs, peak bytes and bytes written of one method at all its reductions.

    Args:
        spec: from :func:`masa.study.compressions.run_spec`.
        calibration: of the configuration, None where the method needs none.
        text_tokens: tokens of the texts whose perplexity is taken.
        tasks: those of lm-eval that are available.
        stored: dtype of the model's file.
    """
    threads, settings, method = spec["threads"], spec["evaluation"], spec["method"]
    scored = settings["dtype"]
    file = sizes.parameters * (2.0 if stored != "float32" else 4.0)
    lapack = decompositions(sizes, spec["projections"])
    name = method.removesuffix("-update")
    once = PREPARE.get(name, 1.0)
    work_flops, peak = 0.0, 0.0
    seconds = 1.4 * device.startup_seconds + lapack * once / device.lapack_flops
    if calibration and calibration["gradient_samples"] and once:
        seconds += 2 * sizes.layers * 16.0 * sizes.width**2 / READ  # statistics are read
    perplexity = forward(sizes, text_tokens / settings["window"], settings["window"])
    each = perplexity.seconds(device, scored, threads) + 4 * file / READ
    each += 0.05 * device.startup_seconds + lapack * SOLVE.get(name, 0.25) / device.lapack_flops
    work_flops += perplexity.flops
    training = Work()
    if spec.get("heal"):
        training += _healing(sizes, spec["heal"], calibration)
    if method == "post-share":
        training += _post_share(sizes, spec["options"], calibration)
        peak = 20.0 * sizes.parameters
    dtype = (spec.get("heal") or spec["options"]).get("dtype") or stored
    each += training.seconds(device, dtype, threads)
    if "update" in method:
        update = _update(sizes, spec, calibration)
        each += update.seconds(device, stored, threads)
        each += 2 * lapack / 9 / device.lapack_flops + 2 * file / READ
        training += update
    work_flops += training.flops
    longest = settings["window"]
    reductions = spec["reductions"] or [0]
    if method == "original":
        reductions = [0]
    total = seconds + len(reductions) * each
    flops = len(reductions) * work_flops
    wanted = [t for t in settings["tasks"] if t in tasks]
    if spec["tasks_at"] and wanted:
        took, work, longest = harness(sizes, wanted, settings, device, scored, threads)
        total += len(spec["tasks_at"]) * took
        flops += len(spec["tasks_at"]) * work.flops
    width = 4 if scored == "float32" else 2
    # the mapped file, the method's truncations (all at once, float32), and the model under test with its logits
    truncations = sizes.layers * 4.0 * sizes.width * (2 * sizes.width + 2 * sizes.kv_width) * (1 if once else 0)
    batch = max(4 * settings["window"], settings["batch_size"] * min(longest, settings["window"]))
    scoring = sizes.parameters * width + batch * sizes.vocabulary * (width + 4)
    peak = max(peak, file + truncations + scoring)
    kept = len(reductions) * (4.0 * sizes.parameters if spec["keep_models"] else 1e6)
    return total, flops, peak, kept


def _healing(sizes: Sizes, heal: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> Work:
    """Student forward and backward, teacher forward, and both distributions of every token."""
    length = heal.get("length", 128) or (calibration or {}).get("length", 512)
    steps, batch = heal.get("steps", 20), heal.get("batch_size", 4)
    once = forward(sizes, batch, length)
    step = once * 4.5 + Work(elements=10.0 * batch * length * sizes.vocabulary)
    step += Work(elements=8.0 * sizes.layers * 2 * sizes.width**2)
    return step * steps


def _post_share(sizes: Sizes, options: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> Work:
    """Forward and backward with all weights trained, and AdamW on them."""
    length = options.get("length") or (calibration or {}).get("length", 512)
    batch = (calibration or {}).get("batch_size", 4)
    once = forward(sizes, batch, length)
    step = once * 3.0 + Work(elements=9.0 * sizes.parameters + 6.0 * batch * length * sizes.vocabulary)
    return step * options.get("steps", 100) + Work(elements=4.0 * sizes.parameters)


def _update(sizes: Sizes, spec: Mapping[str, Any], calibration: Mapping[str, Any] | None) -> Work:
    """Every block twice over the tokens: up to the last input that is wanted, and compressed."""
    known = calibration or {"samples": 64, "length": 512, "batch_size": 4}
    samples = min(spec["options"].get("samples", 16) or known["samples"], known["samples"])
    length = known["length"]
    whole = forward(sizes, samples, length, logits=False)
    attention = sizes.width * (2 * sizes.attention_width + 2 * sizes.kv_width) / sizes.block_matrices
    part = attention if not set(spec["projections"]) & set("ugd") else 1.0
    batches = max(1.0, samples / known["batch_size"])
    both = Work(whole.flops * (1 + part), whole.elements * 1.5, whole.scores * 2, whole.launches * 1.7 * batches)
    return both + grams(sizes, spec["projections"], samples * length)
