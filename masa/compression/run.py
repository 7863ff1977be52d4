"""Compress and quantize from plain arguments: the bodies of the command line's verbs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from masa.compression.api import compress
from masa.compression.base import Compressor, make_compressor
from masa.compression.calibration.collect import DTYPES
from masa.compression.calibration.statistics import Calibration
from masa.compression.calibration.texts import load_tokens
from masa.compression.choice import Choice, choose
from masa.compression.healing.run import healed, state_of
from masa.compression.names import GRADIENT_SAMPLES, needs_gradients
from masa.compression.output import ACCOUNT, account_of, check_output, target_beside
from masa.compression.quantization import quantize
from masa.compression.scoring import Perplexity, perplexity
from masa.compression.storage import converted
from masa.compression.terminal import terminal
from masa.data.texts import Documents, template_of
from masa.errors import MasaError, unknown
from masa.models.beside import hand_on
from masa.models.positions import positions_of
from masa.models.pretrained import load_pretrained, locate, save_plain
from masa.runs.files import whole_folder
from masa.runs.outputs import tried
from masa.runs.run import read_json, write_json
from masa.sharing.checkpoint import load, save
from masa.sharing.embeddings import round_embeddings
from masa.sharing.projections import bank_of
from masa.sharing.spec import ATTENTION

METHOD = "svd-global"
"""Where neither a method nor a size is given."""


def run_compress(
    model: str,
    output: str | Path,
    method: str | Mapping[str, Any] | None = None,
    reduction: float | None = None,
    calibration: str | Path | None = None,
    *,
    size: int | str | None = None,
    revision: str | None = None,
    projections: str | None = None,
    options: Mapping[str, Any] | None = None,
    plain: bool = False,
    heal_minutes: float | None = None,
    evaluate: str | Path | Sequence[str] | None = None,
    column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    window: int = 512,
    batch_size: int = 4,
    threads: int | None = None,
    device: str = "auto",
    dtype: str | None = None,
    trust_remote_code: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Load, compress and save a model; the summary also goes to ``compression.json`` in the output.

    Args:
        model: folder, GGUF file or hub id.
        output: directory of the factored checkpoint (:func:`masa.load` reads it), with the tokenizer. It appears whole;
            an earlier output of this function there is replaced, any other folder refused.
        method: a key of :data:`masa.compression.COMPRESSORS`, or a mapping of "method" and its hyperparameters; by
            default "svd-global", and with ``size`` what :func:`masa.compression.choice.choose` chooses.
        reduction: fraction of the compressed projections' numbers to save; by default 0.2.
        size: of the whole model in bytes, as a number or as "110MiB", in the place of ``reduction``.
        calibration: directory that :func:`masa.compression.run_calibrate` wrote.
        revision: of a hub id.
        projections: letters to compress, or "all" linear layers of the blocks; by default those of attention, and all
            where the method is chosen.
        options: further hyperparameters of the method.
        plain: write a folded folder, which needs no masa to load, instead of the factored checkpoint.
        heal_minutes: train what is stored for this long after the compression, with the original as teacher and on the
            tokens of the calibration (:func:`masa.compression.heal`). What an interrupted run goes on from lies beside
            the output meanwhile.
        evaluate: documents (as for :func:`masa.compression.run_calibrate`) for perplexity before and after.
        column, subset, split: of these documents, as there.
        window: at most this many tokens of a window for it; windows do not overlap.
        batch_size: samples at once, where the model runs.
        threads: of the CPU; by default torch's own choice.
        device: "auto" (a GPU where there is one), "cpu", "cuda:1", …; on the CPU weights are read from the mapped file.
        dtype: of the computation and of what is written, "float32", "bfloat16" or "float16"; by default the stored one.
        trust_remote_code: run Python that the model's folder brings.
        quiet: no progress.

    Returns:
        Summary: the :class:`~masa.compression.CompressionReport` as a mapping, the output, total seconds, and
        perplexities if asked for.

    Raises:
        MasaError: an output that is something else; else see :func:`masa.compression.compress`.
    """
    started = time.perf_counter()
    _prepare(threads, dtype, heal_minutes, calibration)
    compressor, options = None, dict(options or {})
    if chosen := _said(method, projections, dtype, size):
        compressor = _compressor(method or METHOD, options, model, chosen.projections, calibration is not None)
    target = check_output(tried(Path(output), folder=True, option="output"))
    documents = None if evaluate is None else Documents(evaluate, column, subset=subset, split=split).check()
    with whole_folder(target) as folder:
        where = locate(model, revision=revision)
        loaded, tokenizer = load_pretrained(where, device=device, trust_remote_code=trust_remote_code)
        statistics = None if calibration is None else Calibration.load(calibration)
        chosen = chosen or choose(loaded, size, statistics, projections, dtype)
        compressor = compressor or make_compressor(chosen.method, **chosen.options | options)
        statistics = converted(loaded, chosen.dtype, statistics)
        scores: dict[str, Any] = {}
        with terminal(quiet) as progress:
            how: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
            score = documents and _scorer(documents, tokenizer, min(window, positions_of(loaded) or window), how)
            if score:
                scores["perplexity_before"] = score(loaded).to_dict()
            asked = {"size": chosen.size, "tokens": _tokens(statistics), "projections": chosen.projections}
            loaded, report = compress(loaded, compressor, statistics, reduction, **asked, **how)
            if heal_minutes is not None:
                teacher = load_pretrained(where, device=device, trust_remote_code=trust_remote_code)[0]
                scores["healing"] = healed(loaded, teacher, target, statistics, minutes=heal_minutes, **how)
            if chosen.embeddings and not plain:
                round_embeddings(loaded, chosen.embeddings)
            if score:
                scores["perplexity_after"] = score(loaded).to_dict()
        save_plain(loaded, folder) if plain else save(loaded, folder)
        summary = report.to_dict() | scores | chosen.said() | {"model": str(model), "output": str(output)}
        summary |= {"threads": torch.get_num_threads(), "handed_on": hand_on(where, folder, code=trust_remote_code)}
        write_json(folder / ACCOUNT, summary | {"total_seconds": round(time.perf_counter() - started, 2)})
    state_of(target).unlink(missing_ok=True)
    return read_json(target / ACCOUNT)


