"""Numbers of 8 and 4 bits: what is stored, what rounding does, and every method that may use them."""

import copy
import json

import pytest
import torch
from compression_models import fitting, letters, tiny_llama, tokens
from safetensors.torch import load_file
from test_equal_bytes import BYTES, compressed, matrix
from transformers import AutoModel, AutoModelForCausalLM

import masa
from masa import cli
from masa.compression import calibrate, compress
from masa.compression.methods.few_bits import noise
from masa.compression.methods.fits import Fit, dense_fit, dictionary_fit, low_rank_fit, sparse_fit
from masa.compression.methods.rounding import Rounding, grid, nearest, of_every
from masa.compression.names import METHODS
from masa.compression.quantization import quantize
from masa.errors import MasaError
from masa.sharing.embeddings import round_embeddings
from masa.sharing.grouped import GROUPS, Grouped
from masa.sharing.parameters import cast
from masa.sharing.parts import PARTS, make_part

F64 = torch.float64
SHAPES = [(16, 24), (7, 37), (5, 1), (1, 1), (64, 64)]


def values(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# what is stored


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_number_is_at_most_half_a_step_away_and_takes_its_bits(bits, shape):
    exact, stored = values(shape), Grouped(shape, bits)
    stored.fill(exact)
    count, groups = exact.numel(), -(-exact.numel() // GROUPS[bits])
    steps = stored.scales.view(torch.float16).float().repeat_interleave(stored.group)[:count].view(shape)
    rounded = exact.abs() * 2**-11  # the least value of a group is a float16
    assert bool(((stored() - exact).abs() <= 0.501 * steps + rounded).all())
    found = sum(t.nbytes for t in stored.state_dict().values())
    assert found == -(-count * bits // 8) + groups * (2 if bits == 8 else 4)


@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_on_a_grid_come_back_to_the_bit(bits):
    scales, least = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 1.0] if bits == 4 else [0.0, 0.0])
    whole = torch.randint(0, 16, (2, 32), generator=torch.Generator().manual_seed(0)).float()
    exact = (whole * scales[:, None] + least[:, None]).view(4, 16)
    stored = Grouped(exact.shape, bits, group=32)
    stored.fill(exact, scales, least)
    assert torch.equal(stored(), exact)


@pytest.mark.parametrize("bits", [8, 4])
def test_casting_a_model_changes_no_stored_number(bits):
    stored = Grouped((24, 32), bits)
    stored.fill(values((24, 32)))
    cast = copy.deepcopy(stored).to(torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(stored.buffers(), cast.buffers(), strict=True))
    assert cast().dtype == torch.bfloat16
    assert torch.equal(cast(), stored().to(torch.bfloat16))


@pytest.mark.parametrize("exact", [torch.zeros(3, 40), torch.full((3, 40), 7.25), torch.full((2, 2), -1e-9)])
@pytest.mark.parametrize("bits", [8, 4])
def test_groups_without_a_spread(exact, bits):
    stored = Grouped(exact.shape, bits)
    stored.fill(exact)
    torch.testing.assert_close(stored(), exact, rtol=5e-3, atol=1e-7)


@pytest.mark.parametrize(("bits", "group"), [(3, None), (16, None), (8, 7), (4, -2)])
def test_what_cannot_be_is_said(bits, group):
    with pytest.raises(MasaError, match="Bits of a number" if group is None else "even number"):
        Grouped((4, 4), bits, group)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("kind", sorted(set(PARTS) - {"nothing", "mixture"}))
def test_every_kind_multiplies_by_what_it_writes(kind, bits):
    """In the model's dtype and with few bits, one token and many."""
    shape, x = (20, 12), values((30, 12), seed=1)
    arguments = {"dense": {}, "sparse": {"count": 100}, "low-rank": {"rank": 5}}
    arguments["sparse-dictionary"] = {"atoms": 6, "counts": [60], "side": "in"}
    part = make_part({"kind": kind, "bits": bits, **arguments[kind]}, [shape])
    assert part.config() == {"bits": bits} | arguments[kind]
    for module in part.modules():
        if isinstance(module, Grouped):
            module.fill(values(module.shape))
        elif hasattr(module, "positions"):
            mask = torch.zeros(module.rows * module.columns, dtype=torch.bool)
            mask[torch.randperm(len(mask))[: module.count]] = True
            module.fill(values((module.rows, module.columns)), mask.view(module.rows, module.columns))
    written = part(0)
    assert written.shape == shape
    for rows in (x[:1], x):
        torch.testing.assert_close(part(0, rows), rows @ written.T, rtol=1e-4, atol=1e-4)


# rounding


@pytest.mark.parametrize("bits", [8, 4])
def test_a_narrower_grid_is_taken_only_where_it_errs_less(bits):
    exact = values((40, 64)).double() ** 3  # heavy tails
    stored = Grouped(exact.shape, bits)
    stored.fill(exact)
    found = nearest(exact, *of_every(exact, grid(exact, bits), bits), bits)
    assert float((found - exact).square().sum()) <= float((stored().double() - exact).square().sum())
    if bits == 4:
        assert float((found - exact).norm()) < 0.97 * float((stored().double() - exact).norm())


@pytest.mark.parametrize("bits", [8, 4])
def test_columns_make_up_for_the_errors_of_those_before(bits):
    one = matrix(24, 64)
    x = torch.randn(400, 8, dtype=F64, generator=torch.Generator().manual_seed(2)) @ values((8, 64)).double()
    one.inputs = x.T @ x / len(x) + 0.1 * torch.eye(64)  # most of what enters has eight directions
    (fit,) = Rounding([one], bits, {}).fits([dense_fit(one.member, one.weight)])
    plain = nearest(one.weight, *of_every(one.weight, grid(one.weight, bits), bits), bits)
    assert one.cost("whitened", fit.tensors["weight"]) < 0.5 * one.cost("whitened", plain)
    assert noise(one, "whitened", bits, {}) == pytest.approx(one.cost("whitened", fit.tensors["weight"]))


def test_without_data_every_number_is_rounded_by_itself():
    one = matrix(8, 64)
    one.inputs = None
    (fit,) = Rounding([one], 4, {}).fits([dense_fit(one.member, one.weight)])
    found = fit.tensors["weight"]
    scales, least = of_every(one.weight, fit.grids["weight"], 4)
    assert torch.equal(found, nearest(one.weight, scales, least, 4))


def fits_of(kind, one):
    """A fit of a matrix, or the two of a sum."""
    left, singular, right = torch.linalg.svd(one.weight, full_matrices=False)
    low = low_rank_fit(one.member, left[:, :6] * singular[:6], right[:6])
    mask = one.weight.abs() > one.weight.abs().median()
    if kind == "low-rank+sparse":
        return [low, sparse_fit(one.member, one.weight - (left[:, :6] * singular[:6]) @ right[:6], mask)]
    if kind == "sparse-dictionary":
        codes = right @ one.weight.T
        return [dictionary_fit([one.member], right.T, [codes], [codes.abs() > codes.abs().median()], "in")]
    return {"dense": [dense_fit(one.member, one.weight)], "low-rank": [low]}.get(
        kind, [sparse_fit(one.member, one.weight, mask)]
    )


def product(fits, one):
    """In float64, from what is stored."""
    total = torch.zeros_like(one.weight)
    for fit in fits:
        part = make_part(fit.config, [one.weight.shape])
        for name, tensor in fit.tensors.items():
            stored = getattr(part, name)
            if isinstance(stored, Grouped):
                stored.fill(tensor, *fit.grids[name])
            else:
                stored.data = tensor.clone()
        for name, (of, mask) in fit.packed.items():
            packed = part.double().get_submodule(name)
            packed.fill(of, mask, fit.grids.get(name))
        total += part.double()(0).detach()
    return total


@pytest.mark.parametrize(("bits", "worse"), [(8, 1.02), (4, 2.0)])
@pytest.mark.parametrize("kind", ["sparse", "low-rank", "sparse-dictionary", "low-rank+sparse"])
def test_a_rounded_part_costs_little_more_than_the_part(kind, bits, worse):
    one = matrix(40, 64)
    before = fits_of(kind, one)
    after = Rounding([one], bits, {}).fits(before)
    assert all(fit.config["bits"] == bits for fit in after)
    cost, rounded = (one.cost("whitened", product(fits, one)) for fits in (before, after))
    by_itself = [Fit({**f.config, "bits": bits}, f.members, f.tensors, f.packed) for f in before]
    for fit in by_itself:  # each number to its nearest
        fit.grids = {name: grid(t, bits) for name, t in fit.tensors.items()}
        fit.grids |= {name: grid(of[mask], bits) for name, (of, mask) in fit.packed.items()}
    assert rounded < worse * cost
    assert rounded <= one.cost("whitened", product(by_itself, one)) * (1.001 if bits == 8 else 1.0)


# whole models


@pytest.mark.parametrize("bits", [[8], [4], [16, 8, 4]])
@pytest.mark.parametrize("method", BYTES)
def test_bytes_promised_are_bytes_of_the_file_and_load_to_the_bit(method, bits, tmp_path):
    whole = sum(p.nbytes for p in tiny_llama().parameters())
    model, report = compressed(method, 0.8, bits=bits)
    masa.save(model, tmp_path)
    file = sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())
    assert file == whole - report.dense_bytes + report.stored_bytes
    assert 1 - report.stored_bytes / report.dense_bytes >= 0.8
    with torch.no_grad():
        expected = model(tokens()[:2]).logits
        assert torch.equal(masa.load(tmp_path)(tokens()[:2]).logits, expected)
        torch.testing.assert_close(masa.fold(model)(tokens()[:2]).logits, expected, rtol=1e-4, atol=1e-4)


