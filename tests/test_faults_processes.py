"""Faults of processes, memory and clocks, provoked for real: killed workers, no memory, orphans, a clock that jumps."""

import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, VERB, Forked, kill_after_checkpoints, until, whole_checkpoints
from test_image_training import EVERYTHING
from test_image_training import spec_of as image_spec
from test_training import losses, spec_of

import masa
from masa import cli
from masa.runs import run
from masa.training import images, language, resuming


def command(spec, data, out, option="tokens", *more):
    return [VERB[option], "--spec", json.dumps(spec), f"--{option}", str(data), "--out", str(out), *more]


def long_run(steps=150, **recipe):
    """Of a language model, and as long as there are tokens."""
    return spec_of(steps=steps, batch_size=2, micro_batch_size=2, **recipe)


def lines(out):
    return (out / "metrics.jsonl").read_text().count("\n") if (out / "metrics.jsonl").is_file() else 0


# ------------------------------------------------------------------------------------------------- workers, memory


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_data_loader_worker(workers, digits, tmp_path, undisturbed):
    spec = image_spec(steps=150, workers=workers, checkpoint_minutes=0.01, **EVERYTHING)
    out = tmp_path / "cut"
    process = Forked(lambda: cli.main(command(spec, digits, out, "images")), tmp_path / "said.txt")
    until(lambda: whole_checkpoints(out) and lines(out) > 8, process=process)
    found = psutil.Process(process.pid).children()
    assert len(found) == workers
    found[-1].send_signal(signal.SIGKILL)
    assert process.wait() == 2, process.said
    assert "a data loader's worker (" in process.said, process.said
    assert "memory ran out. Lower training.workers" in process.said
    assert f"to go on from step {whole_checkpoints(out)[-1]}." in process.said
    assert "Traceback" not in process.said
    again = images.pretrain(spec, digits, out)
    whole = undisturbed(images.pretrain, image_spec(steps=150, workers=0, **EVERYTHING), digits)
    assert again["sha256"] == whole["sha256"], "neither the kill nor the number of workers changes a bit"


def limited(work, more):
    """``work`` with room for so many more bytes of addresses than the process has now."""

    def limit():
        used = psutil.Process().memory_info().vms
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
        return work()

    return limit


def test_out_of_memory_in_training(tokens, tmp_path):
    """A batch whose logits do not fit below a limit of the address space; a smaller micro-batch does."""
    out = tmp_path / "run"
    spec = spec_of(context=256, batch_size=32, micro_batch_size=32, steps=1)
    spec["model"] |= {"intermediate_size": 1024}
    spec["sharing"]["atoms"] = 2
    process = Forked(limited(lambda: cli.main(command(spec, tokens, out)), 100 * 2**20), tmp_path / "said.txt")
    assert process.wait() == 2, process.said
    said = re.search(
        r"test/masa/seed0 ran out of memory while training \(step 1\)\. Its peak was (\d+\.\d\d) GiB", process.said
    )
    assert said, process.said
    room = psutil.Process().memory_info().vms + 100 * 2**20  # a fork of this process, however large tests have made it
    assert 0.05 < float(said[1]) < room / 2**30, process.said
    assert re.search(r"estimated to need 0\.\d GiB|estimated to need 1\.\d GiB", process.said)
    assert "Lower training.micro_batch_size (now 32;" in process.said
    assert "Traceback" not in process.said
    assert not (out / "manifest.json").exists()
    spec["training"]["micro_batch_size"] = 2
    process = Forked(limited(lambda: cli.main(command(spec, tokens, out)), 100 * 2**20), tmp_path / "again.txt")
    assert process.wait() == 0, process.said


def test_out_of_memory_after_a_checkpoint_is_gone_on_from(tokens, tmp_path, undisturbed):
    """The limit comes in mid-training, as when another process takes the memory."""
    spec = spec_of(context=256, batch_size=32, micro_batch_size=32, steps=2, checkpoint_minutes=1e-6)
    spec["model"] |= {"intermediate_size": 1088}  # activations of 36 MB, more than malloc ever keeps for later
    whole = undisturbed(language.pretrain, spec, tokens)
    out = tmp_path / "cut"
    process = Forked(lambda: cli.main(command(spec, tokens, out)), tmp_path / "said.txt")
    until(lambda: whole_checkpoints(out), process=process)
    room = 2**20
    resource.prlimit(process.pid, resource.RLIMIT_AS, (room, room))
    assert process.wait() == 2, process.said
    assert "ran out of memory while" in process.said
    assert f"The same command will go on from step {whole_checkpoints(out)[-1]}" in process.said
    assert "Traceback" not in process.said
    assert language.pretrain(spec, tokens, out)["sha256"] == whole["sha256"]


