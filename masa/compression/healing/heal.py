"""Healing: a short fine-tune of a compressed model's sources, and of nothing else.

The result has the compressed model's size, dtype and form. First, if asked, every layer is solved for again on the
inputs that it really sees (:mod:`masa.compression.healing.layerwise`), then all are trained together. By default the
dense original is the teacher (distillation, Hinton et al. 2015, arXiv 1503.02531), so that no labels are needed: the
tokens of the calibration will do.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.calibrate import Progress
from masa.compression.calibration.statistics import Calibration, tokens_sha256
from masa.compression.healing.layerwise import solve_layers
from masa.compression.healing.state import State
from masa.compression.healing.trained import Trained, adapters_of, training_only
from masa.compression.healing.training import autocast, batches, check_length, cosine
from masa.errors import MasaError, unknown
from masa.sharing.projections import SharedProjections, bank_of

OBJECTIVES = ("kl", "lm")
STEPS = 20
"""Where nobody says how long."""
SAVING = 0.97
"""What is left of a minute once the state has been written."""


def heal(
    model: nn.Module,
    tokens: Tensor,
    *,
    teacher: nn.Module | str | Path | None = None,
    objective: str = "kl",
    steps: int | None = None,
    minutes: float | None = None,
    layer_samples: int = 0,
    batch_size: int = 4,
    length: int | None = 128,
    lr: float = 3e-4,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: str | None = None,
    calibration: Calibration | None = None,
    state: str | Path | None = None,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Train the atoms, coefficients, factors and dense leftovers of a compressed model, in place.

    AdamW without weight decay, beta (0.9, 0.95), gradients clipped to norm 1, a tenth of the steps of warmup, then a
    cosine to zero. The learning rate is relative to the root mean square of each tensor, since an atom's numbers are a
    thousand times smaller than a coefficient. The optimiser works on float32 copies; the sources keep their dtype, and
    each step sees them as they are stored: positions of sparse values stay, and of numbers with few bits the scales are
    trained (as Chen et al. 2024, arXiv 2407.11062, do). All other parameters, the flags ``requires_grad`` and the
    training mode are left as they were. Where the model wears adapters (LoRA), they alone are trained.

    Args:
        model: what :func:`masa.compression.compress` or :func:`masa.share` returned or :func:`masa.load` read.
        tokens: (N, T) ids, for example the calibration's.
        teacher: the dense original, or its folder or hub id; only for the objective "kl" and ``layer_samples``.
        objective: "kl": ``KL(teacher || model)`` of the next token, in nats; "lm": cross-entropy of the tokens.
        steps: optimiser steps; by default 20.
        minutes: in the place of ``steps``: as many as fit into this time on this machine, measured before the first.
            ``steps`` of the result makes the same again.
        layer_samples: sequences on which every layer is first solved for by least squares; 0 leaves that out.
        batch_size: windows a step, drawn anew each epoch.
        length: every sequence is cut into windows of this many tokens (a shorter rest is left out); None for whole
            sequences.
        lr: peak learning rate, as a fraction of each tensor's root mean square.
        temperature: of both distributions of "kl"; the loss is multiplied by its square.
        seed: of the order of the windows.
        dtype: "bfloat16" or "float16" to run under autocast; by default the model's own.
        calibration: statistics of the original, whose gradients then say how the errors of layers count.
        state: file that is written every minute, from which an interrupted healing goes on to the same bits. It is
            left there; another model, other data or settings begin anew.
        progress: called with ("solving layers" or "healing", done, of).

    Returns:
        "losses" (one a step, before it), "layers" (of each, what was left of the squared error), "seconds", "tokens"
        (how many were seen), "trained" (numbers that were), and the settings.

    Raises:
        MasaError: a model without shared sources, no teacher or one that does not fit, a setting out of range, or a
            loss that is not finite (the sources are then what they were).
    """
    shared = _sources_of(model)
    _check(steps, minutes, layer_samples, batch_size, lr, temperature)
    steps = STEPS if steps is None and minutes is None else steps
    teacher = _teacher(teacher, objective, layer_samples, model)
    length = check_length(length, tokens)
    settings: dict[str, Any] = {"objective": objective, "steps": steps, "minutes": minutes}
    settings |= {"layer_samples": layer_samples, "batch_size": batch_size, "length": length, "lr": lr}
    settings |= {"temperature": temperature, "seed": seed, "dtype": dtype}
    started, device = time.perf_counter(), next(shared.parameters()).device
    context = autocast(device, dtype)
    windows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length).long()
    with training_only(model, shared) as trained:
        made_of = None if calibration is None else calibration.digest()
        kept = State(state, [settings, tokens_sha256(tokens), made_of, device.type], [*trained.parameters, teacher])
        if kept.found is None and layer_samples and not adapters_of(model):
            assert teacher is not None
            few = {"batch_size": batch_size, "calibration": calibration, "progress": progress}
            kept.layers = solve_layers(model, teacher, shared, tokens[:layer_samples].long(), **few)
            trained.read()
        kept.restore(trained)

        def loss_of(ids: Tensor) -> Tensor:
            with torch.enable_grad(), context:
                return _loss(model, teacher if objective == "kl" else None, ids.to(device), temperature)

        if kept.steps is None:
            left = 60 * (minutes or 0) - (time.perf_counter() - started)
            kept.steps = steps or _steps_within(left, loss_of, trained, windows[:batch_size])
            kept.save(trained, now=minutes is not None)  # how many there are is decided once
        _train(kept, trained, loss_of, batches(windows, batch_size, seed), lr, progress)
    return settings | {
        "steps": kept.steps,
        "layers": kept.layers,
        "losses": kept.losses,
        "tokens": kept.tokens,
        "trained": trained.count,
        "seconds": round(time.perf_counter() - started, 2),
    }