def test_more_bits_are_taken_where_the_loss_minds_and_the_budget_allows():
    found = [
        compressed("mixed-fisher", reduction, bits=[16, 8, 4])[1].learned["bits"] for reduction in (0.55, 0.8, 0.86)
    ]
    few = [of.get("4", 0) for of in found]
    assert few[0] < few[1] < few[2]
    assert found[0].get("as it was", 0) > found[2].get("as it was", 0)


def test_eight_bits_lose_little_and_take_half():
    """Beside the same kind in float16, at the same share of its own numbers."""
    ids, plain = tokens(), tiny_llama().to(torch.float16)
    found = calibrate(plain, ids, projections="all", dtype=torch.float32)
    model, report = compress(plain, "sparse-wanda", found, 0.2, projections="all")
    few, less = compress(tiny_llama().to(torch.float16), "sparse-wanda", found, 0.55, projections="all", bits=[8])
    with torch.no_grad():
        exact = tiny_llama()(ids).logits
        error, rounded = ((m.float()(ids).logits - exact).norm() / exact.norm() for m in (model, few))
    assert less.stored_bytes < 0.57 * report.stored_bytes
    assert float(rounded) < 1.05 * float(error)


@pytest.mark.parametrize("bits", [3, [3], [], "8", [8, 16.5], [True]])
def test_other_bits_are_refused_by_name(bits):
    with pytest.raises(MasaError, match="bits"):
        compressed("sparse-wanda", 0.5, bits=bits)


