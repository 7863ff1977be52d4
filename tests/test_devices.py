"""Leases of GPUs between real processes, and starting a training in several of them. No GPU is needed to lease one."""

import json
import os
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT
from test_training import both_train, spec_of, start

import masa
from masa.runs import card, devices, run
from masa.training import launch

JOB = """
import sys, time
from pathlib import Path
from masa.runs import devices
with devices.leased(float(sys.argv[2])) as mine:
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


def stop(place, *names):
    for name in names:
        (place / f"{name}.stop").touch()


def test_jobs_share_a_gpu_up_to_all_of_it(place):
    jobs = {name: job(place, name, 0.25) for name in "abcd"}
    first = has(place, "a")
    assert {has(place, name) for name in "abcd"} == {first}, "together on one, so that the other stays free"
    jobs["whole"] = job(place, "whole")
    other = has(place, "whole")
    assert {first, other} == {"4", "GPU-abc"}
    jobs["e"] = job(place, "e", 0.25)
    assert has(place, "e", within=2) is None
    jobs["b"].kill()
    assert has(place, "e") == first, "in the place of one that was killed"
    jobs["half"] = job(place, "half", 0.5)
    stop(place, "a")
    assert has(place, "half", within=2) is None, "a quarter is not a half"
    stop(place, "c")
    assert has(place, "half") == first
    stop(place, *jobs)
    for name, one in jobs.items():
        _, said = one.communicate(timeout=10)
        assert one.returncode == (-9 if name == "b" else 0)
        assert ("waiting for 0.25 of one of the GPUs" in said) == (name == "e")
    assert not list(place.glob("masa-gpus-*/*.lease")), "nothing is left, of the killed one neither"


def test_a_whole_gpu_waits_for_every_share_of_it(place, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    small = job(place, "small", 0.01)
    assert has(place, "small") == "7"
    whole = job(place, "whole")
    assert has(place, "whole", within=2) is None
    stop(place, "small")
    assert has(place, "whole") == "7"
    share = job(place, "share", 0.01)
    assert has(place, "share", within=2) is None
    stop(place, "whole", "share")
    assert has(place, "share") == "7"
    assert [one.wait(timeout=10) for one in (small, whole, share)] == [0, 0, 0]


def test_a_share_goes_to_the_fullest_gpu_that_has_room(place, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    jobs = []
    for name, share, expected in (
        ("a", 0.7, "0"),
        ("b", 0.5, "1"),
        ("c", 0.3, "0"),
        ("d", 0.4, "1"),
        ("e", 0.34, "2"),
        ("f", 0.1, "1"),
        ("g", 0.333, "2"),
        ("h", 0.32, "2"),
    ):
        jobs.append(job(place, name, share))
        assert has(place, name) == expected, name
    stop(place, *"abcdefgh")
    assert {one.wait(timeout=10) for one in jobs} == {0}


def test_many_jobs_at_once_never_hold_more_than_there_is(place):
    """Twenty shares and whole GPUs, asked for at the same time: what each has is written down while it has it."""
    code = """
import sys, time
from pathlib import Path
from masa.runs import devices
place, name, share = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3])
with devices.leased(share) as (mine,):
    began = time.monotonic()
    time.sleep(0.4)
    (place / name).write_text(f"{mine} {share} {began} {time.monotonic()}")
"""
    shares = [0.3, 0.3, 0.5, 1.0, 0.2] * 4
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(place), f"job{i}", str(share)], cwd=ROOT)
        for i, share in enumerate(shares)
    ]
    assert {one.wait(timeout=120) for one in jobs} == {0}
    held = [line.split() for line in (file.read_text() for file in place.glob("job*"))]
    assert len(held) == 20
    most = {}
    for _, _, moment, _ in held:
        for gpu in ("4", "GPU-abc"):
            there = sum(float(s) for g, s, began, ended in held if g == gpu and began <= moment <= ended)
            most[gpu] = max(most.get(gpu, 0), there)
    assert all(0.5 <= value <= 1 + 1e-9 for value in most.values()), most


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
    both_train(spec_of("masa", micro_batch_size=2, processes_per_node=2), tokens, tmp_path / "one")
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