def run_quantize(
    model: str,
    output: str | Path,
    bits: int = 8,
    calibration: str | Path | None = None,
    *,
    embeddings: int | None = None,
    threads: int | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Write a folder of shared matrices or factors again, with few bits a number.

    Args:
        model: folder that :func:`masa.save`, a training or :func:`run_compress` wrote.
        output: directory as of :func:`run_compress`.
        bits: 8 or 4.
        calibration: directory of statistics of the model that was compressed, or of this one folded; None to have all
            errors count alike.
        embeddings: bits of the embeddings and of the head; None leaves them as they are.
        threads: of the CPU; by default torch's own choice.
        quiet: no progress.

    Returns:
        Summary: bits, bytes of the shared matrices before and after, and seconds; it also goes to ``compression.json``,
        beside what an earlier compression wrote there.

    Raises:
        MasaError: nothing in the folder is shared, or see :func:`masa.compression.quantize`.
    """
    started = time.perf_counter()
    if threads:
        torch.set_num_threads(threads)
    where = Path(model)
    target = target_beside(output, where)
    statistics = None if calibration is None else Calibration.load(calibration)
    with whole_folder(target) as folder:
        loaded = load(where, runtime="factored")
        before = _shared_bytes(loaded)
        with terminal(quiet) as progress:
            quantize(loaded, bits, statistics, embeddings=embeddings, progress=progress)
        save(loaded, folder)
        summary: dict[str, Any] = {"model": str(model), "output": str(output), "bits": bits, "embeddings": embeddings}
        summary |= {"bytes_before": before, "bytes_after": _shared_bytes(loaded)}
        summary |= {"calibration": None if statistics is None else statistics.made_of()}
        summary |= {"handed_on": hand_on(where, folder), "seconds": round(time.perf_counter() - started, 2)}
        write_json(folder / ACCOUNT, account_of(where) | {"quantized": summary})
    return summary


def _shared_bytes(model: Any) -> int:
    shared = bank_of(model)
    return 0 if shared is None else sum(source.stored_bytes() for source in shared.values())


def _compressor(
    method: str | Mapping[str, Any], options: Mapping[str, Any], model: str, projections: str, calibrated: bool
) -> Compressor:
    chosen = {"method": method} if isinstance(method, str) else dict(method)
    compressor = make_compressor(**{**chosen, **options})
    if not calibrated and (compressor.needs_calibration or compressor.needs_tokens):
        gradients = f"--gradient-samples {GRADIENT_SAMPLES} " if needs_gradients(compressor.name) else ""
        gradients += f"--projections {projections} " if projections != ATTENTION else ""
        raise MasaError(
            f"{compressor.name!r} needs calibration statistics: make them with `masa calibrate {model} --text FILE "
            f"{gradients}--out statistics`, then pass --calibration statistics."
        )
    return compressor


def _said(method: Any, projections: str | None, dtype: str | None, size: Any) -> Choice | None:
    """What a user says by himself; None where a size alone is given."""
    if method is None and size is not None:
        return None
    return Choice("", projections or ATTENTION, dtype, None, size)


def _prepare(threads: int | None, dtype: str | None, heal_minutes: float | None, calibration: Any) -> None:
    if threads:
        torch.set_num_threads(threads)
    if dtype is not None and dtype not in DTYPES:
        raise unknown("dtype", dtype, DTYPES)
    if heal_minutes is not None and (calibration is None or not heal_minutes > 0):
        raise MasaError(f"Healing for {heal_minutes} minutes needs more than none of them, and a calibration.")


def _scorer(documents: Documents, tokenizer: Any, window: int, how: Mapping[str, Any]) -> Callable[[Any], Perplexity]:
    """What takes a model's perplexity on these documents."""
    if tokenizer is None:
        raise MasaError("The model holds no tokenizer, which evaluation on text needs.")
    documents.chat = template_of(tokenizer)
    return partial(perplexity, tokenizer=tokenizer, documents=documents, window=window, **how)


def _tokens(statistics: Calibration | None) -> Any:
    """The tokens beside statistics, seen to be those that they were made of."""
    tokens = load_tokens(statistics.directory) if statistics and statistics.directory else None
    if tokens is not None:
        statistics.check_tokens(tokens)
    return tokens
