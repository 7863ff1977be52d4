"""The mathematics of dictionaries with sparse coefficients, against references that know nothing of it."""

import itertools

import pytest
import torch
from torch.linalg import norm

from masa.compression.allocation.matching import distances, groups, match
from masa.compression.methods.algebra import truncation
from masa.compression.methods.coding import largest, largest_overall, objective, pursue, refit_codes
from masa.compression.methods.dictionaries import Code, Side, keep_in_columns, weighed_error
from masa.compression.methods.shared_dictionaries import Group, conjugate, sylvester

F64 = torch.float64


def positive(n, rank=None, seed=0):
    x = torch.randn(rank or 3 * n, n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / len(x)


def side(m=12, n=20, metric="diagonal", seed=0, left=True):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, n, dtype=F64, generator=generator)
    metrics = {
        "none": None,
        "diagonal": torch.rand(n, dtype=F64, generator=generator) + 0.1,
        "full": positive(n, seed=9),
    }
    return Side(x, positive(m, seed=seed + 1) if left else None, metrics[metric], "w", {})


METRICS = pytest.mark.parametrize("metric", ["none", "diagonal", "full"])


def test_a_dictionary_whose_coefficients_all_stay_is_svd_llm():
    """s = k: the truncation of W in the metric of the data, as SVD-LLM and Swift-SVD have it."""
    seen = side(metric="none")
    for k in (1, 5, 12):
        code = seen.basis().code(k, k * 20)
        weight = seen.x.T  # (out, in)
        left, right = truncation(weight, seen.left).factors(k, weight)
        torch.testing.assert_close(code.atoms @ code.codes, (left @ right).T, rtol=0, atol=1e-10)
        vectors = torch.linalg.eigh(weight @ seen.left @ weight.T).eigenvectors[:, -k:]  # of the outputs' covariance
        torch.testing.assert_close((code.atoms @ code.codes).T, vectors @ vectors.T @ weight, rtol=0, atol=1e-10)


@METRICS
def test_the_best_dictionary_leaves_an_error_orthogonal_to_the_coefficients(metric):
    seen = side(metric=metric)
    code = seen.basis().code(6, 60)
    assert norm(weighed_error(seen, code) @ code.codes.T) < 1e-9 * norm(seen.x)
    for _ in range(5):  # and none beside it is better
        other = Code(code.atoms + 1e-3 * torch.randn(12, 6, dtype=F64), code.codes, code.mask)
        assert seen.error(other) > seen.error(code)


def test_the_atoms_of_the_input_side_do_not_depend_on_its_metric():
    seen = side()
    code = seen.basis().code(6, 60)
    other = Side(seen.x, positive(12, seed=5), seen.metric, "w", {}).refit(code.codes, code.mask)
    torch.testing.assert_close(other.atoms, code.atoms)


@METRICS
def test_refitted_coefficients_solve_the_normal_equations_on_their_support(metric):
    seen = side(metric=metric)
    atoms = torch.randn(12, 7, dtype=F64)
    gram, target = seen.gram(atoms)
    mask = torch.rand(7, 20) < 0.5
    found = refit_codes(gram, target, mask, torch.zeros(7, 20, dtype=F64), seen.metric, 500, 1e-13)
    b = torch.eye(20, dtype=F64) if metric == "none" else seen.metric if metric == "full" else torch.diag(seen.metric)
    whole = torch.kron(gram, b)  # rows first: vec(M C B) = (M x B) vec(C)
    right = (atoms.T @ seen.left @ seen.x @ b).flatten()
    keep = mask.flatten()
    expected = torch.zeros(140, dtype=F64)
    expected[keep] = torch.linalg.solve(whole[keep][:, keep], right[keep])
    torch.testing.assert_close(found.flatten(), expected, rtol=1e-8, atol=1e-9)


@METRICS
@pytest.mark.parametrize("whole", [False, True])
def test_the_error_never_rises(metric, whole):
    seen = side(metric=metric)
    code = seen.basis().code(8, 80, "matrix" if whole else "columns")
    error = seen.error(code)
    for _ in range(6):
        gram, target = seen.gram(code.atoms)
        codes, mask = pursue(gram, target, code.codes, code.mask, seen.metric, whole=whole)
        assert int(mask.sum()) == 80 and not bool(codes[~mask].any())
        if not whole:
            assert torch.equal(mask.sum(0), code.mask.sum(0))
        for half in (Code(code.atoms, codes, mask), seen.refit(codes, mask)):
            code, now = half, seen.error(half)
            assert now <= error * (1 + 1e-9)
            error = now
    assert error < seen.error(seen.basis().code(8, 80, "matrix" if whole else "columns"))


