"""Plans with what was measured on a card: which numbers are used, for what, and what is said of them."""

import json
import math
import re

import pytest
from conftest import ROOT

import masa
from masa.study import config, experiments
from masa.study.cost import Plan, device, readings, report
from masa.study.cost.sizes import of_run
from masa.study.cost.training import flops_a_unit, mode_of
from masa.study.cost.workflow import jobs
from masa.training.compiling import COMPILED_FROM

SPEED = {"S": 100_000.0, "L": 20_000.0}


def merged(*overlays):
    return config.load([ROOT / "config" / name for name in overlays])


def step(scale, method="vanilla", mode="eager", **more):
    return {"scale": scale, "method": method, "mode": mode} | (more or {"tokens_per_second": SPEED[scale]})


def write(folder, name="here", **more):
    """A file as `benchmarks/gpu.py` writes one."""
    data = {"card": "NVIDIA A100-SXM4-80GB", "date": "2030-01-02", "matrix_tflops": 250, "bandwidth_gbs": None}
    data |= {"torch": "2", "driver": None, "cuda": "12", "steps": [step("S"), step("L")]} | more
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "gpu.json").write_text(json.dumps(data))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(readings, "FOLDER", tmp_path)
    readings._all.cache_clear()
    yield tmp_path
    readings._all.cache_clear()


def unmeasured(c):
    """The plan by the data sheet alone."""
    plan = Plan(c, "a100")
    plan.paces = None
    return plan


def seconds(plan, run):
    """Of the steps of a run alone."""
    return plan.training(f"{run}/seed0").amount / SPEED[run[0]]


def test_a_measured_speed_is_the_plans_and_all_else_is_a_guess(folder):
    c = merged("paper.yaml")
    before = Plan(c, "a100").training("S/vanilla/seed0")
    assert not before.measured
    write(folder, steps=[step("S"), step("L"), step("S", "masa-qkvo", ratio_to_vanilla=0.5)])
    readings._all.cache_clear()
    plan = Plan(c, "a100")
    found = plan.training("S/vanilla/seed0")
    assert found.measured
    scoring = found.seconds - seconds(plan, "S/vanilla")
    assert 0 < scoring < 0.05 * found.seconds
    half = plan.training("S/masa-qkvo/seed0")
    assert half.measured
    assert half.seconds - scoring == pytest.approx(2 * seconds(plan, "S/vanilla"), rel=0.01)
    assert plan.training("S-65B/vanilla/seed0").measured, "the same sizes by another name"
    for other in ("M/vanilla", "S/gqa", "S/masa-qkv", "cifar10-deep/vanilla"):
        assert not plan.training(f"{other}/seed0").measured, other
    assert plan.training("cifar10-deep/vanilla/seed0") == unmeasured(c).training("cifar10-deep/vanilla/seed0")
    assert not Plan(c, "h100").training("S/vanilla/seed0").measured, "another card"


def test_how_a_run_will_be_trained_decides_which_speed_counts(folder):
    c = merged("paper.yaml")
    fast = step("S", mode="compiled", tokens_per_second=2 * SPEED["S"])
    write(folder, steps=[step("S"), step("L"), fast, step("S", "masa-qkvo", ratio_to_vanilla=0.5)])
    readings._all.cache_clear()
    plan = Plan(c, "a100")
    compiled = plan.training("S/vanilla/seed0")
    assert compiled.measured == "compiled", "of 4,195 steps"
    assert not plan.training("S/masa-qkvo/seed0").measured, "a guess from compiled steps, not the eager reading"
    assert plan.training("S/masa-qkvo/seed0").seconds == pytest.approx(compiled.seconds, rel=0.02)
    assert plan.training("L/vanilla/seed0").measured == "", "S's compiled share is nearer than L's eager steps"
    c["scales"]["S"]["training"]["compile"] = False
    eager = Plan(c, "a100").training("S/vanilla/seed0")
    assert eager.measured == "eager"
    assert eager.seconds == pytest.approx(2 * compiled.seconds, rel=0.02)
    short = {"steps": COMPILED_FROM - 1}
    assert [mode_of(short | more) for more in ({}, {"compile": True}, {"steps": COMPILED_FROM})] == [
        "eager",
        "compiled",
        "compiled",
    ]
    assert mode_of({"steps": COMPILED_FROM, "parallel": "fsdp"}) == "eager"


