"""AdamW and Muon: who moves what, matrix by matrix as torch's own does, and resumed to the same bits."""

import copy
import itertools
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import test_detection
import test_image_training
import test_sharing
import torch
from conftest import ROOT, language_model, llama_model, stop_and_resume
from test_detection import drawn  # noqa: F401 (a fixture)
from test_training import both_train, losses, spec_of, start

import masa
from masa.models import detector, recipes, timm_vit
from masa.runs import run
from masa.sharing.parameters import hidden_matrices, parameter_groups
from masa.sharing.projections import blocks
from masa.study import config, experiments
from masa.study.specs import check
from masa.training import detection, images, language, optimizers

RECIPE = {
    "learning_rate": 3e-3,
    "weight_decay": 0.1,
    "adam_betas": [0.9, 0.999],
    "coefficients_learning_rate_ratio": 0.5,
}
KINDS = {
    "language": (lambda spec: masa.share(language_model(), spec), test_sharing.SPECS),
    "llama": (lambda spec: masa.share(llama_model(key_value_heads=4), spec), test_sharing.SPECS),
    "vit": (lambda spec: timm_vit.build(test_image_training.MODEL, spec), test_detection.SPECS),
    "yolos": (lambda spec: detector.build(test_detection.MODEL, spec), test_detection.SPECS),
}
MODELS = {f"{kind}-{test_sharing.label(s)}": (build, s) for kind, (build, specs) in KINDS.items() for s in specs}


@pytest.fixture(params=MODELS)
def model(request):
    build, sharing = MODELS[request.param]
    return build(sharing)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_every_parameter_is_in_exactly_one_group(name, model):
    made = optimizers.build(model, RECIPE | {"optimizer": name})
    found = [p for group in made.param_groups for p in group["params"]]
    assert len(found) == len({id(p) for p in found})
    assert {id(p) for p in found} == {id(p) for p in model.parameters()}
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in parameter_groups(model, RECIPE) for p in g["params"]}
    assert all(rates[id(p)] == (g["lr"], g["weight_decay"]) for g in made.param_groups for p in g["params"])


def test_muon_moves_the_matrices_of_the_blocks_and_nothing_else(model):
    names = {p: name for name, p in model.named_parameters()}
    hidden = {names[p] for p in hidden_matrices(model)}
    inside = {names[p] for p in blocks(model).parameters() if p.ndim == 2}
    shared = {name for name in names.values() if name.endswith((".atoms", ".sets", ".left", ".right"))}
    assert hidden == inside | shared
    assert not [name for name in hidden if "embed" in name or "maker" in name or "head" in name or "classifier" in name]


