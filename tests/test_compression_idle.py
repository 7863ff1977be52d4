"""Layers that do nothing: every method compresses models that have some, and what such a matrix leaves is spent."""

from __future__ import annotations

import pytest
import torch
from compression_models import LAYERS, WHOLE_BLOCKS, tiny_llama, tokens

import masa
from masa.compression import COMPRESSORS, calibrate, compress
from masa.compression.methods.algebra import nothing, refit
from masa.errors import MasaError

METHODS = sorted(set(COMPRESSORS) - set(WHOLE_BLOCKS))
"""Those that choose matrix by matrix; what leaves out blocks that do nothing is in test_block_dropping.py."""

IDLE = range(LAYERS // 2, LAYERS)
"""Layers that do nothing, in the models that have some: half of them."""


def zero(*modules):
    for module in modules:
        torch.nn.init.zeros_(module.weight)


def identity_blocks(model):
    """As LLaMA-Pro inserts them: what attention and MLP give to the residual stream is zero."""
    for layer in IDLE:
        block = model.model.layers[layer]
        zero(block.self_attn.o_proj, block.mlp.down_proj)


def silent_norms(model):
    """Nothing enters the projections."""
    for layer in IDLE:
        zero(model.model.layers[layer].input_layernorm)


def values_of_zero(model):
    """So that o gets nothing, and no gradient comes back to q and k."""
    for layer in IDLE:
        zero(model.model.layers[layer].self_attn.v_proj)


def one_projection_of_zeros(model):
    """In all layers: its source stores nothing at all."""
    zero(*(block.self_attn.o_proj for block in model.model.layers))


def one_matrix(model):
    zero(model.model.layers[2].self_attn.k_proj)


KINDS = (identity_blocks, silent_norms, values_of_zero, one_projection_of_zeros, one_matrix)


def build(make, **changes):
    model = tiny_llama(attention_bias=False, **changes)
    with torch.no_grad():
        make(model)
    return model


_found = {}


def statistics(make, letters="qkvo"):
    if (make, letters) not in _found:
        _found[make, letters] = calibrate(build(make), tokens(), gradient_samples=8, projections=letters)
    return _found[make, letters]


def smaller(make, method, reduction, letters="qkvo"):
    options = {"steps": 2} if method == "post-share" else {}
    found = statistics(make, letters)
    return compress(build(make), method, found, reduction, tokens=tokens(), projections=letters, **options)


@torch.no_grad()
def logits(model):
    return model(tokens()).logits


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_stays_finite_and_is_saved_loaded_folded_and_counted(method, make, tmp_path):
    model, report = smaller(make, method, 0.2)
    assert report.reduction_achieved >= 0.2
    factored = logits(model)
    assert torch.isfinite(factored).all()
    assert all(torch.isfinite(p).all() for p in model.parameters())
    plain = masa.fold(model)
    torch.testing.assert_close(logits(plain), factored, rtol=1e-4, atol=1e-4)
    masa.save(model, tmp_path)
    loaded = masa.load(tmp_path)
    assert torch.equal(logits(loaded), factored)
    counted = masa.count_parameters(loaded)
    assert counted == masa.count_parameters(model)
    assert counted.total == sum(p.numel() for p in build(make).parameters()) - report.dense + report.stored
    folded = masa.fold(loaded)
    assert all(torch.equal(a, b) for a, b in zip(folded.parameters(), plain.parameters(), strict=True))


ALLOCATING = [m for m in METHODS if "share" not in m or m == "basis-sharing"]


@pytest.mark.parametrize("method", ALLOCATING)
def test_the_logits_stay_where_only_layers_that_do_nothing_had_to_go(method):
    """Half of the layers' inputs are zero: at 40 % the others stay as they are, whatever the method."""
    if method in ("svd", "basis-sharing", "sparse-magnitude"):
        pytest.skip("blind to the data, or sums the data of two layers")
    model, report = smaller(silent_norms, method, 0.4)
    torch.testing.assert_close(logits(model), logits(build(silent_norms)), rtol=1e-4, atol=1e-4)
    if "ranks" in report.learned:
        gone = {layer for found in report.learned["ranks"].values() for (layer,), rank in found if rank == 0}
    else:
        gone = {int(name[1:]) for name, (kind, _) in report.learned["bytes"].items() if kind == "nothing"}
    assert gone == set(IDLE)


@pytest.mark.parametrize("method", ["svd-fisher", "svd-fisher-update", "matrix-pca-fisher"])
@pytest.mark.parametrize("letters", ["qkvo", "qkvogud"])
def test_in_the_metric_of_the_loss_identity_blocks_are_stored_as_nothing(method, letters):
    """LLaMA-Pro's: no gradient comes to q, k, v, gate and up through an o and a down of zeros."""
    model, report = smaller(identity_blocks, method, 0.45, letters)
    torch.testing.assert_close(logits(model), logits(build(identity_blocks)), rtol=1e-4, atol=1e-4)
    assert report.reduction_achieved >= 0.5  # what can go without any error
    for found in report.learned["ranks"].values():
        assert {layers[0]: rank for layers, rank in found} == {n: 0 if n in IDLE else "dense" for n in range(LAYERS)}


@pytest.mark.parametrize("method", ["svd-llm", "svd-llm-global", "svd-global", "matrix-pca"])
def test_what_a_matrix_of_zeros_leaves_goes_to_the_others(method):
    _, without = smaller(one_projection_of_zeros, method, 0.6)
    dense = tiny_llama(attention_bias=False)
    _, among = compress(dense, method, calibrate(dense, tokens(), gradient_samples=8), 0.6)
    assert without.stored > 0.95 * among.stored

    def numbers(report):
        sizes = {p: (out * inp, out + inp) for p, (out, inp) in report.shapes.items()}
        of = {
            p: sum(sizes[p][0] if rank == "dense" else rank * sizes[p][1] for _, rank in found)
            for p, found in report.learned["ranks"].items()
        }
        return of.pop("o"), sum(of.values())

    assert numbers(without)[0] == 0 < numbers(among)[0]
    assert numbers(without)[1] > 1.2 * numbers(among)[1]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"direct-share", "post-share"}))
