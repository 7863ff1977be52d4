"""The closed forms against independent computations in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from masa.compression.allocation.grouping import fixed, greedy, make_groups, optimal, top_k
from masa.compression.allocation.ranks import GlobalRanks, RoleRanks, UniformRanks, make_ranks, stored
from masa.compression.methods.algebra import cholesky, refit, truncation
from masa.compression.methods.matrix_pca import matrix_pca
from masa.errors import MasaError


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def related_weights(n: int = 6) -> list[torch.Tensor]:
    """n matrices (10, 14) with a common part, so that the spectrum of their stack decays."""
    return list(random(n, 10, 14, seed=1) + 2 * random(1, 10, 14, seed=2))


def test_atoms_span_the_right_singular_subspace_of_the_stack():
    weights = related_weights()
    atoms, _, _ = matrix_pca(weights, 3)
    reference = torch.linalg.svd(torch.stack(weights).flatten(1), full_matrices=False).Vh[:3]
    ours = torch.nn.functional.normalize(atoms.flatten(1), dim=1)
    outside = ours - ours @ reference.T @ reference  # its norm is the sine of the largest principal angle
    assert torch.linalg.matrix_norm(outside, 2) < 1e-6


@pytest.mark.parametrize("kept", [1, 2, 4])
def test_squared_error_is_the_sum_of_dropped_eigenvalues(kept):
    weights = related_weights()
    atoms, coefficients, values = matrix_pca(weights, kept)
    error = (torch.stack(weights) - torch.tensordot(coefficients, atoms, 1)).square().sum()
    torch.testing.assert_close(error, values[kept:].sum(), rtol=1e-10, atol=0)


def test_as_many_atoms_as_layers_reproduce_the_weights():
    weights = related_weights()
    atoms, coefficients, _ = matrix_pca(weights, len(weights))
    torch.testing.assert_close(torch.tensordot(coefficients, atoms, 1), torch.stack(weights), rtol=0, atol=1e-10)


def test_one_atom_of_nearly_equal_layers_is_the_mean_direction():
    weights = list(random(1, 10, 14) + 1e-5 * random(5, 10, 14, seed=3))
    atoms, coefficients, _ = matrix_pca(weights, 1)
    mean = torch.stack(weights).mean(0)
    cosine = torch.nn.functional.cosine_similarity(atoms[0].flatten(), mean.flatten(), dim=0)
    assert 1 - cosine < 1e-9
    assert (coefficients > 0).all()


def test_the_first_atom_is_the_leading_singular_direction_with_a_fixed_sign():
    weights = related_weights()
    flipped = [-w for w in weights]
    atoms, coefficients, _ = matrix_pca(weights, 2)
    for c in (coefficients, matrix_pca(flipped, 2)[1]):
        assert (c.gather(0, c.abs().argmax(0, keepdim=True)) > 0).all()
    torch.testing.assert_close(matrix_pca(flipped, 2)[0], -atoms)


def test_repeated_layers_give_no_atoms_of_rounding_noise():
    a, b = random(10, 14), random(10, 14, seed=5)
    atoms, coefficients, _ = matrix_pca([a, b, a, b, a], 5)
    assert len(atoms) == 2
    torch.testing.assert_close(torch.tensordot(coefficients, atoms, 1)[2], a)


def test_data_aware_atoms_beat_plain_ones_in_their_metric_and_lose_outside():
    weights, x = related_weights(), random(50, 14, seed=7) @ torch.diag(torch.logspace(-2, 1, 14).double())
    gram, stacked = x.T @ x, torch.stack(weights)

    def errors(metric):
        atoms, coefficients, values = matrix_pca(weights, 2, metric)
        gap = stacked - torch.tensordot(coefficients, atoms, 1)
        return (gap @ x.T).square().sum(), gap.square().sum(), values

    plain, aware = errors(None), errors(gram)
    assert aware[0] < 0.999 * plain[0]
    assert aware[1] > plain[1]
    torch.testing.assert_close(aware[0], aware[2][2:].sum(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (16, 16)])
@pytest.mark.parametrize("rank", [1, 5, 12])
def test_output_error_on_the_data_is_the_discarded_energy(shape, rank):
    w, x = random(*shape), random(60, shape[1], seed=1) @ random(shape[1], shape[1], seed=2)
    found = truncation(w, x.T @ x)
    left, right = found.factors(rank, w)
    error = (x @ (w - left @ right).T).square().sum()
    torch.testing.assert_close(error, found.energy[rank:].sum(), rtol=1e-8, atol=1e-8 * found.total)


def test_truncation_equals_the_cholesky_whitened_svd():
    w, x = random(12, 20), random(60, 20, seed=1)
    gram = x.T @ x
    factor = torch.linalg.cholesky(gram)
    u, s, vh = torch.linalg.svd(w @ factor, full_matrices=False)
    published = u[:, :5] * s[:5] @ torch.linalg.solve_triangular(factor, vh[:5], upper=False, left=False)
    left, right = truncation(w, gram).factors(5, w)
    torch.testing.assert_close(left @ right, published, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 20), (20, 12)])
def test_truncation_needs_no_jitter_for_a_rank_deficient_autocorrelation(shape):
    w, x = random(*shape), random(4, shape[1], seed=1)  # four tokens only
    found = truncation(w, x.T @ x)
    left, right = found.factors(4, w)
    assert torch.isfinite(left).all() and torch.isfinite(right).all()
    assert (x @ (w - left @ right).T).norm() < 1e-6 * (x @ w.T).norm()


def test_refitted_left_factor_is_the_least_squares_solution():
    w, x, right = random(12, 20), random(60, 20, seed=1), random(5, 20, seed=2)
    left = refit(w, right, x.T @ x, "test", {})
    reference = torch.linalg.lstsq(x @ right.T, x @ w.T).solution.T
    torch.testing.assert_close(left, reference, rtol=1e-8, atol=1e-8)


def test_cholesky_reports_the_jitter_it_needed_and_none_otherwise():
    log: dict[str, float] = {}
    x = random(60, 20)
    cholesky(x.T @ x, "full", log)
    assert not log
    thin = random(4, 20)
    gram = thin.T @ thin
    factor = cholesky(gram, "thin", log)
    assert 1e-8 <= log["thin"] <= 1e-5
    jittered = gram + log["thin"] * gram.diagonal().mean() * torch.eye(20)
    torch.testing.assert_close(factor @ factor.T, jittered.double())
    with pytest.raises(MasaError, match="zero"):
        cholesky(torch.zeros(3, 3, dtype=torch.float64), "dead", log)


def spectra(decays=(0.1, 0.3, 1.0, 3.0)):
    """Matrices of two shapes whose energies fall off at different speeds."""
    found = {}
    for layer, decay in enumerate(decays):
        for letter, shape in (("q", (24, 24)), ("k", (8, 24))):
            u, v = (torch.linalg.qr(random(n, n, seed=layer)).Q for n in shape)
            small = min(shape)
            s = torch.exp(-decay * torch.arange(small, dtype=torch.float64))
            found[letter, (layer,)] = truncation(u[:, :small] * s @ v[:, :small].T)
    return found


def objective(found, ranks):
    return sum(float(found[k].energy[r:].sum()) / found[k].total for k, r in ranks.items() if r is not None)


def test_global_ranks_beat_uniform_and_role_ranks_within_the_budget():
    found = spectra()
    dense = sum(s.shape[0] * s.shape[1] for s in found.values())
    for keep in (0.4, 0.6, 0.8):
        budget = int(keep * dense)
        results = {name: make_ranks(name).allocate(found, budget) for name in ("uniform", "role", "global")}
        results["global-dense"] = make_ranks("global-dense").allocate(found, budget)
        for ranks in results.values():
            assert budget - 48 < stored(found, ranks) <= budget
        scores = {name: objective(found, ranks) for name, ranks in results.items()}
        assert scores["global"] < 0.9 * min(scores["uniform"], scores["role"])
        assert scores["global-dense"] <= scores["global"] + 1e-12
    assert None in results["global-dense"].values()


def test_global_ranks_are_optimal_among_all_ranks():
    found = {key: s for key, s in spectra((0.4, 1.0)).items() if key[0] == "k"}
    for budget in (32 * 3, 32 * 7):  # multiples of the cost, so that nothing is lost to rounding
        best = min(
            objective(found, dict(zip(found, ranks, strict=True)))
            for ranks in itertools.product(range(1, 9), repeat=2)
            if 32 * sum(ranks) <= budget
        )
        assert objective(found, GlobalRanks(dense=False).allocate(found, budget)) == pytest.approx(best, rel=1e-9)


def test_uniform_ranks_keep_the_same_fraction_and_role_ranks_favour_q():
    found = spectra()
    uniform = UniformRanks().allocate(found, int(0.6 * 3072))
    assert {r for (p, _), r in uniform.items() if p == "q"} <= {7, 8}
    assert {r for (p, _), r in uniform.items() if p == "k"} <= {3, 4}
    role = RoleRanks(2.0).allocate(found, int(0.6 * 3072))
    assert role["q", (0,)] > uniform["q", (0,)] and role["k", (0,)] < uniform["k", (0,)]


@pytest.mark.parametrize("rule", ["uniform", "role", "global", "global-dense"])
def test_a_hopeless_budget_is_refused(rule):
    with pytest.raises(MasaError, match="are reachable"):
        make_ranks(rule).allocate(spectra(), 10)


def brute_force(drift, groups, low, high):
    layers = len(drift) + 1
    for cuts in itertools.combinations(range(layers - 1), groups - 1):
        edges = [0, *(c + 1 for c in cuts), layers]
        if all(low <= b - a <= high for a, b in itertools.pairwise(edges)):
            yield sum(drift) - sum(drift[c] for c in cuts)


@pytest.mark.parametrize(("groups", "low", "high"), [(1, 1, 9), (2, 2, 7), (3, 2, 4), (4, 1, 9), (4, 2, 3)])
def test_optimal_grouping_agrees_with_brute_force(groups, low, high):
    drift = random(8).abs().tolist()
    found = optimal(drift, groups, low, high)
    assert [layer for group in found for layer in group] == list(range(9))
    assert len(found) == groups and all(low <= len(group) <= high for group in found)
    inside = sum(drift[a] for group in found for a in group[:-1])
    assert inside == pytest.approx(min(brute_force(drift, groups, low, high)))


def test_the_other_grouping_rules():
    drift = [0.7, 0.1, 0.1, 0.5, 0.2]
    assert top_k(drift, 3) == [[0], [1, 2, 3], [4, 5]]
    assert greedy(drift, 0.35) == [[0], [1, 2, 3], [4, 5]]
    assert fixed(drift, 4) == [[0, 1, 2, 3], [4, 5]]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("optimum", "optimal"),
        ({"rule": "optimal", "groups": 4, "min_size": 2}, "Choose groups"),
        ({"rule": "top-k", "groups": 99}, "between 1 and"),
        ({"rule": "fixed", "width": 3}, "width"),
        ({"rule": "fixed", "size": 0}, "at least one"),
    ],
)
def test_bad_groupings_say_what_would_do(rule, message):
    with pytest.raises(MasaError, match=message):
        make_groups(rule, [0.1] * 5)


@pytest.mark.parametrize("rule", ["uniform", "role", "global", "global-dense"])
def test_at_the_edge_of_the_reachable_every_matrix_keeps_a_rank(rule):
    found = spectra()
    one_each = sum(sum(s.shape) for s in found.values())
    assert set(make_ranks(rule).allocate(found, one_each + 5).values()) == {1}
    assert set(make_ranks(rule).allocate(found, 5, least=0).values()) == {0}