# ----------------------------------------------------------------------------------------------------------- clocks


@pytest.fixture
def fake_clock(tmp_path):
    """Environment of a process whose wall clock follows a file; the monotonic one does not jump, as in reality."""
    found = [str(p) for p in Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
    if not found:
        pytest.skip("libfaketime is not installed (Debian's package libfaketime)")
    file = tmp_path / "clock"
    file.write_text("+0")
    environment = os.environ | {"LD_PRELOAD": found[0], "FAKETIME_TIMESTAMP_FILE": str(file), "FAKETIME_NO_CACHE": "1"}
    return file, environment | {"DONT_FAKE_MONOTONIC": "1", "PYTHONPATH": str(ROOT)}


def test_a_clock_that_jumps_by_days(fake_clock, tokens, tmp_path, undisturbed):
    file, environment = fake_clock
    clock = [sys.executable, "-c", "import time; print(time.time())"]
    file.write_text("-10d")
    behind = float(subprocess.run(clock, env=environment, capture_output=True, text=True, check=True).stdout)
    assert time.time() - behind > 9 * 86400, "the clock is really another"
    file.write_text("+0")
    spec = long_run(checkpoint_minutes=0.1 / 60)
    whole = undisturbed(language.pretrain, spec, tokens)
    out = tmp_path / "run"
    code = "import sys; from masa import cli; from masa.runs import progress; from masa.training import log\n"
    code += "log.Progress = lambda *a: progress.Progress(*a, every=0.05)\n"  # more lines to look at
    code += "sys.exit(cli.main(sys.argv[1:]))"
    started = time.monotonic()
    printed = tmp_path / "said.txt"
    with printed.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-c", code, *command(spec, tokens, out)], env=environment, stderr=stderr
        )
    for at, jump in ((5, "-9d"), (25, "+7d"), (45, "-30d"), (70, "+400d")):
        until(lambda at=at: process.poll() is not None or lines(out) >= at)
        file.write_text(jump)
    seen = set()
    while process.poll() is None:
        seen |= set(whole_checkpoints(out))
        time.sleep(0.005)
    took, said = time.monotonic() - started, printed.read_text()
    assert process.returncode == 0, said
    manifest = run.read_json(out / "manifest.json")
    assert manifest["sha256"] == whole["sha256"]
    assert len(seen) > 2 and max(seen) > 70, "checkpoints go on being written after the last jump"
    assert 0 < manifest["training"]["training_seconds"] < took
    seconds = [r["training_seconds"] for r in run.read_jsonl(out / "metrics.jsonl")]
    assert seconds == sorted(seconds)
    shown = [line for line in said.splitlines() if "/150 steps" in line]
    assert len(shown) > 3
    assert not re.search(r"-\d[\d.,]* (steps|tokens)/s|(ETA|took) -", said)
    assert not re.search(r"(ETA|took) \d+:\d\d:\d\d", said), "no estimate of hours"


def test_checkpoints_are_newest_by_their_step_after_the_clock_went_back(tokens, tmp_path, undisturbed):
    """Those on disk are from the future: they are gone on from, and not kept instead of newer ones."""
    spec = long_run(checkpoint_minutes=1e-4)
    whole = undisturbed(language.pretrain, spec, tokens)
    out = tmp_path / "cut"
    kill_after_checkpoints(lambda: language.pretrain(spec, tokens, out), out)
    old = whole_checkpoints(out)
    for days, step in zip((20, 10), old[-2:], strict=True):  # the older one seems to be the newest
        when = time.time() + days * 86400
        for path in (out / "checkpoints" / f"checkpoint-{step}", *(out / "checkpoints").glob(f"checkpoint-{step}/*")):
            os.utime(path, (when, when))
    assert resuming.newest(out / "checkpoints").name == f"checkpoint-{old[-1]}"
    process = Forked(lambda: cli.main(command(spec, tokens, out)), tmp_path / "said.txt")
    until(lambda: min(whole_checkpoints(out), default=0) > old[-1], process=process)
    process.send(signal.SIGTERM)
    assert process.wait() == 75
    kept = whole_checkpoints(out)
    assert len(kept) == 2 and all(resuming._damage(out / "checkpoints" / f"checkpoint-{step}") is None for step in kept)
    assert language.pretrain(spec, tokens, out)["sha256"] == whole["sha256"]


