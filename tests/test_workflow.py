"""Snakemake for real: the smoke configuration from raw text to all tables and figures, then what reruns and why."""

import json
import os
import re
import subprocess
import sys

import pandas as pd
import pytest
from projects import BIN, ENVIRONMENT, ROOT, copy_finished, snakemake


def jobs(result):
    """Rule -> number of jobs, from a dry run's statistics."""
    table = result.stdout.rpartition("Job stats:")[2] or result.stderr.rpartition("Job stats:")[2]
    found = dict(re.findall(r"^(\w+)\s+(\d+)$", table, re.M))
    return {rule: int(count) for rule, count in found.items() if rule != "total"}


@pytest.fixture(scope="module")
def project(smoke_project, tmp_path_factory):
    """A finished smoke run for this file alone: tests edit it and put it right again."""
    return copy_finished(smoke_project, tmp_path_factory.mktemp("project") / "project")


def test_every_table_and_figure_is_there(project):
    tables, figures = project / "results/smoke/tables", project / "results/smoke/figures"
    for name in (
        "table1",
        "table2",
        "table3",
        "beyond",
        "vision",
        "dictionaries",
        "coefficients",
        "throughput",
        "parameters",
    ):
        assert {(tables / f"{name}.{s}").stat().st_size > 100 for s in ("csv", "md", "tex")} == {True}, name
    training = ("validation_loss", "quality_parameters", "effective_rank", "coefficient_maps")
    vision = ("figure2", "vision_loss", "confusion", "per_class", "predictions", "detections")
    for name in (*training, *vision, "perplexity_reduction", "compression_ranks", "kl_drift"):
        assert (figures / f"{name}.png").stat().st_size > 5000
        assert (figures / f"{name}.pdf").stat().st_size > 2000
    table = pd.read_csv(tables / "table1.csv")
    assert list(table["method"]) == ["vanilla", "gqa", "low-rank", "sequential", "masa-qkvo"]
    assert table["validation_loss"].between(4, 7).all()
    assert table["attn_cr_pct"].round(1).tolist() == [0.0, 41.7, 66.7, 66.7, 66.0]
    assert table["piqa_paper"].tolist() == [0.593, 0.6, 0.579, 0.589, 0.602]
    assert set(table["unavailable_tasks"]) == {"race"}
    runs = pd.read_csv(tables / "runs.csv")
    assert len(runs) == 6 + 2 + 2
    vision = pd.read_csv(tables / "vision.csv")
    assert vision["attn_cr_pct"].round(1).tolist() == [0.0, 66.6]  # 66.7 without the coefficients
    assert vision["images"].tolist() == [64, 64]
    assert vision["top1_pct"].between(0, 60).all()
    detection = pd.read_csv(tables / "detection.csv")
    assert detection["attn_cr_pct"].round(1).tolist() == [0.0, 66.6]
    assert detection["map_pct"].between(0, 50).all()
    assert {"piqa/acc", "piqa/acc_norm"} <= set(runs.columns)
    throughput = pd.read_csv(tables / "throughput.csv")
    assert list(throughput["method"]) == ["vanilla", "masa-qkvo"]
    assert throughput["training_ratio"].tolist()[0] == throughput["inference_ratio"].tolist()[0] == 1.0
    assert throughput["training_ratio"].tolist()[1] != 1.0
    assert (throughput["training_tokens_per_second"] > 0).all()


def test_nothing_runs_again(project):
    assert jobs(snakemake(project, "-n")) == {}


def test_one_table_runs_only_what_it_needs(project):
    result = snakemake(project, "-n", "--forceall", "coefficients")
    assert jobs(result) == {
        "benchmarks": 1, "coefficients": 1, "evaluate": 2, "pretrain": 2, "table": 1, "tokenize": 1, "tokenizer": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["table1", "throughput", "parameters", "runs", "validation_loss"])
def test_every_artefact_has_a_short_rule(project, name):
    assert jobs(snakemake(project, "-n", "--force", name)) == {name: 1}


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return lambda: path.write_text(text)


