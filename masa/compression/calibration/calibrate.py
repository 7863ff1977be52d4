"""One pass over the calibration tokens, block by block: autocorrelations, mean outputs, KL drift.

The hidden states of all samples are kept and one block at a time runs over them, so that memory holds the hidden
states (N T d), one block, one batch of its activations and one layer's statistics, whatever the model's size.
Gradients come of a way back over the blocks (:mod:`masa.compression.calibration.gradients`).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from masa.compression.calibration.calls import Calls
from masa.compression.calibration.gradients import BlockInputs, add_gradients
from masa.compression.calibration.statistics import INPUT_OF, Calibration, model_sha256, tokens_sha256
from masa.compression.calibration.stream import BlockStream, GramHooks, not_finite
from masa.compression.sizes import letters
from masa.errors import BEYOND, MasaError
from masa.models.positions import positions_of
from masa.sharing.projections import Family, family_of
from masa.sharing.spec import ATTENTION, PROJECTIONS

USUAL_LENGTH = 512
"""Tokens of a calibration sequence."""

_log = logging.getLogger("masa")

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""

_log = logging.getLogger("masa")


@torch.inference_mode(False)  # whose tensors could have no gradient, nor be trained on
@torch.no_grad()
def calibrate(
    model: nn.Module,
    tokens: Tensor | Sequence[Sequence[int]],
    *,
    directory: str | Path | None = None,
    projections: str = ATTENTION,
    batch_size: int = 4,
    dtype: torch.dtype | None = None,
    gradient_samples: int = 0,
    seed: int | None = None,
    text_sha256: str | None = None,
    progress: Progress = lambda what, done, of: None,
) -> Calibration:
    """Collect, in one pass, what every compression method needs.

    Args:
        model: a dense language model of transformers, in ``eval()`` or not; its weights may be memory-mapped.
        tokens: (N, T) token ids, all of equal length.
        directory: write each layer's statistics there as soon as they are known, and read them from there later.
        projections: letters whose inputs are wanted, or "all"; attention by default.
        batch_size: samples that run at once.
        dtype: of the computation; by default the model's. float32 for a model stored in bfloat16 costs one block.
        gradient_samples: run this many of the sequences, the first ones, backward too, for the methods that weigh
            outputs by the loss's gradients (:mod:`masa.compression.calibration.gradients`).
        seed, text_sha256: of the choice of ``tokens`` and of the text that they are from; kept with the statistics.
        progress: called with ("calibrating", done, of).

    Returns:
        The statistics. Fewer tokens than their rank takes are said in the log.

    Raises:
        MasaError: no tokens, ids outside the vocabulary, a NaN or infinity in weights or activations (the message
            names layer and projection), an unknown architecture, or a model that is shared already.
    """
    family, projections, tokens = checked(model, tokens, projections, batch_size, gradient_samples)
    training = model.training
    if line := family.passed_over(projections):
        _log.warning("masa: %s", line)
    _say_if_few(tokens.numel(), max(inp for p in projections for _, inp in family.shapes(p)))
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "calibration.json").unlink(missing_ok=True)
    result = Calibration(
        *tokens.shape,
        num_layers=len(family.blocks),
        inputs=list(dict.fromkeys(INPUT_OF[p] for p in projections)),
        tokens_sha256=tokens_sha256(tokens),
        model_sha256=model_sha256(model),
        seed=seed,
        text_sha256=text_sha256,
        threads=torch.get_num_threads(),
        directory=Path(directory) if directory is not None else None,
    )
    model.eval()
    inputs: BlockInputs | None = None
    try:
        started = time.perf_counter()
        stream = BlockStream(model, tokens, batch_size, dtype)
        stream.calls.check(gradients=bool(gradient_samples))
        check_inputs(stream.calls, family, projections)
        inputs = BlockInputs(stream, gradient_samples, result.directory)
        means = _through_the_blocks(stream, family, projections, result, inputs, progress)
        result.tokens_per_second = round(tokens.numel() / (time.perf_counter() - started), 1)
        result.drift = kl_drift(model, stream.calls, torch.stack(means)).tolist()
        if gradient_samples:
            add_gradients(result, model, stream, inputs, projections, progress)
    finally:
        model.train(training)
        if inputs is not None:
            inputs.close()
    if directory is not None:
        result.save()
    return result


def checked(
    model: nn.Module, tokens: Tensor, projections: str, batch_size: int, gradient_samples: int
) -> tuple[Family, str, Tensor]:
    """The model's family, the letters and the tokens of a calibration that can begin; nothing is written.

    Raises:
        MasaError: what :func:`calibrate` raises before it runs anything.
    """
    if getattr(model, "sharing", None) is not None:
        raise MasaError(f"This model shares weights already ({model.sharing.spec.method}); calibrate the dense one.")
    projections, family = check_asked(model, projections, batch_size, gradient_samples)
    tokens = _check_tokens(tokens, model)
    if gradient_samples and model.get_output_embeddings() is None:
        raise MasaError(
            f"{type(model).__name__} predicts no tokens, so that there is no loss whose gradients could be taken "
            "(gradient_samples, the *-fisher methods). Choose another method, or calibrate the causal LM."
        )
    return family, projections, tokens


def _through_the_blocks(
    stream: BlockStream,
    family: Family,
    projections: str,
    result: Calibration,
    inputs: BlockInputs,
    progress: Progress,
) -> list[Tensor]:
    """Add each layer's statistics to the result and its inputs to those kept; the mean outputs (d,) of all layers."""
    means = []
    for layer in range(len(stream.blocks)):
        progress("calibrating", layer, len(stream.blocks))
        block = stream.block(layer)
        check_weights(family, block, layer, "".join(family.found[layer].places))
        inputs.keep()
        hooks = GramHooks(family, layer, "".join(p for p in projections if layer in family.layers(p)))
        with hooks.attached(block):
            means.append(stream.run(layer, block).float())
        found = hooks.grams | {"output": means[-1]}
        for name in not_finite(found):
            where = "output" if name == "output" else f"activations that enter {'/'.join(name)}"
            raise MasaError(f"NaN or infinity in the {where} of layer {layer}; {BEYOND}.")
        result.add(layer, found)
    progress("calibrating", len(stream.blocks), len(stream.blocks))
    return means


