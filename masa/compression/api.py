"""compress(): a dense model in, a factored model and a report out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.base import Compressor, Problem, make_compressor
from masa.compression.calibration.calibrate import Progress, check_weights, compressible
from masa.compression.calibration.statistics import Calibration
from masa.compression.calibration.stream import not_finite
from masa.compression.report import CompressionReport, peak_rss, reset_peak_rss
from masa.compression.sizes import budget_of_size, letters
from masa.errors import BEYOND, MasaError
from masa.sharing.compression_spec import CompressionSpec
from masa.sharing.part_sources import guard_bytes
from masa.sharing.projections import Family, SharedProjections, model_shape
from masa.sharing.share import ParameterCount, Sharing, count_parameters, install
from masa.sharing.spec import ATTENTION
from masa.sharing.weight_sources import WeightSource

TOLERANCE = 0.005
"""Achieved reductions lie within this above the requested one."""

_log = logging.getLogger("masa")


@torch.inference_mode(False)  # whose tensors could have no gradient, nor be trained on
@torch.no_grad()
def compress(
    model: nn.Module,
    method: str | Mapping[str, Any] | Compressor,
    calibration: Calibration | str | Path | None = None,
    reduction: float | None = None,
    *,
    size: int | str | None = None,
    tokens: Tensor | None = None,
    projections: str = ATTENTION,
    batch_size: int = 4,
    progress: Progress = lambda what, done, of: None,
    **options: Any,
) -> tuple[nn.Module, CompressionReport]:
    """Compress a trained model in place: its projections then read from shared sources of fewer numbers.

    The result is what :func:`masa.share` returns, already solved for: :func:`masa.save` and :func:`masa.load` keep it
    factored, :func:`masa.fold` writes a plain model, :func:`masa.count_parameters` counts it, and it can be trained on.

    Args:
        model: a dense language model of transformers. Only its projections change, unless the method says
            ``changes_model`` (post-share).
        method: a key of :data:`masa.compression.COMPRESSORS`, a mapping of "method" and its hyperparameters, or what
            :func:`masa.compression.make_compressor` returned: an instance used again for another reduction of the same
            model, freshly loaded, solves only what depends on the reduction (``report.seconds`` counts the rest, too).
        calibration: statistics of this very model (checked by hash), or their directory; methods blind to data take
            None.
        reduction: fraction of the numbers in ``projections`` to save, in (0, 1), everything stored counted; by default
            0.2. Never missed; exceeded by at most 0.5 point unless the method's granularity is coarser
            (``report.on_target``).
        size: of the whole model in bytes, as a number or as "900MB", "1.5GiB", in the place of ``reduction``.
        tokens: the calibration's (N, T) ids, for methods that run the model again.
        projections: letters that are compressed, or "all" linear layers of the blocks.
        batch_size: samples at once, where the model runs.
        progress: called with (what, done, of).
        **options: hyperparameters of the method; none with an instance, which has its own.

    Returns:
        (model, report).

    Raises:
        MasaError: unknown method or option; no, foreign or unfit statistics; NaN or infinity in a weight; an
            unsupported architecture; tied projections; a reduction out of reach (the message says what is in reach).
    """
    if isinstance(method, Mapping):
        options = {k: v for k, v in method.items() if k != "method"} | options
        method = str(method.get("method"))
    if isinstance(method, Compressor) and options:
        raise MasaError(f"This {method.name!r} has its options already; give {', '.join(options)} when you make it.")
    compressor = method if isinstance(method, Compressor) else make_compressor(method, **options)
    if reduction is not None and size is not None:
        raise MasaError("Say how small: either a reduction, of the compressed projections, or a size, of all.")
    if size is None:
        check_reduction(reduction := 0.2 if reduction is None else reduction)
    if getattr(model, "sharing", None) is not None:
        raise MasaError(f"This model shares weights already ({model.sharing.spec.method}); fold it first.")
    projections = letters(model, projections)
    family = compressible(model, projections)
    shape = model_shape(model, family)
    _check_matrices(family, projections)
    if not isinstance(calibration, Calibration) and (line := family.passed_over(projections)):
        _log.warning("masa: %s", line)  # else the calibration has said so
    calibration = _checked(compressor, model, calibration, tokens)
    problem = Problem(model, shape, projections, 0, calibration, tokens, batch_size, progress, family=family)
    if reduction is None:
        problem.budget = budget_of_size(model, shape, projections, size)
        reduction = 1 - problem.budget / problem.dense
    else:
        problem.budget = int((1 - reduction) * problem.dense)
    before = count_parameters(model)
    model.eval()

    reset_peak_rss()
    started = time.perf_counter()
    sources = _fitted(compressor, problem)
    install(model, SharedProjections(sources, shape.layers))
    seconds = time.perf_counter() - started + problem.seconds_before
    peak = max(peak_rss(), problem.peak_before)

    spec = CompressionSpec(compressor.name, float(reduction), projections, compressor.get_params())
    model.sharing = Sharing(spec, before.attention_dense)
    return model, _report(model, compressor, problem, before, sources, seconds, peak)


def _fitted(compressor: Compressor, problem: Problem) -> list[WeightSource]:
    """The sources, whose every number is finite; the model is as it was where they are refused."""
    said = str(problem.dtype).removeprefix("torch.")
    try:
        sources = compressor.fit(problem)
    except torch.linalg.LinAlgError as error:
        raise MasaError(
            f"{compressor.name}: a matrix cannot be decomposed ({error}). Its numbers, or those of the statistics, are "
            f"too large or too far apart for {said}; {BEYOND}."
        ) from error
    for source in sources:
        if not_finite(source.state_dict()):
            where = f"the factors of {source.projections}"
            raise MasaError(f"{compressor.name}: {where} have numbers that {said} cannot hold; {BEYOND}.")
    return sources


def check_reduction(reduction: Any) -> None:
    """Raise :class:`MasaError` unless it is a fraction."""
    if isinstance(reduction, bool) or not isinstance(reduction, int | float) or not 0 < reduction < 1:
        raise MasaError(f"reduction is a fraction between 0 and 1 (0.2 saves 20 %), got {reduction!r}.")


def _checked(
    compressor: Compressor, model: nn.Module, calibration: Calibration | str | Path | None, tokens: Tensor | None
) -> Calibration | None:
    """The statistics, which are of this model and of these tokens."""
    if compressor.needs_calibration or compressor.needs_tokens:
        if calibration is None:
            raise MasaError(
                f"{compressor.name!r} needs calibration statistics: pass what masa.compression.calibrate returned."
            )
        if compressor.needs_tokens and tokens is None:
            raise MasaError(f"{compressor.name!r} runs the model again: pass the calibration's tokens as tokens=.")
    if isinstance(calibration, str | Path):
        calibration = Calibration.load(calibration)
    if calibration is not None:
        calibration.check(model, tokens if compressor.needs_tokens else None)
    return calibration


def _report(
    model: nn.Module,
    compressor: Compressor,
    problem: Problem,
    before: ParameterCount,
    sources: Sequence[WeightSource],
    seconds: float,
    peak: int,
) -> CompressionReport:
    """What was saved; more than was asked for is a defect of the method."""
    spec, after = model.sharing.spec, count_parameters(model)
    stored = sum(source.stored_numbers() for source in sources)
    dtype = problem.dtype
    achieved = 1 - stored / problem.dense
    assert stored <= problem.budget, f"{spec.method} stored {stored} numbers for a budget of {problem.budget}"
    return CompressionReport(
        method=spec.method,
        options=compressor.get_params(),
        projections=spec.projections,
        reduction_requested=spec.reduction,
        reduction_achieved=achieved,
        attention_reduction=after.attention_reduction,
        model_reduction=1 - after.total / before.total,
        parameters_before=before.total,
        parameters_after=after.total,
        stored=stored,
        dense=problem.dense,
        stored_bytes=sum(s.stored_bytes() for s in sources) + guard_bytes(problem.shape, spec.projections, dtype),
        dense_bytes=problem.dense * dtype.itemsize,
        on_target=achieved <= spec.reduction + TOLERANCE,
        seconds=round(seconds, 3),
        peak_rss_bytes=peak,
        regularisation=problem.regularisation,
        calibration=problem.calibration.made_of() if problem.calibration else None,
        shapes={p: list(problem.shape.shapes[p]) for p in spec.projections},
        learned=compressor.learned(),
    )


def _check_matrices(family: Family, projections: str) -> None:
    """No NaN; every matrix a tensor of its own."""
    seen: dict[tuple[int, str], str] = {}
    for layer, block in enumerate(family.blocks):
        letters = "".join(p for p in projections if layer in family.layers(p))
        check_weights(family, block, layer, letters)
        for letter in letters:
            part = letter if family.place(layer, letter).layout else ""
            key = family.layer(block, layer, letter).weight.data_ptr(), part
            name = f"{letter} of layer {layer}"
            if key in seen:
                raise MasaError(
                    f"{name} and {seen[key]} are one tensor: this model ties its projections, and its "
                    "dense size cannot be told. Untie them first."
                )
            seen[key] = name
