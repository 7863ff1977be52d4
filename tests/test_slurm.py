"""The workflow on a real Slurm (two pretend nodes with two pretend GPUs each): jobs, requeueing, time limits, nodes."""

import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT
from slurm_cluster import Cluster, missing
from test_workflow import BIN, ENVIRONMENT, UNFINISHED, link

from masa import run

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(missing() is not None, reason=str(missing())),
]


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
    folder = tmp_path_factory.mktemp("project")
    for name in ("masa", "workflow", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "cache").is_dir():
        shutil.copytree(ROOT / "cache", folder / "cache", copy_function=link, ignore=UNFINISHED)
    return folder


QUICK = [
    "--slurm-init-seconds-before-status-checks",
    "1",
    "--seconds-between-status-checks",
    "2",
    "--latency-wait",
    "10",
]


def snakemake(cluster, folder, *arguments, overlays=(), profile="--profile"):
    command = [f"{BIN}/snakemake", profile, "workflow/profiles/slurm", *QUICK, *arguments]
    command += ["--configfile", "config/smoke.yaml", *overlays]
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    log = (folder / "snakemake.log").open("w")
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)


def finished(process, folder, within):
    status = process.wait(timeout=within)
    said = (folder / "snakemake.log").read_text()
    assert status == 0, said[-6000:]
    return said


def test_the_whole_workflow(cluster, project):
    finished(snakemake(cluster, project), project, 1200)
    for name in ("tables/table1.csv", "tables/table3.md", "figures/figure2.png"):
        assert (project / "results/smoke" / name).stat().st_size > 100
    records = cluster.records()
    done = [r for r in records if "JobState=COMPLETED" in r]
    assert len(done) >= 30
    assert {"CPUs/Task=1"} <= {word for r in done for word in r.split()}
