"""The workflow on a real Slurm: two pretend nodes with two pretend GPUs each, on this machine."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
from projects import BIN, ENVIRONMENT, copy_project
from slurm_cluster import Cluster, missing

from masa.runs import run
from masa.study import config, cost

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]

QUICK = ["--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "2"]
RUNS = "results/smoke/runs/smoke"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the project with the downloads that this machine already has."""
    return copy_project(tmp_path_factory.mktemp("project"))


def start(folder, *arguments, overlays=(), profile=("--profile", "workflow/profiles/slurm")):
    command = [f"{BIN}/snakemake", *profile, *QUICK, "--latency-wait", "10", *arguments]
    command += ["--configfile", "config/smoke.yaml", *overlays]
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    with (folder / "snakemake.log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def ended(process, folder, within):
    """What Snakemake said; it must have succeeded."""
    status = process.wait(timeout=within)
    said = (folder / "snakemake.log").read_text()
    assert status == 0, said[-6000:]
    return said


def overlay(folder, name, text):
    (folder / name).write_text(text)
    return name


def trainers(folder):
    """Run id -> (process id, environment) of the trainings that are under way."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().decode().split("\0")
            if "pretrain" in words and str(process / "cwd") and (process / "cwd").resolve() == folder:
                environment = dict(
                    v.partition("=")[::2] for v in (process / "environ").read_bytes().decode().split("\0")
                )
                out = words[words.index("--out") + 1]
                found[out.partition("/runs/")[2]] = (int(process.name), environment)
        except (OSError, ValueError):
            continue
    return found


def wait_for(condition, process, folder, within=120):
    end = time.monotonic() + within
    while not (result := condition()):
        assert process.poll() is None, (folder / "snakemake.log").read_text()[-4000:]
        assert time.monotonic() < end, "waited in vain\n" + (folder / "snakemake.log").read_text()[-3000:]
        time.sleep(0.3)
    return result


def under_way(folder, name):
    log = folder / RUNS / name / "seed0" / "metrics.jsonl"
    return log.is_file() and log.read_text().count("\n") > 1


SLICE = """\
results: results/smoke
tables:
  table1: { experiments: [vanilla, masa-qkvo] }
  table3: { experiments: [original, svd-llm], tasks: [original] }
  vision: { experiments: [vanilla] }
"""
"""Every rule that computes, and not the whole workflow: here each job starts Python and torch anew."""


def test_the_workflow(cluster, project):
    tables = ("table1", "table3", "vision")
    ended(start(project, *tables, overlays=[overlay(project, "slice.yaml", SLICE)]), project, 1500)
    for name in tables:
        assert (project / "results/smoke/parts/tables" / f"{name}.csv").stat().st_size > 100
    records = cluster.records()
    assert not [r for r in records if "JobState=FAILED" in r]
    ended_well = [r for r in records if "JobState=COMPLETED" in r]
    rules = {found[1] for r in ended_well if (found := re.search(r"Comment=rule_(\w+?)(_wildcards\S*)?( |$)", r))}
    assert rules >= {"tokenizer", "tokenize", "pretrain", "evaluate", "evaluate_vision", "calibrate", "compress"}
    jobs = [r for r in records if "Comment=rule_pretrain_" in r]
    assert len(jobs) == 3
    wanted = cost.resources(config.load([project / "config" / "smoke.yaml"]), "pretrain", "smoke/masa-qkvo/seed0")
    record = next(r for r in jobs if "smoke_masa-qkvo_seed0" in r)
    assert re.search(r"MinMemoryNode=(\S+)M", record)[1] == str(wanted["mem_mb"])
    assert re.search(r"TimeLimit=(\S+)", record)[1] == f"00:{wanted['runtime']:02d}:00"


LONG = """\
results: results/smoke
plan: { device: h100 }
scales: { smoke: { training: { tokens: 204800, checkpoint_minutes: 0.1 } } }
"""


@pytest.fixture(scope="module")
def disturbed(cluster, project):
    """Two trainings at a time on one node: one is requeued in mid-training, the other runs into its time limit.

    It is halted until then, so that neither needs to be as long as a minute, the shortest limit that Slurm has.
    """
    long = overlay(project, "long.yaml", LONG)
    targets = [f"{RUNS}/{name}/seed0/manifest.json" for name in ("vanilla", "masa-qkvo")]
    limits = ["--set-resources", "pretrain:runtime=1", "pretrain:slurm_extra='--nodelist=a'"]
    process = start(project, *targets, *limits, "--retries", "9", overlays=[long])
    both = wait_for(lambda: len(found := trainers(project)) == 2 and found, process, project)
    wait_for(lambda: under_way(project, "masa-qkvo"), process, project)
    os.kill(both["smoke/masa-qkvo/seed0"][0], signal.SIGSTOP)
    wait_for(lambda: under_way(project, "vanilla"), process, project)
    job = next(job for job, comment in cluster.jobs().items() if "vanilla" in comment)
    cluster.requeue(job)
    said = ended(process, project, 900)
    return {
        "environments": {n: e for n, (_, e) in both.items()},
        "said": said,
        "records": cluster.records(),
        "job": job,
    }


def test_two_jobs_on_one_node_have_a_gpu_each(disturbed):
    devices = [environment["CUDA_VISIBLE_DEVICES"] for environment in disturbed["environments"].values()]
    assert sorted(devices) == ["0", "1"]


def test_a_requeued_training_was_started_again_by_slurm_itself(disturbed):
    record = next(r for r in disturbed["records"] if r.startswith(f"JobId={disturbed['job']} "))
    assert int(re.search(r"Restarts=(\d+)", record)[1]) == 1


def test_a_training_that_ran_into_its_time_limit_was_tried_again(disturbed):
    timeouts = [r for r in disturbed["records"] if "JobState=TIMEOUT" in r and "masa-qkvo" in r]
    assert timeouts
    assert "Trying to restart job" in disturbed["said"]


def test_both_end_with_the_bits_of_undisturbed_trainings(disturbed, project, tmp_path):
    whole = []
    for name in ("vanilla", "masa-qkvo"):
        spec, tokens = project / RUNS / name / "seed0" / "spec.json", project / "results/smoke/data/tokens/smoke"
        command = [f"{BIN}/masa", "pretrain", "--spec", spec, "--tokens", tokens, "--out", tmp_path / name]
        whole.append(subprocess.Popen(command, env=ENVIRONMENT | {"PYTHONPATH": str(project)}, cwd=project))
    for name, process in zip(("vanilla", "masa-qkvo"), whole, strict=True):
        assert process.wait(timeout=600) == 0
        expected = run.read_json(tmp_path / name / "manifest.json")["sha256"]
        assert run.read_json(project / RUNS / name / "seed0" / "manifest.json")["sha256"] == expected


def test_a_training_on_two_nodes(cluster, project):
    """One process on each node; the other form of naming the profile, whose settings then stand alone."""
    two = "plan: { device: h100 }\nscales: { smoke: { training: { tokens: 5120, micro_batch_size: 2, nodes: 2 } } }\n"
    profile = ("--workflow-profile", "workflow/profiles/slurm")
    target = f"{RUNS}/masa-qkvo/seed0/manifest.json"
    ended(start(project, target, overlays=[overlay(project, "two.yaml", two)], profile=profile), project, 300)
    provenance = run.read_json(project / RUNS / "masa-qkvo" / "seed0" / "provenance.json")
    assert provenance["processes"] == 2
    record = [r for r in cluster.records() if "masa-qkvo" in r][-1]
    assert "NumNodes=2" in record
    assert "TresPerJob=gres:gpu:2" in record, "one on each node"
    assert "JobState=COMPLETED" in record
