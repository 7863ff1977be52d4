"""``masa adopt``: finished results of another folder are taken over, those of something else are not."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from test_compression_workflow import MODEL, record_of, spec_of, swept  # noqa: F401
from test_compression_workflow import sweep_one as sweep

from masa import cli
from masa.errors import MasaError
from masa.evaluation import metrics
from masa.runs import run
from masa.study import config
from masa.study.adopting import ABSENT, adopt
from masa.training import earlier

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "results/reference/evidence"
RUN = "cifar10-compact/vanilla/seed0"


@pytest.fixture(scope="module")
def evidence():
    return config.load([ROOT / "config/evidence.yaml"])


@pytest.fixture
def taken(evidence, tmp_path):
    return tmp_path / "results", {found.name: found for found in adopt(EVIDENCE, evidence, tmp_path / "results")}


def test_runs_come_with_their_logs_and_scores_and_say_where_from(taken):
    results, found = taken
    assert found[RUN].state == "adopted"
    manifest = run.read_json(results / "runs" / RUN / "manifest.json")
    assert manifest.pop("adopted") == EVIDENCE.as_posix()
    assert manifest == run.read_json(EVIDENCE / "runs" / RUN / "manifest.json")
    for kind, name in (("runs", "metrics.jsonl"), ("evaluations", "metrics.json"), ("evaluations", "weights.json")):
        assert (results / kind / RUN / name).read_bytes() == (EVIDENCE / kind / RUN / name).read_bytes()
    assert metrics.load(results, f"evaluations/{RUN}")["run"] == RUN


def test_what_was_not_scored_or_is_not_there_is_left_with_the_reason(taken, evidence):
    results, found = taken
    assert found["d48/vanilla/seed0"].state == "left" and "metrics.json is missing" in found["d48/vanilla/seed0"].why
    assert not (results / "runs/d48").exists()
    assert found[f"{MODEL}/svd-llm"].why == "an earlier version made it, which did not say of what"
    other = config.load([ROOT / "config/vision.yaml"])
    assert ABSENT in {found.why for found in adopt(EVIDENCE, other, results.parent / "other")}


def test_another_recipe_is_not_taken_over(evidence, tmp_path):
    changed = {**evidence, "vision_scales": {k: {**v} for k, v in evidence["vision_scales"].items() if v}}
    size = changed["vision_scales"]["cifar10-compact"]
    size["training"] = {**size["training"], "learning_rate": 0.5}
    found = {f.name: f for f in adopt(EVIDENCE, changed, tmp_path)}
    assert found[RUN].state == "left" and "training.learning_rate" in found[RUN].why and "0.5" in found[RUN].why
    rescored = {**evidence, "vision_evaluation": {**evidence["vision_evaluation"], "batch_size": 7}}
    found = {f.name: f for f in adopt(EVIDENCE, rescored, tmp_path)}
    assert found[RUN].why == "it was scored in another way than the configuration says"


def test_a_second_time_nothing_is_taken_over(taken, evidence):
    results, _ = taken
    before = (results / "runs" / RUN / "manifest.json").stat().st_mtime_ns
    assert {f.name: f.state for f in adopt(EVIDENCE, evidence, results)}[RUN] == "there"
    assert (results / "runs" / RUN / "manifest.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "source, said", [("nowhere", "holds neither runs nor compression"), ("results", "is where the workflow writes")]
)
def test_no_folder_of_results(source, said, evidence, tmp_path, capsys):
    with pytest.raises(MasaError, match=said):
        adopt(tmp_path / source, evidence, tmp_path / "results")
    assert cli.main(["adopt", str(tmp_path / source), "--results", str(tmp_path / "results")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and not (tmp_path / "results").exists()


def test_an_adopted_run_is_finished_whatever_code_trained_it_and_not_with_another_recipe(taken):
    place = taken[0] / "runs" / RUN
    spec, provenance = run.read_json(place / "spec.json"), run.read_json(place / "provenance.json")
    asked = earlier.Asked(spec, provenance["inputs"], "new code", "another hash")
    assert earlier.decide(place, asked, "changed")["run"] == RUN
    longer = {**spec, "training": {**spec["training"], "steps": 9}}
    assert earlier.decide(place, earlier.Asked(longer, provenance["inputs"], "", ""), "changed") == "restart"
    moved = earlier.Asked(spec, dict.fromkeys(provenance["inputs"], "0" * 64), "", "")
    assert earlier.decide(place, moved, "changed") == "restart"


def test_an_adopted_run_is_not_scored_again(taken, capsys):
    results = taken[0]
    command = ["evaluate", str(results / "runs" / RUN), "--images", "none", "--out", str(results / "evaluations" / RUN)]
    assert cli.main(command) == 0 and "scored where it was trained" in capsys.readouterr().err
    shutil.rmtree(results / "evaluations" / RUN)
    assert cli.main(command) == 2 and "holds no scores of it" in capsys.readouterr().err


def test_the_workflow_asks_for_nothing_that_was_adopted(taken, mirror):
    """Of three seeds and four methods nothing is trained or scored; the table alone is to be made."""
    call = [Path(sys.executable).with_name("snakemake"), "--dry-run", "--cores", "1", "vision"]
    call += ["--configfile", "config/evidence.yaml", "--config", f"results={taken[0]}"]
    done = subprocess.run(
        call, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "MASA_MIRROR": str(mirror)}
    )
    assert done.returncode == 0, done.stderr
    jobs = done.stdout + done.stderr
    assert re.search(r"^table +1$", jobs, re.M) and not re.search(r"^(pretrain|evaluate_vision) +\d+$", jobs, re.M), (
        jobs
    )


def test_a_method_of_compression_is_kept_on_another_machine(swept, tmp_path):  # noqa: F811
    """Statistics of another processor have other bits, by which a point that was not adopted is made again."""
    source = swept / "results"
    c = config.load()
    for kind, only in (("tables", "table3"), ("figures", None)):
        c[kind] = {name: artefact if name == only else None for name, artefact in c[kind].items()}
    c["tables"]["table3"]["experiments"] = ["svd-llm"]
    spec = spec_of("svd-llm")
    c["calibrations"]["attention"] = {"text": "calibration", **spec["calibration"]}
    c["compression"]["evaluation"] = spec["evaluation"]
    c["compressions"]["svd-llm"]["reductions"] = [20, 40]
    (found,) = adopt(source, c, tmp_path / "results")
    assert (found.name, found.state) == (f"{MODEL}/svd-llm", "adopted"), found
    file = tmp_path / "results/compression" / MODEL / "svd-llm/20/metrics.json"
    record = run.read_json(file)
    assert record.pop("adopted") == source.as_posix() and record == record_of(swept, "svd-llm", 20)
    # by other bits of statistics
    other = tmp_path / "swept"
    shutil.copytree(swept, other, ignore=shutil.ignore_patterns("compression"))
    statistics = run.read_json(other / "statistics/calibration.json")
    statistics["drift"] = [x * 1.0000001 for x in statistics["drift"]]
    run.write_json(other / "statistics/calibration.json", statistics)
    place = other / "results/compression" / MODEL / "svd-llm"
    shutil.copytree(file.parents[1], place)
    sweep(other, "svd-llm")
    assert run.read_json(place / "20/metrics.json")["adopted"] == source.as_posix()
    run.write_json(
        place / "20/metrics.json", {k: v for k, v in run.read_json(place / "20/metrics.json").items() if k != "adopted"}
    )
    sweep(other, "svd-llm")
    assert run.read_json(place / "20/metrics.json")["identity"] != record["identity"]
    # of an unfinished one the points that are there
    half = tmp_path / "half"
    shutil.copytree(source / "compression", half / "compression")
    shutil.rmtree(half / "compression" / MODEL / "svd-llm/40")
    (half / "compression" / MODEL / "svd-llm/manifest.json").unlink()
    (found,) = adopt(half, c, tmp_path / "of half")
    assert (found.state, found.why) == ("adopted", "1 of 2 reductions")
    assert not (tmp_path / "of half/compression" / MODEL / "svd-llm/manifest.json").exists()
    sweep(other, "svd-llm", projections="qk")
    assert "adopted" not in run.read_json(place / "40/metrics.json"), "another method's options are another point"
