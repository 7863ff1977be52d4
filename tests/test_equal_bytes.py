"""Methods whose budget is in bytes: pruning, the allocation, and what is written."""

import copy
import itertools
import json
import re

import numpy
import pytest
import torch
from compression_models import tiny_llama, tokens
from safetensors.torch import load_file, save_file

import masa
from masa.compression import calibrate, compress
from masa.compression.allocation.bytes import Option, Unit, allocate
from masa.compression.methods.dictionary_pairs import better_together
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.pruning import compensated, eliminate, keep, keep_two_of_four, score
from masa.compression.names import METHODS
from masa.errors import MasaError
from masa.sharing.packed import Packed, pack_bits, unpack_bits

F64 = torch.float64
BYTES = sorted(m for m in METHODS if m.startswith(("sparse-", "dictionary-", "low-rank-sparse", "mixed")))
CALIBRATION = {}


def statistics(**changes):
    """Of all linear layers."""
    key = json.dumps(changes, default=str)
    if key not in CALIBRATION:
        CALIBRATION[key] = calibrate(tiny_llama(**changes), tokens(), projections="all", gradient_samples=8)
    return CALIBRATION[key]


def compressed(method, reduction=None, **options):
    return compress(tiny_llama(), method, statistics(), reduction, projections="all", tokens=tokens(), **options)


def matrix(out=16, inp=24, seed=0, loss=True):
    generator = torch.Generator().manual_seed(seed)
    draw = [torch.randn(3 * n, n, dtype=F64, generator=generator) for n in (inp, out)]
    grams = [x.T @ x / len(x) * torch.rand(x.shape[1], generator=generator).add(0.2).double() for x in draw]
    grams = [(g + g.T) / 2 + torch.eye(len(g)) for g in grams]
    weight = torch.randn(out, inp, dtype=F64, generator=generator)
    return Matrix("q", 0, weight, grams[0], grams[1] if loss else None)


# what stays of a matrix


def test_scores_are_the_published_ones():
    m = matrix()
    w, h, g = m.weight, m.inputs, m.outputs
    torch.testing.assert_close(score(m, "wanda").sqrt(), w.abs() * h.diagonal().sqrt())
    torch.testing.assert_close(score(m, "loss"), w**2 * h.diagonal() * g.diagonal()[:, None])
    damped = h + 0.01 * h.diagonal().mean() * torch.eye(24)
    torch.testing.assert_close(score(m, "second-order"), w**2 / torch.linalg.inv(damped).diagonal())
    with pytest.raises(MasaError, match="Did you mean 'wanda'"):
        score(m, "wandas")


def test_rows_keep_equally_many_and_nothing_is_left_over():
    values = torch.rand(7, 10)
    mask = keep(values, 45, "rows")
    assert int(mask.sum()) == 45 and set(mask.sum(1).tolist()) == {6, 7}
    assert float(values[mask].min()) > 0 and int(keep(values, 45, "matrix").sum()) == 45
    kept = keep_two_of_four(values[:, :8])
    assert bool((kept.view(7, 2, 4).sum(2) == 2).all())
    assert keep_two_of_four(values).sum(1).tolist() == [6] * 7  # the last group has two


def test_the_best_compensation_equals_least_squares_on_the_support():
    m = matrix()
    mask = keep(score(m, "loss"), 200, "matrix")
    best = compensated(m, mask, "exact", {}, iterations=400)
    for row, stays, w in zip(best, mask, m.weight, strict=True):
        expected = torch.linalg.solve(m.inputs[stays][:, stays], m.inputs[stays] @ w)
        torch.testing.assert_close(row[stays], expected, rtol=1e-4, atol=1e-6)
        assert not bool(row[~stays].any())


def test_compensations_in_their_order():
    """None, column by column, the best for the outputs; the best for the loss is best for the loss."""
    m = matrix()
    mask = keep(score(m, "loss"), 200, "matrix")
    found = {rule: compensated(m, mask, rule, {}, iterations=200) for rule in ("none", "columns", "exact", "loss")}
    errors = [m.cost("whitened", found[rule]) for rule in ("exact", "columns", "none")]
    assert errors == sorted(errors) and len(set(errors)) == 3
    losses = {rule: m.cost("loss", w) for rule, w in found.items()}
    assert min(losses, key=losses.get) == "loss" and losses["loss"] < 0.99 * losses["exact"]
    assert all(not bool(w[~mask].any()) for w in found.values())


