"""Sharing that is not the paper's, against its formulas in float64 and its limits."""

import numpy as np
import pytest
import torch
from conftest import ROOT, language_model, llama_model

import masa
from masa.errors import MasaError
from masa.sharing.coefficients import LegendreCoefficients
from masa.sharing.variant_sources import HeadAtoms, Relaxed
from masa.sharing.weight_sources import Atoms, Repeat
from masa.study import artefacts, config, experiments


def drawn(source, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in source.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return source.double()


@pytest.mark.parametrize("axis", [0, 1])
def test_each_head_is_mixed_by_coefficients_of_its_own(axis):
    source = drawn(HeadAtoms("o" if axis else "q", 5, (12, 8), atoms=3, heads=4, axis=axis))
    atoms, c = source.atoms.detach().numpy(), source.values.detach().numpy()
    if axis == 0:
        expected = np.einsum("hls,shni->lhni", c, atoms.reshape(3, 4, 3, 8)).reshape(5, 12, 8)
    else:
        expected = np.einsum("hls,sohn->lohn", c, atoms.reshape(3, 12, 4, 2)).reshape(5, 12, 8)
    found = source.weights()[source.projections]
    for layer in range(5):
        np.testing.assert_allclose(found[layer].detach().numpy(), expected[layer], rtol=1e-12)
        one = source.layer_weight(source.projections, layer)
        np.testing.assert_allclose(one.detach().numpy(), expected[layer], rtol=1e-12)
    x = torch.randn(2, 7, 8, dtype=torch.float64)
    torch.testing.assert_close(source(source.projections, 2, x), x @ torch.tensor(expected[2]).T)


def test_one_head_is_masa():
    heads = drawn(HeadAtoms("v", 4, (6, 6), atoms=2, heads=1, axis=0))
    plain = Atoms("v", 4, (6, 6), atoms=2).double()
    with torch.no_grad():
        plain.atoms.copy_(heads.atoms)
        plain.maker["v"].values.copy_(heads.values[0])
    for a, b in zip(heads.weights()["v"], plain.weights()["v"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("layers", "atoms"), [(12, 4), (6, 6), (5, 1), (1, 1)])
def test_the_basis_is_legendres_over_depth(layers, atoms):
    made = LegendreCoefficients(layers, atoms).double()
    made.reset_parameters()
    c = made().numpy()
    np.testing.assert_allclose(c.T @ c, np.eye(atoms) * layers / atoms, atol=1e-9)
    assert np.mean((c**2).sum(1)) == pytest.approx(1)
    depth = np.linspace(-1, 1, layers) if layers > 1 else np.zeros(1)
    for degree in range(atoms):  # a polynomial of this degree and of none below
        fit = np.polynomial.legendre.legfit(depth, c[:, degree], degree)
        np.testing.assert_allclose(np.polynomial.legendre.legval(depth, fit), c[:, degree], atol=1e-9)
        assert fit[-1] > 0, "the sign of Legendre's own"
    assert not list(made.parameters())


def test_the_basis_is_not_trained_and_is_saved_as_plain_coefficients(tmp_path):
    model = masa.share(language_model(), {"method": "masa", "coefficients": "legendre"})
    before = model.model.shared["q"].coefficients("q").clone()
    ids = torch.arange(16)[None] % 60
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert torch.equal(model.model.shared["q"].coefficients("q"), before)
    back = masa.load(masa.save(model.eval(), tmp_path))
    assert torch.equal(back.model.shared["q"].maker["q"].values, before)
    torch.testing.assert_close(back(ids).logits, model(ids).logits)


def test_a_set_and_a_low_rank_part_for_each_use():
    source = drawn(Relaxed("k", 6, (8, 10), sets=2, rank=3))
    sets, left, right = (p.detach().numpy() for p in (source.sets, source.left, source.right))
    x = torch.randn(5, 10, dtype=torch.float64)
    for layer, weight in enumerate(source.weights()["k"]):
        expected = sets[layer % 2] + left[layer] @ right[layer]
        np.testing.assert_allclose(weight.detach().numpy(), expected, rtol=1e-12)
        np.testing.assert_allclose(source.layer_weight("k", layer).detach().numpy(), expected, rtol=1e-12)
        torch.testing.assert_close(source("k", layer, x), x @ torch.tensor(expected).T)


def test_at_the_start_it_is_repeat_all_over():
    torch.manual_seed(0)
    source = Relaxed("k", 6, (8, 10), sets=2, rank=3)
    source.reset_parameters(0.02)
    plain = Repeat("k", 6, (8, 10), sets=2)
    plain.sets = source.sets
    for a, b in zip(source.weights()["k"], plain.weights()["k"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"method": "masa-per-head", "projections": "qu"}, "FFN up.* has no heads"),
        ({"method": "masa-per-head", "coefficients": "mlp"}, "'coefficients' has no effect"),
        ({"method": "relaxed", "sets": 4}, "does not divide L = 6"),
        ({"method": "relaxed", "rank": 99, "sets": 2}, "exceeds"),
        ({"method": "masa", "coefficients": "legendr"}, "Did you mean 'legendre'"),
    ],
)
def test_what_cannot_be_built_is_said(spec, said):
    with pytest.raises(MasaError, match=said):
        masa.share(language_model(), spec)


def test_key_and_value_heads_of_grouped_attention():
    model = masa.share(llama_model(), {"method": "masa-per-head", "atoms": 2})
    config = model.config
    assert model.model.shared["q"].heads == config.num_attention_heads
    assert model.model.shared["k"].heads == config.num_key_value_heads


def test_the_table_compares_equal_attention_parameters():
    asked = config.load([ROOT / "config/evidence.yaml", ROOT / "config/schemes.yaml"])
    rows = artefacts.artefact_spec(asked, "tables", "schemes")["rows"]
    assert [row["experiment"] for row in rows][3:] == ["masa-per-head", "masa-legendre", "relaxed"]
    assert len(experiments.all_runs(asked)) == 18
    for row in rows[1:]:
        model = language_model(layers=12, width=48, heads=3)
        assert masa.count_parameters(masa.share(model, row["sharing"])).attention_reduction == pytest.approx(
            2 / 3, abs=0.01
        )
