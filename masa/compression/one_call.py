"""compress() in one call: a model in hand and some text, and out comes a smaller model of transformers."""

from __future__ import annotations

from typing import Any

from torch import nn

from masa.compression import api
from masa.compression.base import make_compressor
from masa.compression.calibration.calibrate import Progress, calibrate, check_length, compressible
from masa.compression.calibration.statistics import Calibration
from masa.compression.calibration.texts import tokens_of
from masa.compression.names import GRADIENT_SAMPLES, METHODS, needs_gradients
from masa.compression.sizes import budget_of_size, letters
from masa.compression.terminal import terminal
from masa.errors import MasaError
from masa.sharing.projections import model_shape
from masa.sharing.spec import ATTENTION


def compress(
    model: nn.Module,
    data: Any = None,
    *,
    reduction: float | None = None,
    size: int | str | None = None,
    method: str = "svd-global",
    tokenizer: Any = None,
    column: str | None = None,
    samples: int = 64,
    length: int | None = None,
    seed: int = 0,
    projections: str = ATTENTION,
    batch_size: int = 4,
    progress: Progress | None = None,
    **options: Any,
) -> nn.Module:
    """Compress a trained model, in place: calibrate on some text, then solve for fewer numbers.

    Both steps by themselves are :func:`masa.calibrate` and :func:`masa.compression.compress`.

    Args:
        model: a dense language model of transformers, with any head or none.
        data: texts (a list or a generator of strings, or a file of them), a ``datasets.Dataset`` with a column of texts
            or of ``input_ids``, a ``DataLoader`` whose batches hold ``input_ids``, token ids (N, T), or what
            :func:`masa.calibrate` returned. None for methods that look at the weights alone.
        reduction: fraction of the numbers in ``projections`` to save, in (0, 1).
        size: of the whole model in bytes, as a number or as "900MB", "1.5GiB", instead of ``reduction``.
        method: a key of :data:`masa.compression.COMPRESSORS`.
        tokenizer: for texts; by default the one that lies where the model came from.
        column: of a data set that has its texts neither in "text" nor in "content".
        samples, length: sequences and their tokens, at most, by default 512 or what the model has positions for; the
            paper takes 256 x 2048.
        seed: of the choice of sequences.
        projections: letters that are compressed, or "all" linear layers of the blocks.
        batch_size: samples at once, where the model runs.
        progress: called with (what, done, of); by default a line on the terminal.
        **options: hyperparameters of the method.

    Returns:
        ``model`` itself: ``save_pretrained`` writes it factored, :func:`masa.fold` makes it plain. What was done is in
        ``model.compression_report``, a :class:`masa.compression.CompressionReport`.

    Raises:
        MasaError: both or none of ``reduction`` and ``size``, or one out of reach; data of another kind, or too few;
            else see :func:`masa.compression.compress`.

    Example:
        >>> model = masa.compress(model, texts, reduction=0.2, tokenizer=tokenizer)  # doctest: +SKIP
        >>> model.save_pretrained("smaller")  # doctest: +SKIP
    """
    if isinstance(data, str) and data in METHODS:
        raise MasaError(
            f"{data!r} is a method: masa.compress(model, data, method={data!r}, reduction=0.2). The call with "
            "statistics and a report is masa.compression.compress."
        )
    if (reduction is None) == (size is None):
        raise MasaError("Say how small: either reduction=0.2 (of the compressed projections) or size='900MB' (of all).")
    compressor = make_compressor(method, **options)
    projections = letters(model, projections)
    shape = model_shape(model, compressible(model, projections))
    if size is not None:  # before the data are gone through
        budget_of_size(model, shape, projections, size)
    else:
        api.check_reduction(reduction)
    statistics, tokens = (data, None) if isinstance(data, Calibration) else (None, None)
    if (compressor.needs_calibration or compressor.needs_tokens) and statistics is None:
        if data is None:
            raise MasaError(
                f"{method!r} needs data to calibrate on: texts, a Dataset, a DataLoader or token ids (N, T)."
            )
        tokens = tokens_of(data, model, tokenizer, column, samples, check_length(model, length), seed)
    with terminal(progress is not None) as shown:
        told: dict[str, Any] = {"projections": projections, "batch_size": batch_size, "progress": progress or shown}
        if tokens is not None:
            gradients = min(GRADIENT_SAMPLES, len(tokens)) if needs_gradients(method) else 0
            statistics = calibrate(model, tokens, gradient_samples=gradients, seed=seed, **told)
        model, report = api.compress(model, compressor, statistics, reduction, size=size, tokens=tokens, **told)
    model.compression_report = report
    return model