def test_elimination_of_one_entry_is_the_optimal_brain_surgeon():
    """One entry of the last column but one goes: the last column moves as the closed form says."""
    m = matrix()
    mask = torch.ones(16, 24, dtype=torch.bool)
    mask[3, 22] = False
    found, _ = eliminate(m, mask, {})
    damped = m.inputs + 0.01 * m.inputs.diagonal().mean() * torch.eye(24)
    inverse = torch.linalg.inv(damped[22:, 22:])  # columns before are done with
    expected = m.weight.clone()
    expected[3, 22:] -= m.weight[3, 22] / inverse[0, 0] * inverse[:, 0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_elimination_in_blocks_is_elimination_in_one():
    m = matrix(8, 300)
    mask = keep(score(m, "wanda"), 1500, "matrix")
    found, _ = eliminate(m, mask, {})
    damped = m.inputs + 0.01 * m.inputs.diagonal().mean() * torch.eye(300)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True)
    expected = m.weight.clone()
    for j in range(300):
        gone = expected[:, j] * ~mask[:, j]
        expected[:, j:] -= (gone / upper[j, j])[:, None] * upper[j, j:]
        expected[:, j] *= mask[:, j]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-8)
    chosen, own = eliminate(m, None, {}, keep_share=0.6)
    assert int(own.sum()) == round(0.6 * 2400) and not bool(chosen[~own].any())


def test_everything_kept_is_the_matrix_to_the_bit():
    m = matrix()
    everything = torch.ones(16, 24, dtype=torch.bool)
    for rule in ("none", "columns", "exact", "loss"):
        assert torch.equal(compensated(m, everything, rule, {}), m.weight), rule


def test_costs_are_what_they_are_called():
    m, other = matrix(), matrix(seed=5).weight
    d = m.weight - other
    assert m.cost("weights", other) == pytest.approx(float(d.norm() / m.weight.norm()))
    x = torch.linalg.cholesky(m.inputs)
    assert m.cost("whitened", other) == pytest.approx(float(((d @ x).norm() / (m.weight @ x).norm()) ** 2))
    assert m.cost("loss", other) == pytest.approx(float(torch.trace(m.outputs @ d @ m.inputs @ d.T)) / 2)


# the allocation


def options(seed, count=4, members=(("q", 0),)):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 30, (count,), generator=generator).tolist()
    costs = torch.rand(count, generator=generator).tolist()
    return [Option(tuple(members), "x", s, c) for s, c in zip(sizes, costs, strict=True)]


def best_of_all(units, budget):
    """Every choice tried."""
    choices = []
    for unit in units:
        apart = [list(c) for c in itertools.product(*unit.singles)]
        choices.append(apart + [[o] for o in unit.joint])
    costs = [
        sum(o.cost for part in chosen for o in part)
        for chosen in itertools.product(*choices)
        if sum(o.size for part in chosen for o in part) <= budget
    ]
    return min(costs)


@pytest.mark.parametrize("seed", range(8))
def test_the_allocation_is_near_the_best_and_never_above_the_budget(seed):
    units = [Unit([options(10 * seed + i)]) for i in range(4)]
    units.append(Unit([options(10 * seed + 5), options(10 * seed + 6)], options(10 * seed + 7)))
    least, most = sum(u.least() for u in units), 150
    for budget in range(least, most, 7):
        chosen = allocate(units, budget, most)
        assert sum(o.size for o in chosen) <= budget
        # within one step of one matrix
        step = max(o.cost - p.cost for u in units for s in [*u.singles, u.joint] for o in s for p in s)
        assert best_of_all(units, budget) - 1e-12 <= sum(o.cost for o in chosen) <= best_of_all(units, budget) + step


def test_on_convex_options_the_allocation_is_the_best():
    units = [
        Unit([[Option((("q", n),), "x", 10 * k, a * 2.0**-k) for k in range(6)]])
        for n, a in enumerate((1.0, 3.0, 0.2, 7.0))
    ]
    for budget in range(0, 210, 10):
        assert sum(o.cost for o in allocate(units, budget, 200)) == pytest.approx(best_of_all(units, budget))


def test_a_group_is_offered_only_where_it_beats_its_members_apart():
    a, b = options(1), options(2)
    both = tuple(o.members[0] for o in (a[0], b[0]))
    for size, cost in itertools.product((5, 20, 40, 60), (0.01, 0.1, 0.5, 1.0)):
        joint = Option(both, "pair", size, cost)
        apart = [x.cost + y.cost for x, y in itertools.product(a, b) if x.size + y.size <= size]
        assert better_together(joint, [a, b]) == (not apart or cost < min(apart))


# whole models


