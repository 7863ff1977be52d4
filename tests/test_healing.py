"""Layers solved for again, healing that goes on where it was stopped, and its verbs."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from compression_models import LAYERS, statistics, tiny_llama, tokens
from test_compression_pretrained import TEXT, tokenizer

import masa
from masa.compression import compress, heal, quantize
from masa.compression.healing import state
from masa.compression.healing.layerwise import Matrix, only_readers, solve, solve_layers
from masa.errors import MasaError
from masa.sharing.part_sources import Parts
from masa.sharing.projections import bank_of
from masa.sharing.weight_sources import from_config

SETTINGS = {"batch_size": 4, "length": 12, "lr": 4e-3}
OUT, IN = 10, 14


def metric(size: int, seed: int) -> torch.Tensor:
    x = torch.randn(3 * size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.T @ x / len(x)


def filled(source):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return source


def asked(place: int = 0, outputs: bool = True, letter: str = "q") -> Matrix:
    target = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(7))
    return Matrix(letter, place, target, metric(IN, 1).float(), metric(OUT, 2).float() if outputs else None)


def least(basis: torch.Tensor, matrix: Matrix) -> tuple[torch.Tensor, float]:
    """Coefficients and error of the least squares over spans (n, out, in), by QR in float64."""
    left, right = torch.linalg.cholesky(matrix.outputs.double()), torch.linalg.cholesky(matrix.inputs.double())
    columns = torch.stack([(left.T @ b.double() @ right).flatten() for b in basis], 1)
    wanted = (left.T @ matrix.target.double() @ right).flatten()
    found = torch.linalg.lstsq(columns, wanted[:, None]).solution[:, 0]
    return found, float((columns @ found - wanted).square().sum())


def test_coefficients_of_one_layer_are_the_least_squares_and_atoms_stay():
    source = filled(from_config({"kind": "atoms", "projections": "q", "num_layers": 4, "shape": [OUT, IN], "atoms": 3}))
    readers, atoms, before = only_readers(source), source.atoms.detach().clone(), source.coefficients("q").clone()
    matrix = asked(2)
    wanted, error = least(atoms, matrix)
    (first, last), names = solve(source, [matrix], readers, iterations=6)
    assert names == ["maker.q.values"] and torch.equal(source.atoms, atoms)
    assert torch.allclose(source.coefficients("q")[2].double(), wanted, atol=1e-4)
    assert last == pytest.approx(error, rel=1e-4) and last < first
    others = [0, 1, 3]
    assert torch.equal(source.coefficients("q")[others], before[others])


def test_values_that_stayed_are_the_least_squares_of_their_pattern():
    mask = torch.rand(OUT, IN, generator=torch.Generator().manual_seed(3)) < 0.5
    part = {"kind": "sparse", "of": [["q", 0]], "count": int(mask.sum())}
    source = Parts("q", 1, {"q": (OUT, IN)}, [part])
    source.parts[0].packed.fill(torch.randn(OUT, IN), mask)
    matrix = asked()
    places = mask.nonzero().tolist()
    basis = torch.zeros(len(places), OUT, IN)
    for index, (row, column) in enumerate(places):
        basis[index, row, column] = 1
    wanted, error = least(basis, matrix)
    (_, last), _ = solve(source, [matrix], only_readers(source), iterations=400)
    found = source.layer_weight("q", 0).detach()
    assert torch.equal(found != 0, mask) and last == pytest.approx(error, rel=1e-3)
    assert torch.allclose(found[mask].double(), wanted, atol=2e-2)


def test_both_factors_are_solved_for_in_turn_and_the_error_never_rises():
    part = {"kind": "low-rank", "of": [["q", 0]], "rank": 4}
    source = filled(Parts("q", 1, {"q": (OUT, IN)}, [part]))
    matrix, errors = asked(), []
    for _ in range(25):
        (first, last), names = solve(source, [matrix], only_readers(source), iterations=30)
        assert set(names) == {"parts.0.left", "parts.0.right"} and last <= first
        errors += [first, last]
    root = torch.linalg.cholesky(matrix.outputs.double()), torch.linalg.cholesky(matrix.inputs.double())
    values = torch.linalg.svdvals(root[0].T @ matrix.target.double() @ root[1])
    best = float(values[4:].square().sum())  # Eckart and Young: nothing of this rank is nearer
    assert errors == sorted(errors, reverse=True) and best * (1 - 1e-5) <= errors[-1] <= 1.02 * best


def test_what_several_layers_read_is_nobodys():
    shapes = {"q": (OUT, IN), "k": (OUT, IN)}
    parts = [
        {"kind": "sparse-dictionary", "of": [["q", 0], ["k", 1]], "atoms": 6, "counts": [20, 20]},
        {"kind": "dense", "of": [["q", 1]]},
        {"kind": "sparse-dictionary", "of": [["k", 0]], "atoms": 6, "counts": [20]},
    ]
    source = filled(Parts("qk", 2, shapes, parts))
    for part in (source.parts[0], source.parts[2]):
        for code in part.codes:
            mask = torch.zeros(OUT, 6, dtype=torch.bool)
            mask.view(-1)[:20] = True
            code.fill(torch.randn(OUT, 6), mask)
    readers = only_readers(source)
    assert bool((readers["parts.0.atoms"] == -1).all())
    assert bool((readers["parts.0.codes.0.values"] == 0).all()) and bool((readers["parts.0.codes.1.values"] == 1).all())
    assert bool((readers["parts.1.weight"] == 1).all())
    assert bool((readers["parts.2.codes.0.values"] == 0).all())


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("svd-llm", {}),
        ("matrix-pca", {}),
        ("basis-sharing", {}),
        ("direct-share", {}),
        ("sparse-wanda", {}),
        ("sparse-dictionary", {}),
        ("dictionary-pairs", {}),
        ("sparse-wanda", {"bits": [8]}),
    ],
)
def test_every_kind_of_storage_is_solved_for_on_the_inputs_that_it_sees(method, options):
    teacher = tiny_llama()
    model, _ = compress(tiny_llama(), method, statistics(), 0.3, tokens=tokens(), **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = {name: source.config() for name, source in bank_of(model).items()}
    found = solve_layers(model, teacher, bank_of(model), tokens(), calibration=statistics())
    assert len(found) == LAYERS and all(0 <= left <= 1 for left in found)
    assert {name: source.config() for name, source in bank_of(model).items()} == kept
    for name, tensor in model.state_dict().items():
        if ".shared." not in name or not tensor.is_floating_point():
            assert torch.equal(tensor, before[name]), name
    if method in ("svd-llm", "sparse-dictionary") and not options:
        assert min(found) < 0.999


def test_a_model_that_is_dense_to_the_bit_stays_so():
    """Nothing is lost, so nothing may change."""
    model, teacher = tiny_llama(), tiny_llama()
    model, _ = compress(model, "sparse-fisher", statistics(), 0.05)
    source = bank_of(model).source("q")
    dense = [i for i, part in enumerate(source.parts) if part.kind == "dense"]
    assert dense
    before = [source.parts[i].weight.clone() for i in dense]
    solve_layers(model, teacher, bank_of(model), tokens())
    assert all(torch.equal(source.parts[i].weight, old) for i, old in zip(dense, before, strict=True))


def small(**options):
    model, _ = compress(tiny_llama(), "svd-fisher", statistics(), 0.3, **options)
    return model


def numbers(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_an_interrupted_healing_goes_on_to_the_same_bits(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(state, "EVERY", 0.0)
    how = {"steps": 12, "layer_samples": 4, "calibration": statistics(), "teacher": tiny_llama(), **SETTINGS}
    whole = small()
    report = heal(whole, tokens(), **how)
    assert len(report["layers"]) == LAYERS and len(report["losses"]) == 12

    def stop(what, done, of):
        if what == "healing" and done == 7:
            raise KeyboardInterrupt

    file, model = tmp_path / "healing", small()
    untouched = numbers(model)
    with pytest.raises(KeyboardInterrupt):
        heal(model, tokens(), **how, state=file, progress=stop)
    assert same(numbers(model), untouched)
    seen = []
    again = heal(model, tokens(), **how, state=file, progress=lambda what, done, of: seen.append((what, done)))
    assert seen[0] == ("healing", 7) and same(numbers(model), numbers(whole))
    assert again["losses"] == report["losses"] and again["tokens"] == report["tokens"]
    # what is done is not done again, and a state of something else is not taken
    third = small()
    heal(third, tokens(), **how, state=file, progress=lambda what, done, of: seen.append((what, done)))
    assert seen[-1] == ("healing", 12) and same(numbers(third), numbers(whole))
    for other in ({"seed": 1}, {"lr": 1e-3}):
        fresh = small()
        heal(fresh, tokens(), **how | other, state=file)
        assert "begins anew" in caplog.text and not same(numbers(fresh), numbers(whole))
        caplog.clear()
    file.write_bytes(b"no state")
    fourth = small()
    heal(fourth, tokens(), **how, state=file)
    assert same(numbers(fourth), numbers(whole)) and "begins anew" in caplog.text


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from compression_models import tokens, tiny_llama
import masa, time
from masa.compression import heal
from masa.compression.healing import state
state.EVERY = 0.0
model = masa.load({model!r})
show = lambda what, done, of: (print(done, flush=True), time.sleep({pause}))
heal(model, tokens(), teacher=tiny_llama(), steps=30, layer_samples=4, batch_size=4, length=12, lr=4e-3,
     state={file!r}, progress=show)
masa.save(model, {out!r})
"""