def test_rounds_end_where_the_error_stands():
    seen = side()
    start = seen.basis().code(8, 80)
    few, many = (seen.error(seen.improve(start, rounds)) for rounds in (3, 200))
    assert many < few < seen.error(start)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_the_importance_of_a_coefficient_is_rockets(lam):
    seen = side(metric="none")
    upper = torch.linalg.cholesky(seen.left, upper=True)
    white = upper @ seen.x
    basis = torch.linalg.svd(white).U[:, :6]
    score = (basis.T @ white).abs() * (torch.linalg.inv(upper) @ basis).norm(dim=0)[:, None] ** lam
    mask = torch.zeros(6, 20, dtype=bool)
    for j in range(20):
        mask[score[:, j].topk(3).indices, j] = True
    kept = (basis.T @ white) * mask
    atoms = torch.linalg.inv(upper) @ (white @ kept.T @ torch.linalg.inv(kept @ kept.T))
    code = seen.basis().code(6, 60, weight_space=lam)
    torch.testing.assert_close(code.atoms @ code.codes, atoms @ kept, rtol=1e-8, atol=1e-8)


def test_thresholds_keep_exactly_what_is_counted_also_where_entries_tie():
    score = torch.ones(5, 4)
    assert largest(score, 2).sum(0).tolist() == [2, 2, 2, 2]
    assert largest(score, torch.tensor([0, 1, 5, 3])).sum(0).tolist() == [0, 1, 5, 3]
    assert int(largest_overall(score, 7).sum()) == 7
    assert sorted(keep_in_columns(score, 10).sum(0).tolist()) == [2, 2, 3, 3]
    assert bool(keep_in_columns(score, 99).all())


# in singular metrics, at sizes where nothing is left to choose


def test_a_singular_metric_and_more_atoms_than_directions():
    flat = positive(12, rank=4)
    seen = Side(torch.randn(12, 20, dtype=F64), flat, None, "w", log := {})
    code = seen.improve(seen.basis().code(10, 100), 3)
    assert log and bool(torch.isfinite(code.atoms).all())
    low = Side(torch.randn(12, 2, dtype=F64) @ torch.randn(2, 20, dtype=F64), positive(12), None, "w", {})  # of rank 2
    code = low.improve(low.basis().code(8, 160), 3)
    assert low.error(code) < 1e-12 * objective(low.x, low.left, None)


def test_fewer_columns_than_coefficients_of_each():
    seen = side(m=12, n=3, metric="none")
    basis = seen.basis()
    assert basis.codes.shape == (3, 3)  # as many directions as the matrix has
    assert seen.error(basis.code(3, 9)) < 1e-18 * objective(seen.x, seen.left, None)


# several matrices


def group(sizes=(20, 14), metric="diagonal", m=12):
    return Group([side(m, n, metric, seed=10 * i) for i, n in enumerate(sizes)])


def test_the_sylvester_solve_equals_a_kronecker_solve():
    a, s = (positive(6, seed=1), positive(6, seed=2)), (positive(3, seed=3), positive(3, seed=4))
    target = torch.randn(6, 3, dtype=F64)
    found = sylvester(a, s, target, "d", {})
    whole = torch.kron(a[0], s[0]) + torch.kron(a[1], s[1])
    torch.testing.assert_close(found, torch.linalg.solve(whole, target.flatten()).view(6, 3), rtol=1e-10, atol=1e-10)
    assert norm(a[0] @ found @ s[0] + a[1] @ found @ s[1] - target) < 1e-10
    by_steps = conjugate(a, s, target, torch.zeros(6, 3, dtype=F64), "d", {})
    torch.testing.assert_close(by_steps, found, rtol=1e-7, atol=1e-8)


def test_conjugate_gradients_solve_for_three():
    a, s = [positive(6, seed=i) for i in range(3)], [positive(3, seed=9 + i) for i in range(3)]
    target = torch.randn(6, 3, dtype=F64)
    found = conjugate(a, s, target, torch.zeros(6, 3, dtype=F64), "d", {})
    whole = sum(torch.kron(x, y) for x, y in zip(a, s, strict=True))
    torch.testing.assert_close(found, torch.linalg.solve(whole, target.flatten()).view(6, 3), rtol=1e-7, atol=1e-8)


