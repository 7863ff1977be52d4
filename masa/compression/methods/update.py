"""The sequential update of low-rank factors (SVD-LLM, Wang et al. 2024): each layer adapts to the ones before it."""

from __future__ import annotations

import copy

import torch

from masa.compression.base import Problem
from masa.compression.calibration.statistics import INPUT_OF
from masa.compression.calibration.stream import BlockStream, GramHooks
from masa.compression.methods.algebra import refit
from masa.compression.methods.low_rank import Factors
from masa.errors import MasaError


@torch.no_grad()
def sequential_update(problem: Problem, factors: Factors, samples: int | None = None) -> Factors:
    """Refit the left factors, layer by layer, to the inputs X' that the compressed layers before produce.

    ``B = argmin ||X' W^T - X' (BA)^T||_F`` in closed form, with ranks and right factors as they are. As in the
    published code, the target is the dense matrix's output on the same inputs. Every block runs twice over the tokens:
    dense, up to the last input that is wanted (o's, so that no FFN runs), and compressed.

    Args:
        problem: with tokens.
        factors: of single layers; layers without are dense.
        samples: sequences of the tokens that are used, from the first on; None for all.

    Raises:
        MasaError: ``samples`` is less than 1.
    """
    assert problem.tokens is not None
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise MasaError(f"samples is a number of sequences, at least 1, or None for all of them; got {samples!r}.")
    family, refined = problem.family, dict(factors)
    stream = BlockStream(problem.model, problem.tokens[:samples], problem.batch_size)
    for layer in problem.layers:
        problem.progress("updating", layer, len(problem.layers))
        block, letters = stream.block(layer), problem.letters_of(layer)
        if not letters:
            stream.run(layer, block)
            continue
        hooks = GramHooks(family, layer, letters, stop=True)
        with hooks.attached(block):
            stream.run_hooked(layer, block)
        compressed = copy.deepcopy(block)
        for letter in letters:
            key = (letter, (layer,))
            if key not in factors:
                continue
            right, weight = factors[key][1], problem.weight(letter, layer)
            gram = hooks.grams[INPUT_OF[letter]]
            left = refit(weight, right, gram, f"{letter} of layer {layer}", problem.regularisation).to(right.dtype)
            refined[key] = left, right
            family.write(compressed, layer, letter, left @ right)
        stream.run(layer, compressed)
    return refined
