"""Calibrate and compress from plain arguments, with progress on the terminal: the command line's verbs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from masa.compression.texts import draw_tokens, load_tokens, read_documents, save_tokens
from masa.errors import MasaError, unknown
from masa.progress import Progress
from masa.spec import ATTENTION

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def run_calibrate(
    model: str,
    output: str | Path,
    text: str | Path | Sequence[str],
    *,
    samples: int = 64,
    length: int = 512,
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
        model: folder, GGUF file or hub id (see :func:`masa.pretrained.load_pretrained`).
        output: directory for the statistics and ``tokens.safetensors``.
        text: a text file, a JSON-lines file with "text", "content" or "page", or a list of documents.
        samples, length: N and T; the paper's size is 256 x 2048.
        seed: of the windows drawn.
        revision: of a hub id.
        projections: letters to calibrate.
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
    from masa.compression.calibration import calibrate
    from masa.compression.report import peak_rss, reset_peak_rss
    from masa.pretrained import load_pretrained

    started = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    reset_peak_rss()
    loaded, tokenizer = load_pretrained(model, revision=revision, device=device)
    if tokenizer is None:
        raise MasaError(f"{model} holds no tokenizer, which calibration on text needs.")
    tokens = draw_tokens(tokenizer, read_documents(text), samples, length, seed)
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
    save_tokens(tokens, output)
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


def run_compress(
    model: str,
    output: str | Path,
    method: str | Mapping[str, Any] = "svd-global",
    reduction: float = 0.2,
    calibration: str | Path | None = None,
    *,
    revision: str | None = None,
    projections: str = ATTENTION,
    options: Mapping[str, Any] | None = None,
    plain: bool = False,
    evaluate: str | Path | Sequence[str] | None = None,
    window: int = 512,
    batch_size: int = 4,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Load, compress and save a model; the summary also goes to ``compression.json`` in the output.

    Args:
        model: folder, GGUF file or hub id.
        output: directory of the factored checkpoint (:func:`masa.load` reads it), with the tokenizer.
        method: a key of :data:`masa.compression.COMPRESSORS`, or a mapping of "method" and its hyperparameters.
        reduction: fraction of the compressed projections' numbers to save.
        calibration: directory that :func:`run_calibrate` wrote.
        revision: of a hub id.
        projections: letters to compress.
        options: further hyperparameters of the method.
        plain: write a folded folder, which needs no masa to load, instead of the factored checkpoint.
        evaluate: documents (as in :func:`run_calibrate`) for perplexity before and after.
        window: tokens of a window for it; windows do not overlap.
        batch_size: samples at once, where the model runs.
        device: as in :func:`run_calibrate`.
        quiet: no progress.

    Returns:
        Summary: the :class:`~masa.compression.CompressionReport` as a mapping, the output, total seconds, and
        perplexities if asked for.

    Raises:
        MasaError: the output is the model's own folder; else see :func:`masa.compression.compress`.
    """
    from masa.checkpoint import save
    from masa.compression.api import compress
    from masa.compression.scoring import perplexity
    from masa.pretrained import load_pretrained, save_plain

    started = time.perf_counter()
    if Path(model).is_dir() and Path(output).resolve() == Path(model).resolve():
        raise MasaError(
            f"{output} is the model itself, whose weights are read while the output is written; choose another."
        )
    loaded, tokenizer = load_pretrained(model, revision=revision, device=device)
    tokens = load_tokens(calibration) if calibration is not None else None
    documents = read_documents(evaluate) if evaluate is not None else None
    if documents and tokenizer is None:
        raise MasaError(f"{model} holds no tokenizer, which evaluation on text needs.")
    scores = {}
    with terminal(quiet) as progress:
        settings: dict[str, Any] = {"window": window, "batch_size": batch_size, "progress": progress}
        if documents:
            scores["perplexity_before"] = perplexity(loaded, tokenizer, documents, **settings).to_dict()
        loaded, report = compress(
            loaded,
            method,
            calibration,
            reduction,
            tokens=tokens,
            projections=projections,
            batch_size=batch_size,
            progress=progress,
            **(options or {}),
        )
        if documents:
            scores["perplexity_after"] = perplexity(loaded, tokenizer, documents, **settings).to_dict()
    directory = save_plain(loaded, output) if plain else save(loaded, output)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    summary = report.to_dict() | scores
    summary |= {"model": model, "output": str(directory), "total_seconds": round(time.perf_counter() - started, 2)}
    (Path(directory) / "compression.json").write_text(json.dumps(summary, indent=2) + "\n")
    return summary


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name] if name else None


@contextmanager
def terminal(quiet: bool = False) -> Iterator[Any]:
    """A progress callback: a bar for each phase on a terminal, a line now and then elsewhere (a log, a workflow)."""
    if quiet or not sys.stderr.isatty():
        yield _silent if quiet else _Lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    tasks: dict[str, Any] = {}
    with Bars(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bars:

        def show(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield show
        for task in bars.tasks:
            bars.update(task.id, completed=task.total)


def _silent(what: str, done: int, of: int) -> None:
    pass


class _Lines:
    """One :class:`~masa.progress.Progress` a phase."""

    def __init__(self) -> None:
        self.phase, self.progress, self.done = "", Progress("", 1, ""), 0

    def __call__(self, what: str, done: int, of: int) -> None:
        if what != self.phase or done < self.done:
            self.phase, self.progress = what, Progress(what, of, "steps")
        self.done = done
        self.progress.update(done)