# what is shared or compressed already


def trained(spec):
    return masa.share(tiny_llama(), spec)


def smaller(method):
    changes = fitting(method)
    found = calibrate(tiny_llama(**changes), tokens(), projections="all", gradient_samples=8)
    chosen = {"projections": letters(method), "tokens": tokens()}
    return compress(tiny_llama(**changes), method, found, 0.3, **chosen)[0], found


def stored_bytes(model):
    return sum(source.stored_bytes() for source in model.model.shared.values())


SPECS = [
    {"method": "masa", "projections": "qkvo"},
    {"method": "masa", "projections": "qo", "dictionaries": ["qo"], "atoms": 2},
    {"method": "masa", "coefficients": "mlp"},
    {"method": "low-rank", "projections": "qkvo"},
    {"method": "sequential", "projections": "qkvo"},
    {"method": "repeat-all-over", "projections": "qkvo"},
]


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: "-".join(map(str, spec.values())))
def test_what_was_trained_keeps_its_outputs_in_fewer_bytes(spec, bits, tmp_path):
    model = trained(spec)
    before, exact = stored_bytes(model), model(tokens()).logits.detach()
    few = quantize(model, bits)
    assert few is model and stored_bytes(few) < (0.28 if bits == 8 else 0.18) * before
    with torch.no_grad():
        found = few(tokens()).logits
        assert float((found - exact).norm() / exact.norm()) < (0.05 if bits == 8 else 0.6)
        masa.save(few, tmp_path)
        assert torch.equal(masa.load(tmp_path)(tokens()).logits, found)
        torch.testing.assert_close(masa.fold(few)(tokens()).logits, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"direct-share", "post-share", "mixed", "mixed-fisher"}))