@pytest.mark.parametrize(
    ("file", "old", "new", "expected"),
    [
        ("masa/training/trainer.py", "    torch.set_num_threads", "    # a comment\n    torch.set_num_threads", {}),
        ("masa/sharing/products.py", '"""Linear combinations of atoms', '"""Sums of atoms', {}),
        ("masa/sharing/parameters.py", "p.ndim >= 2]", "p.ndim >= 1]", {"pretrain": 10}),
        ("masa/data/pixels.py", ".float() / 255", ".float() / 256", {"pretrain": 4}),
        ("masa/evaluation/classification.py", "TOP = 5", "TOP = 3", {"evaluate_vision": 2}),
        ("masa/report/tables.py", 'NA = "n/a"', 'NA = "missing"', {"table": 14}),
        ("masa/report/style.py", '"font.size": 8', '"font.size": 9', {"figure": 13}),
        ("config/experiments.yaml", "coefficients: mlp", "coefficients: mlp, embedding_dim: 32", {"pretrain": 1}),
        ("config/experiments.yaml", "label: Vanilla", "label: Dense", {"table": 7, "figure": 8}),
        ("config/smoke.yaml", "steps: 4", "steps: 5", {"pretrain": 2}),
        ("config/smoke.yaml", "examples: 4", "examples: 5", {"evaluate_vision": 4}),
        ("config/smoke.yaml", "limit: 2", "limit: 3", {"evaluate": 6}),
        ("masa/compression/methods/matrix_pca.py", "EPS * values[0]]", "2 * EPS * values[0]]", {"compress": 2}),
        ("masa/compression/calibration/stream.py", "x.T @ x", "(x.T @ x)", {}),
        ("config/compression.yaml", "label: SVD-LLM,", "label: SVDLLM,", {"table": 2, "figure": 2}),
        ("config/smoke.yaml", "samples: 4", "samples: 5", {"calibrate": 1}),
        ("config/smoke.yaml", "vocab_size: 512", "vocab_size: 500", {"tokenizer": 1}),
        # what jobs cost does not decide what they make; the page shows it
        ("masa/study/cost/devices.py", "1.5e-6", "2.5e-6", {"report": 1}),
        ("config/config.yaml", "margin: 2.0", "margin: 3.0", {"report": 1}),
        ("config/config.yaml", "margin: 2.0", "margin: 2.0, gpus: { smoke: 0.5 }", {"report": 1}),
        ("masa/report/page/templates/page.css", "#ffffff", "#fefefe", {"report": 1}),
        ("workflow/envs/masa.yaml", "pip=25.3", "pip=25.2", {}),
    ],
)
def test_reruns_follow_meaning(project, file, old, new, expected):
    restore = edit(project / file, old, new)
    try:
        found = jobs(snakemake(project, "-n"))
    finally:
        restore()
    assert {rule: found.get(rule) for rule in expected} == expected
    if not expected:
        assert found == {}
    if expected == {"report": 1}:
        assert found == {"all": 1, "report": 1}
    if "table" in expected or "figure" in expected:
        assert not {"pretrain", "evaluate"} & set(found), "a report never trains"


def test_bad_configuration_is_one_message_before_anything_runs(project):
    bad = project / "bad.yaml"
    bad.write_text("tables: {table1: {experiments: [vanilla, masa-qkvoo]}}\n")
    result = snakemake(project, overlays=["bad.yaml"], check=False)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert "tables.table1: experiment 'masa-qkvoo' does not exist. Did you mean 'masa-qkvo'" in said
    assert "Traceback" not in said


def test_an_own_corpus_is_an_input_and_a_missing_one_is_named(project):
    own = project / "own.yaml"
    own.write_text('data: {corpus: {source: "file:texts/*.txt", reader: text, sha256: null}}\n')
    result = snakemake(project, "-n", overlays=["own.yaml"], check=False)
    assert result.returncode != 0
    assert "data.corpus: file:texts/*.txt: no file matches" in result.stdout + result.stderr
    (project / "texts").mkdir()
    (project / "texts" / "a.txt").write_text("text")
    assert jobs(snakemake(project, "-n", overlays=["own.yaml"]))["tokenizer"] == 1


def test_a_failing_run_stops_with_its_reason_and_nothing_half_written(project):
    bad = project / "bad.yaml"
    bad.write_text("training: {max_grad_norm: 1.0e+30}\nscales: {smoke: {training: {learning_rate: 1.0e+30}}}\n")
    target = "results/smoke/runs/smoke/vanilla/seed0/manifest.json"
    result = snakemake(project, target, overlays=["bad.yaml"], check=False)
    assert result.returncode != 0
    assert "smoke/vanilla/seed0: the loss is" in result.stdout + result.stderr
    assert not (project / target).exists()
    snakemake(project)  # with the right configuration the next call mends it
    assert (project / target).exists()
    assert jobs(snakemake(project, "-n")) == {}