# ---------------------------------------------------------------------------------------- two processes on one run


def orphan(spec, tokens, out, folder):
    """A trainer whose parent was killed, as Snakemake's children are; returns its process id."""

    def parent():
        Forked(lambda: cli.main(command(spec, tokens, out)), folder / "orphan.txt").wait()

    killed = Forked(parent, folder / "parent.txt")
    until(lambda: lines(out) > 3, process=killed)
    trainer = psutil.Process(killed.pid).children()[0]
    killed.send(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert trainer.is_running()
    return trainer


def test_an_orphan_is_waited_for_and_its_run_taken_over_whole(tokens, tmp_path, undisturbed):
    spec, out = long_run(steps=150), tmp_path / "run"
    left = orphan(spec, tokens, out, tmp_path)
    stopped = Forked(lambda: cli.main(command(spec, tokens, out, "tokens", "--no-wait")), tmp_path / "no_wait.txt")
    second = Forked(lambda: cli.main(command(spec, tokens, out)), tmp_path / "second.txt")
    assert stopped.wait() == 2
    assert f"is being written by process {left.pid} on {os.uname().nodename} since 20" in stopped.said
    assert second.wait() == 0, second.said
    assert f"is being written by process {left.pid} on {os.uname().nodename} since 20" in second.said
    assert "waiting for it (0 s so far)" in second.said
    assert "the process that was waited for has finished this run" in second.said
    assert "150/150 steps" not in second.said, "nothing was trained again"
    assert "150/150 steps" in (tmp_path / "orphan.txt").read_text()
    assert list(losses(out)) == list(range(1, 151))
    whole = undisturbed(language.pretrain, spec, tokens)
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]


def test_an_orphan_that_dies_while_it_is_waited_for_is_taken_over_from(tokens, tmp_path, undisturbed):
    spec, out = long_run(steps=150, checkpoint_minutes=1e-4), tmp_path / "run"
    left = orphan(spec, tokens, out, tmp_path)
    second = Forked(lambda: cli.main(command(spec, tokens, out)), tmp_path / "second.txt")
    until(lambda: "waiting for it" in second.said and whole_checkpoints(out), process=second)
    left.send_signal(signal.SIGKILL)
    assert second.wait() == 0, second.said
    assert "150/150 steps" in second.said
    assert list(losses(out)) == list(range(1, 151))
    whole = undisturbed(language.pretrain, spec, tokens)
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]


def test_another_spec_trains_its_own_run_after_the_wait(tokens, tmp_path):
    """As the workflow asks for; without --restart the run that was waited for is left as it is."""
    out = tmp_path / "run"
    left = orphan(long_run(), tokens, out, tmp_path)
    other = command(spec_of(steps=10, seed=1), tokens, out)
    second = Forked(lambda: cli.main([*other, "--restart", "changed"]), tmp_path / "second.txt")
    until(lambda: "waiting for it" in second.said, process=second)
    assert left.is_running()
    assert second.wait() == 0, second.said
    assert run.read_json(out / "manifest.json")["run"] == "test/masa/seed1"
    assert cli.main(command(long_run(), tokens, out)) == 2
    assert run.read_json(out / "manifest.json")["run"] == "test/masa/seed1"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_waiting_can_be_interrupted(number, tokens, tmp_path):
    with run.exclusive(tmp_path / "run"):
        second = Forked(lambda: cli.main(command(spec_of(), tokens, tmp_path / "run")), tmp_path / "said.txt")
        until(lambda: "waiting for it" in second.said, process=second)
        second.send(number)
        assert second.wait() == 75
    assert f"stopped by {number.name} while waiting for {tmp_path / 'run'}, which process {os.getpid()}" in second.said
    assert language.pretrain(spec_of(steps=3), tokens, tmp_path / "run")["training"]["steps"] == 3