@pytest.mark.parametrize("method", BYTES)
def test_bytes_promised_are_bytes_of_the_file(method, tmp_path):
    whole = sum(p.nbytes for p in tiny_llama().parameters())
    wanted = whole - 100_000
    model, report = compressed(method, size=wanted)
    masa.save(model, tmp_path)
    found = load_file(tmp_path / "model.safetensors")
    file = sum(t.nbytes for t in found.values())
    assert file == whole - report.dense_bytes + report.stored_bytes <= wanted
    coarse = 6_000 if method == "sparse-2-4" else 2_500  # a matrix of 48 x 64, half a per cent
    assert file > wanted - coarse
    assert report.projections == "qkvogud"
    assert masa.fold(model)(tokens()[:2]).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_values_have_the_width_of_the_weights(dtype, tmp_path):
    model = tiny_llama().to(dtype)
    found = calibrate(model, tokens(), projections="all", dtype=torch.float32)
    model, report = compress(model, "sparse-wanda", found, 0.4, projections="all")
    masa.save(model, tmp_path)
    source = model.model.shared["q"]
    assert source.parts[0].packed.values.dtype == dtype
    assert report.stored_bytes == sum(
        t.nbytes
        for name, t in load_file(tmp_path / "model.safetensors").items()
        if ".shared." in name or (t.shape == (1,) and "_proj" in name)
    )
    assert 0.4 <= 1 - report.stored_bytes / report.dense_bytes < 0.405


def test_all_is_every_linear_layer_and_letters_are_those():
    everything, named = compressed("sparse-fisher", 0.3), compressed("sparse-fisher", 0.3)
    letters = compress(tiny_llama(), "sparse-fisher", statistics(), 0.3, projections="qkvogud")
    assert everything[1].projections == letters[1].projections == "qkvogud"
    assert everything[1].learned == named[1].learned == letters[1].learned


@pytest.mark.parametrize("method", BYTES)
def test_a_budget_out_of_reach_says_what_is_in_reach(method):
    with pytest.raises(MasaError, match=r"in reach") as refused:
        compressed(method, 0.995)
    assert "\n" not in str(refused.value)


def test_what_is_in_reach_can_be_had():
    with pytest.raises(MasaError) as refused:
        compressed("sparse-2-4", 0.6)
    most = float(re.search(r"0 to ([\d.]+)%", str(refused.value))[1]) / 100
    assert compressed("sparse-2-4", most - 1e-3)[1].reduction_achieved >= most - 1e-3


def test_a_reduction_and_a_size_exclude_each_other():
    with pytest.raises(MasaError, match="either a reduction"):
        compressed("sparse-wanda", 0.2, size=10)
    with pytest.raises(MasaError, match=r"out of reach: .* Give a size between"):
        compressed("sparse-wanda", size="3GB")


def test_the_loss_decides_better_than_shares_do():
    """KL from the original's predictions, at the same bytes."""
    with torch.no_grad():
        target = tiny_llama()(tokens()).logits.log_softmax(-1)

        def divergence(method, **options):
            found = compressed(method, 0.3, **options)[0](tokens()).logits.log_softmax(-1)
            return float((target.exp() * (target - found)).sum(-1).mean())

        plain = {m: divergence(m) for m in ("sparse-magnitude", "sparse-wanda", "sparse-fisher")}
        assert plain["sparse-fisher"] < 0.5 * plain["sparse-wanda"]
        assert plain["sparse-fisher"] < divergence("sparse-fisher", compensation="none")
        assert divergence("sparse-dictionary-fisher") < 0.5 * divergence("sparse-dictionary")
        assert divergence("dictionary-pairs") < divergence("dictionary-pairs", group_size=1)  # the control


def test_one_dictionary_may_serve_matrices_of_several_projections_and_is_stored_once(tmp_path):
    model, _ = compressed("dictionary-pairs", 0.3)
    masa.save(model, tmp_path)
    parts = [p for source in model.model.shared.values() for p in source.config()["parts"]]
    assert [len(p["of"]) for p in parts] == [2] * 21
    assert any(p["of"][0][0] != p["of"][1][0] for p in parts)
    found = load_file(tmp_path / "model.safetensors")
    assert sum(name.endswith(".atoms") for name in found) == 21
    attention = masa.count_parameters(model)
    bare = sum(
        sum(t.nbytes for t in part.own(row)) + part.atoms.nbytes / len(members)
        for source in model.model.shared.values()
        for part, members in zip(source.parts, source.members, strict=True)
        for row, (letter, _) in enumerate(members)
        if letter in "qkvo"
    )
    assert attention.attention == pytest.approx(bare / 4, abs=4)
    with torch.no_grad():
        assert torch.equal(masa.load(tmp_path)(tokens()).logits, model(tokens()).logits)


