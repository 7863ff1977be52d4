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
from masa.study.cost.training import flops_a_unit
from masa.study.cost.workflow import jobs

SPEED = {"S": 100_000.0, "L": 20_000.0}


def merged(*overlays):
    return config.load([ROOT / "config" / name for name in overlays])


def entry(scale, method="vanilla", mode="eager", **more):
    return {"scale": scale, "method": method, "mode": mode} | (more or {"tokens_per_second": SPEED[scale]})


def write(folder, name="here", **more):
    """A file as `benchmarks/gpu.py` writes one."""
    data = {"card": "NVIDIA A100-SXM4-80GB", "date": "2030-01-02", "matrix_tflops": 250, "bandwidth_gbs": None}
    data |= {"torch": "2", "driver": None, "cuda": "12", "entries": [entry("S"), entry("L")]} | more
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "gpu.json").write_text(json.dumps(data))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(readings, "FOLDER", tmp_path)
    readings._all.cache_clear()
    yield tmp_path
    readings._all.cache_clear()


def seconds(plan, run):
    """Of the steps of a run alone."""
    return plan.training(f"{run}/seed0").amount / SPEED[run[0]]


def test_a_measured_speed_is_the_plans_and_all_else_is_a_guess(folder):
    c = merged("paper.yaml")
    before = Plan(c, "a100").training("S/vanilla/seed0")
    assert not before.measured
    write(folder, entries=[entry("S"), entry("L"), entry("S", "masa-qkvo", ratio_to_vanilla=0.5)])
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
    assert plan.training("cifar10-deep/vanilla/seed0") == Plan(c, "a100", mode="compiled").training(
        "cifar10-deep/vanilla/seed0"
    )
    assert not Plan(c, "a100", mode="compiled").training("S/vanilla/seed0").measured
    assert not Plan(c, "h100").training("S/vanilla/seed0").measured, "another card"


def test_sizes_between_those_measured_reach_what_is_between(folder):
    write(folder)
    paces = readings.paces(device("a100"), merged("paper.yaml"))
    (f_small, small), (f_large, large) = sorted(paces.reached_at["vanilla"].items())
    assert small == pytest.approx(SPEED["S"] * f_small)
    middle = math.sqrt(f_small * f_large)
    assert paces.reached("vanilla", middle) == (pytest.approx((small + large) / 2), False)
    assert paces.reached("vanilla", f_small / 7) == (small, False)
    assert paces.reached("low-rank", f_large * 7) == (large, False)
    assert paces.reached("vanilla", f_large * 1.005) == (large, True)
    # a small model is bound by launches, of which a share knows nothing
    c = merged("paper.yaml")
    nano = Plan(c, "a100").training("nano/vanilla/seed0")
    sheet = Plan(c, "a100", mode="compiled").training("nano/vanilla/seed0")
    assert nano.seconds == sheet.seconds
    assert (
        Plan(c, "a100").training("M/vanilla/seed0").seconds
        > 1.01 * Plan(c, "a100", mode="compiled").training("M/vanilla/seed0").seconds
    ), "0.5 of the sheet is more than was measured at either side"


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
    write(folder, entries=[entry("S", tokens_per_second=SPEED["S"], share=share)])
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
    assert set(readings.paces(device("a100"), c).vanilla) == {"S", "L"}


def test_the_plan_says_what_was_measured_where_and_when(folder):
    write(folder)
    plan = Plan(merged("paper.yaml"), "a100")
    said = report.text(plan, 1)
    assert re.search(r"^S/vanilla .* measured ", said, re.M)
    assert re.search(r"^L/vanilla .* on 8 +measured on one ", said, re.M)
    assert re.search(r"^M/vanilla .* guess ", said, re.M)
    (line,) = re.findall(r"^measured: .*", said, re.M)
    for part in ("NVIDIA A100-SXM4-80GB, 2030-01-02, eager", "here/gpu.json", "250 TFLOP/s", "S 31 %, L 39 %"):
        assert part in line
    data = json.loads(report.as_json(plan, 1))
    assert data["reading"]["card"] == "NVIDIA A100-SXM4-80GB"
    found = {job["name"]: job["measured"] for job in data["jobs"] if job["rule"] == "pretrain"}
    assert found["S/vanilla/seed0"] is True
    assert found["M/vanilla/seed0"] is False
    compiled = report.text(Plan(merged("paper.yaml"), "a100", mode="compiled"), 1)
    assert "nothing was measured in this mode" in compiled
    assert not re.search(r"^\S+/\S+ .* measured ", compiled, re.M)
    assert "t4 was not measured" in report.text(Plan(merged("paper.yaml"), "t4"), 1)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"matrix_tflops": "fast"}, "matrix_tflops must be a number"),
        ({"entries": [entry("S", mode="warp")]}, r"mode: value 'warp' does not exist"),
        ({"entries": [{"scale": "S", "mode": "eager"}]}, "needs method"),
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
    write(folder, card="NVIDIA H100 PCIe", entries=[])
    readings._all.cache_clear()
    assert readings.peak(spec, "NVIDIA H100 PCIe").rates == {"bfloat16": 250e12}
    vision = experiments.run_spec(merged(), "digits-compact", "vanilla", 0)
    assert readings.peak(vision, "Tesla T4").rates == {"float32": 8.1e12}


def test_the_readings_of_the_repository_are_used():
    found = readings.of_card(device("h100").cards)
    assert found.data["card"] == "NVIDIA H100 80GB HBM3"
    plan = Plan(merged("paper.yaml"))
    measured = {job.name for job in jobs(plan) if job.measured}
    assert {"S/vanilla/seed0", "L/masa-qkvo/seed0"} <= measured
    assert not plan.paces.others