def test_models_of_one_layer(method):
    """There is no other layer to share with, but a matrix of its own can be made smaller."""

    def make(model):
        zero(model.model.layers[0].self_attn.k_proj)

    found = calibrate(build(make, num_hidden_layers=1), tokens(), gradient_samples=8)
    assert found.drift == []
    model, report = compress(build(make, num_hidden_layers=1), method, found, 0.2, tokens=tokens())
    assert report.reduction_achieved >= 0.2
    torch.testing.assert_close(logits(masa.fold(model)), logits(model), rtol=1e-4, atol=1e-4)


def test_a_model_of_one_layer_has_no_heads_to_share_with():
    found = calibrate(build(lambda model: None, num_hidden_layers=1), tokens())
    with pytest.raises(MasaError, match="reachable are 0 to 0"):
        compress(build(lambda model: None, num_hidden_layers=1), "direct-share", found)


def test_a_model_that_stores_nothing_keeps_its_dtype_and_is_read_by_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    model = build(one_projection_of_zeros).to(torch.bfloat16)
    expected = logits(model)
    found = calibrate(model, tokens(), projections="o")
    model, report = compress(model, "svd-llm", found, 0.3, projections="o")
    assert report.stored == 0 and report.reduction_achieved == 1
    masa.save(model, tmp_path)
    for loaded in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert torch.equal(logits(loaded), expected)
        folded = masa.fold(loaded)
        assert folded.model.layers[0].self_attn.o_proj.weight.dtype == torch.bfloat16
        assert torch.equal(logits(folded), expected)


def test_broken_statistics_are_still_refused():
    with pytest.raises(MasaError, match="one token"):
        found = calibrate(tiny_llama(), tokens(8, 1), gradient_samples=8)
        compress(tiny_llama(), "svd-fisher", found)
    found = calibrate(tiny_llama(), tokens(), gradient_samples=8)
    for statistics_of_layer in found._layers.values():
        for name, tensor in statistics_of_layer.items():
            tensor.mul_(0 if name.startswith("gradient") else 1)
    with pytest.raises(MasaError, match=r"gradients of all matrices of qkvo are zero.*longer"):
        compress(tiny_llama(), "svd-fisher", found)
    found._layers[1]["gradient.v"].fill_(float("nan"))
    with pytest.raises(MasaError, match=r"gradients of v of layer 1 is not finite.*Calibrate anew"):
        compress(tiny_llama(), "svd-fisher", found)


def test_the_algebra_of_nothing():
    weight = torch.randn(6, 4)
    found = nothing(weight)
    left, right = found.factors(0, weight)
    assert left.shape == (6, 0) and right.shape == (0, 4) and found.total == 0 and not found.energy.any()
    right = torch.randn(2, 4)  # no data: the best for the weight itself
    best = refit(weight, right, torch.zeros(4, 4, dtype=torch.float64), "", {})
    exact = torch.linalg.lstsq(right.double().T, weight.double().T).solution.T
    torch.testing.assert_close(best, exact)
