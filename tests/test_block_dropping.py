"""Whole blocks left out, with and without a linear map in their place."""

from __future__ import annotations

import pytest
import torch
from compression_models import LAYERS, statistics, tiny_llama, tokens

import masa
from masa.compression import calibrate, compress
from masa.errors import MasaError

PLAIN = {"attention_bias": False}


def shortened(method, reduction, model=None, **options):
    model = tiny_llama(**PLAIN) if model is None else model
    found = calibrate(model, tokens())
    return compress(model, method, found, reduction, tokens=tokens(), projections="all", **options)


def states(model, ids):
    """The hidden states (L + 1, tokens, d) between blocks: before the first to after the last, no norm in between."""
    found = []
    handles = [b.register_forward_pre_hook(lambda m, args: found.append(args[0])) for b in model.model.layers]
    handles.append(model.model.norm.register_forward_pre_hook(lambda m, args: found.append(args[0])))
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return torch.stack(found).flatten(1, 2).double()


@torch.no_grad()
def test_it_is_the_model_without_these_blocks():
    model, report = shortened("drop-blocks", 0.33)
    start, end = report.learned["dropped"]
    assert end - start == 2 and report.reduction_achieved == pytest.approx(2 / LAYERS)
    short = tiny_llama(**PLAIN)
    blocks = list(short.model.layers)
    short.model.layers = torch.nn.ModuleList(blocks[:start] + blocks[end:])
    short.config.num_hidden_layers = LAYERS - 2
    for layer, block in enumerate(short.model.layers):
        block.self_attn.layer_idx = layer
    expected = short(tokens(), use_cache=False).logits
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-5, atol=1e-5)


def test_the_blocks_are_those_whose_output_is_most_like_their_input():
    _, report = shortened("drop-blocks", 0.33)
    found = states(tiny_llama(**PLAIN), tokens())
    distance = {
        (i, i + 2): 1 - float(torch.cosine_similarity(found[i], found[i + 2], dim=-1).mean()) for i in range(LAYERS - 1)
    }
    best = min(distance, key=distance.get)
    assert report.learned["dropped"] == list(best)
    assert report.learned["distance"] == pytest.approx(distance[best], abs=1e-6)


@torch.no_grad()
def test_the_map_is_the_least_squares_solution():
    model, report = shortened("replace-me", 0.33)
    start, end = report.learned["dropped"]
    assert start >= 1
    dense, plain = tiny_llama(**PLAIN), masa.fold(model)
    before, down = states(dense, tokens()), dense.model.layers[start - 1].mlp.down_proj.weight.double()
    seen = []
    handle = dense.model.layers[start - 1].mlp.down_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    dense(tokens())
    handle.remove()
    x = seen[0].flatten(0, 1).double()
    residual = before[start] - x @ down.T
    theirs = torch.linalg.lstsq(x @ down.T, before[end] - residual).solution
    ours = plain.model.layers[start - 1].mlp.down_proj.weight.double()
    torch.testing.assert_close(ours, theirs.T @ down, rtol=1e-3, atol=1e-4)
    errors = [(residual + x @ w.T - before[end]).norm() for w in (ours, down)]
    assert errors[0] < errors[1]  # than leaving the blocks out alone


@torch.no_grad()
def test_a_map_in_the_place_of_blocks_that_do_nothing_is_the_identity():
    model = tiny_llama(**PLAIN)
    for block in model.model.layers[2:4]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    expected = model(tokens()).logits
    model, report = shortened("replace-me", 0.33, model)
    assert report.learned["dropped"] == [2, 4] and report.learned["distance"] == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(model(tokens()).logits, expected, rtol=1e-3, atol=1e-4)


def test_nothing_is_stored_of_the_blocks_that_are_gone(tmp_path):
    model, report = shortened("drop-blocks", 0.5)
    assert report.stored == report.dense // 2
    whole, short = sum(p.nbytes for p in tiny_llama(**PLAIN).parameters()), masa.count_parameters(model).total * 4
    assert whole - short == 4 * report.dense // 2
    masa.save(model, tmp_path)
    with torch.no_grad():
        assert torch.equal(masa.load(tmp_path)(tokens()).logits, model(tokens()).logits)


def test_what_cannot_be_left_out_is_said():
    with pytest.raises(MasaError, match=r"last linear of the MLP \(d\).*give projections 'all'"):
        compress(tiny_llama(**PLAIN), "drop-blocks", statistics(**PLAIN), 0.2, tokens=tokens())
    found = calibrate(tiny_llama(), tokens())
    with pytest.raises(MasaError, match="o of layer 0 has a bias"):
        compress(tiny_llama(), "drop-blocks", found, 0.2, tokens=tokens(), projections="all")
    with pytest.raises(MasaError, match="samples is a number"):
        shortened("replace-me", 0.2, samples=0)
    with pytest.raises(MasaError, match=r"reachable are 0 to 83\.33%"):
        shortened("replace-me", 0.9)


def test_a_map_cannot_go_before_a_norm():
    """Gemma 2 has a norm after its MLP: what the map makes would not be what is added."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "head_dim": 8, "vocab_size": 96}
    model = Gemma2ForCausalLM(Gemma2Config(num_attention_heads=4, num_key_value_heads=2, **sizes)).eval()
    with pytest.raises(MasaError, match="a norm comes after it"):
        shortened("replace-me", 0.25, model)
    _, report = shortened("drop-blocks", 0.25, model)
    assert report.reduction_achieved == 0.25