def test_a_killed_healing_goes_on_to_the_same_bits(tmp_path):
    masa.save(small(), tmp_path / "model")

    def begun(file: str, out: str, pause: float) -> subprocess.Popen:
        given = {"tests": str(Path(__file__).parent), "model": str(tmp_path / "model"), "pause": pause}
        script = SCRIPT.format(**given, file=str(tmp_path / file), out=str(tmp_path / out))
        return subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)

    with begun("one", "whole", 0) as process:
        process.communicate()
        assert process.returncode == 0
    with begun("two", "resumed", 0.1) as process:
        for line in process.stdout:
            if line.strip() == "17":
                process.send_signal(signal.SIGKILL)
                break
    with begun("two", "resumed", 0) as process:
        first = process.communicate()[0].split()[0]
        assert process.returncode == 0 and int(first) >= 15
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "resumed"))
    assert one == two


def test_minutes_are_kept_and_their_steps_make_the_same_again():
    model, other, started = small(), small(), time.perf_counter()
    how = {"teacher": tiny_llama(), **SETTINGS}
    report = heal(model, tokens(), minutes=0.05, **how)
    assert report["minutes"] == 0.05 and report["steps"] >= 1 and time.perf_counter() - started < 60
    heal(other, tokens(), steps=report["steps"], **how)
    assert same(numbers(model), numbers(other))


