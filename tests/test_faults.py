"""Faults of disks and numbers, provoked for real: what is said, what is kept, and that the same command mends it."""

import contextlib
import ctypes
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, VERB, whole_checkpoints
from test_image_training import spec_of as image_spec
from test_training import spec_of

import masa
from masa import cli
from masa.runs import faults, files, run
from masa.training import language, trainer
from masa.training.watch import Watch


@pytest.fixture
def disk(tmp_path):
    """A small file system of its own: mounts it, makes it larger or read-only; skips where that is not allowed."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=900k", "tmpfs", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"mounting a file system is not allowed here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def remount(folder, option):
    subprocess.run(["mount", "-o", f"remount,{option}", folder], check=True)


def fill(folder, but=0):
    """Leave about ``but`` bytes free."""
    file = folder / "filler"
    with file.open("wb") as out:
        while faults.why_not_writable(folder, 4096) is None:
            out.write(bytes(4096))
            out.flush()
    os.truncate(file, max(0, file.stat().st_size - but))
    return file


def pretrain(spec, data, out, option="tokens", *more):
    command = [VERB[option], "--spec", json.dumps(spec), f"--{option}", str(data), "--out", str(out), *more]
    return cli.main(list(map(str, command)))


def temporary_files(folder):
    return [p for p in folder.rglob(".*") if p.name != ".lock"]


# ------------------------------------------------------------------------------------------------------- full disks


@pytest.mark.parametrize("size", ["560k", "640k", "760k", "820k", "900k", "1m"])
def test_a_disk_that_fills_up_in_training(size, disk, tokens, tmp_path, capfd, undisturbed):
    """Sizes at which different files of a checkpoint, or the third checkpoint, do not fit any more."""
    spec = spec_of(steps=12, checkpoint_minutes=1e-6)
    whole = undisturbed(language.pretrain, spec, tokens)
    remount(disk, f"size={size}")
    out = disk / "run"
    capfd.readouterr()
    assert pretrain(spec, tokens, out, "tokens", "--log", tmp_path / "log.txt") == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert f"No space left on device: {out}" in said
    assert "free space and run the same command again to" in said
    assert "No space left" in (tmp_path / "log.txt").read_text()
    kept = whole_checkpoints(out)
    if kept:
        assert f"to go on from step {kept[-1]}" in said
    there = sorted(int(p.name[11:]) for p in out.glob("checkpoints/checkpoint-*"))
    assert there == sorted(kept), "none is half-written"
    assert not (out / "manifest.json").exists()
    assert not temporary_files(out)
    remount(disk, "size=20m")
    assert pretrain(spec, tokens, out) == 0
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]
    steps = [r["step"] for r in run.read_jsonl(out / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 13))


def test_a_disk_that_is_full_when_only_the_log_is_written(disk, tokens, tmp_path, capfd, undisturbed):
    """Without checkpoints; and --log is on the full disk, too."""
    spec = spec_of(steps=100)
    whole = undisturbed(language.pretrain, spec, tokens)
    out, log = disk / "run", disk / "log.txt"
    log.touch()
    filler = fill(disk, but=24 * 1024)
    capfd.readouterr()
    assert pretrain(spec, tokens, out, "tokens", "--log", log) == 2
    said = capfd.readouterr().err
    assert f"No space left on device: {out / 'metrics.jsonl'}; free space and run the same command again" in said
    assert f"the log {log} could not be written" in said
    assert "Traceback" not in said
    lines = (out / "metrics.jsonl").read_text()
    assert lines.endswith("\n"), "no half a line"
    assert all(isinstance(json.loads(line), dict) for line in lines.splitlines())
    filler.unlink()
    assert pretrain(spec, tokens, out, "tokens", "--log", log) == 0
    assert log.read_text().startswith("done in ")
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]
    steps = [r["step"] for r in run.read_jsonl(out / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, 101))


def test_a_disk_that_is_full_at_the_end(disk, tokens, tmp_path, capfd, undisturbed):
    """The model does not fit: its parts, the manifest above all, are not there until it does."""
    spec = spec_of(steps=4)
    whole = undisturbed(language.pretrain, spec, tokens)
    out = disk / "run"
    filler = fill(disk, but=64 * 1024)
    capfd.readouterr()
    assert pretrain(spec, tokens, out) == 2
    assert f"No space left on device: {out / 'model' / 'model.safetensors'}; free" in capfd.readouterr().err
    assert not list((out / "model").iterdir())
    filler.unlink()
    assert pretrain(spec, tokens, out) == 0
    assert run.read_json(out / "manifest.json")["sha256"] == whole["sha256"]


def test_token_files_on_a_full_disk(disk, tmp_path, capfd):
    source = tmp_path / "text.jsonl"
    generator = np.random.default_rng(0)
    known = ["".join(generator.choice(list("abcdefghij"), 5)) for _ in range(500)]
    words = generator.choice(known, (4000, 40))
    source.write_text("".join(json.dumps({"text": " ".join(line)}) + "\n" for line in words))
    corpus = {"source": f"file:{source}", "reader": "json", "column": "text", "sha256": None}
    corpus |= {"validation_fraction": 0.1, "validation_tokens": 1000, "shuffle_buffer": 100}
    spec = {
        "data": {"corpus": corpus, "tokenizer": {"source": "train", "vocab_size": 400, "training_bytes": 100_000}},
        "cache": str(tmp_path / "cache"),
        "mirror": None,
    }
    made, whole, out = tmp_path / "tokenizer", tmp_path / "whole", disk / "tokens"
    assert cli.main(["tokenizer", "--spec", json.dumps(spec), "--out", str(made)]) == 0
    command = ["tokenize", "--spec", json.dumps(spec), "--tokenizer", str(made), "--tokens", "100000"]
    assert cli.main([*command, "--out", str(whole)]) == 0
    filler = fill(disk, but=100 * 1024)
    capfd.readouterr()
    assert cli.main([*command, "--out", str(out)]) == 2
    said = capfd.readouterr().err
    assert f"No space left on device: {out / 'train-00000.bin'}; free space and run the same command again" in said
    assert "Traceback" not in said
    assert sorted(p.name for p in out.iterdir()) == ["validation.bin"]
    assert cli.main(["tokenizer", "--spec", json.dumps(spec), "--out", str(disk / "tokenizer")]) in (0, 2)
    assert (disk / "tokenizer" / "manifest.json").exists() == (disk / "tokenizer" / "tokenizer.json").exists()
    filler.unlink()
    assert cli.main([*command, "--out", str(out)]) == 0
    assert run.read_json(out / "manifest.json")["train"] == run.read_json(whole / "manifest.json")["train"]
    assert not temporary_files(out)


def test_a_tokenizer_table_or_json_on_a_full_disk(disk, tmp_path, capfd):
    old = {"old": list(range(2000))}
    run.write_json(disk / "metrics.json", old)
    filler = fill(disk)
    with pytest.raises(masa.MasaError, match=f"No space left on device: {disk / 'metrics.json'}; free space"):
        run.write_json(disk / "metrics.json", {"new": list(range(9000))})
    assert run.read_json(disk / "metrics.json") == old, "the last good one is kept"
    from masa.report import tables

    results = tmp_path / "results"
    parameters = {"parameters": []}
    run.write_json(results / "parameters.json", parameters)
    import pandas as pd

    frame = pd.DataFrame({"a": range(3000), "b": range(3000)})
    with pytest.raises(masa.MasaError, match=f"No space left on device: {disk / 't' / 'big.csv'}"):
        tables.write(frame, {"name": "big", "title": "Big"}, disk / "t")
    assert not temporary_files(disk)
    filler.unlink()
    tables.write(frame, {"name": "big", "title": "Big"}, disk / "t")
    assert len(pd.read_csv(disk / "t" / "big.csv")) == 3000


@pytest.mark.parametrize("kind", ["torch", "safetensors", "numpy", "text"])
def test_every_library_that_writes_is_understood(kind, disk):
    from safetensors.torch import save_file

    def write(path):
        data = torch.zeros(10**6)
        {
            "torch": lambda: torch.save({"a": data}, path),
            "safetensors": lambda: save_file({"a": data}, path),
            "numpy": lambda: data.numpy().tofile(path),
            "text": lambda: path.write_text("x" * 10**7),
        }[kind]()

    with pytest.raises(faults.CannotWrite) as raised, files.whole_file(disk / "file") as path:
        write(path)
    assert raised.value.number == errno.ENOSPC
    assert not list(disk.iterdir())


def test_an_error_that_is_not_of_the_disk_is_left_alone(tmp_path):
    with pytest.raises(RuntimeError, match="mat1"), files.whole_file(tmp_path / "file"):
        torch.zeros(2, 3) @ torch.zeros(2, 3)
    with pytest.raises(FileNotFoundError), files.whole_file(tmp_path / "file"):
        (tmp_path / "input").read_text()


# ------------------------------------------------------------------------------------- read-only and not permitted


def test_read_only_results(disk, tokens, tmp_path, capfd, undisturbed):
    spec = spec_of(steps=4)
    whole = undisturbed(language.pretrain, spec, tokens)
    remount(disk, "ro")
    capfd.readouterr()
    assert pretrain(spec, tokens, disk / "run") == 2
    said = capfd.readouterr().err
    assert (
        f"Read-only file system: {disk / 'run'}; make the file system writable and run the same command again" in said
    )
    assert cli.main(["parameters", "--spec", "[]", "--out", str(disk / "parameters.json")]) == 2
    assert f"{disk / 'parameters.json'}" in capfd.readouterr().err
    assert pretrain(spec, tokens, tmp_path / "run", "tokens", "--log", disk / "log.txt") == 2
    said = capfd.readouterr().err
    assert f"{disk / 'log.txt'}: Read-only file system" in said
    assert "Traceback" not in said
    remount(disk, "rw,size=20m")
    assert pretrain(spec, tokens, disk / "run", "tokens", "--log", disk / "log.txt") == 0
    assert run.read_json(disk / "run" / "manifest.json")["sha256"] == whole["sha256"]


def without_privilege():
    """Arguments of subprocess for a process that permission bits bind: another user, or root without its exemption."""
    if os.getuid():
        return {}
    with contextlib.suppress(PermissionError):  # where Python itself is closed to others
        if not subprocess.run([sys.executable, "-c", "import torch"], user=65534, capture_output=True).returncode:
            return {"user": 65534, "group": 65534}
    return {"preexec_fn": lambda: [ctypes.CDLL(None).prctl(24, number, 0, 0, 0) for number in (1, 2)]}


def test_no_permission(tokens, tmp_path):
    results, home = tmp_path / "results", tmp_path / "home"
    results.mkdir(mode=0o755)
    home.mkdir()
    home.chmod(0o777)
    for folder in (*tmp_path.parents, tmp_path):
        if folder.stat().st_uid == os.getuid() and folder.is_relative_to("/tmp") and folder != Path("/tmp"):
            folder.chmod(0o755)
    readable = home / "tokens"
    shutil.copytree(tokens, readable)
    readable.chmod(0o755)
    results.chmod(0o555)
    command = [sys.executable, "-m", "masa.cli", "pretrain", "--spec", json.dumps(spec_of(steps=4))]
    command += ["--tokens", str(readable), "--out", str(results / "run")]
    environment = os.environ | {"HOME": str(home), "XDG_CACHE_HOME": str(home), "HF_HOME": str(home)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **without_privilege())
    assert done.returncode == 2, done.stderr
    assert f"Permission denied: {results / 'run'}; allow this user to write there" in done.stderr
    assert "Traceback" not in done.stderr
    results.chmod(0o777)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, **without_privilege())
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------- numbers not finite


def test_a_huge_learning_rate_names_the_step_and_the_blocks_and_keeps_the_good_checkpoint(tokens, tmp_path, capfd):
    """The rate warms up, so some steps are good; it saves after each, and none with a weight that is not finite."""
    spec = spec_of("vanilla", steps=60, learning_rate=1e30, max_grad_norm=1e30, checkpoint_minutes=1e-7)
    out = tmp_path / "run"
    assert pretrain(spec, tokens, out) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said
    step = int(said.split("step ")[1].split(",")[0])
    first = (step - 1) * 4
    order = language.PackedTokens(tokens, 32, 240, 0).order
    blocks = ", ".join(f"{b} (train-00000.bin, tokens {32 * b} to {32 * b + 31})" for b in order[first : first + 4])
    assert f"items {first} to {first + 3}: blocks {blocks}" in said
    for folder in out.glob("checkpoints/checkpoint-*"):
        assert int(folder.name[11:]) < step
        assert all_finite(folder)
    again = spec_of("vanilla", steps=6)
    assert pretrain(again, tokens, out) == 2, "the good checkpoints are not thrown away unasked"
    assert "training.learning_rate 1e+30 -> 0.005; training.max_grad_norm 1e+30 -> 1.0" in capfd.readouterr().err
    assert pretrain(again, tokens, out, "tokens", "--restart") == 0
    assert [r["step"] for r in run.read_jsonl(out / "metrics.jsonl") if "loss" in r] == list(range(1, 7))


def all_finite(folder):
    from safetensors.torch import load_file

    state = torch.load(folder / "optimizer.pt", weights_only=True)["state"].values()
    tensors = [*load_file(folder / "model.safetensors").values(), *(t for s in state for t in s.values())]
    return all(t.isfinite().all() for t in tensors)


def poisoned(digits, tmp_path, number):
    folder = tmp_path / "images"
    shutil.copytree(digits, folder)
    manifest = run.read_json(folder / "manifest.json")
    run.write_json(folder / "manifest.json", manifest | {"std": [number]})
    return folder


def test_images_normalised_to_nan(digits, tmp_path, capfd):
    spec = image_spec(checkpoint_minutes=1e-7)
    assert pretrain(spec, poisoned(digits, tmp_path, 0.0), tmp_path / "run", "images") == 2
    said = capfd.readouterr().err
    assert "digits/masa/seed0: the loss is nan at step 1, whose batch is items 0 to 15: training images " in said
    order = np.random.default_rng([0, 0]).permutation(1206)[:16]
    assert ", ".join(map(str, order)) in said
    assert not whole_checkpoints(tmp_path / "run")
    assert pretrain(spec, digits, tmp_path / "run", "images") == 0


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("fault", ["weights", "gradient", "optimiser", "update"])
def test_no_checkpoint_of_numbers_that_are_not_finite(fault, at_once, tokens, tmp_path, monkeypatch, undisturbed):
    """Weights, a gradient, Adam's state or an update made bad after step 5, in a run that saves after every step.

    Both ways of looking: at once, and remembered on the device until it is looked at.
    """
    step = trainer.Trainer.training_step

    def harm(self, model, inputs, *rest, **more):
        loss = step(self, model, inputs, *rest, **more)
        parameter = next(model.parameters())
        if self.state.global_step == 5:
            with torch.no_grad():
                if fault == "weights":
                    model.model.layers[0].mlp.c_fc.weight.fill_(float("nan"))
                if fault == "gradient":
                    parameter.grad[0, 0] = float("inf")
                if fault == "optimiser":
                    next(iter(self.optimizer.state.values()))["exp_avg_sq"].fill_(float("inf"))
                if fault == "update":
                    self.optimizer.param_groups[0]["lr"] = float("inf")
        return loss

    monkeypatch.setattr(trainer.Trainer, "training_step", harm)
    made = Watch.__init__
    monkeypatch.setattr(Watch, "__init__", lambda self, *a: made(self, *a, at_once=at_once))
    spec = spec_of("vanilla", checkpoint_minutes=1e-7)
    with pytest.raises(masa.MasaError) as raised:
        language.pretrain(spec, tokens, tmp_path / "run")
    said = str(raised.value)
    assert "step 6, whose batch is items 20 to 23: blocks " in said
    expected = {"gradient": "the gradient norm is inf", "optimiser": "the optimiser's exp_avg_sq of model."}
    assert expected.get(fault, "the weights model.") in said
    assert whole_checkpoints(tmp_path / "run") == [4, 5]
    assert all(all_finite(folder) for folder in (tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    monkeypatch.undo()
    again = language.pretrain(spec, tokens, tmp_path / "run")
    assert again["sha256"] == undisturbed(language.pretrain, spec, tokens)["sha256"]


def test_a_step_that_was_bad_long_ago_is_named_by_a_watch_that_looks_late():
    watch = Watch("r", lambda step: f"batch {step}", torch.device("cpu"), at_once=False)
    for step in range(1, 30):
        loss, norm = torch.tensor(float("nan") if step > 11 else 1.0), torch.tensor(2.0)
        watch.look(step, loss, norm if step < 15 else torch.tensor(float("inf")))
    with pytest.raises(masa.MasaError, match="r: the loss is nan at step 12, batch 12"):
        watch.check()
    watch = Watch("r", lambda step: f"batch {step}", torch.device("cpu"))
    with pytest.raises(masa.MasaError, match="r: the gradient norm is inf at step 3, batch 3"):
        watch.look(3, torch.tensor(1.0), float("inf"))