def kl_drift(model: nn.Module, calls: Calls, outputs: Tensor) -> Tensor:
    """``KL(p_l || p_l+1)`` with ``p_l = softmax(head(norm(h_l)))`` for mean block outputs h (L, d) -> (L - 1,).

    A model without a head over the vocabulary (a classifier, a bare decoder) is read through its input embeddings, as
    one that ties both.
    """
    head = model.get_output_embeddings() or model.get_input_embeddings()
    outputs = outputs.to(calls.hidden_dtype)
    hidden = calls.leave(outputs)
    if hidden.shape[-1] == head.weight.shape[-1]:
        logits = nn.functional.linear(hidden, head.weight)
    else:  # the head has another width, which is the model's own affair
        logits = calls.logits(outputs)
    logp = torch.log_softmax(logits.float().double(), -1)
    return (logp[:-1].exp() * (logp[:-1] - logp[1:])).sum(-1).clamp_min(0).cpu()


def check_asked(model: nn.Module, projections: str, batch_size: int, gradient_samples: int) -> tuple[str, Family]:
    """The letters asked for, and where the model has them.

    Raises:
        MasaError: it has not, or a number is out of range.
    """
    if batch_size < 1 or gradient_samples < 0:
        name, value = ("batch_size", batch_size) if batch_size < 1 else ("gradient_samples", gradient_samples)
        raise MasaError(f"{name} is a number of sequences, at least {int(name == 'batch_size')}, got {value}.")
    projections = letters(model, projections)
    return projections, compressible(model, projections)