def test_waiting_says_so_again_and_again_and_notices_that_the_directory_was_removed(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("masa.runs.hold.SAY", 0.3)
    out = tmp_path / "run"

    def hold():
        with run.exclusive(out):
            time.sleep(1.5)

    holder = Forked(hold, tmp_path / "holder.txt")
    until(lambda: (out / ".lock").is_file() and (out / ".lock").read_text(), process=holder)
    with run.exclusive(out, wait=True) as waited:
        assert waited
        (out / ".lock").unlink()
    assert capfd.readouterr().err.count(f"{out} is being written by process {holder.pid} on") >= 3
    assert holder.wait() == 0
    with run.exclusive(out, wait=True) as waited:
        assert not waited


# ---------------------------------------------------------------------------------------------------- damaged files


def cut_short(out):
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9999, "loss": 3.1')


def bytes_that_are_no_text(out):
    data = (out / "metrics.jsonl").read_bytes()
    (out / "metrics.jsonl").write_bytes(data[:20] + b"\xff\xfe\n" + data[20:])


def stray_files(out):
    checkpoints = out / "checkpoints"
    (checkpoints / "checkpoint-9999").write_text("a file")
    (checkpoints / "checkpoint-old").mkdir()
    (checkpoints / "checkpoint-old" / "complete.json").write_text("{}")
    (checkpoints / "checkpoint-8888").mkdir()
    (checkpoints / "checkpoint-8888" / "complete.json").write_text("{}")
    (checkpoints / "notes.txt").write_text("mine")
    (out / ".manifest.json.abcd1234").mkdir()
    (out / ".manifest.json.abcd1234" / "manifest.json").write_text("{")


def spec_corrupt(out):
    (out / "spec.json").write_bytes(b'{"run": \xff')


def manifest_corrupt(out):
    (out / "manifest.json").write_text("{")


def lock_corrupt(out):
    (out / ".lock").write_bytes(b"\xff\xfe")


def complete_corrupt(out):
    (resuming.newest(out / "checkpoints") / "complete.json").write_bytes(b"{\xff")


def test_checkpoints_that_nobody_knows_are_kept(tokens, tmp_path, capfd, undisturbed):
    """Whose they are cannot be told any more: the same command refuses, and --restart gives the same bits."""
    spec, out = spec_of(steps=40, checkpoint_minutes=1e-4), tmp_path / "cut"
    whole = undisturbed(language.pretrain, spec, tokens)
    kill_after_checkpoints(lambda: language.pretrain(spec, tokens, out), out)
    (out / "identity.json").write_bytes(b"\xff")
    kept = whole_checkpoints(out)
    assert cli.main(command(spec, tokens, out)) == 2
    assert f"{out / 'identity.json'} is corrupt" in capfd.readouterr().err
    assert whole_checkpoints(out) == kept
    assert cli.main([*command(spec, tokens, out), "--restart"]) == 0
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]


HARMS = (cut_short, bytes_that_are_no_text, stray_files, spec_corrupt, manifest_corrupt, lock_corrupt)


@pytest.fixture(scope="module")
def killed(tokens, tmp_path_factory):
    """A spec, its finished run, and one of it that was killed, to be copied."""
    folder, spec = tmp_path_factory.mktemp("killed"), spec_of(steps=40, checkpoint_minutes=1e-4)
    language.pretrain(spec, tokens, folder / "whole")
    kill_after_checkpoints(lambda: language.pretrain(spec, tokens, folder / "cut"), folder / "cut")
    return spec, folder / "whole", folder / "cut"


@pytest.mark.parametrize("harm", [*HARMS, complete_corrupt], ids=lambda harm: harm.__name__)
def test_the_next_call_mends_damaged_files(harm, killed, tokens, tmp_path):
    spec, whole, cut = killed
    out = shutil.copytree(cut, tmp_path / "cut")
    harm(out)
    assert cli.main(command(spec, tokens, out)) == 0
    assert run.read_json(out / "manifest.json")["sha256"] == run.read_json(whole / "manifest.json")["sha256"]
    assert run.read_json(out / "spec.json") == run.read_json(whole / "spec.json")
    steps = [json.loads(line).get("step") for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and max(steps) == 40
    assert {p.name for p in out.glob(".*")} == {".lock"}


def test_a_kill_before_the_first_checkpoint_logs_no_step_twice(tokens, tmp_path):
    spec, out = long_run(), tmp_path / "cut"
    process = Forked(lambda: language.pretrain(spec, tokens, out) and None, tmp_path / "said.txt")
    until(lambda: lines(out) > 3, process=process)
    process.send(signal.SIGKILL)
    process.wait()
    language.pretrain(spec, tokens, out)
    steps = [r["step"] for r in run.read_jsonl(out / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 151))


def test_a_second_process_is_still_told_by_the_library(tokens, tmp_path):
    with run.exclusive(tmp_path), pytest.raises(masa.MasaError, match="since 20"):
        language.pretrain(spec_of(), tokens, Path(tmp_path))