def test_positions_that_do_not_fit_their_values_are_refused(tmp_path):
    masa.save(compressed("sparse-wanda", 0.3)[0], tmp_path)
    file = tmp_path / "model.safetensors"
    found = load_file(file)
    name = next(name for name in found if name.endswith("positions"))
    for byte in (0, 255):
        found[name][7] = byte
        save_file(found, file, {"format": "pt"})
        with pytest.raises(MasaError, match=r"shared\..*packed has .* positions .* damaged"):
            masa.load(tmp_path)


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (1, 9), (7, 1)])
def test_bits_are_packed_and_unpacked(shape):
    mask = torch.rand(shape) < 0.4
    bits = pack_bits(mask)
    assert torch.equal(bits, torch.from_numpy(numpy.packbits(mask.flatten().numpy(), bitorder="little")))
    assert torch.equal(unpack_bits(bits, mask.numel()).view(shape), mask)
    packed = Packed(*shape, int(mask.sum()))
    dense = torch.randn(shape)
    packed.fill(dense, mask)
    assert torch.equal(packed(), dense * mask) and packed.consistent()
    assert -(-mask.numel() // 8) + 4 * int(mask.sum()) == sum(t.nbytes for t in packed.state_dict().values())


def test_where_no_data_reach_a_common_dictionary_is_not_arbitrary():
    """Ten tokens for a width of 48: most directions are seen by no member."""
    few = calibrate(tiny_llama(), tokens()[:1, :10], projections="all")
    model, _ = compress(tiny_llama(), "dictionary-pairs", few, 0.2, projections="all")
    plain, dense = masa.fold(model).state_dict(), tiny_llama().state_dict()
    for name in (n for n in plain if n.endswith("_proj.weight")):
        assert (plain[name] - dense[name]).norm() < 1.2 * dense[name].norm(), name


@pytest.mark.parametrize(
    ("method", "options"),
    [("dictionary-pairs", {"group_size": 1}), ("sparse-dictionary", {"allocation": "uniform", "ratios": [2.5]})],
)
def test_a_wide_matrix_by_itself_has_all_directions_where_the_ratio_asks_for_more(method, options):
    """Else nothing would be left for it at a tenth less, where all matrices have the same share."""
    base, seen = tiny_llama(intermediate_size=144), statistics(intermediate_size=144)
    model, report = compress(base, method, seen, 0.1, projections="all", **options)
    parts = [p for source in model.model.shared.values() for p in source.config()["parts"]]
    width = base.config.hidden_size
    gates = [p for p in parts if p["of"][0][0] in ("g", "u")]
    assert gates and all(p["atoms"] == width and p["counts"][0] > 144 * width / 2.5 for p in gates)
    assert 0.1 <= report.reduction_achieved < 0.11


def test_odd_counts_one_layer_and_groups_of_four():
    model, _ = compress(
        tiny_llama(num_hidden_layers=1), "dictionary-pairs", statistics(num_hidden_layers=1), 0.3, projections="all"
    )
    members = [p["of"] for source in model.model.shared.values() for p in source.config()["parts"]]
    assert sorted(map(len, members)) == [1, 2, 2, 2]  # q, k, v, o, gate and up by twos, down alone
    model, _ = compressed("dictionary-pairs", 0.3, group_size=4)
    sizes = [len(p["of"]) for source in model.model.shared.values() for p in source.config()["parts"]]
    assert sorted(sizes) == [2, *[4] * 10]  # 36 of one width, 6 of the other
    with pytest.raises(MasaError, match="power of two"):
        compressed("dictionary-pairs", 0.3, group_size=3)


@pytest.mark.parametrize("option", ["cost", "allocation", "score", "scope", "compensation"])
def test_unknown_values_are_named(option):
    with pytest.raises(MasaError, match="'wrong'"):
        compressed("sparse-fisher", 0.3, **{option: "wrong"})


def test_options_are_made_once_for_several_reductions():
    from masa.compression.base import make_compressor

    method = make_compressor("sparse-dictionary-fisher")
    first = compress(tiny_llama(), method, statistics(), 0.2, projections="all")[1]
    again = compress(tiny_llama(), method, statistics(), 0.4, projections="all")[1]
    assert again.learned == compressed("sparse-dictionary-fisher", 0.4)[1].learned
    assert first.learned["cost"] < again.learned["cost"]


def test_a_matrix_of_zeros_and_a_layer_that_nothing_reaches():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].self_attn.v_proj.weight.zero_()
        model.model.layers[3].mlp.gate_proj.weight.zero_()
    found = calibrate(model, tokens(), projections="all", gradient_samples=8)
    for method in BYTES:
        smaller, _ = compress(copy.deepcopy(model), method, found, 0.3, projections="all", tokens=tokens())
        assert smaller(tokens()[:1]).logits.isfinite().all(), method