def compressible(model: nn.Module, projections: str) -> Family:
    """The family of a model that can be calibrated and compressed.

    Raises:
        MasaError: it is no language model, or has not these projections.
    """
    family = family_of(model)
    if not family.language:
        raise MasaError(
            f"{type(model).__name__} is no language model: compression calibrates on tokens. Such a model can share "
            "weights while it trains (masa.share)."
        )
    if not projections or len(set(projections)) != len(projections) or set(projections) - set(PROJECTIONS):
        raise MasaError(f"projections must be distinct letters of {', '.join(family.paths)}, got {projections!r}.")
    family.require(projections)
    return family


def check_inputs(calls: Calls, family: Family, projections: str) -> None:
    """Raise :class:`MasaError` unless the model calls every projection, those of one input with the same one."""
    seen: dict[tuple[int, str], Tensor] = {}

    def keep(key: tuple[int, str], module: nn.Module, args: tuple[Tensor]) -> None:
        seen[key] = args[0]

    wanted = [(layer, p) for p in projections for layer in family.layers(p)]
    handles = [
        family.layer(family.blocks[layer], layer, p).register_forward_pre_hook(partial(keep, (layer, p)))
        for layer, p in wanted
    ]
    try:
        calls.run(calls.probe)
    finally:
        for handle in handles:
            handle.remove()
    for layer, p in wanted:
        other = next(other for other in projections if INPUT_OF[other] == INPUT_OF[p] and (layer, other) in seen)
        same = (layer, p) in seen and torch.allclose(seen[layer, p], seen[layer, other], rtol=0, atol=0, equal_nan=True)
        if not same:
            what = f"reads another input than {other!r}" if (layer, p) in seen else "is not called where tokens run"
            raise MasaError(f"Projection {p!r} of layer {layer} {what}: leave it out of projections.")


def check_weights(family: Family, block: nn.Module, layer: int, letters: str) -> None:
    """Raise :class:`MasaError` for a NaN or infinity in a weight, naming layer and projection."""
    for letter in not_finite({p: family.layer(block, layer, p).weight for p in letters}):
        path = family.place(layer, letter).path
        raise MasaError(f"NaN or infinity in the weight of projection {letter!r} ({path}) of layer {layer}; {BEYOND}.")


def _say_if_few(tokens: int, width: int) -> None:
    """H = X^T X of T tokens has a rank of at most T; with fewer than its width, directions are missing."""
    if tokens < 2 * width:
        _log.warning(
            "masa: %d tokens are few to calibrate a width of %d on (H has a rank of at most %d); %d or more would be "
            "better.",
            *(tokens, width, min(tokens, width), 16 * width),
        )


def check_length(model: nn.Module, length: int | None = None) -> int:
    """Tokens a calibration sequence: what is asked for, else 512 or as many as the model has positions.

    Raises:
        MasaError: the model has fewer positions.
    """
    known = positions_of(model)
    if length is None:
        return min(USUAL_LENGTH, known or USUAL_LENGTH)
    if known and length > known:
        raise MasaError(
            f"Calibration sequences are to have {length:,} tokens, but this model knows {known:,} positions "
            "(max_position_embeddings). Give shorter ones (length)."
        )
    return length


def _check_tokens(tokens: Tensor | Sequence[Sequence[int]], model: nn.Module) -> Tensor:
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError) as error:
        raise MasaError(f"Calibration tokens must be N sequences of one length T: {error}") from error
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point():
        raise MasaError(f"Calibration tokens must be integers (N, T), got {tokens.dtype} {tuple(tokens.shape)}.")
    check_length(model, tokens.shape[1])
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise MasaError(
            f"Calibration tokens reach from {int(tokens.min())} to {int(tokens.max())}, but the vocabulary has "
            f"{vocabulary}. Use the tokenizer of this model."
        )
    return tokens.long()
