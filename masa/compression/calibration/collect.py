"""Calibrate from plain arguments: the body of the command line's verb."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from masa.compression.calibration.calibrate import calibrate, check_asked, check_length, checked
from masa.compression.calibration.texts import draw_tokens, save_tokens
from masa.compression.report import peak_rss, reset_peak_rss
from masa.compression.terminal import terminal
from masa.data import tokenizers
from masa.data.texts import Documents
from masa.errors import MasaError, unknown
from masa.models.pretrained import load_pretrained
from masa.runs.faults import writing
from masa.runs.files import sha256_of
from masa.runs.hold import exclusive
from masa.runs.outputs import tried
from masa.runs.run import digest
from masa.sharing.spec import ATTENTION

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SAID = ("threads", "tokens_sha256", "text_sha256", "model_sha256", "tokens_per_second")
"""Of the statistics, in the summary."""


def run_calibrate(
    model: str,
    output: str | Path,
    text: str | Path | Sequence[str],
    *,
    samples: int = 64,
    length: int | None = None,
    column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    seed: int = 0,
    revision: str | None = None,
    projections: str = ATTENTION,
    batch_size: int = 4,
    dtype: str | None = None,
    gradient_samples: int = 0,
    threads: int | None = None,
    device: str = "auto",
    trust_remote_code: bool = False,
    quiet: bool = False,
    wait: bool = True,
) -> dict[str, Any]:
    """Load a model, draw N x T tokens from texts and write calibration statistics and tokens.

    Args:
        model: folder, GGUF file or hub id (see :func:`masa.models.pretrained.load_pretrained`).
        output: directory for the statistics and ``tokens.safetensors``.
        text: a file, a folder or a glob of JSON, Parquet, Arrow, CSV or plain text, compressed or not; what `masa text`
            wrote; ``hub:ORG/NAME[@COMMIT]``; or a list of documents (:class:`masa.data.texts.Documents`).
        column: that holds the text; by default text, content, page or messages.
        subset, split: of a data set on the hub, or of a folder.
        samples, length: N and T, by default 64 x 512, or what the model has positions for; the paper's is 256 x 2048.
        seed: of the windows drawn.
        revision: of a hub id.
        projections: letters to calibrate, or "all".
        batch_size: samples that run at once.
        dtype: of the computation; by default the stored one.
        gradient_samples: sequences whose gradients are collected too, for the methods that need them.
        threads: of the CPU; by default torch's own choice.
        device: "auto" (a GPU where there is one), "cpu", "cuda:1", …; on the CPU weights are read from the mapped file.
        trust_remote_code: run Python that the model's folder brings.
        quiet: no progress.
        wait: for another process that writes the same directory, such as one whose workflow was killed.

    Returns:
        Summary: samples, length, start_token (that every document begins with, or None), tokens_per_second, seconds,
        peak_rss_bytes, hashes, directory.

    Raises:
        MasaError: see :func:`masa.compression.calibrate`; too little text; an output that cannot be written, or, unless
            ``wait``, that another process writes.
    """
    folder = tried(Path(output), folder=True, option="output")
    started, computed = time.perf_counter(), _dtype(dtype)
    if threads:
        torch.set_num_threads(threads)
    reset_peak_rss()
    with exclusive(folder, wait=wait, keep=False):
        Documents(text, column, subset=subset, split=split).check()  # before the model is read
        how = {"revision": revision, "device": device, "trust_remote_code": trust_remote_code}
        loaded, tokenizer = load_pretrained(model, **how)
        if tokenizer is None:
            raise MasaError(f"{model} holds no tokenizer, which calibration on text needs.")
        check_asked(loaded, projections, batch_size, gradient_samples)
        length, start = check_length(loaded, length), tokenizers.start_of(tokenizer)
        documents = Documents(text, column, subset=subset, split=split, tokenizer=tokenizer)
        tokens = draw_tokens(tokenizer, documents, samples, length, seed)
        checked(loaded, tokens, projections, batch_size, gradient_samples)  # what lies there stays till then
        (folder / "calibration.json").unlink(missing_ok=True)  # written last: with it, everything is there
        with writing(folder / "tokens.safetensors", below=folder):
            save_tokens(tokens, folder)
        with terminal(quiet) as progress:
            found = calibrate(
                loaded,
                tokens,
                directory=folder,
                projections=projections,
                batch_size=batch_size,
                dtype=computed,
                gradient_samples=gradient_samples,
                seed=seed,
                text_sha256=_text_sha256(text),
                progress=progress,
            )
    summary = {"model": model, "directory": str(folder), "samples": samples, "length": length, "seed": seed}
    summary["start_token"] = None if start is None else tokenizer.convert_ids_to_tokens(start)
    summary |= {name: getattr(found, name) for name in SAID}
    return summary | {"seconds": round(time.perf_counter() - started, 2), "peak_rss_bytes": peak_rss()}


def _text_sha256(text: str | Path | Sequence[str]) -> str | None:
    """Of a file, or of documents; None of anything else that has a name alone."""
    if not isinstance(text, str | Path):
        return digest([str(document) for document in text])
    return sha256_of(Path(text)) if Path(text).is_file() else None


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name] if name else None
