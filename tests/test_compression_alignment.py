"""Aligned heads: what leaves a block's function as it is, what is found, and Matrix PCA on it."""

from __future__ import annotations

import math

import pytest
import torch
from compression_models import LAYERS, tiny_llama, tokens, weight

import masa
from masa.compression import calibrate, compress
from masa.compression.base import Problem
from masa.compression.methods.alignment import AlignedProblem, Transform, align, mean_cosine, transforms_of
from masa.errors import MasaError
from masa.sharing.projections import family_of, model_shape

HEADS, GROUPS, SIZE = 6, 2, 8
WHOLE = {"rule": "fixed", "size": LAYERS}


def model(seed: int = 0, **changes):
    sizes = {"num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "attention_bias": False}
    return tiny_llama(seed, **(sizes | changes)).double()


def block(of, layer: int) -> dict[str, torch.Tensor]:
    return {letter: weight(of, letter, layer).clone() for letter in "qkvo"}


def random_transform(seed: int, scaled: bool = False) -> Transform:
    g = torch.Generator().manual_seed(seed)
    served = HEADS // GROUPS
    order = torch.randperm(GROUPS, generator=g)
    heads = torch.cat([group * served + torch.randperm(served, generator=g) for group in order])
    angle = torch.rand(GROUPS, SIZE // 2, generator=g, dtype=torch.float64) * 2 * math.pi
    scale = torch.rand(GROUPS, SIZE // 2, generator=g, dtype=torch.float64) + 0.5 if scaled else torch.ones_like(angle)
    rotation = torch.linalg.qr(torch.randn(GROUPS, SIZE, SIZE, generator=g, dtype=torch.float64)).Q
    return Transform(heads, angle, scale, rotation)


@torch.no_grad()
def write(of, layer: int, transform: Transform, source: dict[str, torch.Tensor] | None = None) -> None:
    """Write a block of ``of`` in another way, or another block so written in its place."""
    for letter, matrix in (source or block(of, layer)).items():
        weight(of, letter, layer).copy_(transform.apply(letter, matrix))


def logits(of) -> torch.Tensor:
    with torch.no_grad():
        return of(tokens()[:3]).logits


def problem_of(of, calibration=None) -> Problem:
    return Problem(of, model_shape(of, family_of(of)), "qkvo", 0, calibration, tokens())


@pytest.mark.parametrize("scaled", [False, True])
def test_a_transform_changes_every_matrix_and_no_logit(scaled):
    other, expected = model(), logits(model())
    for layer in range(LAYERS):
        write(other, layer, random_transform(layer, scaled))
    for letter in "qkvo":
        assert not torch.allclose(weight(other, letter, 2), weight(model(), letter, 2), atol=0.01)
    torch.testing.assert_close(logits(other), expected, rtol=0, atol=1e-9)
    identity = Transform.identity(HEADS, GROUPS, SIZE)
    assert all(torch.equal(identity.apply(letter, w), w) for letter, w in block(other, 1).items())


def test_the_statistics_of_a_transformed_model_follow_from_the_plain_ones():
    transforms = {layer: random_transform(layer, scaled=True) for layer in range(LAYERS)}
    plain, other = model(), model()
    for layer, transform in transforms.items():
        write(other, layer, transform)
    found = calibrate(plain, tokens(), gradient_samples=4)
    expected = calibrate(other, tokens(), gradient_samples=4)
    aligned = AlignedProblem.of(problem_of(plain, found), transforms)
    for layer in range(LAYERS):
        for letter in "qkvo":
            assert torch.equal(aligned.weight(letter, layer), weight(other, letter, layer))
            gram = expected.gram(letter, layer)
            torch.testing.assert_close(aligned.gram(letter, layer), gram, rtol=1e-3, atol=1e-5 * float(gram.max()))
            gram = expected.gradient_gram(letter, layer)
            mine = aligned.calibration.gradient_gram(letter, layer)
            torch.testing.assert_close(mine, gram, rtol=1e-3, atol=1e-5 * float(gram.abs().max()))


@pytest.mark.parametrize("seed", range(4))
def test_a_transformed_block_is_recognised(seed):
    original = block(model(seed), 1)
    hidden = {letter: random_transform(seed).apply(letter, w) for letter, w in original.items()}
    found = align(hidden, original, GROUPS, HEADS // GROUPS)
    for letter, w in original.items():
        torch.testing.assert_close(found.apply(letter, hidden[letter]), w, rtol=0, atol=1e-8)


def cosines(one, two) -> float:
    return sum(float(torch.nn.functional.cosine_similarity(one[p].flatten(), two[p].flatten(), dim=0)) for p in one)


def test_alignment_never_makes_layers_less_similar():
    for seed in range(3):
        of = model(seed)
        for layer in range(1, LAYERS):
            own, reference = block(of, layer), block(of, layer - 1)
            found = align(own, reference, GROUPS, HEADS // GROUPS)
            turned = {letter: found.apply(letter, w) for letter, w in own.items()}
            assert cosines(turned, reference) > cosines(own, reference)
            again = align(turned, reference, GROUPS, HEADS // GROUPS)
            best = {letter: again.apply(letter, w) for letter, w in turned.items()}
            assert cosines(best, reference) >= cosines(turned, reference) - 1e-12
        problem = problem_of(of)
        groups = [[0, 1, 2], [3], [4, 5]]
        transforms = transforms_of(problem, groups)
        aligned = object.__new__(AlignedProblem)
        vars(aligned).update(vars(problem), transforms=transforms)
        before, after = mean_cosine(problem, groups), mean_cosine(aligned, groups)
        assert sum(after.values()) > sum(before.values())
        for layer in (0, 3, 4):  # a group's first layer stays bit for bit
            assert torch.equal(aligned.weight("o", layer), problem.weight("o", layer))


def test_layers_that_are_one_layer_in_disguise_are_stored_once():
    of = model()
    first = block(of, 0)
    for layer in range(1, LAYERS):
        write(of, layer, random_transform(layer), first)
    expected, weights = logits(of), of.state_dict()
    found = calibrate(of, tokens())
    errors = {}
    for method in ("matrix-pca", "matrix-pca-aligned"):
        fresh = model(1)
        fresh.load_state_dict(weights)
        fresh, report = compress(fresh, method, found, 0.8, grouping=WHOLE, ranks="global")
        errors[method] = float((logits(fresh) - expected).abs().max())
    assert errors["matrix-pca-aligned"] < 1e-7 < 1e-2 < errors["matrix-pca"]
    cosine = report.learned["cosine"]
    for letter in "qkvo":
        assert cosine["after"][letter] == pytest.approx(1, abs=1e-9) and cosine["before"][letter] < 0.5


@pytest.mark.parametrize("residual", ["data", "fisher"])
def test_the_aligned_model_approaches_the_dense_one_and_can_be_saved(residual, tmp_path):
    found = calibrate(model(), tokens(), gradient_samples=8)
    expected, gaps = logits(model()), []
    for reduction in (0.5, 0.02):
        compressed, report = compress(model(), "matrix-pca-aligned", found, reduction, residual=residual)
        gaps.append(float((logits(compressed) - expected).norm() / expected.norm()))
        assert sum(report.learned["cosine"]["after"].values()) >= sum(report.learned["cosine"]["before"].values())
    assert gaps[1] < 0.3 * gaps[0]
    masa.save(compressed, tmp_path)
    assert torch.equal(logits(masa.load(tmp_path)), logits(compressed))
    torch.testing.assert_close(logits(masa.fold(compressed)), logits(compressed))


def test_a_block_with_more_in_it_is_refused():
    found = calibrate(model(), tokens())
    with pytest.raises(MasaError, match="all of q, k, v and o"):
        compress(model(), "matrix-pca-aligned", found, 0.2, projections="qkv")
    biased = tiny_llama()
    with pytest.raises(MasaError, match="bias"):
        compress(biased, "matrix-pca-aligned", calibrate(biased, tokens()), 0.2)
    for other in (normalised(), partly_turned(), turned_in_other_pairs(), biased_by_distance()):
        with pytest.raises(MasaError, match="does not stay what it is when its heads are turned"):
            compress(other, "matrix-pca-aligned", calibrate(other, tokens()), 0.2)


SIZES = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 96, "pad_token_id": 0}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2}


def normalised():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=12)).eval()


def partly_turned():
    from transformers import StableLmConfig, StableLmForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    return StableLmForCausalLM(StableLmConfig(**SIZES, rope_parameters=rope)).eval()


def turned_in_other_pairs():
    """Neighbouring rows, where Llama's are half a head apart."""
    from transformers import CohereConfig, CohereForCausalLM

    return CohereForCausalLM(CohereConfig(**SIZES)).eval()


def biased_by_distance():
    """ALiBi: every head has a slope of its own."""
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {name: value for name, value in SIZES.items() if name not in ("intermediate_size", "num_key_value_heads")}
    return FalconForCausalLM(FalconConfig(**sizes, alibi=True, multi_query=False, parallel_attn=False)).eval()
