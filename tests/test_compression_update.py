"""The sequential update: which part of a block runs, over how many sequences, and that the result is the plain one."""

from __future__ import annotations

import copy

import pytest
import torch
from compression_models import LAYERS, tiny_llama, tokens

import masa
from masa.compression import calibrate, compress, make_compressor
from masa.compression.base import Problem
from masa.compression.calibration.statistics import INPUT_OF
from masa.compression.calibration.stream import BlockStream, GramHooks
from masa.compression.methods.algebra import refit
from masa.compression.methods.low_rank import factorise
from masa.compression.methods.update import sequential_update
from masa.errors import MasaError
from masa.sharing.projections import family_of, model_shape


def problem_and_factors(projections: str):
    model, ids = tiny_llama(), tokens()
    found = calibrate(model, ids, projections=projections)
    problem = Problem(model, model_shape(model, family_of(model)), projections, 0, found, ids)
    allocator, truncations = make_compressor("svd-llm").prepare(problem)
    ranks = allocator.allocate(truncations, int(0.6 * problem.dense))
    return problem, factorise(truncations, ranks, lambda key: problem.weight(key[0], key[1][0]))


@torch.no_grad()
def reference(problem: Problem, factors, samples: int):
    """The update with whole blocks run twice."""
    refined = {}
    stream = BlockStream(problem.model, problem.tokens[:samples])
    for layer in problem.layers:
        block = stream.block(layer)
        hooks = GramHooks(problem.family, layer, problem.projections)
        with hooks.attached(block):
            stream.run(layer, block, keep=False)
        block = copy.deepcopy(block)
        for letter in problem.projections:
            right = factors[letter, (layer,)][1]
            left = refit(problem.weight(letter, layer), right, hooks.grams[INPUT_OF[letter]], "", {}).float()
            refined[letter, (layer,)] = left, right
            block.get_submodule(problem.family.paths[letter]).weight.copy_(left @ right)
        stream.run(layer, block)
    return refined


@pytest.mark.parametrize(("projections", "ffn"), [("qkvo", 0), ("qk", 0), ("o", 0), ("ovdugkq", 1)])
def test_a_block_that_stops_early_gives_the_same_factors_and_runs_no_needless_ffn(projections, ffn):
    problem, factors = problem_and_factors(projections)
    runs = {"mlp": 0, "down": 0}
    mlp = problem.model.model.layers[2].mlp
    # one sequence is looked at first; it is no batch
    mlp.register_forward_pre_hook(lambda m, args: runs.update(mlp=runs["mlp"] + (len(args[0]) > 1)))
    mlp.down_proj.register_forward_hook(lambda m, args, y: runs.update(down=runs["down"] + (len(y) > 1)))
    found = sequential_update(problem, factors, 8)
    batches = 2  # 8 sequences, 4 at once; each runs dense, then compressed, on a copy with the same hooks
    assert runs == {"mlp": batches * (1 + ffn), "down": batches}
    expected = reference(problem, factors, 8)
    assert found.keys() == expected.keys()
    for key, pair in found.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, expected[key], strict=True))
    assert not any(
        module._forward_pre_hooks for block in problem.model.model.layers for module in block.self_attn.children()
    )


@pytest.mark.parametrize("method", ["svd-llm-update", "svd-global-update", "svd-fisher-update"])
def test_samples_are_the_first_sequences(method):
    ids = tokens()
    found = calibrate(tiny_llama(), ids, gradient_samples=2)

    def bits(samples):
        model, report = compress(tiny_llama(), method, found, 0.4, tokens=ids, samples=samples)
        assert report.options["samples"] == samples
        return masa.fold(model).state_dict()

    few, default, every = bits(2), bits(16), bits(None)
    name = f"model.layers.{LAYERS - 1}.self_attn.q_proj.weight"
    assert not torch.equal(few[name], every[name])
    assert all(torch.equal(default[key], every[key]) for key in every)  # there are only 8
    assert make_compressor(method).samples == 16
    problem, factors = problem_and_factors("qkvo")
    updated, expected = sequential_update(problem, factors, 2), reference(problem, factors, 2)
    assert all(torch.equal(updated[key][0], expected[key][0]) for key in expected)


@pytest.mark.parametrize("samples", [0, -1, True, 1.5, "all"])
def test_samples_are_a_number(samples):
    problem, factors = problem_and_factors("qk")
    with pytest.raises(MasaError, match="samples"):
        sequential_update(problem, factors, samples)