def test_two_matrices_with_one_metric_are_one_matrix():
    first, second = side(seed=1), side(seed=2)
    second.left = first.left
    one = Side(torch.cat([first.x, second.x], 1), first.left, torch.cat([first.metric, second.metric]), "w", {})
    pair = Group([first, second])
    torch.testing.assert_close(pair.start() @ pair.start().T, torch.eye(12, dtype=F64), rtol=0, atol=1e-10)
    code = pair.dictionary(pair.thresholded(pair.start()[:, :6], 120, "columns"))
    alone = one.refit(torch.cat(code.codes, 1), torch.cat(code.masks, 1))
    torch.testing.assert_close(code.atoms, alone.atoms, rtol=1e-6, atol=1e-7)


@METRICS
@pytest.mark.parametrize("sizes", [(20,), (20, 14), (20, 14, 9, 30)])
def test_the_error_of_a_group_never_rises(sizes, metric):
    found = group(sizes, metric)
    code = found.thresholded(found.start()[:, :8], 4 * sum(sizes), "columns")
    error = found.error(code)
    for _ in range(3):
        for half in (found.dictionary, found.pursued):
            code = half(code)
            now = found.error(code)
            assert now <= error * (1 + 1e-7)
            error = now
        assert [int(mask.sum()) for mask in code.masks] == [4 * n for n in sizes]
    assert found.error(found.improve(code, 50)) <= error


def test_a_dictionary_of_all_directions_gives_every_matrix_back():
    found = group()
    code = found.dictionary(found.thresholded(found.start(), 12 * 34, "matrix"))
    assert found.error(code) < 1e-10 * sum(objective(s.x, s.left, s.metric) for s in found.sides)


# who shares with whom


def distance(a, b):
    if a.shape[1] > b.shape[1]:
        a, b = b, a
    n = a.shape[1]
    scale = a.norm() if n < b.shape[1] else min(a.norm(), b.norm())
    return min(norm(b[:, t : t + n] - a) for t in range(b.shape[1] - n + 1)) / scale


def test_distances_are_those_of_the_best_window():
    found = [torch.randn(70, n, dtype=F64) for n in (6, 6, 9, 15, 15, 9)]
    found[3][:, 4:10] = found[0] + 0.1 * torch.randn(70, 6, dtype=F64)  # a part of one is another
    near = distances(found)
    for i, j in itertools.combinations(range(6), 2):
        assert float(near[i, j]) == pytest.approx(float(distance(found[i], found[j])), rel=1e-9)
        assert float(near[i, j]) == pytest.approx(float(near[j, i]), rel=1e-12)
    assert near[0].argsort()[1] == 3 and float(near.diagonal().sum()) == 0


def pairings(items):
    if not items:
        yield []
    for i in range(1, len(items)):
        for rest in pairings(items[1:i] + items[i + 1 :]):
            yield [[items[0], items[i]], *rest]


def test_the_matching_is_the_best_of_all():
    for seed in range(5):
        near = positive(6, seed=seed).abs()
        least = min(sum(float(near[i, j]) for i, j in p) for p in pairings(list(range(6))))
        assert sum(float(near[i, j]) for i, j in match(near)) == pytest.approx(least)


def test_an_odd_one_stays_alone_and_one_has_nobody():
    near = torch.tensor([[0.0, 1, 5], [1, 0, 5], [5, 5, 0]])
    assert match(near) == [[0, 1], [2]]
    assert match(torch.zeros(1, 1)) == [[0]]
    assert groups(near, 1) == [[0], [1], [2]]


def test_larger_groups_are_pairs_of_near_pairs():
    at = torch.tensor([0.0, 100, 1, 101, 3, 103, 2, 102])
    found = groups((at[:, None] - at).abs(), 4)
    assert found == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert groups((at[:, None] - at).abs(), 8) == [list(range(8))]


@METRICS
def test_the_error_of_a_profile_is_that_of_the_fit(metric):
    seen = side(metric=metric)
    basis = seen.basis()
    kept, mask = basis.kept(6, 60)
    assert basis.error(kept) == pytest.approx(seen.error(seen.refit(kept, mask)), rel=1e-9)
