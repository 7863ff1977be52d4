"""Hidden states on their way through the blocks, one block at a time, and the moments that are gathered meanwhile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from masa.compression.calibration.calls import Call, Calls
from masa.compression.calibration.statistics import INPUT_OF
from masa.sharing.projections import Family

KINDS = 16
"""Different tensors of one shape that are kept to compare later ones with: masks and position embeddings have few."""


class BlockStream:
    """The hidden states (N, T, d) of all samples on their way through the blocks.

    Args:
        model: a causal LM whose blocks masa knows, in ``eval()``.
        tokens: (N, T) ids.
        batch_size: samples that run at once.
        dtype: of the computation; blocks stored otherwise are converted one at a time. By default the model's.

    Raises:
        MasaError: the model does not run its blocks one after the other.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, batch_size: int = 4, dtype: torch.dtype | None = None) -> None:
        embedding = model.get_input_embeddings()
        self.batch_size, self.dtype = batch_size, dtype
        self.batches = tokens.to(embedding.weight.device).split(batch_size)
        self.calls = Calls(model, self.batches[0])
        self.blocks = self.calls.blocks
        self.hidden: list[Tensor] = []
        self._arguments: dict[tuple[int, int], list[Call]] = {}
        self._known: dict[tuple[int, ...], list[Tensor]] = {}
        for i, batch in enumerate(self.batches):
            hidden = self._enter(i, len(batch))
            self.hidden.append(hidden if dtype is None else hidden.to(dtype))

    def _enter(self, i: int, samples: int) -> Tensor:
        """The embeddings of the first samples of a batch; what the blocks are given beside is kept, equal tensors once.

        Masks and position embeddings are those of every batch of this size, and of all layers of one kind; what is made
        of the tokens themselves (per-layer inputs) is not.
        """
        hidden, calls = self.calls.enter(self.batches[i][:samples])
        met: dict[int, tuple[Tensor, Tensor]] = {}

        def known(tensor: Tensor) -> Tensor:
            if id(tensor) not in met:
                alike = self._known.setdefault(tuple(tensor.shape), [])
                kept = next((k for k in alike if k.dtype == tensor.dtype and torch.equal(k, tensor)), None)
                if kept is None and len(alike) < KINDS:
                    alike.append(tensor)
                met[id(tensor)] = tensor, tensor if kept is None else kept
            return met[id(tensor)][1]

        self._arguments[i, samples] = [call.keeping(known) for call in calls]
        return hidden

    def block(self, layer: int) -> nn.Module:
        """Block ``layer`` in the dtype of the computation: the model's own, or a copy to be thrown away."""
        block = self.blocks[layer]
        if self.dtype is None or all(p.dtype == self.dtype for p in block.parameters()):
            return block
        return copy.deepcopy(block).to(self.dtype)

    @torch.no_grad()
    def run(self, layer: int, block: nn.Module, keep: bool = True) -> Tensor:
        """Run every batch through ``block`` in the place of a layer, replace the hidden states if ``keep``.

        Returns:
            The mean (d,) of what comes out, in float64.
        """
        total = torch.zeros(self.hidden[0].shape[-1], dtype=torch.float64, device=self.hidden[0].device)
        for i, hidden in enumerate(self.hidden):
            output = self.through(layer, block, i, hidden)
            total += output.sum((0, 1), dtype=torch.float64)
            if keep:
                self.hidden[i] = output
        return total / sum(h.shape[0] * h.shape[1] for h in self.hidden)

    @torch.no_grad()
    def run_hooked(self, layer: int, block: nn.Module) -> None:
        """Run every batch through ``block`` only as far as its hooks let it (see :class:`GramHooks`); keep nothing."""
        for i, hidden in enumerate(self.hidden):
            with contextlib.suppress(InputsSeen):
                self.through(layer, block, i, hidden)

    def through(self, layer: int, block: nn.Module, i: int, hidden: Tensor) -> Tensor:
        """What ``block`` makes, in the place of a layer, of hidden states (n, T, d) of the first samples of a batch."""
        if (i, len(hidden)) not in self._arguments:
            self._enter(i, len(hidden))
        return self._arguments[i, len(hidden)][layer].run(block, hidden, self.dtype)

    def first(self, samples: int) -> list[Tensor]:
        """The hidden states of the first sequences alone, in the batches in which they run."""
        whole, part = divmod(samples, self.batch_size)
        # the part is a copy: a view would keep the whole batch in memory
        return self.hidden[:whole] + [hidden[:part].clone() for hidden in self.hidden[whole : whole + bool(part)]]


class InputsSeen(Exception):
    """Every input that was wanted of a block has been seen: the rest of it need not run."""


class GramHooks:
    """Collects H = X^T X of a block's projection inputs while it runs: float32 products, float64 sums.

    Args:
        family: of the model.
        layer: number of the block.
        letters: projections of it whose inputs are wanted; those that read the same input are counted once.
        stop: raise :class:`InputsSeen` at the last of these inputs, for :meth:`BlockStream.run_hooked`.
    """

    def __init__(self, family: Family, layer: int, letters: str, stop: bool = False) -> None:
        self.family, self.layer, self.stop = family, layer, stop
        self.readers = {INPUT_OF[letter]: letter for letter in letters}
        self.seen: set[str] = set()
        self.grams: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def attached(self, block: nn.Module) -> Iterator[None]:
        """Meanwhile the block, or a copy of it, is listened to."""
        handles = [
            self.family.layer(block, self.layer, letter).register_forward_pre_hook(partial(self._add, name))
            for name, letter in self.readers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, module: nn.Module, args: tuple[Tensor]) -> None:
        add_moment(self.grams, name, args[0])
        self.seen.add(name)
        if self.stop and len(self.seen) == len(self.readers):
            self.seen.clear()  # of this batch
            raise InputsSeen


def add_moment(moments: dict[str, Tensor], name: str, x: Tensor) -> None:
    """Add X^T X of rows x (..., d) to the moment of that name: float32 products, float64 sums."""
    x = x.detach().flatten(0, -2).float()
    product = x.T @ x
    if name in moments:
        moments[name] += product
    else:
        moments[name] = product.double()


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of those that hold a NaN or infinity; a GPU is waited for once, however many they are."""
    if not tensors:
        return []
    found = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    return [name for name, finite in zip(tensors, found, strict=True) if not finite]
