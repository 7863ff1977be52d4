"""One pass over the calibration tokens, block by block: autocorrelations, mean outputs, KL drift.

The hidden states of all samples are kept and one block at a time runs over them, so that memory holds the hidden
states (N T d), one block, one batch of its activations and one layer's statistics, whatever the model's size.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.gradients import add_gradients
from masa.compression.calibration.statistics import INPUT_OF, Calibration, model_sha256, tokens_sha256
from masa.errors import MasaError
from masa.sharing.projections import Family, decoder, model_shape, separate
from masa.sharing.spec import ATTENTION

Progress = Callable[[str, int, int], None]
"""Called with (what, done, of)."""


class BlockStream:
    """The hidden states (N, T, d) of all samples on their way through the blocks.

    Args:
        model: a causal LM whose blocks masa knows.
        tokens: (N, T) ids.
        batch_size: samples that run at once.
        dtype: of the computation; blocks stored otherwise are converted one at a time. By default the model's.

    Raises:
        MasaError: the blocks are not all called alike (sliding-window attention in some of them).
    """

    def __init__(self, model: nn.Module, tokens: Tensor, batch_size: int = 4, dtype: torch.dtype | None = None) -> None:
        kinds = sorted(set(getattr(model.config, "layer_types", None) or []))
        if len(kinds) > 1:
            raise MasaError(
                f"The blocks of this model use different attention masks ({', '.join(kinds)}), but they are run one by "
                "one with the first block's. Only models with one kind can be calibrated."
            )
        self.base, self.batch_size = decoder(model), batch_size
        embedding = model.get_input_embeddings()
        self.dtype = dtype or embedding.weight.dtype
        self.blocks = self.base.layers
        self.batches = tokens.to(embedding.weight.device).split(batch_size)
        self.hidden: list[Tensor] = []
        self._arguments: dict[int, dict[str, Any]] = {}
        for batch in self.batches:
            hidden, arguments = self._enter(batch)
            self.hidden.append(hidden.to(self.dtype))
            self._arguments.setdefault(len(batch), arguments)

    @torch.no_grad()
    def _enter(self, batch: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """What the first block is called with: the embeddings, and rotary tables and mask, which all blocks share."""
        caught: list[tuple[Tensor, dict[str, Any]]] = []

        def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            caught.append((args[0] if args else kwargs.pop("hidden_states"), kwargs))
            raise _FirstBlockReached

        handle = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.base(input_ids=batch, use_cache=False)
        except _FirstBlockReached:
            pass
        finally:
            handle.remove()
        hidden, arguments = caught[0]
        return hidden, arguments

    def block(self, layer: int) -> nn.Module:
        """Block ``layer`` in the dtype of the computation: the model's own, or a copy to be thrown away."""
        block = self.blocks[layer]
        if all(p.dtype == self.dtype for p in block.parameters()):
            return block
        return copy.deepcopy(block).to(self.dtype)

    @torch.no_grad()
    def run(self, block: nn.Module, keep: bool = True) -> Tensor:
        """Run every batch through ``block``, replace the hidden states if ``keep``; their mean (d,) in float64."""
        total = torch.zeros(self.hidden[0].shape[-1], dtype=torch.float64, device=self.hidden[0].device)
        for i, hidden in enumerate(self.hidden):
            output = block(hidden, **_cast(self._arguments[len(hidden)], self.dtype))
            output = output[0] if isinstance(output, tuple) else output
            total += output.sum((0, 1), dtype=torch.float64)
            if keep:
                self.hidden[i] = output
        return total / sum(h.shape[0] * h.shape[1] for h in self.hidden)

    @torch.no_grad()
    def run_hooked(self, block: nn.Module) -> None:
        """Run every batch through ``block`` only as far as its hooks let it (see :class:`GramHooks`); keep nothing."""
        for hidden in self.hidden:
            with contextlib.suppress(InputsSeen):
                block(hidden, **_cast(self._arguments[len(hidden)], self.dtype))


class _FirstBlockReached(Exception):
    pass


class InputsSeen(Exception):
    """Every input that was wanted of a block has been seen: the rest of it need not run."""


def _cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    def cast(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(cast, value))
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: cast(value) for key, value in arguments.items()}


