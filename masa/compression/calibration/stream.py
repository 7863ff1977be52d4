"""Hidden states on their way through the blocks, one block at a time, and the moments that are gathered meanwhile."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.statistics import INPUT_OF
from masa.errors import MasaError
from masa.sharing.projections import decoder


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
            output = self.through(block, hidden)
            total += output.sum((0, 1), dtype=torch.float64)
            if keep:
                self.hidden[i] = output
        return total / sum(h.shape[0] * h.shape[1] for h in self.hidden)

    @torch.no_grad()
    def run_hooked(self, block: nn.Module) -> None:
        """Run every batch through ``block`` only as far as its hooks let it (see :class:`GramHooks`); keep nothing."""
        for hidden in self.hidden:
            with contextlib.suppress(InputsSeen):
                self.through(block, hidden)

    def through(self, block: nn.Module, hidden: Tensor) -> Tensor:
        """What ``block`` makes of hidden states (n, T, d), n at most the batch size."""
        if len(hidden) not in self._arguments:
            self._arguments[len(hidden)] = self._enter(self.batches[0][: len(hidden)])[1]
        output = block(hidden, **_cast(self._arguments[len(hidden)], self.dtype))
        return output[0] if isinstance(output, tuple) else output

    def first(self, samples: int) -> list[Tensor]:
        """The hidden states of the first sequences alone, in the batches in which they run."""
        whole, part = divmod(samples, self.batch_size)
        # the part is a copy: a view would keep the whole batch in memory
        return self.hidden[:whole] + [hidden[:part].clone() for hidden in self.hidden[whole : whole + bool(part)]]


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
        add_moment(self.grams, name, x)
        if name == self.last:
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
    found = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    return [name for name, finite in zip(tensors, found, strict=True) if not finite]
