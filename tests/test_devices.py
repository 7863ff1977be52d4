"""Leases of GPUs between real processes, and starting a training in several of them. No GPU is needed to lease one."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from test_training import spec_of, start

import masa
from masa.runs import card, devices, run
from masa.training import launch

JOB = """
import sys, time
from pathlib import Path
from masa.runs import devices
with devices.leased(int(sys.argv[2])) as mine:
    Path(sys.argv[1]).write_text(",".join(mine))
    while not Path(sys.argv[1] + ".stop").exists():
        time.sleep(0.01)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two GPUs that nobody else leases: lock files are in a temporary directory of the test."""
    for name in ("SLURM_JOB_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-abc")
    return tmp_path


def job(place, name, count=1):
    command = [sys.executable, "-c", JOB, str(place / name), str(count)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def has(place, name, within=20.0):
    """What a job has leased, or None if it has nothing after so many seconds."""
    end = time.monotonic() + within
    while not ((place / name).is_file() and (place / name).read_text()):
        if time.monotonic() > end:
            return None
        time.sleep(0.01)
    return (place / name).read_text()


def test_jobs_side_by_side_have_a_gpu_each_and_a_third_waits(place):
    jobs = {name: job(place, name) for name in "ab"}
    assert sorted([has(place, "a"), has(place, "b")]) == ["4", "GPU-abc"]
    jobs["c"] = job(place, "c")
    assert has(place, "c", within=2) is None
    jobs["a"].kill()  # the lease ends with its process, however that ends
    assert has(place, "c") == has(place, "a")
    for name in "bc":
        (place / f"{name}.stop").touch()
        _, said = jobs[name].communicate(timeout=10)
        assert ("waiting for 1 of the GPUs 4, GPU-abc" in said) == (name == "c")


def test_a_job_of_two_waits_for_both(place):
    one = job(place, "one")
    assert has(place, "one")
    two = job(place, "two", 2)
    assert has(place, "two", within=2) is None
    (place / "one.stop").touch()
    assert has(place, "two") == "4,GPU-abc"
    (place / "two.stop").touch()
    assert one.wait(timeout=10) == two.wait(timeout=10) == 0


def test_what_is_seen_is_restored_and_too_few_are_an_error(place, monkeypatch):
    with devices.leased() as mine:
        assert os.environ["CUDA_VISIBLE_DEVICES"] == mine[0]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "4,GPU-abc"
    with (
        pytest.raises(masa.MasaError, match=r"3 GPUs are asked for .* there are 2 here: 4, GPU-abc"),
        devices.leased(3),
    ):
        pass
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with devices.leased(3) as mine:
        assert mine == ["4", "GPU-abc"], "what Slurm has given is not leased again"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with devices.leased(3) as mine:
        assert mine == [], "no GPU, nothing to lease"


def test_the_driver_is_what_nvidia_smi_says_or_none(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    program = tmp_path / "nvidia-smi"
    for text, expected in (
        (None, None),
        ("#!/bin/sh\nprintf '550.54.15\\n550.54.15\\n'\n", "550.54.15"),
        ("#!/bin/sh\nexit 0\n", None),
        ("#!/bin/sh\necho 'no devices were found'\nexit 6\n", None),
        ("not a program", None),
    ):
        if text:
            program.write_text(text)
            program.chmod(0o755)
        card._driver.cache_clear()
        assert card._driver() == expected, text
    card._driver.cache_clear()


def test_what_is_computed_on_is_named_and_none_where_that_is_a_cpu():
    import torch

    found = card.used()
    assert set(found) == {"gpu", "driver", "cuda"}
    assert (found["gpu"] is None) == (found["cuda"] is None) == (not torch.cuda.is_available())
    code = "import sys; from masa.runs import run; p = run.provenance({}); assert 'torch' not in sys.modules;"
    code += "assert p['gpu'] is p['driver'] is p['cuda'] is None"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_two_nodes_without_slurm_meet_by_hand(tokens, tmp_path, monkeypatch):
    """The same command on each node, one process each: the bits of two processes on one node."""
    import socket

    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    spec = spec_of("masa", micro_batch_size=2, nodes=2)
    with pytest.raises(masa.MasaError, match=r"2 nodes .* MASA_RENDEZVOUS=HOST:PORT"):
        launch.launch(spec, [])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASA_RENDEZVOUS", f"127.0.0.1:{free.getsockname()[1]}")
    nodes = [start(spec, tokens, tmp_path / "nodes") for _ in range(2)]
    for node in nodes:
        _, said = node.communicate(timeout=180)
        assert node.returncode == 0, said
    monkeypatch.delenv("MASA_RENDEZVOUS")
    assert start(spec_of("masa", micro_batch_size=2, processes_per_node=2), tokens, tmp_path / "one").wait() == 0
    first, second = (run.read_json(tmp_path / name / "manifest.json") for name in ("nodes", "one"))
    assert first["sha256"] == second["sha256"]


def test_a_process_that_is_killed_ends_the_others_and_is_named(tokens, tmp_path):
    spec = spec_of("masa", micro_batch_size=2, processes_per_node=2, steps=150)
    process = start(spec, tokens, tmp_path)
    while not (tmp_path / "metrics.jsonl").is_file():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.02)
    ranks = [p for p in psutil.Process(process.pid).children() if p.environ().get("RANK") == "1"]
    ranks[0].kill()
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "ended with status -9" in said or "Connection" in said, said
    assert start(spec, tokens, tmp_path).wait(timeout=120) == 0, "the same command mends it"


def test_a_process_that_fails_is_named(tokens, tmp_path):
    spec = spec_of("masa", micro_batch_size=2, processes_per_node=2, steps=10**6)
    process = start(spec, tokens, tmp_path)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said.rstrip().splitlines()[-1].startswith("masa: error: ")
    assert "the run needs 4,000,000" in said
    assert "Traceback" not in said


def test_a_wrong_number_of_processes(tokens, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    command = [sys.executable, "-m", "masa.cli", "pretrain", "--tokens", str(tokens), "--out", str(tmp_path)]
    command += ["--spec", json.dumps(spec_of(processes_per_node=2))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "asks for 1 x 2 processes" in done.stderr