class GramHooks:
    """Collects H = X^T X of a block's projection inputs while it runs: float32 products, float64 sums.

    Args:
        paths: projection letter -> path of its linear layer inside the block.
        letters: projections whose inputs are wanted; those that read the same input are counted once.
        stop: raise :class:`InputsSeen` at the last of these inputs, for :meth:`BlockStream.run_hooked`.
    """

    def __init__(self, paths: dict[str, str], letters: str, stop: bool = False) -> None:
        self.paths = {INPUT_OF[p]: paths[p] for p in letters}
        # INPUT_OF is in the order in which a block computes
        self.last = [name for name in INPUT_OF.values() if name in self.paths][-1] if stop else None
        self.grams: dict[str, Tensor] = {}

    def attach(self, block: nn.Module) -> list[Any]:
        self.grams = {}
        return [
            block.get_submodule(path).register_forward_pre_hook(lambda _, args, name=name: self._add(name, args[0]))
            for name, path in self.paths.items()
        ]

    def _add(self, name: str, x: Tensor) -> None:
        x = x.detach().flatten(0, -2).float()
        product = x.T @ x
        if name in self.grams:
            self.grams[name] += product
        else:
            self.grams[name] = product.double()
        if name == self.last:
            raise InputsSeen


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
    progress: Progress = lambda what, done, of: None,
) -> Calibration:
    """Collect, in one pass, what every compression method needs.

    Args:
        model: a dense Llama- or Starcoder2-like model, in ``eval()`` or not; its weights may be memory-mapped.
        tokens: (N, T) token ids, all of equal length.
        directory: write each layer's statistics there as soon as they are known, and read them from there later.
        projections: letters whose inputs are wanted; attention by default.
        batch_size: samples that run at once.
        dtype: of the computation; by default the model's. float32 for a model stored in bfloat16 costs one block.
        gradient_samples: run this many of the sequences through the whole model once more, forward and backward, for
            the methods that weigh outputs by the loss's gradients (:mod:`masa.compression.calibration.gradients`).
        progress: called with ("calibrating", done, of).

    Returns:
        The statistics.

    Raises:
        MasaError: no tokens, ids outside the vocabulary, a NaN or infinity in weights or activations (the message
            names layer and projection), an unknown architecture, or a model that is shared already.
    """
    if getattr(model, "sharing", None) is not None:
        raise MasaError(f"This model shares weights already ({model.sharing.spec.method}); calibrate the dense one.")
    family, training = separate(model), model.training
    tokens = _check_tokens(tokens, model)
    if gradient_samples and model.get_output_embeddings() is None:
        raise MasaError(
            f"{type(model).__name__} predicts no tokens, so that there is no loss whose gradients could be taken "
            "(gradient_samples, the *-fisher methods). Choose another method, or calibrate the causal LM."
        )
    shape = model_shape(model, family)
    if absent := set(projections) - set(shape.shapes):
        raise MasaError(f"This model has no projection {', '.join(sorted(absent))}; it has {', '.join(shape.shapes)}.")
    if directory is not None:
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "calibration.json").unlink(missing_ok=True)
    result = Calibration(
        *tokens.shape,
        num_layers=shape.num_layers,
        inputs=list(dict.fromkeys(INPUT_OF[p] for p in projections)),
        tokens_sha256=tokens_sha256(tokens),
        model_sha256=model_sha256(model),
        directory=Path(directory) if directory is not None else None,
    )
    model.eval()
    try:
        started = time.perf_counter()
        stream = BlockStream(model, tokens, batch_size, dtype)
        means = _through_the_blocks(stream, family, projections, result, progress)
        result.tokens_per_second = round(tokens.numel() / (time.perf_counter() - started), 1)
        result.drift = kl_drift(model, torch.stack(means)).tolist()
        if gradient_samples:
            add_gradients(result, model, tokens[:gradient_samples], projections, batch_size, progress)
    finally:
        model.train(training)
    if directory is not None:
        result.save()
    return result


def _through_the_blocks(
    stream: BlockStream, family: Family, projections: str, result: Calibration, progress: Progress
) -> list[Tensor]:
    """Add each layer's statistics to the result; the mean outputs (d,) of all layers."""
    hooks, means = GramHooks(dict(family.paths), projections), []
    for layer in range(len(stream.blocks)):
        progress("calibrating", layer, len(stream.blocks))
        block = stream.block(layer)
        check_weights(block, dict(family.paths), layer)
        handles = hooks.attach(block)
        try:
            means.append(stream.run(block).float())
        finally:
            for handle in handles:
                handle.remove()
        for name, gram in hooks.grams.items():
            if not torch.isfinite(gram).all():
                raise MasaError(f"NaN or infinity in the activations that enter {'/'.join(name)} of layer {layer}.")
        if not torch.isfinite(means[-1]).all():
            raise MasaError(f"NaN or infinity in the output of layer {layer}.")
        result.add(layer, hooks.grams | {"output": means[-1]})
    progress("calibrating", len(stream.blocks), len(stream.blocks))
    return means


def kl_drift(model: nn.Module, outputs: Tensor) -> Tensor:
    """``KL(p_l || p_l+1)`` with ``p_l = softmax(head(norm(h_l)))`` for mean block outputs h (L, d) -> (L - 1,).

    A model without a head over the vocabulary (a classifier, a bare decoder) is read through its input embeddings, as
    one that ties both.
    """
    norm, head = decoder(model).norm, model.get_output_embeddings() or model.get_input_embeddings()
    hidden = norm(outputs.to(norm.weight))
    logp = torch.log_softmax(nn.functional.linear(hidden, head.weight).float().double(), -1)
    return (logp[:-1].exp() * (logp[:-1] - logp[1:])).sum(-1).clamp_min(0).cpu()


def check_weights(block: nn.Module, paths: dict[str, str], layer: int) -> None:
    """Raise :class:`MasaError` for a NaN or infinity in a weight, naming layer and projection."""
    for letter, path in paths.items():
        if not torch.isfinite(block.get_submodule(path).weight).all():
            raise MasaError(f"NaN or infinity in the weight of projection {letter!r} ({path}) of layer {layer}.")


def _check_tokens(tokens: Tensor | Sequence[Sequence[int]], model: nn.Module) -> Tensor:
    try:
        tokens = torch.as_tensor(tokens)
    except (TypeError, ValueError) as error:
        raise MasaError(f"Calibration tokens must be N sequences of one length T: {error}") from error
    if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point():
        raise MasaError(f"Calibration tokens must be integers (N, T), got {tokens.dtype} {tuple(tokens.shape)}.")
    vocabulary = model.get_input_embeddings().num_embeddings
    if int(tokens.min()) < 0 or int(tokens.max()) >= vocabulary:
        raise MasaError(
            f"Calibration tokens reach from {int(tokens.min())} to {int(tokens.max())}, but the vocabulary has "
            f"{vocabulary}. Use the tokenizer of this model."
        )
    return tokens.long()
