"""A run that cannot exist at a scale is left out everywhere alike and said once, with the mend that makes it."""

import copy
import re
import subprocess
import sys

import pytest
import yaml
from conftest import ROOT

import masa
from masa.cli import main
from masa.study import artefacts, checks, config, cost, experiments, inputs
from masa.study.cost.workflow import jobs
from masa.study.status.survey import Surveyor

SMALL = {
    "scales": {
        "odd": {
            "model": {"num_layers": 6, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
            "training": {"tokens": 100_000, "batch_size": 8, "context": 128, "micro_batch_size": None},
        }
    },
    "grids": {"main": {"scales": ["odd"], "seeds": [0]}},
    "throughput": {"scales": ["odd"]},
    "parameters": {"scales": ["odd"]},
}


def written(tmp_path, **more):
    """An overlay with a scale of four heads, of which the H/6 of gqa is no whole number."""
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(SMALL | more))
    return path


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(config, "_said", set())


SAID = (
    "gqa is left out at scale odd: num_key_value_heads = 'H/6' is not an integer there: H = 4. To make it, set "
    "experiments.gqa.per_scale.odd: {num_key_value_heads: 1} (or another of [1, 2, 4])."
)


def test_the_other_runs_of_the_grid_are_made(tmp_path, capsys):
    c = config.load([written(tmp_path)])
    assert capsys.readouterr().err == SAID + "\n"
    runs = [run for run in experiments.all_runs(c) if run.startswith("odd/")]
    assert "odd/gqa/seed0" not in runs
    assert {"odd/vanilla/seed0", "odd/masa-qkvo/seed0", "odd/sequential/seed0"} <= set(runs)
    config.load([written(tmp_path)])
    assert not capsys.readouterr().err, "once"


def test_plan_status_tables_and_workflow_agree(tmp_path):
    c = config.load([written(tmp_path)])
    runs = set(experiments.all_runs(c))
    assert set(Surveyor(tmp_path / "results", c).specs) == runs
    planned = {job.name for job in jobs(cost.Plan(c)) if job.rule == "pretrain"}
    assert planned == runs
    table = artefacts.table_spec(c, "table1")
    assert {row["experiment"] for row in table["rows"]} == {
        r.split("/")[1] for r in runs if r.startswith("odd/")
    } & set(c["tables"]["table1"]["experiments"])
    assert table["left_out"] == [SAID]
    assert "left_out" not in artefacts.table_spec(config.load(), "table1")
    timed = inputs.throughput_spec(c, "odd")["runs"]
    assert [spec["run"].split("/")[1] for spec in timed] == [n for n in c["throughput"]["methods"] if n != "gqa"]
    assert not [spec for spec in inputs.parameters_spec(c) if spec["run"] == "odd/gqa/seed0"]


def test_the_mend_makes_it(tmp_path, capsys):
    mend = yaml.safe_load(re.search(r"per_scale\.odd: (\{.*?\})", SAID)[1])
    c = config.load([written(tmp_path, experiments={"gqa": {"per_scale": {"odd": mend}}})])
    assert not capsys.readouterr().err
    assert "odd/gqa/seed0" in experiments.all_runs(c)
    assert experiments.run_spec(c, "odd", "gqa", 0)["sharing"]["num_key_value_heads"] == 1


def test_a_run_that_is_asked_for_by_name_is_refused_with_the_mend(tmp_path, capsys):
    arguments = ["pretrain", "--run", "odd/gqa/seed0", "--tokens", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*arguments, "--configfile", str(written(tmp_path))]) == 2
    assert "masa: error: Run odd/gqa/seed0: num_key_value_heads = 'H/6' is not an integer" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_any_number_that_is_a_part_of_the_model_is_meant(tmp_path):
    """Eight layers are no multiple of three: atoms and sets of L/3 cannot be; a rank of d/6 is rounded down."""
    small = copy.deepcopy(SMALL)
    small["scales"]["odd"]["model"] |= {"num_layers": 8, "num_attention_heads": 16}
    path = tmp_path / "odd.yaml"
    path.write_text(yaml.safe_dump(small))
    c = config.load([path])
    left = {sentence.split()[0]: sentence for sentence in experiments.left_out(c)}
    assert left.keys() == {"gqa", "masa-qkv", "masa-qkvo", "sequential", "repeat-all-over"}
    assert (
        "atoms = 'L/3' is not an integer there: L = 8. To make it, set experiments.masa-qkvo.per_scale.odd: {atoms: 2}"
        in (left["masa-qkvo"])
    )
    assert {r for r in experiments.all_runs(c) if r.startswith("odd/")} == {"odd/vanilla/seed0", "odd/low-rank/seed0"}
    assert "coefficients" not in experiments.active(c, "figures"), "a figure of atoms alone has nothing to draw"
    checks.check(c)


def test_a_number_that_is_written_out_is_meant_as_it_stands(tmp_path):
    with pytest.raises(masa.MasaError, match=r"Run odd/gqa/seed0: num_key_value_heads = 3 does not divide"):
        config.load([written(tmp_path, experiments={"gqa": {"per_scale": {"odd": {"num_key_value_heads": 3}}}})])


def test_the_workflow_says_it_once(tmp_path):
    overlay = written(tmp_path, results=str(tmp_path / "results"))
    target = tmp_path / "results/evaluations/odd/vanilla/seed0/metrics.json"
    command = [sys.executable, "-m", "snakemake", "-n", "--nolock", "--cores", "1", str(target), "--configfile"]
    command.append(str(overlay))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (done.stdout + done.stderr).count(SAID) == 1