@pytest.mark.parametrize("bits", [8, 4])
def test_of_few_bits_the_scales_are_trained_and_the_whole_numbers_stay(bits, tmp_path):
    model = quantize(small(), bits, statistics())
    before = numbers(model)
    size = sum(source.stored_bytes() for source in bank_of(model).values())
    report = heal(model, tokens(), teacher=tiny_llama(), steps=30, **SETTINGS)
    after = numbers(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.rsplit(".", 1)[-1] in ("scales", "least") for name in changed)
    assert sum(report["losses"][-5:]) < 0.9 * sum(report["losses"][:5])
    assert sum(source.stored_bytes() for source in bank_of(model).values()) == size
    assert not any("trained" in name for name, _ in model.named_parameters())
    masa.save(model, tmp_path)
    assert same(numbers(masa.load(tmp_path)), after)


def test_of_a_model_with_an_adapter_the_adapter_alone_is_trained():
    from peft import LoraConfig, get_peft_model

    base = small()
    before = numbers(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "o_proj"]))
    report = heal(model, tokens(), teacher=tiny_llama(), steps=60, layer_samples=4, **SETTINGS | {"lr": 2e-2})
    assert report["layers"] == [] and sum(report["losses"][-5:]) < 0.95 * sum(report["losses"][:5])
    after = dict(model.state_dict())
    adapters = {name for name in after if "lora_" in name}
    assert adapters and report["trained"] == sum(after[name].numel() for name in adapters)
    assert any(bool(after[name].any()) for name in adapters if "lora_B" in name)
    plain = model.unload()
    assert same(dict(plain.state_dict()), before)


def test_a_shared_and_trained_model_is_healed_too():
    model = masa.share(tiny_llama(), masa.SharingSpec("masa", "qkvo", atoms=3))
    report = heal(model, tokens(), teacher=tiny_llama(), steps=30, layer_samples=4, **SETTINGS)
    assert report["losses"][-1] < report["losses"][0] and all(left <= 1 for left in report["layers"])