def _train(
    kept: State,
    trained: Trained,
    loss_of: Callable[[Tensor], Tensor],
    order: Iterator[Tensor],
    lr: float,
    progress: Progress,
) -> None:
    """All steps that are not done yet."""
    steps = kept.steps or 0
    for step, ids in enumerate(itertools.islice(order, len(kept.losses), steps), len(kept.losses)):
        progress("healing", step, steps)
        loss = loss_of(ids)
        kept.losses.append(round(loss.item(), 6))
        kept.tokens += ids.numel()
        if not math.isfinite(loss.item()):
            raise MasaError(f"Healing: the loss became {loss.item()} at step {step}. Lower lr (now {lr}).")
        loss.backward()
        trained.step(lr * cosine(step, steps, warmup=steps // 10))
        kept.save(trained)
    progress("healing", steps, steps)


def _check(
    steps: int | None, minutes: float | None, layer_samples: int, batch_size: int, lr: float, temperature: float
) -> None:
    if steps is not None and minutes is not None:
        raise MasaError("Say how long to heal: either steps or minutes.")
    if minutes is not None and not 0 < minutes < math.inf:
        raise MasaError(f"minutes must be positive, got {minutes}.")
    whole = steps is None or (isinstance(steps, int) and steps >= 1)
    if not whole or batch_size < 1 or layer_samples < 0 or not lr > 0 or not temperature > 0:
        raise MasaError(
            f"steps and batch_size must be at least 1, layer_samples not negative, lr and temperature positive; got "
            f"steps = {steps}, batch_size = {batch_size}, layer_samples = {layer_samples}, lr = {lr}, "
            f"temperature = {temperature}."
        )


def _steps_within(seconds: float, loss_of: Callable[[Tensor], Tensor], trained: Trained, ids: Tensor) -> int:
    """Steps that fit into the time, by the second of two that change nothing; at least 1."""
    for _ in range(2):
        started = time.perf_counter()
        loss_of(ids).backward()
        trained.step(0.0)
        took = time.perf_counter() - started
    trained.read()  # and an optimiser that has seen nothing
    return max(1, int((SAVING * seconds - 2 * took) / took))


def _sources_of(model: nn.Module) -> SharedProjections:
    shared = bank_of(model)
    if shared is None:
        raise MasaError("This model is dense: healing trains the sources of a compressed one. Compress it first.")
    return shared


def _teacher(
    teacher: nn.Module | str | Path | None, objective: str, layer_samples: int, model: nn.Module
) -> nn.Module | None:
    """The dense model to learn from, or None where nothing needs it."""
    if objective not in OBJECTIVES:
        raise unknown("Objective", objective, OBJECTIVES)
    if objective == "lm" and not layer_samples:
        return None
    if teacher is None:
        wants, instead = ("The objective 'kl' needs", "choose objective='lm'") if objective == "kl" else ("", "")
        wants, instead = wants or "layer_samples needs", instead or "give none"
        raise MasaError(f"{wants} the dense original: pass teacher=, or {instead}.")
    if isinstance(teacher, str | Path):
        from masa.models.pretrained import load_pretrained

        teacher, _ = load_pretrained(teacher)
    if getattr(teacher, "sharing", None) is not None:
        raise MasaError("The teacher shares weights itself; pass the dense original, loaded anew.")
    if teacher.config.vocab_size != model.config.vocab_size:
        raise MasaError(
            f"The teacher's vocabulary has {teacher.config.vocab_size} tokens, the model's {model.config.vocab_size}; "
            "pass the model that was compressed."
        )
    return teacher.eval()


def _loss(model: nn.Module, teacher: nn.Module | None, ids: Tensor, temperature: float) -> Tensor:
    """Mean over the predicted tokens of one batch (b, T)."""
    if teacher is None:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    def predictions(of: nn.Module, device: torch.device) -> Tensor:
        logits = of(input_ids=ids.to(device), use_cache=False).logits
        return torch.log_softmax(logits.flatten(0, 1).float() / temperature, -1)

    with torch.no_grad():
        target = predictions(teacher, next(teacher.parameters()).device).to(ids.device)
    found = predictions(model, ids.device)
    return nn.functional.kl_div(found, target, reduction="batchmean", log_target=True) * temperature**2