def test_sizes_between_those_measured_reach_what_is_between(folder):
    write(folder)
    c = merged("paper.yaml")
    paces = readings.paces(device("a100"), c)
    (f_small, small), (f_large, large) = sorted(paces.reached_at["eager"]["vanilla"].items())
    assert small == pytest.approx(SPEED["S"] * f_small)
    middle = math.sqrt(f_small * f_large)
    assert paces.reached("vanilla", "eager", middle) == (pytest.approx((small + large) / 2), "", False)
    assert paces.reached("vanilla", "eager", f_small / 7) == (small, "", True)
    assert paces.reached("low-rank", "eager", f_large * 7) == (large, "", False)
    assert paces.reached("vanilla", "eager", f_large * 1.005) == (large, "eager", False)
    assert paces.reached("vanilla", "compiled", f_large * 1.005)[:2] == (large, "eager"), "for want of a compiled one"
    # a small model is bound by launches, of which a share knows nothing
    plan = Plan(c, "a100")
    assert plan.training("nano/vanilla/seed0").seconds == unmeasured(c).training("nano/vanilla/seed0").seconds
    large_step = plan.training("M/vanilla/seed0").flops / plan.training("M/vanilla/seed0").seconds
    assert small < large_step < large


def test_the_later_reading_of_a_card_counts_and_only_of_its_card(folder):
    write(folder, "a", date="2030-01", matrix_tflops=1)
    write(folder, "b", date="2030-02", matrix_tflops=2)
    write(folder, "c", date="2031-01", matrix_tflops=3, card="NVIDIA L40S")
    assert readings.of_card(device("a100").cards).flops == 2e12
    assert readings.of_card(device("l40s").cards).flops == 3e12
    assert readings.of_card(device("cpu").cards) is None
    assert readings.paces(device("t4"), merged()) is None


def test_a_scale_of_the_same_name_that_is_another_model_is_not_used(folder):
    c = merged("paper.yaml")
    spec = experiments.run_spec(c, "S", "vanilla", 0)
    share = SPEED["S"] * flops_a_unit(spec["training"], of_run(spec)) / 250e12
    write(folder, steps=[step("S", tokens_per_second=SPEED["S"], share=share)])
    assert readings.paces(device("a100"), c).vanilla
    c["scales"]["S"] = c["scales"]["L"]
    plan = Plan(c, "a100")
    assert not plan.paces.vanilla
    assert not plan.training("S/vanilla/seed0").measured
    assert "not used: S of" in report.text(plan, 1)
    c["scales"]["S"] = None
    assert not readings.paces(device("a100"), c).reached_at


def test_a_recipe_that_does_not_fit_the_scales_of_a_reading_does_not_stop_a_plan(folder):
    write(folder)
    c = merged("smoke.yaml")
    c["training"] |= {"batch_size": 6}
    with pytest.raises(masa.MasaError, match="micro_batch_size = 64"):
        experiments.run_spec(c, "S", "vanilla", 0)
    assert set(readings.paces(device("a100"), c).vanilla["eager"]) == {"S", "L"}


