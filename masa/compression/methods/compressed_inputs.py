"""Every matrix solved for the inputs that the compressed layers before it produce, as SparseGPT and SVD-LLM do."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from masa.compression.allocation.bytes import Member, Option
from masa.compression.base import Problem
from masa.compression.calibration.statistics import INPUT_OF
from masa.compression.calibration.stream import BlockStream, GramHooks
from masa.compression.methods.fits import Fit, written
from masa.errors import MasaError

Solve = Callable[[Option, Tensor | None], list[Fit]]
"""(option, E[x x^T] (in, in) of the compressed model, or None for the original's) -> its parts."""


def check_samples(samples: int | None) -> None:
    """Raise :class:`MasaError` unless it is a number of sequences."""
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise MasaError(f"samples is a number of sequences, at least 1, or None for all of them; got {samples!r}.")


@torch.no_grad()
def fits_on_compressed_inputs(
    problem: Problem, chosen: Sequence[Option], solve: Solve, samples: int | None = None
) -> list[Fit]:
    """Solve for the chosen options layer by layer, each on the inputs that the layers before it leave.

    The target is the dense matrix's output on the same inputs. Every block runs twice over the tokens: dense, up to
    the last input that is wanted, and compressed. What several layers store together is solved for at the first of
    them, on the original's statistics.

    Args:
        problem: with tokens.
        chosen: of all matrices.
        solve: for one of them.
        samples: sequences of the tokens that are used, from the first on; None for all.

    Raises:
        MasaError: ``samples`` is less than 1.
    """
    assert problem.tokens is not None
    check_samples(samples)
    tokens = problem.tokens[:samples]
    of = {member: option for option in chosen for member in option.members}
    stream = BlockStream(problem.model, tokens, problem.batch_size, torch.promote_types(problem.dtype, torch.float32))
    made: dict[Member, Tensor] = {}
    fits: list[Fit] = []
    for layer in problem.layers:
        problem.progress("solving", layer, len(problem.layers))
        block = stream.block(layer)
        letters = problem.letters_of(layer)
        hooks = GramHooks(problem.family, layer, letters, stop=True)
        if letters:
            with hooks.attached(block):
                stream.run_hooked(layer, block)
        compressed = copy.deepcopy(block)
        for letter in letters:
            if (letter, layer) not in made:
                option = of[letter, layer]
                alone = len(option.members) == 1
                found = solve(option, hooks.grams[INPUT_OF[letter]] / tokens.numel() if alone else None)
                made |= written(problem, found)
                fits += found
            problem.family.write(compressed, layer, letter, made.pop((letter, layer)))
        stream.run(layer, compressed)
    problem.progress("solving", len(problem.layers), len(problem.layers))
    return fits
