"""Calibrate from plain arguments: the body of the command line's verb."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from masa.compression.calibration.calibrate import calibrate, check_length
from masa.compression.calibration.texts import draw_tokens, read_documents, save_tokens
from masa.compression.report import peak_rss, reset_peak_rss
from masa.compression.terminal import terminal
from masa.errors import MasaError, unknown
from masa.models.pretrained import load_pretrained
from masa.sharing.spec import ATTENTION

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_calibrate(
    model: str,
    output: str | Path,
    text: str | Path | Sequence[str],
    *,
    samples: int = 64,
    length: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    projections: str = ATTENTION,
    batch_size: int = 4,
    dtype: str | None = None,
    gradient_samples: int = 0,
    threads: int | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Load a model, draw N x T tokens from texts and write calibration statistics and tokens.

    Args:
        model: folder, GGUF file or hub id (see :func:`masa.models.pretrained.load_pretrained`).
        output: directory for the statistics and ``tokens.safetensors``.
        text: a text file, a JSON-lines file with "text", "content" or "page", or a list of documents.
        samples, length: N and T, by default 64 x 512, or what the model has positions for; the paper's is 256 x 2048.
        seed: of the windows drawn.
        revision: of a hub id.
        projections: letters to calibrate, or "all".
        batch_size: samples that run at once.
        dtype: of the computation; by default the stored one.
        gradient_samples: sequences whose gradients are collected too, for the methods that need them.
        threads: of the CPU; by default torch's own choice.
        device: "auto" (a GPU where there is one), "cpu", "cuda:1", …; on the CPU weights are read from the mapped file.
        quiet: no progress.

    Returns:
        Summary: samples, length, tokens_per_second, seconds, peak_rss_bytes, hashes, directory.

    Raises:
        MasaError: see :func:`masa.compression.calibrate`; or too little text.
    """
    started = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    reset_peak_rss()
    loaded, tokenizer = load_pretrained(model, revision=revision, device=device)
    if tokenizer is None:
        raise MasaError(f"{model} holds no tokenizer, which calibration on text needs.")
    length = check_length(loaded, length)
    tokens = draw_tokens(tokenizer, read_documents(text), samples, length, seed)
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.json").unlink(missing_ok=True)  # written last: with it, everything is there
    save_tokens(tokens, folder)
    with terminal(quiet) as progress:
        found = calibrate(
            loaded,
            tokens,
            directory=output,
            projections=projections,
            batch_size=batch_size,
            dtype=_dtype(dtype),
            gradient_samples=gradient_samples,
            progress=progress,
        )
    return {
        "model": model,
        "directory": str(output),
        "samples": samples,
        "length": length,
        "seed": seed,
        "tokens_sha256": found.tokens_sha256,
        "model_sha256": found.model_sha256,
        "tokens_per_second": found.tokens_per_second,
        "seconds": round(time.perf_counter() - started, 2),
        "peak_rss_bytes": peak_rss(),
    }


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name] if name else None