def test_what_was_compressed_keeps_its_outputs_and_data_help(method):
    model, found = smaller(method)
    errors = []
    with torch.no_grad():
        exact = model(tokens()).logits
        for data in (None, found):
            few = quantize(copy.deepcopy(model), 4, data)
            assert stored_bytes(few) < 0.23 * stored_bytes(model)
            errors.append(float((few(tokens()).logits - exact).norm() / exact.norm()))
    assert errors[1] < errors[0] < 0.55


def test_quantised_weights_are_not_trained_and_adapters_on_them_are():
    few = quantize(trained(SPECS[0]))
    assert not any(p.requires_grad for p in few.model.shared.parameters())
    few.train()(tokens(), labels=tokens()).loss.backward()
    assert few.model.embed_tokens.weight.grad is not None
    peft = pytest.importorskip("peft")
    worn = peft.get_peft_model(few, peft.LoraConfig(target_modules=["q_proj"], r=2))
    worn(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for name, p in worn.named_parameters() if "lora_" in name)


def test_what_has_no_form_with_few_bits_says_so():
    with pytest.raises(MasaError, match="shares nothing"):
        quantize(tiny_llama())
    with pytest.raises(MasaError, match="bits is one of"):
        quantize(trained(SPECS[0]), 5)
    with pytest.raises(MasaError, match="Fold the model first"):
        quantize(smaller("direct-share")[0])
    with pytest.raises(MasaError, match="few bits already"):
        quantize(quantize(trained(SPECS[3])))


@pytest.fixture
def smaller_folder(tmp_path):
    model, found = smaller("svd-llm")
    masa.save(model, tmp_path / "smaller")
    (tmp_path / "smaller/tokenizer.json").write_text("{}")
    found.save(tmp_path / "statistics")
    return tmp_path / "smaller"


