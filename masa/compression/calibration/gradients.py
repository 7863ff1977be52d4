"""Second moments of the loss's gradients at the outputs of the projections: how much an output error matters.

With ``G = E[g g^T]`` and ``H = E[x x^T]`` a small change dW of a weight raises the loss by about
``tr(G dW H dW^T) / 2`` nats a token, the Kronecker-factored Fisher approximation (Martens and Grosse 2015,
arXiv 1503.05671). Labels are drawn from the model's own predictions, so this measures the divergence from the model
itself and needs no labels.

No graph of the whole model is ever held. Of the pass forward each block's input is kept, in a file where there is a
directory; on the way back a block is computed again from it, with gradients, and passes the gradient of its input on to
the block before.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.calls import Calls, frozen
from masa.compression.calibration.statistics import Calibration
from masa.compression.calibration.stream import BlockStream, add_moment, not_finite
from masa.errors import MasaError
from masa.runs import memory
from masa.sharing.projections import Family, family_of

FOLDER = "block-inputs"
"""What enters the blocks lies there, beside the statistics, while calibration runs."""

LOGITS = 2**25
"""Logits that exist at once, 128 MiB in float32: those of all tokens could be larger than the model."""


class BlockInputs:
    """What enters each block, of the first sequences of a stream: (L n T d) numbers.

    They stay on a GPU that has twice their size left. The host keeps others in files where it may, else in memory.

    Args:
        samples: n, or all if there are fewer.
        directory: where files may be, in a folder that :meth:`close` takes away; None for nowhere.
    """

    def __init__(self, stream: BlockStream, samples: int, directory: Path | None = None) -> None:
        self.stream, self.samples = stream, min(samples, sum(map(len, stream.hidden)))
        hidden = stream.hidden[0]
        size = len(stream.blocks) * self.samples * hidden[0].numel() * hidden.element_size()
        stays = hidden.is_cuda and 2 * size <= torch.cuda.mem_get_info(hidden.device)[0]
        self.device = hidden.device if stays else torch.device("cpu")
        self.folder = directory / FOLDER if directory is not None and not stays and self.samples else None
        self._kept: list[list[Tensor | Path]] = []
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)  # of one that was killed
            self.folder.mkdir(parents=True)

    def keep(self) -> None:
        """Keep what enters the block that runs next."""
        batches = self.stream.first(self.samples)
        self._kept.append([self._put(f"{len(self._kept)}-{i}", hidden) for i, hidden in enumerate(batches)])

    def pop(self) -> Iterator[Tensor]:
        """What entered the last block that was not asked for yet, batch by batch; it is kept no longer."""
        batches = self._kept.pop()
        while batches:
            yield self._take(batches.pop(0)).to(self.stream.hidden[0].device)

    def close(self) -> None:
        """Nothing is kept any more."""
        self._kept = []
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _put(self, name: str, hidden: Tensor) -> Tensor | Path:
        kept = hidden.to(self.device)
        if self.folder is None:
            return kept
        torch.save(kept.clone() if kept.nbytes < kept.untyped_storage().nbytes() else kept, self.folder / name)
        return self.folder / name

    def _take(self, kept: Tensor | Path) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        hidden: Tensor = torch.load(kept, weights_only=True)
        kept.unlink()
        return hidden


@torch.enable_grad()
def add_gradients(
    calibration: Calibration,
    model: nn.Module,
    stream: BlockStream,
    inputs: BlockInputs,
    projections: str,
    progress: Callable[[str, int, int], None],
    seed: int = 0,
) -> None:
    """Add ``gradient.q`` and so on, G (out, out) in float64, to every layer's statistics, the last layer first.

    Memory holds the inputs that were kept in it, a chunk of logits, and one block's graph for one batch.

    Args:
        calibration: receives the statistics.
        model: the model that it belongs to.
        stream: has run through all of its blocks.
        inputs: of these blocks.
        projections: letters.
        progress: called with ("gradients", done, of).
        seed: of the labels drawn.

    Raises:
        MasaError: a gradient is not finite; the message names layer and projection.
    """
    family, layers = family_of(model), len(stream.blocks)
    tokens = inputs.samples * stream.batches[0].shape[1]
    generator = torch.Generator(device=stream.hidden[0].device).manual_seed(seed)
    memory.give_back()  # of the way forward
    with frozen(model):
        gradients = [loss_gradient(model, stream.calls, hidden, generator) for hidden in stream.first(inputs.samples)]
        for layer in reversed(range(layers)):
            progress("gradients", layers - 1 - layer, layers)
            block, moments = stream.block(layer), dict[str, Tensor]()
            letters = [p for p in projections if layer in family.layers(p)]
            with _watched(family, layer, block, letters, moments):
                for i, hidden in enumerate(inputs.pop()):
                    hidden = hidden.detach().requires_grad_()
                    stream.through(layer, block, i, hidden).backward(gradients[i])
                    gradients[i] = hidden.grad
            if absent := [p for p in letters if p not in moments]:
                raise MasaError(
                    f"No gradient comes to {', '.join(absent)} of layer {layer}: leave it out of projections."
                )
            for p in not_finite(moments):
                raise MasaError(f"NaN or infinity in the gradients at the output of {p!r} of layer {layer}.")
            calibration.add(layer, {f"gradient.{p}": moments[p] / tokens for p in letters})
    progress("gradients", layers, layers)
    calibration.gradient_samples = inputs.samples


def loss_gradient(model: nn.Module, calls: Calls, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient, at the last block's output (n, T, d), of the summed loss of labels that the model itself predicts."""
    rows, vocabulary = hidden.flatten(0, 1), model.get_output_embeddings().weight.shape[0]
    chunks = rows.chunk(-(-len(rows) * vocabulary // LOGITS))
    found = torch.cat([_of_tokens(calls, chunk, generator) for chunk in chunks])
    return found.view_as(hidden).to(hidden.dtype)


def _of_tokens(calls: Calls, rows: Tensor, generator: torch.Generator) -> Tensor:
    """The same of tokens (n, d) whose logits may exist all at once."""
    x = rows.detach().to(calls.hidden_dtype, copy=True).requires_grad_()
    logits = calls.logits(x).float()
    # on a CPU one number a probability, in order: the labels do not depend on how tokens are cut into chunks
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)
    nn.functional.cross_entropy(logits, labels.flatten(), reduction="sum").backward()
    return x.grad


@contextlib.contextmanager
def _watched(
    family: Family, layer: int, block: nn.Module, letters: Sequence[str], moments: dict[str, Tensor]
) -> Iterator[None]:
    """Meanwhile gradients at the outputs of a block's projections are added up, those of a fused layer by its parts."""

    def watch(letter: str, module: nn.Module, args: Any, output: Tensor) -> None:
        layout = family.place(layer, letter).layout

        def add(gradient: Tensor) -> None:
            if layout is not None:
                gradient = layout.take(gradient.flatten(0, -2).T, letter).T
            add_moment(moments, letter, gradient)

        output.register_hook(add)

    handles = [family.layer(block, layer, p).register_forward_hook(partial(watch, p)) for p in letters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
