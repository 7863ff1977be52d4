"""Where verbs write: tried before any work, and held while it goes on."""

import json
import os
import signal
import sys
import time

import pytest
from compression_models import tiny_llama
from conftest import Forked, until
from test_compression_pretrained import TEXT, tokenizer
from test_faults import disk, fill, remount, temporary_files  # noqa: F401

import masa
from masa import cli
from masa.compression import run_calibrate, run_compress
from masa.compression.calibration import collect
from masa.compression.calibration.statistics import Calibration
from masa.runs import hold, outputs, run
from masa.runs.files import whole_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return written_model(tmp_path_factory.mktemp("model"))


def written_model(folder):
    """A tiny Llama in a folder, with its tokenizer and some text beside it."""
    tiny_llama().save_pretrained(folder / "llama")
    tokenizer().save_pretrained(folder / "llama")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT))
    (folder / "other.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXT[2:]))
    return folder


def calibrate(model, out, *more, text="text.jsonl", samples=8):
    words = ["calibrate", model / "llama", "--text", model / text, "--samples", samples, "--length", 16]
    return [*map(str, [*words, "--threads", 1, "--out", out, *more])]


def compress(model, out, *more):
    words = ["compress", model / "llama", "--method", "svd", "--threads", 1, "--out", out, *more]
    return [*map(str, words)]


def never(monkeypatch):
    """Make loading a model a failure: what is refused is refused before it."""

    def load(*_, **__):
        pytest.fail("work has begun")

    for module in (collect, sys.modules["masa.compression.run"]):
        monkeypatch.setattr(module, "load_pretrained", load)


# ------------------------------------------------------------------------------------------------------ tried before


def a_file(folder):
    (folder / "file").write_text("mine")
    return folder / "file", "is a file; name a folder"


def below_a_file(folder):
    (folder / "file").write_text("mine")
    return folder / "file" / "a" / "b", f"{folder / 'file'} is no folder, so that nothing can be made in it"


def link_to_itself(folder):
    (folder / "link").symlink_to(folder / "link")
    return folder / "link", "is a link that leads to itself"


def below_a_link_to_nowhere(folder):
    (folder / "link").symlink_to(folder / "nowhere")
    return folder / "link" / "a", f"{folder / 'link'} is no folder"


@pytest.mark.parametrize("verb", [calibrate, compress])
@pytest.mark.parametrize("make", [a_file, below_a_file, link_to_itself, below_a_link_to_nowhere])
def test_an_output_that_cannot_be_is_refused_before_any_work(make, verb, model, tmp_path, monkeypatch, capfd):
    never(monkeypatch)
    out, said = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert cli.main(verb(model, out)) == 2
    line = capfd.readouterr().err
    assert said in line and str(out) in line and line.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert not (tmp_path / "file").exists() or (tmp_path / "file").read_text() == "mine"


def test_every_verb_that_writes_says_where_and_is_tried_and_held():
    """A new verb with --out must add it by add_out, which is what is tried and held."""
    verbs = next(a for a in cli.make_parser()._actions if isinstance(a.choices, dict)).choices
    writing = {name: verb for name, verb in verbs.items() if "--out" in verb._option_string_actions}
    assert {
        "pretrain",
        "train-vit",
        "calibrate",
        "compress",
        "quantize",
        "heal",
        "sweep",
        "export",
        "evaluate",
        "tokenize",
    } <= set(writing)
    locks = {name: verb.get_default("out_lock") for name, verb in writing.items()}
    own = {"pretrain", "train-vit", "sweep", "calibrate", "tables", "figures", "report"}  # their work takes it
    assert {name for name, lock in locks.items() if lock is None} == own
    for name, verb in writing.items():
        assert "--no-wait" in verb._option_string_actions, name
        assert verb.get_default("out_is_folder") in (True, False), name


@pytest.mark.parametrize(
    "words",
    [
        ["tokenizer", "--spec", "{}"],
        ["tokenize", "--spec", "{}", "--tokenizer", "x", "--tokens", "9"],
        ["fetch", "--spec", "{}"],
        ["images", "digits"],
        ["boxes", "shapes"],
        ["pretrained", "SmolLM2-135M"],
        ["evaluate", "x"],
        ["quantize", "x"],
        ["heal", "x", "--original", "x", "--text", "x"],
        ["export", "x"],
        ["sweep", "a/b", "--model", "x", "--texts", "x", "--benchmarks", "x"],
        ["pretrain", "--run", "nano/vanilla/seed0", "--tokens", "x"],
        ["tables", "table1"],
        ["tensorboard"],
    ],
    ids=lambda words: words[0],
)
def test_a_file_in_the_place_of_a_folder_is_said_by_every_verb(words, tmp_path, capfd):
    out, said = a_file(tmp_path)
    assert cli.main([*words, "--out", str(out)]) == 2
    assert f"--out {out} {said}" in capfd.readouterr().err
    assert out.read_text() == "mine"


@pytest.mark.parametrize(
    "words", [["throughput", "--scale", "nano"], ["parameters"], ["text", "x"], ["report"]], ids=lambda words: words[0]
)
def test_a_folder_in_the_place_of_a_file_is_said_by_every_verb(words, tmp_path, capfd):
    assert cli.main([*words, "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is a directory; name a file in it" in capfd.readouterr().err


@pytest.mark.parametrize("verb", [calibrate, compress])
def test_a_read_only_or_full_disk_is_said_before_any_work(verb, disk, model, monkeypatch, capfd):  # noqa: F811
    never(monkeypatch)
    fill(disk)
    assert cli.main(verb(model, disk / "out")) == 2
    assert f"No space left on device: {disk / 'out'}; free space and run the same" in capfd.readouterr().err
    (disk / "filler").unlink()
    remount(disk, "ro")
    assert cli.main(verb(model, disk / "out")) == 2
    assert f"Read-only file system: {disk / 'out'}; make the file system writable" in capfd.readouterr().err


def test_an_output_that_is_what_is_read_is_refused(model, tmp_path, monkeypatch, capfd):
    never(monkeypatch)
    (tmp_path / "link").symlink_to(model / "llama")
    before = sorted((p.name, p.stat().st_mtime_ns) for p in (model / "llama").iterdir())
    for out in (model / "llama", tmp_path / "link"):
        for verb in (calibrate, compress):
            assert cli.main(verb(model, out)) == 2
            assert f"--out {out} is what is read (model)" in capfd.readouterr().err
    assert sorted((p.name, p.stat().st_mtime_ns) for p in (model / "llama").iterdir()) == before


def test_an_output_that_a_spec_reads_is_refused(model, tmp_path, capfd):
    """A corpus in the place of its own excerpt, a tokenizer in the place of that which it is made of."""
    import shutil

    corpus, words = tmp_path / "corpus.jsonl", tmp_path / "llama"
    shutil.copy(model / "text.jsonl", corpus)
    shutil.copytree(model / "llama", words)
    of_corpus = {"source": f"file:{tmp_path}/*.jsonl", "reader": "json", "validation_fraction": 0.5}
    text = {"text": of_corpus | {"documents": 2, "split": "train"}}
    made = {
        "corpus": of_corpus | {"shuffle_buffer": 1, "validation_tokens": 10},
        "tokenizer": {"source": f"file:{words}", "vocab_size": 300},
    }
    where = {"cache": str(tmp_path / "cache"), "mirror": None}
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for verb, spec, out, read in (
        (["text", "x"], text, corpus, of_corpus["source"]),
        (["tokenizer"], {"data": made}, words, f"file:{words}"),
        (["images"], {"data": {"name": "cifar10", "source": f"file:{words}"}}, words, f"file:{words}"),
    ):
        assert cli.main([*verb, "--spec", json.dumps(spec | where), "--out", str(out)]) == 2
        said = capfd.readouterr().err
        assert f"--out {out} is what is read ({read}): it would be overwritten" in said, said
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_what_is_read_is_not_replaced_with_the_folder_around_it(model, tmp_path, capfd):
    """An earlier output may be replaced, but not with the model in it."""
    import shutil

    assert cli.main(compress(model, tmp_path / "out")) == 0
    shutil.copytree(model / "llama", tmp_path / "out" / "llama")
    assert cli.main(compress(tmp_path / "out", tmp_path / "out")) == 2
    assert "(model) lies in it" in capfd.readouterr().err
    assert (tmp_path / "out" / "llama" / "config.json").is_file()


@pytest.mark.parametrize("there", ["nothing", "an empty folder", "an earlier output"])
def test_a_link_is_what_it_leads_to(there, model, tmp_path):
    target, link = tmp_path / "big-disk" / "smaller", tmp_path / "smaller"
    target.parent.mkdir()
    link.symlink_to(target)
    if there == "an empty folder":
        target.mkdir()
    if there == "an earlier output":
        assert cli.main(compress(model, target)) == 0
        (target / "compression.json").write_text("{}")
    assert cli.main(compress(model, link)) == 0
    assert link.is_symlink() and target.is_dir()
    assert run.read_json(target / "compression.json")["method"] == "svd"
    assert masa.load(link) is not None
    assert {path.name for path in tmp_path.iterdir()} == {"big-disk", "smaller"}
    assert [path.name for path in target.parent.iterdir()] == ["smaller"], "no lock is left beside it"


def test_a_link_is_what_it_leads_to_for_the_library_too(model, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    run_compress(str(model / "llama"), tmp_path / "link", "svd", quiet=True)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target" / "compression.json").is_file()
    with whole_folder(tmp_path / "link") as folder:
        (folder / "new").touch()
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["new"]
    assert outputs.resolved(tmp_path / "plain") == tmp_path / "plain"


# ---------------------------------------------------------------------------------------------------------- full disks


def test_a_disk_that_fills_up_in_calibration(disk, model, tmp_path, capfd):  # noqa: F811
    """Wherever it is full, the file is named and nothing half-written is left; the same command mends it."""
    whole = run_calibrate(str(model / "llama"), tmp_path / "whole", model / "text.jsonl", samples=8, length=16)
    seen = set()
    for room in (8, 24, 60, 90):
        filler = fill(disk, but=room * 1024)
        capfd.readouterr()
        assert cli.main(calibrate(model, disk / "out")) == 2
        said = capfd.readouterr().err
        assert f"No space left on device: {disk / 'out'}/" in said and "free space and run the same command" in said
        assert "Traceback" not in said
        seen.add(said.partition("device: ")[2].partition(";")[0])
        assert not (disk / "out" / "calibration.json").exists() and not temporary_files(disk)
        filler.unlink()
    assert len(seen) > 1, seen
    remount(disk, "size=20m")
    assert cli.main(calibrate(model, disk / "out")) == 0
    assert Calibration.load(disk / "out").digest() == Calibration.load(tmp_path / "whole").digest()
    assert whole["tokens_sha256"] == Calibration.load(disk / "out").tokens_sha256


def test_a_disk_that_fills_up_in_compress_and_export(disk, model, tmp_path, capfd):  # noqa: F811
    filler = fill(disk, but=64 * 1024)
    assert cli.main(compress(model, disk / "out")) == 2
    said = capfd.readouterr().err
    assert f"No space left on device: {disk / 'out'}" in said and "Traceback" not in said
    assert {path.name for path in disk.iterdir()} == {"filler"}
    assert cli.main(compress(model, tmp_path / "smaller")) == 0
    assert cli.main(["export", str(tmp_path / "smaller"), "--out", str(disk / "plain")]) == 2
    said = capfd.readouterr().err
    assert f"No space left on device: {disk / 'plain'}" in said and "Traceback" not in said
    assert {path.name for path in disk.iterdir()} == {"filler"}
    filler.unlink()
    assert cli.main(compress(model, disk / "out")) == 0


# --------------------------------------------------------------------------------------------------------------- locks


def slow(monkeypatch, go):
    """Calibration in processes that are forked from here waits for a file in its midst."""
    real = collect.calibrate

    def waiting(*args, **named):
        until(go.exists)
        return real(*args, **named)

    monkeypatch.setattr(collect, "calibrate", waiting)


def test_an_orphan_does_not_overwrite_the_statistics_that_came_after_it(model, tmp_path, monkeypatch):
    """Its workflow was killed; the next one asks for other samples, and waits for it."""
    out, go = tmp_path / "statistics", tmp_path / "go"
    slow(monkeypatch, go)
    orphan = Forked(lambda: cli.main(calibrate(model, out, samples=4)), tmp_path / "orphan.txt")
    until(lambda: (out / "tokens.safetensors").is_file(), process=orphan)
    refused = Forked(lambda: cli.main(calibrate(model, out, "--no-wait")), tmp_path / "refused.txt")
    assert refused.wait() == 2
    assert f"{out} is being written by process {orphan.pid} on {os.uname().nodename}" in refused.said
    second = Forked(lambda: cli.main(calibrate(model, out, samples=8)), tmp_path / "second.txt")
    until(lambda: "waiting for it" in second.said, process=second)
    go.touch()
    assert (orphan.wait(), second.wait()) == (0, 0), orphan.said + second.said
    found = Calibration.load(out)
    alone = run_calibrate(str(model / "llama"), tmp_path / "alone", model / "text.jsonl", samples=8, length=16)
    assert (found.samples, found.tokens_sha256) == (8, alone["tokens_sha256"])
    assert found.digest() == Calibration.load(tmp_path / "alone").digest()
    assert all((found.gram("q", i) == Calibration.load(tmp_path / "alone").gram("q", i)).all() for i in range(6))
    assert not (out / ".lock").exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_orphan_that_dies_lets_go(number, model, tmp_path, monkeypatch):
    out, go = tmp_path / "statistics", tmp_path / "go"
    slow(monkeypatch, go)
    orphan = Forked(lambda: cli.main(calibrate(model, out, samples=4)), tmp_path / "orphan.txt")
    until(lambda: (out / "tokens.safetensors").is_file(), process=orphan)
    orphan.send(number)
    orphan.wait()
    go.touch()
    assert cli.main(calibrate(model, out, "--no-wait")) == 0
    assert Calibration.load(out).samples == 8


def test_a_verb_waits_for_another_that_writes_the_same_folder(model, tmp_path):
    """Whole folders are held beside themselves: the lock is no part of what is handed on."""
    out = tmp_path / "smaller"
    with hold.exclusive(out, beside=True):
        second = Forked(lambda: cli.main(compress(model, out)), tmp_path / "second.txt")
        until(lambda: "waiting for it" in second.said, process=second)
        assert not out.exists()
    assert second.wait() == 0, second.said
    assert (out / "compression.json").is_file() and not list(out.glob(".*")) and not list(tmp_path.glob(".*"))
    with hold.exclusive(tmp_path / "t.json", beside=True):
        assert cli.main(["parameters", "--spec", "[]", "--no-wait", "--out", str(tmp_path / "t.json")]) == 2
    assert cli.main(["parameters", "--spec", "[]", "--no-wait", "--out", str(tmp_path / "t.json")]) == 0
    assert not list(tmp_path.glob(".*"))


def test_bad_input_leaves_no_folder_behind(model, tmp_path, capfd):
    out = tmp_path / "a" / "b"
    assert cli.main(calibrate(model, out, samples=10**6)) == 2
    assert cli.main(["tokenizer", "--spec", "{", "--out", str(out)]) == 2
    assert cli.main(["evaluate", str(tmp_path / "none"), "--out", str(out)]) == 2
    assert not (tmp_path / "a").exists()
    (tmp_path / "a").mkdir()
    assert cli.main(calibrate(model, out, samples=10**6)) == 2
    assert list((tmp_path / "a").iterdir()) == []


def test_many_processes_hold_one_folder_that_comes_and_goes(tmp_path):
    """Each holds it alone: no two are ever in it at once, although it is made and removed again and again."""
    out, log = tmp_path / "out", tmp_path / "log"

    def work():
        for _ in range(60):
            with hold.exclusive(out, wait=True):
                with log.open("a") as file:
                    file.write("in\n")
                time.sleep(0.0005)
                with log.open("a") as file:
                    file.write("out\n")

    hold_poll, hold.POLL = hold.POLL, 0.001
    try:
        workers = [Forked(work, tmp_path / f"{i}.txt") for i in range(4)]
        assert [worker.wait() for worker in workers] == [0] * 4, [worker.said[-500:] for worker in workers]
    finally:
        hold.POLL = hold_poll
    assert log.read_text().split() == ["in", "out"] * 240
    with hold.exclusive(out, keep=False):
        pass
    assert not (out / ".lock").exists()