@pytest.mark.parametrize("data", [False, True])
def test_the_command_writes_a_folder_with_its_account(smaller_folder, data, tmp_path, capsys):
    out, call = tmp_path / "few", ["quantize", str(smaller_folder), "--bits", "4", "--threads", "1"]
    call += ["--calibration", str(tmp_path / "statistics")] if data else ["--embeddings", "8"]
    assert cli.main([*call, "--out", str(out)]) == 0
    assert "4 bits a number: shared matrices" in capsys.readouterr().out
    account = json.loads((out / "compression.json").read_text())["quantized"]
    found = masa.load(out)
    assert stored_bytes(found) == account["bytes_after"] < 0.2 * account["bytes_before"]
    assert (account["calibration"] is not None) == data
    assert account["embeddings"] == (None if data else 8)
    assert hasattr(found.get_input_embeddings(), "table") != data
    assert (out / "tokenizer.json").read_text() == "{}"
    assert cli.main([*call, "--out", str(out)]) == 0, "its own earlier output is replaced"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--bits", "5"], "bits is one of 8, 4"),
        (["--out", "smaller"], "it would be overwritten"),
        (["nowhere"], "nowhere"),
    ],
)
def test_bad_calls_are_a_line_and_leave_nothing(smaller_folder, change, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = sorted(p.name for p in tmp_path.rglob("*"))
    model = change[:1] if change[0] == "nowhere" else ["smaller"]
    more = change if change[0].startswith("--") else []
    assert cli.main(["quantize", *model, "--out", "few", *more]) == 2
    assert message in (said := capsys.readouterr().err) and "Traceback" not in said
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


# embeddings


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_and_head_are_one_table_where_they_were(bits, tied, tmp_path):
    model = masa.share(tiny_llama(tie_word_embeddings=tied), SPECS[0])
    with torch.no_grad():
        exact = model(tokens()).logits
    rows = model.get_input_embeddings().weight.detach().clone()
    few = quantize(model, bits, embeddings=bits)
    written = few.get_input_embeddings().weight
    assert float((written - rows).norm() / rows.norm()) < (0.01 if bits == 8 else 0.1)
    torch.testing.assert_close(few.get_input_embeddings()(tokens()), torch.nn.functional.embedding(tokens(), written))
    with torch.no_grad():
        found = few(tokens()).logits
    assert float((found - exact).norm() / exact.norm()) < (0.05 if bits == 8 else 0.6)
    few.save_pretrained(tmp_path / "few")
    stored = load_file(tmp_path / "few/model.safetensors")
    tables = {name: t.nbytes for name, t in stored.items() if name.startswith(("model.embed_tokens", "lm_head"))}
    assert sum(name.endswith(".numbers") for name in tables) == (1 if tied else 2)
    each = {8: 1 + 2 / 48, 4: 0.5 + 4 / 24}[bits]  # groups of the largest even part of 48
    assert sum(tables.values()) == rows.numel() * each * (1 if tied else 2)
    for loaded in (masa.load(tmp_path / "few"), AutoModelForCausalLM.from_pretrained(tmp_path / "few")):
        with torch.no_grad():
            assert torch.equal(loaded(tokens()).logits, found)
        assert masa.count_parameters(loaded).total == masa.count_parameters(few).total
    plain = masa.fold(few)
    assert type(plain.get_input_embeddings()) is torch.nn.Embedding
    assert (plain.get_output_embeddings().weight is plain.get_input_embeddings().weight) == tied
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens()).logits, found, rtol=1e-4, atol=1e-4)
    plain.save_pretrained(tmp_path / "plain")
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(tokens()).logits
    torch.testing.assert_close(again, plain(tokens()).logits.detach())


def test_a_base_model_and_another_dtype_read_them_too(tmp_path):
    few = quantize(trained(SPECS[0]), 8, embeddings=8)
    few.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = few.model(tokens()).last_hidden_state
        assert torch.equal(base(tokens()).last_hidden_state, expected)
        half = masa.load(tmp_path, dtype=torch.bfloat16)
        assert half(tokens()).logits.dtype == torch.bfloat16
        assert torch.equal(half(tokens()).logits, cast(copy.deepcopy(few), torch.bfloat16)(tokens()).logits)
    for a, b in zip(half.buffers(), few.buffers(), strict=True):
        assert a.is_floating_point() or torch.equal(a, b)


def test_words_are_generated_and_another_head_is_refused(tmp_path):
    few = quantize(trained(SPECS[0]), 8, embeddings=8)
    made = few.generate(tokens()[:1, :4], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 9)
    with pytest.raises(MasaError, match="few bits already"):
        round_embeddings(few, 8)
    odd = trained(SPECS[0])
    odd.lm_head = torch.nn.Sequential(odd.lm_head)
    odd.lm_head.weight, odd.lm_head.bias = odd.lm_head[0].weight, None
    with pytest.raises(MasaError, match="Sequential has no form with few bits"):
        quantize(odd, 8, embeddings=8)
