"""Whole blocks left out: the control of every method that keeps them all.

A block whose last linears, o and d, are nothing adds nothing to the residual stream, so that of a block that is left
out nothing at all is stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from masa.compression.allocation.bytes import Member
from masa.compression.base import Compressor, Problem, register, unreachable
from masa.compression.calibration.stream import BlockStream
from masa.compression.methods.algebra import cholesky
from masa.compression.methods.compressed_inputs import check_samples
from masa.compression.methods.equal_bytes import members_of
from masa.compression.methods.fits import Fit, dense_fit, part_sources
from masa.errors import MasaError
from masa.sharing.weight_sources import WeightSource

LAST = {"o": "attention", "d": "the MLP"}
"""The linears that write to the residual stream, and whose they are."""


@register("drop-blocks")
class DropBlocks(Compressor):
    """Leave out the neighbouring blocks that change the hidden states least (Gromov et al. 2024, arXiv 2403.17887).

    The change is the cosine distance, in the mean over all tokens, of what enters the first from what leaves the last.
    As many are left out as the budget asks for, counted in numbers; a folder's guard (a number a matrix) is extra.

    Args:
        samples: sequences of the tokens that are used, from the first on; None for all.
    """

    needs_tokens = True
    first = 0  # block that may be left out

    def __init__(self, samples: int | None = None) -> None:
        self.samples = samples

    def prepare(self, problem: Problem) -> Tensor:
        """Cosine distance (L + 1, L + 1) of the hidden states between blocks, each from each."""
        check_samples(self.samples)
        check_last(problem)
        total, tokens = torch.zeros((), dtype=torch.float64), 0
        for _, states in passes(problem, self.samples, "measuring"):
            units = torch.nn.functional.normalize(torch.stack([s.flatten(0, 1).double() for s in states]), dim=-1)
            total = total + torch.einsum("itd,jtd->ij", units, units).cpu()
            tokens += units.shape[1]
        return 1 - total / tokens

    def solve(self, problem: Problem, prepared: Tensor) -> list[WeightSource]:
        start, end = self.span(problem, prepared)
        self.dropped_ = [start, end]
        self.distance_ = float(prepared[start, end])
        return part_sources(problem, self.fits(problem, start, end))

    def span(self, problem: Problem, distances: Tensor) -> tuple[int, int]:
        """First block that is left out, and the first after it that stays.

        Raises:
            MasaError: the budget is below what must stay.
        """
        sizes = [sum(map(problem.numbers, problem.letters_of(layer))) for layer in problem.layers]
        excess, found = problem.dense - problem.budget, []
        for start in range(self.first, len(sizes)):
            gone = 0
            for end in range(start + 1, len(sizes) + 1):
                gone += sizes[end - 1]
                if gone >= excess:
                    found.append((float(distances[start, end]), start, end))
                    break
        if not found:
            raise unreachable(problem, sum(sizes[: self.first]), "the blocks that must stay have")
        return min(found)[1:]

    def fits(self, problem: Problem, start: int, end: int) -> list[Fit]:
        """The blocks that stay as they are, nothing of the others."""
        return [_kept(problem, member, start, end) for member in members_of(problem, problem.projections)]


@register("replace-me")
class ReplaceMe(DropBlocks):
    """A linear map in the place of the blocks that are left out (Shopkhoev et al. 2025, arXiv 2505.02819).

    ``min over T of ||M T + Y - H||_F``: M is what the MLP before the cut adds to its block's residual Y, H what left
    the last of the blocks that are left out. T goes into that MLP's down projection and costs nothing.

    Args:
        samples: of :class:`DropBlocks`.
    """

    first = 1  # the map goes into the block before

    def fits(self, problem: Problem, start: int, end: int) -> list[Fit]:
        before = ("d", start - 1)
        found = {fit.members[0]: fit for fit in super().fits(problem, start, end)}
        changed = self.map(problem, start, end).T @ problem.weight(*before).double()
        found[before] = dense_fit(before, changed).rounded(problem.dtype)
        return list(found.values())

    def map(self, problem: Problem, start: int, end: int) -> Tensor:
        """T (d, d) in float64, of the blocks from ``start`` to before ``end``.

        Raises:
            MasaError: what the MLP makes is not what it adds.
        """
        layer = start - 1
        gram: Tensor | None = None
        cross = torch.zeros(())
        for stream, states in passes(problem, self.samples, "fitting the map", end):
            added = _added(problem, stream, layer, states[layer])
            before, after = (states[i].flatten(0, 1).double() for i in (start, end))
            if gram is None:
                _check_adds(problem, stream, layer, states[layer], before, added)
                gram, cross = torch.zeros(2, *[added.shape[1]] * 2, dtype=torch.float64, device=added.device)
            gram += added.T @ added
            cross += added.T @ (after - before + added)
        assert gram is not None
        name = f"the output of d of layer {layer}"
        return torch.cholesky_solve(cross, cholesky(gram, name, problem.regularisation))


def passes(
    problem: Problem, samples: int | None, what: str, last: int | None = None
) -> Iterator[tuple[BlockStream, list[Tensor]]]:
    """Batch by batch the hidden states (n, T, d): before every block, and after the last.

    Args:
        problem: with tokens.
        samples: sequences, from the first on; None for all.
        what: is said of the progress.
        last: blocks that run; None for all.
    """
    assert problem.tokens is not None
    batches = problem.tokens[:samples].split(problem.batch_size)
    dtype = torch.promote_types(problem.dtype, torch.float32)
    for done, batch in enumerate(batches):
        problem.progress(what, done, len(batches))
        stream = BlockStream(problem.model, batch, problem.batch_size, dtype)
        states = [stream.hidden[0]]
        for layer in problem.layers[:last]:
            stream.run(layer, stream.block(layer))
            states.append(stream.hidden[0])
        yield stream, states
    problem.progress(what, len(batches), len(batches))


def check_last(problem: Problem) -> None:
    """That a block adds nothing once its projections are nothing.

    Raises:
        MasaError: o or d is not among the projections of every block, or has a bias.
    """
    for layer in problem.layers:
        for letter, whose in LAST.items():
            if letter not in problem.letters_of(layer):
                there = letter in problem.family.paths and layer in problem.family.layers(letter)
                mend = "give projections 'all'" if there else f"{problem.family.name} has none that masa knows there"
                raise MasaError(
                    f"Leaving out blocks needs the last linear of {whose} ({letter}) of every block among the "
                    f"projections, and of layer {layer} it is not: {mend}, or take another method."
                )
            if getattr(problem.family.layer(problem.family.blocks[layer], layer, letter), "bias", None) is not None:
                raise MasaError(
                    f"Leaving out blocks: {letter} of layer {layer} has a bias, which would be added all the same; "
                    "take another method."
                )


def _kept(problem: Problem, member: Member, start: int, end: int) -> Fit:
    if start <= member[1] < end:
        return Fit({"kind": "nothing"}, (member,))
    return dense_fit(member, problem.weight(*member))


def _run_hooked(problem: Problem, stream: BlockStream, layer: int, hidden: Tensor, hook: Callable[..., Any]) -> Tensor:
    """What a block makes of hidden states (n, T, d) with a forward hook on its d; (tokens, d) in float64."""
    block = stream.block(layer)
    handle = problem.family.layer(block, layer, "d").register_forward_hook(hook)
    try:
        return stream.through(layer, block, 0, hidden).flatten(0, 1).double()
    finally:
        handle.remove()


def _added(problem: Problem, stream: BlockStream, layer: int, hidden: Tensor) -> Tensor:
    """What the d of a block makes (tokens, d), in float64."""
    made: list[Tensor] = []
    # a copy: blocks add to it in place
    _run_hooked(problem, stream, layer, hidden, lambda m, args, output: made.append(output.clone()))
    return made[0].flatten(0, 1).double()


def _check_adds(
    problem: Problem, stream: BlockStream, layer: int, hidden: Tensor, after: Tensor, added: Tensor
) -> None:
    """Raise unless a block's output grows by what its d makes when that is doubled: no norm comes after it."""
    grown = _run_hooked(problem, stream, layer, hidden, lambda m, args, output: 2 * output) - after
    if float((grown - added).norm()) > 0.05 * float(added.norm()):
        raise MasaError(
            f"replace-me: layer {layer} of {problem.family.name} does not add what its d makes as it is (a norm comes "
            "after it), so that no map can go into it; take drop-blocks."
        )
