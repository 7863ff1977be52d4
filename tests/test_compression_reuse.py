"""One compressor for several reductions: what it keeps is right, changes no bit and pins no model."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest
import torch
from compression_models import fitting, letters, statistics, tiny_llama, tokens

import masa
from masa.compression import COMPRESSORS, calibrate, compress, make_compressor
from masa.errors import MasaError

FAST = {"post-share": {"steps": 1}}
REDUCTIONS = (0.15, 0.3, 0.45)


def state(compressor, reduction: float, model=None, calibration=None, ids=None):
    ids = tokens() if ids is None else ids
    changes = fitting(compressor.name)
    found = statistics(**changes) if calibration is None else calibration
    given = {"tokens": ids, "projections": letters(compressor.name)}
    model, report = compress(model or tiny_llama(**changes), compressor, found, reduction, **given)
    return masa.fold(model).state_dict(), report


def assert_equal(first, second) -> None:
    (bits, report), (expected, fresh) = first, second
    assert bits.keys() == expected.keys()
    assert all(torch.equal(bits[name], expected[name]) for name in bits)
    volatile = {"seconds", "peak_rss_bytes"}
    assert {k: v for k, v in report.to_dict().items() if k not in volatile} == {
        k: v for k, v in fresh.to_dict().items() if k not in volatile
    }


@pytest.mark.parametrize("method", sorted(COMPRESSORS))
def test_a_reused_instance_gives_the_bits_of_a_fresh_one(method):
    options = FAST.get(method, {})
    expected = {r: state(make_compressor(method, **options), r) for r in REDUCTIONS}
    for order in ((0.15, 0.45, 0.15), (0.45, 0.3)):
        compressor = make_compressor(method, **options)
        for reduction in order:
            assert_equal(state(compressor, reduction), expected[reduction])


def test_atoms_that_idle_at_one_reduction_serve_at_the_next():
    model = tiny_llama()
    for block in model.model.layers:  # q needs every rank, the others hardly any: at 0.2 q stays dense
        torch.nn.init.orthogonal_(block.self_attn.q_proj.weight)
        for letter in "kvo":
            w = getattr(block.self_attn, f"{letter}_proj").weight.data
            w.copy_(w[:, :2] @ w[:2] + 1e-4 * w)
    found, weights = calibrate(model, tokens()), model.state_dict()

    def fresh():
        copy = tiny_llama()
        copy.load_state_dict(weights)
        return copy

    options = {"grouping": {"rule": "fixed", "size": 3}}
    reused = make_compressor("matrix-pca", **options)
    for reduction in (0.2, 0.6, 0.2):
        model, report = compress(fresh(), reused, found, reduction)
        other, other_report = compress(fresh(), "matrix-pca", found, reduction, **options)
        assert report.learned == other_report.learned and report.stored == other_report.stored
        assert bool(model.model.shared["q"].atom_groups) == (reduction == 0.6)
        expected = other.state_dict()
        assert all(torch.equal(bits, expected[name]) for name, bits in model.state_dict().items())


@pytest.mark.parametrize("method", ["svd", "svd-fisher", "basis-sharing", "matrix-pca-aligned", "direct-share"])
def test_the_second_reduction_prepares_nothing_and_the_first_model_is_let_go(method):
    compressor, calls = make_compressor(method), []
    inner = compressor.prepare
    compressor.prepare = lambda problem: calls.append(1) or inner(problem)
    model = tiny_llama(**fitting(method))
    gone = [weakref.ref(model), weakref.ref(model.model.layers[0].self_attn.q_proj.weight)]
    compress(model, compressor, statistics(**fitting(method)), 0.2)
    del model
    gc.collect()
    assert [ref() for ref in gone] == [None, None]
    state(compressor, 0.3)
    assert len(calls) == 1


def test_what_is_kept_is_not_used_for_another_model_data_or_option():
    other = tiny_llama(seed=1)
    other_data = calibrate(other, tokens(), gradient_samples=2)
    fewer = calibrate(tiny_llama(), tokens(4), gradient_samples=4)
    less_gradient = calibrate(tiny_llama(), tokens(), gradient_samples=2)
    compressor = make_compressor("svd-fisher")

    def check():
        assert_equal(state(compressor, 0.3), state(make_compressor("svd-fisher", **compressor.get_params()), 0.3))

    check()
    for data, ids, model in ((other_data, tokens(), other), (fewer, tokens(4), None), (less_gradient, tokens(), None)):
        copy = model and tiny_llama(seed=1)
        fresh = make_compressor("svd-fisher")
        assert_equal(state(compressor, 0.3, model, data, ids), state(fresh, 0.3, copy, data, ids))
        check()
    compressor.damping = 0.5
    check()
    for some in ("qk", "qkvo"):
        _, report = compress(tiny_llama(), compressor, statistics(), 0.3, projections=some)
        assert list(report.learned["ranks"]) == list(some)
    blind = make_compressor("svd")  # without statistics the weights themselves are the key
    for seed, _ in itertools.product((0, 1), range(2)):
        model, _ = compress(tiny_llama(seed=seed), blind, None, 0.3)
        expected, _ = compress(tiny_llama(seed=seed), "svd", None, 0.3)
        assert torch.equal(model.model.shared["q"].factors[0].left, expected.model.shared["q"].factors[0].left)


def test_weights_that_change_after_a_failure_do_no_harm():
    compressor, model = make_compressor("svd"), tiny_llama()
    with pytest.raises(MasaError, match="reachable"):
        compress(model, compressor, None, 0.99)
    assert compressor.learned() == {}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model, _ = compress(tiny_llama(), compressor, None, 0.3)
    expected, _ = compress(tiny_llama(), "svd", None, 0.3)
    assert torch.equal(model.model.shared["o"].factors[2].right, expected.model.shared["o"].factors[2].right)


def test_what_was_learned_is_of_the_last_fit_alone():
    compressor = make_compressor("svd-llm")
    first, second = state(compressor, 0.2)[1], state(compressor, 0.4)[1]
    assert first.learned != second.learned == compressor.learned()
    with pytest.raises(MasaError):
        state(compressor, 0.9999)
    assert "error" not in compressor.learned()


def test_an_instance_brings_its_own_options():
    with pytest.raises(MasaError, match="ranks"):
        compress(tiny_llama(), make_compressor("svd"), None, 0.2, ranks="global")