def test_what_cannot_be_says_why():
    how = {"teacher": tiny_llama(), **SETTINGS}
    with pytest.raises(MasaError, match="either steps or minutes"):
        heal(small(), tokens(), steps=3, minutes=1, **how)
    for wrong in (0, -1, math.inf, math.nan):
        with pytest.raises(MasaError, match="minutes must be positive"):
            heal(small(), tokens(), minutes=wrong, **how)
    with pytest.raises(MasaError, match="layer_samples"):
        heal(small(), tokens(), layer_samples=-1, **how)
    with pytest.raises(MasaError, match="layer_samples needs the dense original"):
        heal(small(), tokens(), layer_samples=2, objective="lm", **SETTINGS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny original with its tokenizer, its statistics, and what a compression made of it."""
    root = tmp_path_factory.mktemp("healing")
    tiny_llama().save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    (root / "text.txt").write_text("\n".join(TEXT))
    given = ["model", "--text", "text.txt", "--samples", "8", "--length", "24", "--gradient-samples", "8"]
    assert_done(verb("calibrate", *given, "--out", "statistics", cwd=root))
    given = ["model", "--method", "svd-fisher", "--reduction", "0.3", "--calibration", "statistics"]
    assert_done(verb("compress", *given, "--out", "smaller", cwd=root))
    return root


def verb(*words: str, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "masa.cli", *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def assert_done(process: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
    assert process.returncode == 0, process.stderr
    return process


def test_the_verb_writes_a_folder_of_the_same_form_and_its_account(folders):
    asked = ["smaller", "--original", "model", "--length", "12", "--lr", "4e-3", "--threads", "1"]
    said = assert_done(verb("heal", *asked, "--text", "text.txt", "--steps", "30", "--out", "healed", cwd=folders))
    assert "healed: 30 steps" in said.stdout and "layers solved for" in said.stdout
    account = json.loads((folders / "healed" / "compression.json").read_text())
    assert account["method"] == "svd-fisher" and account["healing"]["original"] == "model"
    before, after = masa.load(folders / "smaller"), masa.load(folders / "healed")
    assert masa.count_parameters(after) == masa.count_parameters(before)
    assert (folders / "healed" / "tokenizer.json").is_file() and not (folders / "healed.healing").exists()
    assert divergence(after) < 0.9 * divergence(before)
    again = verb("heal", *asked, "--text", "text.txt", "--steps", "30", "--out", "again", "--json", cwd=folders)
    assert json.loads(again.stdout)["losses"] == account["healing"]["losses"]
    one, two = ((folders / name / "model.safetensors").read_bytes() for name in ("healed", "again"))
    assert one == two
    statistics = ["--calibration", "statistics", "--minutes", "0.02", "--layer-samples", "0"]
    assert_done(verb("heal", *asked, *statistics, "--out", "of-statistics", cwd=folders))
    assert json.loads((folders / "of-statistics" / "compression.json").read_text())["healing"]["steps"] >= 1


@torch.no_grad()
def divergence(model) -> float:
    found, target = (m(tokens()).logits.double().log_softmax(-1) for m in (model, tiny_llama()))
    return float((target.exp() * (target - found)).sum(-1).mean())


def test_a_compression_can_be_healed_in_the_same_command(folders):
    asked = ["model", "--method", "svd-fisher", "--reduction", "0.3", "--calibration", "statistics"]
    said = assert_done(verb("compress", *asked, "--heal-minutes", "0.05", "--out", "both", cwd=folders))
    assert "healed: " in said.stdout
    account = json.loads((folders / "both" / "compression.json").read_text())
    assert account["healing"]["minutes"] == 0.05 and account["healing"]["layer_samples"] == 8
    assert divergence(masa.load(folders / "both")) < divergence(masa.load(folders / "smaller"))
    assert not list(folders.glob("*.healing"))


@pytest.mark.parametrize(
    ("words", "said"),
    {
        "nothing to train on": (["smaller", "--original", "model"], "needs something to train on"),
        "no such original": (["smaller", "--original", "nowhere", "--text", "text.txt"], "nowhere"),
        "a dense model": (["model", "--original", "model", "--text", "text.txt"], "dense"),
        "the original shares": (["smaller", "--original", "smaller", "--text", "text.txt"], "smaller"),
        "minutes": (["smaller", "--original", "model", "--text", "text.txt", "--minutes", "-1"], "above 0"),
        "both": (["smaller", "--original", "model", "--minutes", "1", "--steps", "3"], "not allowed with"),
        "length": (["smaller", "--original", "model", "--text", "text.txt", "--length", "99"], "length must lie"),
        "onto itself": (
            ["smaller", "--original", "model", "--text", "text.txt", "--out", "smaller"],
            "is what is read",
        ),
    }.values(),
)
def test_wrong_words_end_in_one_line_and_leave_nothing(folders, words, said):
    before = sorted(folders.iterdir())
    done = verb("heal", *words, *([] if "--out" in words else ["--out", "no"]), cwd=folders)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert sorted(folders.iterdir()) == before


def test_healing_in_passing_needs_statistics(folders):
    done = verb("compress", "model", "--method", "svd", "--heal-minutes", "1", "--out", "no", cwd=folders)
    assert done.returncode == 2 and "a calibration" in done.stderr and not (folders / "no").exists()
