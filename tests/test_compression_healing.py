"""Healing trains the sources of a compressed model and nothing else; the short trainings' common parts."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from compression_models import statistics, tiny_llama, tokens

import masa
from masa.compression import compress, heal
from masa.compression.healing.training import batches, cosine
from masa.errors import MasaError

SETTINGS = {"steps": 30, "batch_size": 4, "length": 12, "lr": 4e-3}


def compressed(method: str = "matrix-pca", reduction: float = 0.4, dtype: torch.dtype = torch.float32):
    model, _ = compress(tiny_llama(), method, statistics(), reduction)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


@torch.no_grad()
def divergence(model) -> float:
    """KL of the dense model's predictions from the model's, in nats a token."""
    found, target = (m(tokens()).logits.double().log_softmax(-1) for m in (model, tiny_llama()))
    return float((target.exp() * (target - found)).sum(-1).mean())


@pytest.mark.parametrize("method", ["svd-fisher", "matrix-pca", "basis-sharing", "direct-share"])
def test_the_divergence_from_the_dense_model_goes_down_and_only_sources_change(method):
    model = compressed(method)
    frozen = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    first = next(model.model.shared.parameters()).requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    start = divergence(model)
    report = heal(model, tokens(), teacher=tiny_llama(), **SETTINGS)
    assert divergence(model) < 0.8 * start
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (".shared." not in name or tensor.dtype == torch.int32), name
    assert not frozen.requires_grad and not first.requires_grad
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert report["losses"][0] > report["losses"][-1] and len(report["losses"]) == 30
    assert report["tokens"] == 30 * 4 * 12
    assert report["trained"] == sum(p.numel() for p in model.model.shared.parameters())


def test_the_first_loss_is_the_divergence_at_any_temperature():
    model = compressed()
    settings = {"steps": 1, "batch_size": 8, "length": None, "lr": 1e-3}
    report = heal(compressed(), tokens(), teacher=tiny_llama(), **settings)
    assert report["losses"][0] == pytest.approx(divergence(model), rel=1e-3)
    hot = heal(compressed(), tokens(), teacher=tiny_llama(), temperature=2.0, **settings)
    with torch.no_grad():
        found, target = ((m(tokens()).logits.double() / 2).log_softmax(-1) for m in (model, tiny_llama()))
    expected = 4 * float((target.exp() * (target - found)).sum(-1).mean())
    assert hot["losses"][0] == pytest.approx(expected, rel=1e-3)


def test_the_lm_objective_lowers_the_loss_on_its_tokens():
    model = compressed()
    with torch.no_grad():
        before = model(tokens(), labels=tokens()).loss
        report = heal(model, tokens(), objective="lm", **SETTINGS)
        after = model(tokens(), labels=tokens()).loss
    assert after < before - 0.05 and report["objective"] == "lm"


def test_a_seed_fixes_every_bit_and_the_healed_model_saves_loads_and_folds(tmp_path):
    models = [compressed() for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        with torch.no_grad():
            model(tokens())  # folds the weights of before
        heal(model, tokens(), teacher=tiny_llama(), seed=seed, **SETTINGS | {"steps": 6})
    first, second, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    masa.save(models[0], tmp_path)
    with torch.no_grad():
        expected = models[0](tokens()).logits
        assert torch.equal(masa.load(tmp_path)(tokens()).logits, expected)
        torch.testing.assert_close(masa.fold(models[0])(tokens()).logits, expected)
    loaded = masa.load(tmp_path)  # a loaded model can be healed, and its file stays what it is
    stored = (tmp_path / "model.safetensors").read_bytes()
    heal(loaded, tokens(), teacher=tiny_llama(), **SETTINGS)
    assert (tmp_path / "model.safetensors").read_bytes() == stored
    assert divergence(loaded) < divergence(models[0])


def test_sources_in_bfloat16_stay_so_and_small_steps_add_up():
    model, start = compressed(dtype=torch.bfloat16), divergence(compressed(dtype=torch.bfloat16))
    heal(model, tokens(), teacher=tiny_llama(), **SETTINGS | {"lr": 3e-3, "steps": 60})
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert divergence(model) < 0.95 * start
    under = compressed()
    heal(under, tokens(), teacher=tiny_llama(), dtype="bfloat16", **SETTINGS)
    assert {p.dtype for p in under.parameters()} == {torch.float32}
    assert divergence(under) < 0.8 * divergence(compressed())


def test_a_loss_that_is_not_finite_is_an_error_and_leaves_the_model_as_it_was():
    model = compressed()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(MasaError, match="Lower lr"):
        heal(model, tokens(), teacher=tiny_llama(), **SETTINGS | {"lr": 1e30})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_what_cannot_be_healed_says_why():
    with pytest.raises(MasaError, match="dense"):
        heal(tiny_llama(), tokens(), teacher=tiny_llama())
    with pytest.raises(MasaError, match="dense"):
        heal(masa.fold(compressed()), tokens(), teacher=tiny_llama())
    model = compressed()
    with pytest.raises(MasaError, match="teacher="):
        heal(model, tokens(), length=12)
    with pytest.raises(MasaError, match="shares weights itself"):
        heal(model, tokens(), teacher=model, length=12)
    with pytest.raises(MasaError, match="vocabulary"):
        heal(model, tokens(), teacher=tiny_llama(vocab_size=64), length=12)
    for wrong, name in (({"objective": "k"}, "kl"), ({"dtype": "int8"}, "bfloat16"), ({"length": 99}, "length")):
        with pytest.raises(MasaError, match=name):
            heal(model, tokens(), teacher=tiny_llama(), **{"length": 12} | wrong)
    for wrong in ({"steps": 0}, {"lr": 0.0}, {"batch_size": 0}, {"temperature": 0.0}):
        with pytest.raises(MasaError, match=next(iter(wrong))):
            heal(model, tokens(), teacher=tiny_llama(), length=12, **wrong)


def test_post_share_may_cut_its_sequences_and_run_under_autocast():
    def losses(**options):
        _, report = compress(tiny_llama(), "post-share", statistics(), 0.25, tokens=tokens(), steps=2, **options)
        return report.learned["losses"]

    plain = losses()
    assert losses(length=24) == plain != losses(length=12)
    autocast = losses(dtype="bfloat16")
    assert autocast != plain and autocast[0][0] == pytest.approx(plain[0][0], rel=0.05)
    with pytest.raises(MasaError, match="length"):
        losses(length=25)
    with pytest.raises(MasaError, match="dtype"):
        losses(dtype="float128")


def test_an_epoch_has_every_sequence_once():
    ids = torch.arange(10).view(5, 2)
    found = [b[:, 0].tolist() for b in itertools.islice(batches(ids, 2, seed=3), 6)]
    assert [len(b) for b in found] == [2, 2, 1, 2, 2, 1]
    epochs = [list(itertools.chain(*found[:3])), list(itertools.chain(*found[3:]))]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1]) == [0, 2, 4, 6, 8]
    assert [cosine(step, 12, 2) for step in (0, 1, 2, 7)] == pytest.approx([1 / 3, 2 / 3, 1, 0.5])
    assert cosine(11, 12, 2) == pytest.approx((1 + math.cos(math.pi * 0.9)) / 2)
