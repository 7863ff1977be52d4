"""Healing from plain arguments: the body of the command line's verb, and of what follows a compression there."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.calibrate import Progress, check_length
from masa.compression.calibration.statistics import Calibration
from masa.compression.calibration.texts import load_tokens, tokens_of
from masa.compression.healing.heal import heal
from masa.compression.output import ACCOUNT, account_of, target_beside
from masa.compression.report import peak_rss, reset_peak_rss
from masa.compression.terminal import terminal
from masa.data.texts import Documents, template_of
from masa.errors import MasaError
from masa.models.beside import hand_on
from masa.models.pretrained import load_pretrained, locate
from masa.runs.files import whole_folder
from masa.runs.run import write_json
from masa.sharing.checkpoint import load, save

MINUTES = 10.0
SAMPLES = 512
"""Sequences drawn of a text, at most."""
LAYER_SAMPLES = 8
WINDOW = 128
RATE = 3e-4


def run_heal(
    model: str | Path,
    output: str | Path,
    original: str,
    calibration: str | Path | None = None,
    *,
    text: str | Path | None = None,
    column: str | None = None,
    subset: str | None = None,
    split: str | None = None,
    minutes: float | None = None,
    steps: int | None = None,
    layer_samples: int = LAYER_SAMPLES,
    samples: int = SAMPLES,
    length: int | None = None,
    batch_size: int = 4,
    lr: float = RATE,
    seed: int = 0,
    dtype: str | None = "auto",
    threads: int | None = None,
    device: str = "auto",
    quiet: bool = False,
) -> dict[str, Any]:
    """Heal a compressed folder and write it again, of the same size and form.

    Args:
        model: folder that :func:`masa.save`, a training or :func:`masa.compression.run_compress` wrote.
        output: directory as of :func:`masa.compression.run_compress`. What an interrupted healing goes on from lies
            beside it in ``OUTPUT.healing`` meanwhile.
        original: folder, GGUF file or hub id of the dense model.
        calibration: statistics of the original; their tokens are trained on unless there is a ``text``, and where they
            have gradients, these say how the errors of layers count.
        text, column, subset, split: documents to train on, as for :func:`masa.compression.run_calibrate`.
        minutes, steps: how long; by default 10 minutes.
        layer_samples: sequences on which every layer is solved for first; 0 leaves that out.
        samples: sequences of 512 tokens that are drawn of a text, or as many as it has.
        length: tokens of a window; by default 128, or as many as the sequences have.
        batch_size, lr, seed: see :func:`masa.compression.heal`.
        dtype: of the computation under autocast; "auto" is bfloat16 where the processor multiplies it, None the stored.
        threads: of the CPU; by default torch's own choice.
        device: "auto" (a GPU where there is one), "cpu", "cuda:1", …
        quiet: no progress.

    Returns:
        Summary: what :func:`masa.compression.heal` returns, and memory; it also goes to ``compression.json``, beside
        what an earlier compression wrote there.

    Raises:
        MasaError: nothing to train on, or see :func:`masa.compression.heal`.
    """
    if threads:
        torch.set_num_threads(threads)
    if calibration is None and text is None:
        raise MasaError("Healing needs something to train on: give a text, or the statistics of a calibration.")
    where = Path(model)
    target = target_beside(output, where)
    documents = None if text is None else Documents(text, column, subset=subset, split=split).check()
    with whole_folder(target) as folder:
        loaded = load(where, runtime="factored")
        teacher, tokenizer = load_pretrained(locate(original), device=device)
        loaded.to(next(teacher.parameters()).device)
        tokens = None if documents is None else _drawn(teacher, tokenizer, documents, samples, seed)
        settings = {"layer_samples": layer_samples, "length": length, "batch_size": batch_size, "lr": lr, "seed": seed}
        with terminal(quiet) as progress:
            healing = healed(
                loaded,
                teacher,
                target,
                calibration,
                tokens=tokens,
                minutes=MINUTES if minutes is None and steps is None else minutes,
                steps=steps,
                dtype=dtype,
                progress=progress,
                **settings,
            )
        save(loaded, folder)
        summary = {"model": str(model), "original": original, "output": str(output)} | healing
        summary |= {"handed_on": hand_on(where, folder)}
        write_json(folder / ACCOUNT, account_of(where) | {"healing": summary})
    state_of(target).unlink(missing_ok=True)
    return summary


def state_of(output: Path) -> Path:
    """The file that an interrupted healing into a folder goes on from."""
    return output.with_name(f"{output.name}.healing")


def healed(
    model: nn.Module,
    teacher: nn.Module,
    output: Path,
    calibration: str | Path | Calibration | None,
    *,
    tokens: Tensor | None = None,
    length: int | None = None,
    layer_samples: int = LAYER_SAMPLES,
    dtype: str | None = "auto",
    progress: Progress,
    **settings: Any,
) -> dict[str, Any]:
    """:func:`masa.compression.heal` with what lies in files, resumable.

    Args:
        output: folder beside which the state is.
        calibration: statistics; their tokens are taken where there are no others.

    Returns:
        What it returns, and the peak memory.
    """
    reset_peak_rss()
    if calibration is not None and not isinstance(calibration, Calibration):
        calibration = Calibration.load(calibration)
    if tokens is None:
        assert calibration is not None
        tokens = load_tokens(calibration.directory) if calibration.directory else None
        if tokens is None:
            raise MasaError("The statistics have lost their tokens (tokens.safetensors); give a text to train on.")
        calibration.check_tokens(tokens)
    if dtype == "auto":
        dtype = _fast_dtype(next(model.parameters()).device)
    started = time.perf_counter()
    found = heal(
        model,
        tokens,
        teacher=teacher,
        layer_samples=layer_samples,
        length=min(WINDOW, tokens.shape[1]) if length is None else length,
        dtype=dtype,
        calibration=calibration if calibration is not None and calibration.gradient_samples else None,
        state=state_of(output),
        progress=progress,
        **settings,
    )
    return found | {"seconds": round(time.perf_counter() - started, 2), "peak_rss_bytes": peak_rss()}


def _drawn(model: nn.Module, tokenizer: Any, documents: Documents, samples: int, seed: int) -> Tensor:
    """Sequences of a text, as many as it has and no more than ``samples``."""
    if tokenizer is None:
        raise MasaError("The original holds no tokenizer, which healing on text needs.")
    documents.chat = template_of(tokenizer)
    return tokens_of(documents, model, tokenizer, None, samples, check_length(model, None), seed)


def _fast_dtype(device: torch.device) -> str | None:
    """bfloat16 where it is multiplied by the hardware, else what the model is stored in."""
    if device.type == "cpu":
        known = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        known = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if known else None