def moved(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def matrices(tensor, rows):
    """Every matrix of a parameter, copied."""
    return [m.clone() for part in tensor.detach().chunk(rows, -2) for m in part.reshape(-1, *part.shape[-2:])]


def test_each_matrix_moves_as_torchs_muon_moves_it_alone(model):
    apart, parameters = copy.deepcopy(model), dict(model.named_parameters())
    hidden = {name: rows for name, p in parameters.items() if (rows := hidden_matrices(model).get(p))}
    ours = optimizers.build(model, RECIPE | {"optimizer": "muon"})
    alone = {name: [torch.nn.Parameter(m) for m in matrices(parameters[name], n)] for name, n in hidden.items()}
    every = [matrix for of_one in alone.values() for matrix in of_one]
    muon = torch.optim.Muon(every, lr=3e-3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    others = {name: p for name, p in apart.named_parameters() if name not in hidden}
    adamw = torch.optim.AdamW(parameter_groups(apart, RECIPE), fused=True)  # leaves alone what has no gradient
    for _ in range(3):
        gradients = {name: torch.randn_like(p) for name, p in parameters.items()}
        moved(ours, parameters.values(), gradients.values())
        moved(muon, every, [m for name, n in hidden.items() for m in matrices(gradients[name], n)])
        moved(adamw, others.values(), [gradients[name] for name in others])
    for name, rows in hidden.items():
        for got, expected in zip(matrices(parameters[name], rows), alone[name], strict=True):
            torch.testing.assert_close(got, expected.detach(), rtol=0, atol=1e-6)
    for name, expected in others.items():
        torch.testing.assert_close(parameters[name], expected, rtol=0, atol=0)


def test_an_update_is_orthogonal_and_as_large_as_adamws():
    """Of the first step, without decay: singular values of 1 to 30 become nearly equal, a number 0.2 times the rate."""
    model = masa.share(language_model(width=48), {"method": "masa"})
    atoms = model.model.shared["q"].atoms
    before = atoms.detach().clone()
    left, right = (torch.linalg.qr(torch.randn(atoms.shape))[0] for _ in range(2))
    atoms.grad = left @ torch.diag_embed(torch.linspace(1, 30, 48).expand(len(atoms), 48)) @ right
    optimizers.build(model, RECIPE | {"optimizer": "muon", "weight_decay": 0.0}).step()
    for change in before - atoms.detach():
        assert change.square().mean().sqrt() == pytest.approx(0.2 * 3e-3, rel=0.2)
        values = torch.linalg.svdvals(change)
        assert values.max() < 2 * values.min()


def test_adamw_is_torchs_own_over_the_same_groups():
    model = masa.share(language_model(), {"method": "masa"})
    made = optimizers.build(model, RECIPE)
    assert type(made) is torch.optim.AdamW
    wanted = parameter_groups(model, RECIPE)
    assert [[id(p) for p in g["params"]] for g in made.param_groups] == [[id(p) for p in g["params"]] for g in wanted]
    assert all(g["betas"] == (0.9, 0.999) and g["fused"] for g in made.param_groups)


def test_loaded_state_is_what_the_next_step_uses():
    """A schedule changes the rates of both optimisers, before and after loading, and momentum is not forgotten."""
    recipe, gradients = RECIPE | {"optimizer": "muon"}, torch.Generator().manual_seed(1)
    one = masa.share(language_model(), {"method": "masa"})
    made = optimizers.build(one, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 1 / (1 + step))
    draws = [[torch.randn(p.shape, generator=gradients) for p in one.parameters()] for _ in range(4)]
    for draw in draws[:2]:
        moved(made, one.parameters(), draw)
        schedule.step()
    two = copy.deepcopy(one)
    again = optimizers.build(two, recipe)
    going_on = torch.optim.lr_scheduler.LambdaLR(again, lambda step: 1 / (1 + step))
    again.load_state_dict(copy.deepcopy(made.state_dict()))
    going_on.load_state_dict(schedule.state_dict())
    for draw in draws[2:]:
        moved(made, one.parameters(), draw)
        moved(again, two.parameters(), draw)
        schedule.step()
        going_on.step()
        assert [g["lr"] for g in again.param_groups] == [g["lr"] for g in made.param_groups]
    assert {g["lr"] for g in made.param_groups} == {3e-3 / 5, 1.5e-3 / 5}
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------------ runs


def test_a_run_with_muon_learns(tokens, tmp_path):
    result = language.pretrain(spec_of(steps=60, optimizer="muon"), tokens, tmp_path)
    log = list(run.read_jsonl(tmp_path / "metrics.jsonl"))
    held_out = [r["validation_loss"] for r in log if "validation_loss" in r]
    assert held_out[-1] < held_out[0] - 0.3
    rates = [r["learning_rate"] for r in log if "loss" in r]
    assert max(rates) == pytest.approx(5e-3, rel=0.02)
    assert rates[-1] == pytest.approx(5e-4, rel=0.1)
    other = language.pretrain(spec_of(steps=60), tokens, tmp_path / "adamw")
    assert other["sha256"] != result["sha256"]


@pytest.mark.parametrize("method", ["masa", "low-rank"])
def test_a_language_model_goes_on_to_the_same_bits(method, tokens, tmp_path):
    spec = spec_of(method, steps=120, optimizer="muon")
    stop_and_resume(language.pretrain, spec, "tokens", tokens, tmp_path, lines=20)


@pytest.mark.parametrize("method", ["masa", "vanilla"])
def test_a_vision_transformer_goes_on_to_the_same_bits(method, digits, tmp_path):
    spec = test_image_training.spec_of(method, steps=120, optimizer="muon")
    stop_and_resume(images.pretrain, spec, "images", digits, tmp_path, lines=20)


def test_a_detector_goes_on_to_the_same_bits(drawn, tmp_path):  # noqa: F811
    spec = test_detection.spec_of(steps=60, optimizer="muon")
    stop_and_resume(detection.pretrain, spec, "boxes", drawn, tmp_path, lines=10)


def test_two_processes_give_the_loss_curve_of_one(tokens, tmp_path):
    spec = spec_of(micro_batch_size=2, optimizer="muon")
    language.pretrain(spec, tokens, tmp_path / "one")
    both_train(spec | {"training": spec["training"] | {"processes_per_node": 2}}, tokens, tmp_path / "two")
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == list(range(1, 21))
    assert [two[s] for s in two] == pytest.approx([one[s] for s in one], abs=2e-3)  # updates are made in bfloat16


def test_weights_in_parts_are_refused(tokens, tmp_path):
    spec = spec_of(micro_batch_size=2, optimizer="muon", processes_per_node=2, parallel="fsdp")
    process = start(spec, tokens, tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode
    assert "training.optimizer: muon needs whole matrices; set training.parallel: ddp." in said
    assert "Traceback" not in said


# --------------------------------------------------------------------------------------------------- configuration


def test_an_unknown_optimiser(tmp_path):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text("training: { optimizer: moun }")
    message = "training.optimizer: value 'moun' does not exist.*Did you mean 'muon'"
    with pytest.raises(masa.MasaError, match=message):
        config.load([overlay])
    with pytest.raises(masa.MasaError, match=message):
        check("run", spec_of(optimizer="moun"))
    with pytest.raises(masa.MasaError, match=message):
        check("run", test_image_training.spec_of(optimizer="moun"))
    with pytest.raises(masa.MasaError, match=message):
        optimizers.build(language_model(), RECIPE | {"optimizer": "moun"})


def test_all_names_are_known_to_the_configuration():
    assert set(get_args(recipes.Optimizer)) == set(optimizers.OPTIMIZERS)


def test_runs_with_adamw_keep_their_spec():
    """What runs were told before there was a choice is what they are told now; it is a part of their identity."""
    reference = ROOT / "results" / "reference" / "evidence" / "runs"
    evidence = config.load([ROOT / "config" / "evidence.yaml"])
    stored = sorted(reference.glob("*/*/seed0/spec.json"))
    assert len(stored) > 20
    for file in stored:
        spec = run.read_json(file)
        now = experiments.run_spec(evidence, *experiments.parse_run(spec["run"]))
        known = {name: value for name, value in spec["training"].items() if name not in ("steps", "epochs")}
        assert {k: v for k, v in now["training"].items() if k not in ("steps", "epochs")} == known, spec["run"]
    evidence["training"]["optimizer"] = "muon"
    assert experiments.run_spec(evidence, "d48", "vanilla", 0)["training"]["optimizer"] == "muon"


# ------------------------------------------------------------------------------------------------------- the ablation

REFERENCE = ROOT / "results" / "reference" / "optimizers"
SCALES = {"adamw": "nano", "muon": "nano-muon-48e-3"}


def quoted(first):
    """Rows of the table on docs/results.md whose first heading is ``first``, as heading -> cell without emphasis."""
    lines = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    table = list(itertools.takewhile(lambda line: line.startswith("|"), lines[start:]))
    cells = [[cell.strip().replace("*", "").replace("−", "-") for cell in line.strip("|").split("|")] for line in table]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def held_out(scale, method):
    """Final held-out losses of the seeds that were run."""
    found = sorted((REFERENCE / "runs" / scale / method).glob("seed*/manifest.json"))
    return np.array([run.read_json(file)["training"]["validation_loss"] for file in found])


def scale_of(optimizer, rate):
    """The scale of the ablation with an optimiser and peak rate."""
    ablation = config.load([ROOT / "config" / "optimizers.yaml"])
    (found,) = (
        scale
        for scale in ablation["grids"]["optimizer_rates"]["scales"]
        if (recipe := experiments.run_spec(ablation, scale, "vanilla", 0)["training"])["learning_rate"] == float(rate)
        and recipe.get("optimizer", "adamw") == optimizer.lower()
    )
    return found


def test_the_ablation_is_the_default_run_with_another_optimiser():
    free = ("optimizer", "learning_rate")
    default, ablation = config.load(), config.load([ROOT / "config" / "optimizers.yaml"])
    for method in ("vanilla", "masa-qkvo"):
        wanted = experiments.run_spec(default, "nano", method, 0)
        assert experiments.run_spec(ablation, "nano", method, 0) == wanted
        for scale in ablation["grids"]["optimizer_rates"]["scales"]:
            found = experiments.run_spec(ablation, scale, method, 0)
            recipes_ = [{k: v for k, v in s["training"].items() if k not in free} for s in (found, wanted)]
            assert recipes_[0] == recipes_[1]
            assert (found["model"], found["sharing"]) == (wanted["model"], wanted["sharing"])


def test_rates_are_quoted_as_they_were_run():
    rows = quoted("peak rate, vanilla, seed 0")
    assert [row["peak rate, vanilla, seed 0"] for row in rows] == ["AdamW", "Muon"]
    for row in rows:
        for rate in list(row)[1:]:
            scale = scale_of(row["peak rate, vanilla, seed 0"], rate)
            assert row[rate] == f"{held_out(scale, 'vanilla')[0]:.3f}"


def test_gaps_are_quoted_as_they_were_run():
    """Means and sample standard deviations over seeds; of the gap, of the differences at the same seed."""
    rows = quoted("optimiser")
    assert {row["optimiser"] for row in rows} == {"AdamW", "Muon"}
    for row in rows:
        vanilla, ours = (held_out(scale_of(row["optimiser"], row["peak rate"]), m) for m in ("vanilla", "masa-qkvo"))
        assert len(vanilla) == len(ours) == 3
        for heading, losses_ in (("Vanilla", vanilla), ("MASA-QKVO", ours)):
            assert row[heading] == f"{losses_.mean():.3f} ± {losses_.std(ddof=1):.3f}"
        gap = ours - vanilla
        assert row["gap, paired"] == f"{gap.mean():+.3f} ± {gap.std(ddof=1):.3f}"
    table = pd.read_csv(REFERENCE / "tables" / "optimizers.csv").set_index(["scale", "method"])["validation_loss"]
    for (scale, method), loss in table.items():
        assert loss == pytest.approx(held_out(scale, method).mean())


def test_what_the_page_says_of_the_gaps():
    """The change of the gap, and what is better by how much, by the same losses."""
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8").replace("−", "-")
    runs = {rate: {m: held_out(scale, m) for m in ("vanilla", "masa-qkvo")} for rate, scale in SCALES.items()}
    gaps = {rate: found["masa-qkvo"] - found["vanilla"] for rate, found in runs.items()}
    change = gaps["muon"] - gaps["adamw"]
    assert f"moves by {change.mean():+.3f} ± {change.std(ddof=1):.3f}, seed by seed" in page
    assert (gaps["muon"] < 0).all()
    better = [(runs["adamw"][method] - runs["muon"][method]).mean() for method in ("vanilla", "masa-qkvo")]
    assert f"{min(better):.2f} nats lower" in page
    row = pd.read_csv(REFERENCE / "tables" / "claims.csv").set_index("scale").loc[SCALES["muon"]]
    assert f"a gain of {row['low']:.3f} to {row['high']:.3f}, p {row['p_holm']:.3f} by Holm" in page
    assert (row["verdict"], row["gain"]) == ("holds", pytest.approx(-gaps["muon"].mean(), abs=1e-6))
    unreliable = [f"{loss:.2f}" for loss in held_out("nano-rate-12e-3", "masa-qkvo")]
    assert f"ends at {', '.join(unreliable[:2])} and {unreliable[2]}" in page
