"""The sequential update of low-rank factors (SVD-LLM, Wang et al. 2024): each layer adapts to the ones before it."""

from __future__ import annotations

import copy

import torch

from masa.compression.algebra import refit
from masa.compression.base import Problem
from masa.compression.calibration import BlockStream, GramHooks
from masa.compression.low_rank import Factors
from masa.compression.statistics import INPUT_OF
from masa.projections import family_of


@torch.no_grad()
def sequential_update(problem: Problem, factors: Factors) -> Factors:
    """Refit the left factors, layer by layer, to the inputs X' that the compressed layers before produce.

    ``B = argmin ||X' W^T - X' (BA)^T||_F`` in closed form, with ranks and right factors as they are. As in the
    published code, the target is the dense matrix's output on the same inputs. Two passes over the tokens.

    Args:
        problem: with tokens.
        factors: of single layers; layers without are dense.
    """
    assert problem.tokens is not None
    paths, refined = dict(family_of(problem.model).paths), dict(factors)
    stream = BlockStream(problem.model, problem.tokens, problem.batch_size)
    hooks = GramHooks(paths, problem.projections)
    for layer in problem.layers:
        problem.progress("updating", layer, len(problem.layers))
        block = stream.block(layer)
        handles = hooks.attach(block)
        try:
            stream.run(block, keep=False)
        finally:
            for handle in handles:
                handle.remove()
        compressed = copy.deepcopy(block)
        for letter in problem.projections:
            key = (letter, (layer,))
            if key not in factors:
                continue
            right, weight = factors[key][1], problem.weight(letter, layer)
            gram = hooks.grams[INPUT_OF[letter]]
            left = refit(weight, right, gram, f"{letter} of layer {layer}", problem.regularisation).to(right.dtype)
            refined[key] = left, right
            compressed.get_submodule(paths[letter]).weight.copy_(left @ right)
        stream.run(compressed)
    return refined