def test_the_plan_says_what_was_measured_where_and_when(folder):
    write(folder)
    plan = Plan(merged("paper.yaml"), "a100")
    said = report.text(plan, 1)
    assert re.search(r"^S/vanilla .* measured, eager ", said, re.M)
    assert re.search(r"^L/vanilla .* on 8 +measured on one, eager ", said, re.M)
    assert re.search(r"^M/vanilla .* guess ", said, re.M)
    (line,) = re.findall(r"^measured: .*", said, re.M)
    for part in ("NVIDIA A100-SXM4-80GB, 2030-01-02", "here/gpu.json", "250 TFLOP/s", "eager: S 31 %, L 39 %"):
        assert part in line
    data = json.loads(report.as_json(plan, 1))
    assert data["reading"]["card"] == "NVIDIA A100-SXM4-80GB"
    found = {job["name"]: job["measured"] for job in data["jobs"] if job["rule"] == "pretrain"}
    assert found["S/vanilla/seed0"] == "eager"
    assert found["M/vanilla/seed0"] == ""
    assert "no compiled step was measured" in said
    write(folder, steps=[step("S", mode="compiled"), step("S")])
    readings._all.cache_clear()
    compiled = report.text(Plan(merged("paper.yaml"), "a100"), 1)
    assert re.search(r"^S/vanilla .* measured, compiled ", compiled, re.M)
    assert "no compiled step" not in compiled
    write(folder, steps=[{"scale": "S", "method": "vanilla", "mode": "eager", "error": "out of memory"}])
    readings._all.cache_clear()
    assert "nothing that is known" in report.text(Plan(merged("paper.yaml"), "a100"), 1)
    assert "t4 was not measured" in report.text(Plan(merged("paper.yaml"), "t4"), 1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"matrix_tflops": "fast"}, "matrix_tflops must be a number"),
        ({"steps": [step("S", mode="warp")]}, r"mode: value 'warp' does not exist"),
        ({"steps": [{"scale": "S", "mode": "eager"}]}, "needs method"),
    ],
)
def test_a_file_that_is_no_reading_is_named(folder, broken, message):
    write(folder, **broken)
    with pytest.raises(masa.MasaError, match=rf"gpu\.json: .*{message}"):
        Plan(merged(), "a100")


def test_a_file_that_is_no_json_is_named_and_stops_no_training(folder):
    write(folder)
    (folder / "here" / "gpu.json").write_text("{")
    with pytest.raises(masa.MasaError, match=r"gpu\.json is not valid JSON"):
        Plan(merged(), "a100")
    spec = experiments.run_spec(merged(), "nano", "vanilla", 0)
    assert readings.peak(spec, "NVIDIA A100-SXM4-80GB") is None


def test_a_training_is_held_against_what_was_measured_else_the_data_sheet(folder):
    spec = experiments.run_spec(merged(), "S", "vanilla", 0)
    sheet = readings.peak(spec, "NVIDIA A100-SXM4-80GB")
    assert sheet.rates["bfloat16"] == 312e12
    assert sheet.rates["float32"] == 19.5e12
    assert sheet.flops == flops_a_unit(spec["training"], of_run(spec))
    write(folder)
    readings._all.cache_clear()
    found = readings.peak(spec, "NVIDIA A100-SXM4-80GB")
    assert found.rates == sheet.rates | {"bfloat16": 250e12}
    assert readings.peak(spec, "NVIDIA A100-PCIE-40GB").rates == sheet.rates, "a card that was not measured"
    assert readings.peak(spec, "NVIDIA H100 PCIe") is None, "neither measured nor in the table"
    write(folder, card="NVIDIA H100 PCIe", steps=[])
    readings._all.cache_clear()
    assert readings.peak(spec, "NVIDIA H100 PCIe").rates == {"bfloat16": 250e12}
    vision = experiments.run_spec(merged(), "digits-compact", "vanilla", 0)
    assert readings.peak(vision, "Tesla T4").rates == {"float32": 8.1e12}


def test_the_readings_of_the_repository_are_used():
    found = readings.of_card(device("h100").cards)
    assert found.data["card"] == "NVIDIA H100 80GB HBM3"
    plan = Plan(merged("paper.yaml"))
    measured = {job.name: job.measured for job in jobs(plan) if job.measured}
    for name in ("S/vanilla/seed0", "S/masa-qkvo/seed0", "L/vanilla/seed0"):
        assert measured[name] == "compiled", name
    assert "L/masa-qkvo/seed0" not in measured, "timed eager alone, trained compiled"
    assert not plan.paces.others