def test_paper_configuration_passes_a_dry_run():
    command = [f"{BIN}/snakemake", "-n", "--cores", "2", "results/tables", "results/figures"]
    command += ["--configfile", "config/paper.yaml"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
    found = jobs(result)
    vision = 9 * 6 * 3 + 3 * 3  # nine sizes, six methods, three seeds; S = 4 beside S = L/3 at the deep ones
    assert found["pretrain"] == 35 + vision
    assert found["evaluate_vision"] == vision
    assert found["images"] == 3
    assert found["tokenize"] == 4
    assert found["table"] == 15
    assert found["pretrained"] == 3
    assert found["calibrate"] == 3 + 1 + 2
    assert found["compress"] == 3 * 14 + 6 + 2 * 18


def test_rules_are_formatted_and_the_linter_finds_nothing():
    subprocess.run([f"{BIN}/snakefmt", "--check", "workflow"], cwd=ROOT, check=True, capture_output=True)
    command = [f"{BIN}/snakemake", "--lint"]
    result = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Congratulations" in result.stdout + result.stderr


def test_snakemakes_own_report_has_every_table_and_figure(project):
    snakemake(project, "--report", "report.html")
    page = (project / "report.html").read_text()
    for kind in ("tables", "figures"):
        for path in (project / "results/smoke" / kind).glob("*.csv" if kind == "tables" else "*.png"):
            assert path.name in page, path.name
    assert "Overview" in page
    assert "report.html" in page
    assert jobs(snakemake(project, "-n")) == {}, "a report makes nothing run again"


def test_nested_values_of_the_command_line_have_their_keys_types():
    """Snakemake hands them on as text; a text in a file is still none of a number."""
    target = ["results/smoke/runs/smoke/vanilla/seed0/manifest.json", "--configfile", "config/smoke.yaml"]

    def dry(*config):
        command = [f"{BIN}/snakemake", "-n", "-p", "--cores", "2", *target, "--config", *config]
        command += ["--workflow-profile", "none"]  # which says not to print commands
        return subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)

    result = dry("training={threads: 2, weight_decay: 2e-1, compile: false}")
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout + result.stderr
    assert '"threads": 2' in said and '"weight_decay": 0.2' in said and '"compile": false' in said
    result = dry("training={threads: two}")
    assert result.returncode != 0
    assert "training.threads must be an integer of at least 1, got 'two'" in result.stdout + result.stderr


def test_a_key_that_changes_no_bits_trains_nothing_again(project):
    """Snakemake deletes the manifest and calls the job; the run says that it is finished."""
    folder = project / "results/smoke/runs/smoke/vanilla/seed0"
    before = (folder / "manifest.json").read_bytes()
    written = (folder / "model/model.safetensors").stat().st_mtime_ns
    own = project / "minutes.yaml"
    own.write_text("training: {checkpoint_minutes: 7}\n")
    target = f"{folder.relative_to(project)}/manifest.json"
    assert jobs(snakemake(project, "-n", target, overlays=["minutes.yaml"])) == {"pretrain": 1}
    snakemake(project, target, overlays=["minutes.yaml"])
    assert (folder / "manifest.json").read_bytes() == before
    assert (folder / "model/model.safetensors").stat().st_mtime_ns == written
    snakemake(project, target)
    assert jobs(snakemake(project, "-n")) == {}


def test_statistics_that_an_orphan_left_are_not_compressed_with(project):
    """Other samples under a name that Snakemake takes for the right ones."""
    folder = project / "results/smoke/compression/SmolLM2-135M"
    file = next(folder.glob("calibrations/*/calibration.json"))
    kept, when = file.read_bytes(), file.stat()
    samples = json.loads(kept)["samples"]
    file.write_text(json.dumps(json.loads(kept) | {"samples": samples + 1}))
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    target = next(m for m in folder.glob("*/manifest.json") if m.parent.name not in ("original", "matrix-pca-healed"))
    record = target.read_bytes()
    target.unlink()
    try:
        result = snakemake(project, str(target.relative_to(project)), check=False)
        said = result.stdout + result.stderr
        assert result.returncode != 0
        assert f"calibration.samples is {samples}, these statistics are of {samples + 1}" in said
    finally:
        file.write_bytes(kept)
        os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    snakemake(project, str(target.relative_to(project)))
    assert json.loads(target.read_bytes()) == json.loads(record)


def test_where_the_time_of_a_job_goes(project, tmp_path):
    """The benchmark repeats jobs of a finished workflow and leaves it as it is."""
    command = [sys.executable, str(ROOT / "benchmarks" / "job_parts.py"), "--configfile", "config/smoke.yaml"]
    command += ["--kinds", "tables", "tokenize", "--out", str(tmp_path)]
    environment = ENVIRONMENT | {"PYTHONPATH": str(project)}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = pd.read_csv(tmp_path / "job_parts.csv").set_index("what")["value"]
    for verb in ("tables", "tokenize"):
        parts = rows[[name for name in rows.index if name.startswith(f"{verb}: ") and "whole" not in name]]
        assert rows[f"{verb}: whole"] > 0 and parts.sum() == pytest.approx(1, abs=0.05)
        assert parts[f"{verb}: imports"] > 0.1
    assert rows["tokenize: data"] > 0
    assert jobs(snakemake(project, "-n")) == {}


def test_a_workflow_says_what_its_tables_hold(project):
    """What goes first, is said when it lands, with its place and a line of its content."""
    table = project / "results/smoke/parts/tables/table1.csv"
    kept = table.read_bytes()
    table.unlink()
    result = snakemake(project, "table1")
    assert table.read_bytes() == kept
    assert "table1: results/smoke/parts/tables/table1.md  Held-out loss (nats/token) from " in result.stderr
