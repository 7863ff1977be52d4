"""Healing: a short fine-tune of a compressed model's sources, and of nothing else.

The result has the compressed model's size, dtype and form. By default the dense original is the teacher (distillation,
Hinton et al. 2015, arXiv 1503.02531), so that no labels are needed: the tokens of the calibration will do.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.calibrate import Progress
from masa.compression.healing.training import autocast, batches, check_length, cosine
from masa.errors import MasaError, unknown
from masa.sharing.projections import SharedProjections, bank_of

OBJECTIVES = ("kl", "lm")


def heal(
    model: nn.Module,
    tokens: Tensor,
    *,
    teacher: nn.Module | str | Path | None = None,
    objective: str = "kl",
    steps: int = 20,
    batch_size: int = 4,
    length: int | None = 128,
    lr: float = 3e-4,
    temperature: float = 1.0,
    seed: int = 0,
    dtype: str | None = None,
    progress: Progress = lambda what, done, of: None,
) -> dict[str, Any]:
    """Train the atoms, coefficients, factors and dense leftovers of a compressed model, in place.

    AdamW without weight decay, beta (0.9, 0.95), gradients clipped to norm 1, a tenth of the steps of warmup, then a
    cosine to zero. The learning rate is relative to the root mean square of each tensor, since an atom's numbers are a
    thousand times smaller than a coefficient. The optimiser works on float32 copies; the sources keep their dtype, and
    each step sees them as they are stored. All other parameters, the flags ``requires_grad`` and the training mode are
    left as they were.

    Args:
        model: what :func:`masa.compression.compress` returned or :func:`masa.load` read.
        tokens: (N, T) ids, for example the calibration's.
        teacher: the dense original, or its folder or hub id; only for the objective "kl".
        objective: "kl": ``KL(teacher || model)`` of the next token, in nats; "lm": cross-entropy of the tokens.
        steps: optimiser steps.
        batch_size: windows a step, drawn anew each epoch.
        length: every sequence is cut into windows of this many tokens (a shorter rest is left out); None for whole
            sequences.
        lr: peak learning rate, as a fraction of each tensor's root mean square.
        temperature: of both distributions of "kl"; the loss is multiplied by its square.
        seed: of the order of the windows.
        dtype: "bfloat16" or "float16" to run under autocast; by default the model's own.
        progress: called with ("healing", done, of).

    Returns:
        "losses" (one a step, before it), "seconds", "tokens" (how many were seen), "trained" (numbers that were), and
        the settings.

    Raises:
        MasaError: a model without shared sources, no teacher or one that does not fit, a setting out of range, or a
            loss that is not finite (the sources are then what they were).
    """
    shared = _sources_of(model)
    if not isinstance(steps, int) or steps < 1 or batch_size < 1 or not lr > 0 or not temperature > 0:
        raise MasaError(
            f"steps and batch_size must be at least 1, lr and temperature positive; got steps = {steps}, "
            f"batch_size = {batch_size}, lr = {lr}, temperature = {temperature}."
        )
    teacher = _teacher(teacher, objective, model)
    length = check_length(length, tokens)
    windows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length).long()

    started, device = time.perf_counter(), next(shared.parameters()).device
    context, losses, seen = autocast(device, dtype), [], 0
    order = batches(windows, batch_size, seed)
    with _training_only(model, shared) as sources:
        masters = [p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in sources]
        groups = [{"params": [m], "size": float(m.square().mean().sqrt())} for m in masters]
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        for step in range(steps):
            progress("healing", step, steps)
            ids = next(order).to(device)
            with torch.enable_grad(), context:
                loss = _loss(model, teacher, ids, temperature)
            losses.append(round(loss.item(), 6))
            seen += ids.numel()
            if not math.isfinite(loss.item()):
                raise MasaError(f"Healing: the loss became {loss.item()} at step {step}. Lower lr (now {lr}).")
            loss.backward()
            for group in optimiser.param_groups:
                group["lr"] = lr * group["size"] * cosine(step, steps, warmup=steps // 10)
            _step(optimiser, sources, masters)
        progress("healing", steps, steps)
    return {
        "objective": objective,
        "steps": steps,
        "batch_size": batch_size,
        "length": length,
        "lr": lr,
        "temperature": temperature,
        "seed": seed,
        "dtype": dtype,
        "losses": losses,
        "tokens": seen,
        "trained": sum(p.numel() for p in sources),
        "seconds": round(time.perf_counter() - started, 2),
    }


def _sources_of(model: nn.Module) -> SharedProjections:
    shared = bank_of(model)
    if shared is None:
        raise MasaError("This model is dense: healing trains the sources of a compressed one. Compress it first.")
    return shared


@contextmanager
def _training_only(model: nn.Module, shared: SharedProjections) -> Iterator[list[nn.Parameter]]:
    """The sources' parameters, which alone have gradients meanwhile; after an error they are what they were."""
    sources = list(shared.parameters())
    before = [p.detach().clone() for p in sources]
    others = list({id(p): p for p in model.parameters()}.values())
    flags, training = [p.requires_grad for p in others], model.training
    for p in others:
        p.requires_grad_(False)
    for p, values in zip(sources, before, strict=True):
        p.data = values.clone()  # a memory-mapped file is not written to
        p.requires_grad_(True)
    model.eval()
    try:
        yield sources
    except BaseException:
        for p, values in zip(sources, before, strict=True):
            p.data = values
        raise
    finally:
        for p, flag in zip(others, flags, strict=True):
            p.requires_grad_(flag)
            p.grad = None
        model.train(training)


def _teacher(teacher: nn.Module | str | Path | None, objective: str, model: nn.Module) -> nn.Module | None:
    """The dense model to learn from, or None where the objective needs none."""
    if objective not in OBJECTIVES:
        raise unknown("Objective", objective, OBJECTIVES)
    if objective == "lm":
        return None
    if teacher is None:
        raise MasaError("The objective 'kl' needs the dense original: pass teacher=, or choose objective='lm'.")
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


def _step(optimiser: torch.optim.Optimizer, sources: list[nn.Parameter], masters: list[Tensor]) -> None:
    """One step of the masters with the sources' gradients; the sources get the masters' values, rounded."""
    for p, master in zip(sources, masters, strict=True):
        master.grad = None if p.grad is None else p.grad.to(master.dtype)
        p.grad = None
    nn.utils.clip_grad_norm_(masters, 1.0)
    optimiser.step()
    with torch.no_grad():
        for p, master in zip(sources, masters, strict=True):
            p.copy_(master)
