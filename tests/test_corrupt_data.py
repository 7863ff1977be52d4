"""Every kind of damage made for real: the file is named, the message says how to mend it, and mending works."""

import contextlib
import gzip
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from compression_models import tiny_llama
from conftest import ROOT
from servers import closed_port, package_index, refusing, served, wheel
from test_compression_calibration import statistics
from test_compression_pretrained import tokenizer
from test_image_training import spec_of as image_spec
from test_report import evaluation
from test_text import corpus, read
from test_training import spec_of

import masa
from masa import cli
from masa.compression import Calibration
from masa.data import benchmarks, boxed_images, boxes, documents, images, pixels, sources, tokenize
from masa.models.pretrained import load_pretrained
from masa.runs import files, run
from masa.training import images as image_training
from masa.training import language


def flip(path, at, bit=1):
    """Change one byte; the size stays."""
    data = bytearray(path.read_bytes())
    data[at] ^= bit
    path.write_bytes(data)


def cut(path, keep=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def copy_of(folder, target):
    shutil.copytree(folder, target)
    return target


# ------------------------------------------------------------------------------------------------------ downloads


@pytest.mark.parametrize("told", [True, False], ids=["length told", "length not told"])
def test_a_download_that_ends_in_its_middle(told, tmp_path, monkeypatch):
    file, data = wheel()
    source = sources.parse("pypi:toy==1.0")
    with package_index("toy", file, data) as (url, state):
        state["told"] = told
        for key, value in {
            "INDEX_URL": f"{url}/simple",
            "RESUME_RETRIES": "0",
            "RETRIES": "0",
            "NO_CACHE_DIR": "1",
        }.items():
            monkeypatch.setenv(f"PIP_{key}", value)
        with pytest.raises(masa.MasaError, match=r"pypi:toy==1\.0 could not be downloaded with pip: .*run again"):
            sources.fetch_wheel(source, None, tmp_path)
        assert state["downloads"]
        assert not [p for p in tmp_path.rglob("*") if p.is_file()], "nothing is kept"
        state["cut"] = False
        assert sources.fetch_wheel(source, None, tmp_path).read_bytes() == data


@pytest.mark.parametrize("known", [True, False], ids=["sha256 configured", "no sha256"])
@pytest.mark.parametrize("damage", [cut, lambda p: flip(p, 4000)], ids=["cut", "one bit"])
def test_a_damaged_wheel_in_the_cache_is_named_removed_and_fetched_again(known, damage, tmp_path, monkeypatch):
    import hashlib

    file, data = wheel()
    sha256 = hashlib.sha256(data).hexdigest() if known else None
    source, kept = sources.parse("pypi:toy==1.0"), tmp_path / "pypi" / "toy-1.0" / file
    kept.parent.mkdir(parents=True)
    kept.write_bytes(data)
    assert sources.fetch_wheel(source, sha256, tmp_path) == kept
    damage(kept)
    with pytest.raises(masa.MasaError, match=rf"{file}.*(expected {sha256}|cut short or corrupt).* removed; run again"):
        sources.fetch_wheel(source, sha256, tmp_path)
    assert not kept.exists()
    with package_index("toy", file, data) as (url, state):
        state["cut"] = False
        monkeypatch.setenv("PIP_INDEX_URL", f"{url}/simple")
        monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
        assert sources.fetch_wheel(source, sha256, tmp_path).read_bytes() == data


VERBS = """
import contextlib, io, json, multiprocessing, sys, time
import datasets, masa.models.pretrained  # once, for all
from masa import cli

def call(arguments):
    said, started = io.StringIO(), time.monotonic()
    with contextlib.redirect_stderr(said):
        status = cli.main(arguments)
    return [status, said.getvalue(), time.monotonic() - started]

calls = json.loads(sys.argv[1])
with multiprocessing.get_context("fork").Pool(len(calls)) as pool:
    for found in pool.map(call, calls, chunksize=1):
        print(json.dumps(found))
"""


def hub(url, folder, *calls):
    """Verbs with a hub of ours and an empty cache: (status, what was said, seconds) each.

    Each in a process of its own, and all at once, since most of the time they wait to try again.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("MASA_MIRROR", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": url, "HF_HOME": str(folder / "hf"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", VERBS, json.dumps(calls)]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]


HUB = f"hub:org/name@{'0' * 40}"
PLACES = {"cache": "cache", "mirror": None}
FROM_THE_HUB = {
    "text": ("text", "t", {"text": {"source": HUB, "reader": "hub", "split": "all"}}),
    "tokenizer": ("tokenizer", None, {"data": {"corpus": corpus("x"), "tokenizer": {"source": HUB, "vocab_size": 9}}}),
    "pretrained": ("pretrained", "m", {"model": {"source": HUB}}),
    "images": ("images", None, {"data": {"name": "cifar10", "source": HUB}}),
    "boxes": ("boxes", None, {"data": {"name": "coco", "image_size": 32, "source": HUB}}),
}


@pytest.mark.parametrize("answer", ["closed", 401, 403, 404, 500])
def test_a_hub_that_is_not_there_or_refuses(answer, tmp_path):
    verbs = {
        verb: [verb, *([name] if name else []), "--spec", json.dumps(spec | PLACES), "--out", str(tmp_path / verb)]
        for verb, name, spec in FROM_THE_HUB.values()
        if not (verb == "text" and answer == 500)  # streaming tries again for half a minute: shown with the closed port
    }
    with contextlib.ExitStack() as stack:
        url = closed_port() if answer == "closed" else stack.enter_context(served(refusing(answer)))
        found = dict(zip(verbs, hub(url, tmp_path, *verbs.values()), strict=True))
    for verb, (status, said, seconds) in found.items():
        assert status == 2, (verb, said)
        assert all(word in said for word in (HUB, "MASA_MIRROR", "hf auth login")), (verb, said)
        assert "Traceback" not in said
        assert seconds < 90
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and "hf" not in p.relative_to(tmp_path).parts]


def test_benchmarks_that_the_hub_refuses_are_recorded_as_unavailable(tmp_path):
    spec = {"tasks": ["piqa"], "sources": ["hub"]} | PLACES
    with served(refusing(403)) as url:
        found = hub(url, tmp_path, ["fetch", "--spec", json.dumps(spec), "--out", str(tmp_path / "b")])
    assert found[0][0] == 0
    assert "could not be reached" in run.read_json(tmp_path / "b" / "manifest.json")["piqa"]["unavailable"]


def test_a_folder_of_the_same_name_is_never_taken_for_the_hub(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "org" / "name" / "a.jsonl").write_text('{"content": "not from the hub"}\n')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(masa.MasaError, match="folder org/name here would be read in its place"):
        read(corpus("", source=HUB, reader="hub"))


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.fixture
def model(tmp_path):
    """A pretrained model in shards, with its tokenizer."""
    tiny_llama(tie_word_embeddings=False).save_pretrained(tmp_path / "model", max_shard_size="50KB")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def header(path):
    return int.from_bytes(path.read_bytes()[:8], "little")


WEIGHTS = {
    "truncated": cut,
    "empty": lambda p: p.write_bytes(b""),
    "header of another length": lambda p: flip(p, 3, 0xFF),
    "no header": lambda p: p.write_bytes(p.read_bytes()[:8] + b"x" * (p.stat().st_size - 8)),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_damaged_shard_of_a_pretrained_model(name, model):
    shard = sorted(model.glob("*.safetensors"))[1]
    WEIGHTS[name](shard)
    with pytest.raises(masa.MasaError, match=rf"{shard.name} is corrupt or truncated.*fetch it again"):
        load_pretrained(model)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_damaged_factored_checkpoint(name, tmp_path):
    model = masa.share(tiny_llama(attention_bias=False), {"method": "masa"})
    masa.save(model, tmp_path)
    WEIGHTS[name](tmp_path / "model.safetensors")
    with pytest.raises(masa.MasaError, match=r"model\.safetensors is corrupt or truncated.*again"):
        masa.load(tmp_path)


def test_every_single_flipped_bit_of_a_header_is_noticed_or_harmless(tmp_path):
    """Whatever a flip turns the header into, it is a message; never another exception, never other numbers."""
    model = masa.share(tiny_llama(attention_bias=False, num_hidden_layers=2), {"method": "sequential", "sets": 1})
    masa.save(model, tmp_path)
    path = tmp_path / "model.safetensors"
    whole, reference = path.read_bytes(), masa.load(tmp_path).state_dict()
    noticed = 0
    for at in range(8, 8 + header(path), 29):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            found = masa.load(tmp_path).state_dict()
        except masa.MasaError as error:
            assert "model.safetensors" in str(error)
            noticed += 1
        else:
            assert all(torch.equal(t, reference[k]) for k, t in found.items())
    assert noticed > 10
    path.write_bytes(whole)
    masa.load(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors.index.json", "{oops", r"index\.json is not valid JSON"),
        ("model.safetensors.index.json", "[]", r"index\.json is no index"),
        ("model.safetensors.index.json", '{"weight_map": {"a": "../x.safetensors"}}', r"index\.json is no index"),
        ("config.json", "{oops", r"config\.json does not describe"),
        ("config.json", '{"model_type": "llama", "num_hidden_layers": "x"}', r"config\.json does not describe"),
        ("tokenizer.json", "{oops", r"No tokenizer could be read from .*model"),
        ("tokenizer.json", '{"version": "1.0"}', r"No tokenizer could be read from .*model"),
    ],
)
def test_damaged_settings_of_a_pretrained_model(file, content, message, model):
    (model / file).write_text(content)
    with pytest.raises(masa.MasaError, match=message):
        load_pretrained(model)


def test_a_pretrained_model_that_changed_since_it_was_fetched(model, tmp_path, capsys):
    spec = {"model": {"source": f"file:{model}"}, "cache": str(tmp_path / "c"), "mirror": None}
    fetch = ["pretrained", "m", "--spec", json.dumps(spec), "--out", str(tmp_path / "out")]
    assert cli.main(fetch) == 0
    load_pretrained(tmp_path / "out")
    shard = sorted(model.glob("*.safetensors"))[0]
    flip(shard, -5)
    with pytest.raises(masa.MasaError, match=rf"{shard.name} is corrupt: sha256 .* run `masa pretrained` again"):
        load_pretrained(tmp_path / "out")
    for content in ("{oops", "{}", "[]"):
        (tmp_path / "out" / "manifest.json").write_text(content)
        with pytest.raises(masa.MasaError, match=r"out/manifest\.json .*`masa pretrained`"):
            load_pretrained(tmp_path / "out")
    assert cli.main(fetch) == 0
    load_pretrained(tmp_path / "out")


# ------------------------------------------------------------------------------------------------------------ texts


def parquet(path, rows=4000, **more):
    table = pyarrow.table({"content": [f"row {i}: " + "the quick brown fox " * 5 for i in range(rows)]})
    pyarrow.parquet.write_table(table, path, row_group_size=1000, use_dictionary=False, **more)


@pytest.mark.parametrize("compression", ["snappy", "none"])
def test_a_damaged_page_in_the_middle_of_parquet(compression, tmp_path):
    path = tmp_path / "a.parquet"
    parquet(path, compression=compression, write_page_checksum=True)
    with pyarrow.parquet.ParquetFile(path) as file:
        column = file.metadata.row_group(2).column(0)
        middle = column.data_page_offset + column.total_compressed_size // 2
    flip(path, middle, 0xFF)
    with pytest.raises(masa.MasaError, match=r"a\.parquet is corrupt .*after row 2000 in row group 2 .*get it again"):
        read(corpus(path, reader="parquet"))
    cut(path, 0.9)
    with pytest.raises(masa.MasaError, match=r"a\.parquet is corrupt or not Parquet"):
        read(corpus(path, reader="parquet"))
    parquet(path)
    assert len(read(corpus(path, reader="parquet"))) + len(read(corpus(path, reader="parquet"), "validation")) == 4000


def test_parquet_whose_text_is_no_text(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"content": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(masa.MasaError, match=r"a\.parquet, row 1: 'content' is int, expected text"):
        read(corpus(tmp_path / "a.parquet", reader="parquet"))


@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_a_damaged_arrow_stream_in_a_wheel(damage, tmp_path):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, pyarrow.schema({"text": pyarrow.string()})) as writer:
        for batch in range(4):
            writer.write(pyarrow.record_batch({"text": [f"{batch}-{i} " + "word " * 20 for i in range(50)]}))
    whole = sink.getvalue().to_pybytes()
    middle = len(whole) * 5 // 8
    broken = whole[:middle] if damage == "cut" else whole[:middle] + b"\xff" * (len(whole) - middle)
    source = sources.parse("pypi:toy==1.0")
    for content, good in ((broken, False), (whole, True)):
        file, data = wheel(members={"toy/a.arrow": content})
        kept = tmp_path / "pypi" / "toy-1.0" / file
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_bytes(data)
        stream = documents.read_arrow(source, {"member": "toy/a.arrow"}, tmp_path, None)
        if good:
            assert len(list(stream)) == 200
        else:
            with pytest.raises(masa.MasaError, match=r"whl: toy/a\.arrow is corrupt .* after row \d+ in batch [23]"):
                list(stream)


def test_gzip_that_ends_in_its_middle_tells_the_line(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    generator = np.random.default_rng(0)  # of which gzip makes little
    rows = [json.dumps({"content": generator.bytes(100).hex()}) for _ in range(300)]
    path.write_bytes(gzip.compress("\n".join(rows).encode()))
    cut(path)
    with pytest.raises(masa.MasaError, match=r"a\.jsonl\.gz is corrupt or truncated after line 1\d\d "):
        read(corpus(path))
    flip(path, 5000, 0xFF)
    with pytest.raises(masa.MasaError, match=r"a\.jsonl\.gz.* line \d+"):
        read(corpus(path))


def test_several_local_files_with_another_checksum(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name)
    spec = corpus(tmp_path / "*.txt", reader="text", sha256="0" * 64)
    with pytest.raises(masa.MasaError, match=r"expected 0000.*Get the files again .*a\.txt"):
        read(spec)


# -------------------------------------------------------------------------------------------- tokens, images, boxes


@pytest.mark.parametrize("name", ["train-00000.bin", "validation.bin"])
def test_a_token_file_with_other_bytes_is_noticed_before_training(name, tokens, tmp_path):
    folder = copy_of(tokens, tmp_path / "tokens")
    flip(folder / name, 101)
    with pytest.raises(masa.MasaError, match=rf"{name} is corrupt: sha256 .* make it anew with `masa tokenize`"):
        language.pretrain(spec_of(steps=2), folder, tmp_path / "run")
    assert not (tmp_path / "run" / "manifest.json").exists()
    shutil.copy(tokens / name, folder / name)
    assert language.pretrain(spec_of(steps=2), folder, tmp_path / "run")


def test_above_a_gibibyte_sizes_alone_are_checked_and_this_is_said(tokens, tmp_path, monkeypatch, capsys):
    folder = copy_of(tokens, tmp_path / "tokens")
    monkeypatch.setattr(files, "VERIFIED", 1000)
    language.pretrain(spec_of(steps=2), folder, tmp_path / "run")
    assert "checked by size alone" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["{oops", "[]", "{}", '{"train": {"shards": [{"name": "../x", "tokens": 1}]}}'])
def test_a_damaged_manifest_of_tokens(content, tokens, tmp_path):
    folder = copy_of(tokens, tmp_path / "tokens")
    (folder / "manifest.json").write_text(content)
    with pytest.raises(masa.MasaError, match=r"tokens/manifest\.json .*`masa tokenize`"):
        language.pretrain(spec_of(steps=2), folder, tmp_path / "run")


def test_a_shard_that_was_damaged_while_tokenizing_stood_still(tmp_path, monkeypatch):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"content": f"document {i} of some words"}) + "\n" for i in range(400)))
    data = {"corpus": corpus(path), "tokenizer": {"source": "train", "vocab_size": 280, "training_bytes": 5000}}
    tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    monkeypatch.setattr(tokenize, "SHARD", 700)
    wanted = tokenize.tokenize(data, tmp_path / "tok", None, None, 2000, tmp_path / "tokens")
    shards = wanted["train"]["shards"]
    for damage in ("bytes", "state"):
        (tmp_path / "tokens" / "manifest.json").unlink()
        state = {"identity": None, "documents": 0, "rest": [], "shards": shards[:2]}
        run.write_json(tmp_path / "tokens" / "state.json", state)
        if damage == "bytes":
            flip(tmp_path / "tokens" / "train-00000.bin", 7)
        else:
            (tmp_path / "tokens" / "state.json").write_text('{"shards": 3')
        assert tokenize.tokenize(data, tmp_path / "tok", None, None, 2000, tmp_path / "tokens") == wanted


def test_a_damaged_tokenizer(tmp_path):
    tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": 3}')
    with pytest.raises(masa.MasaError, match=r"tokenizer\.json .*make it anew with `masa tokenizer`"):
        tokenize.load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["train.bin", "train-labels.bin", "validation.bin"])
def test_a_pixel_file_with_other_bytes(name, digits, tmp_path):
    folder = copy_of(digits, tmp_path / "digits")
    flip(folder / name, 100)
    with pytest.raises(masa.MasaError, match=rf"{name} is corrupt: sha256 .*`masa images`"):
        image_training.pretrain(image_spec(), folder, tmp_path / "run")
    images.prepare({"name": "digits"}, tmp_path / "cache", None, folder)
    assert len(pixels.ImageSplit(folder, "train"))


@pytest.mark.parametrize("part", ["", "-images", "-boxes"])
def test_a_box_file_with_other_bytes(part, tmp_path):
    spec = {"name": "shapes", "image_size": 32, "count": 12, "test_count": 3, "max_boxes": 2, "seed": 0}
    boxes.prepare(spec, tmp_path, None, tmp_path / "shapes")
    boxed_images.BoxSplit(tmp_path / "shapes", "train")
    flip(tmp_path / "shapes" / f"train{part}.bin", 20)
    with pytest.raises(masa.MasaError, match=rf"train{part}\.bin is corrupt: sha256 .*`masa boxes`"):
        boxed_images.BoxSplit(tmp_path / "shapes", "train")
    boxes.prepare(spec, tmp_path, None, tmp_path / "shapes")
    boxed_images.BoxSplit(tmp_path / "shapes", "train")


def test_a_missing_part_of_an_image_data_set(mirror, tmp_path):
    folder = tmp_path / "cifar10"
    folder.mkdir()
    files = sorted((sources.Path(mirror) / "cifar10").rglob("test*.parquet"))
    (folder / "train-00000-of-00002.parquet").symlink_to(files[0])
    (folder / "test-00000-of-00001.parquet").symlink_to(files[0])
    with pytest.raises(masa.MasaError, match=r"of the 2 files train-\*-of-00002 number 1 is missing.*again"):
        images.prepare({"name": "cifar10", "source": f"file:{folder}"}, tmp_path, None, tmp_path / "out")


# ------------------------------------------------------------------------------ statistics, evaluations, benchmarks


def test_damaged_calibration_statistics(tmp_path):
    statistics().save(tmp_path / "s")
    for name, layer in (("layer-001.safetensors", 1), ("gradients-002.safetensors", 2)):
        folder = copy_of(tmp_path / "s", tmp_path / name)
        flip(folder / name, -3)
        found = Calibration.load(folder)
        found.gram("q", 0)
        with pytest.raises(masa.MasaError, match=rf"{name} is corrupt .*`masa calibrate`"):
            found.gram("q", layer) if layer == 1 else found.gradient_gram("q", layer)
    for content in ("{oops", "[]", '{"format": 1}'):
        (folder / "calibration.json").write_text(content)
        with pytest.raises(masa.MasaError, match=r"calibration\.json is not a calibration.*`masa calibrate`"):
            Calibration.load(folder)
    (tmp_path / "s" / "tokens.safetensors").write_bytes(b"oops")
    from masa.compression.calibration.texts import load_tokens

    with pytest.raises(masa.MasaError, match=r"tokens\.safetensors is corrupt.*`masa calibrate`"):
        load_tokens(tmp_path / "s")


@pytest.mark.parametrize("content", ["{oops", "[]", "{}", '{"parameters": {"total": 1}}', b"\xff\xfe"])
def test_a_damaged_evaluation_that_a_table_reads(content, tmp_path, capsys):
    path = tmp_path / "evaluations" / "nano" / "vanilla" / "seed0" / "metrics.json"
    run.write_json(path, evaluation(3.0, 0.5))
    table = ["tables", "runs", "--spec", '["nano/vanilla/seed0"]', "--results", str(tmp_path), "--out", str(tmp_path)]
    assert cli.main(table) == 0
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert cli.main(table) == 2
    said = capsys.readouterr().err
    assert str(path) in said
    assert "`masa evaluate` or `masa sweep`" in said


def test_a_model_that_changed_since_its_run_was_finished(tokens, tmp_path):
    from masa.evaluation import analysis

    manifest = language.pretrain(spec_of(steps=2), tokens, tmp_path / "run")
    analysis.read_run(tmp_path / "run", manifest, tmp_path / "out")
    flip(tmp_path / "run" / "model" / "model.safetensors", -3)
    with pytest.raises(masa.MasaError, match=r"model\.safetensors is corrupt: sha256 .*`masa pretrain`"):
        analysis.read_run(tmp_path / "run", manifest, tmp_path / "out")
    with pytest.raises(masa.MasaError, match=r"manifest\.json is not one of a finished run"):
        analysis.read_run(tmp_path / "run", {"parameters": {}}, tmp_path / "out")


@pytest.mark.parametrize("content", ["{oops", "[]", '{"piqa": 3}', '{"piqa": {}}'])
def test_a_damaged_manifest_of_benchmarks(content, tmp_path, capsys):
    for name in ("manifest.json", "spec.json"):
        run.write_json(tmp_path / "run" / name, spec_of())
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.json").write_text(content)
    given = ["evaluate", tmp_path / "run", "--tokens", "x", "--tokenizer", "x", "--benchmarks", tmp_path / "b"]
    assert cli.main([*map(str, given), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "b/manifest.json" in said
    assert "Traceback" not in said


def test_damaged_benchmark_data(mirror, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = copy_of(f"{mirror}/lm_eval/piqa", tmp_path / "piqa")
    data = [p for p in folder.rglob("*") if p.suffix in (".parquet", ".jsonl", ".json", ".gz")]
    for path in data:
        cut(path)
    with pytest.raises(masa.MasaError, match=rf"Task piqa: its data could not be read from {folder} .*`masa fetch`"):
        benchmarks.load_tasks({"piqa": {"source": "mirror", "path": str(folder)}})


@pytest.mark.parametrize(
    "content", ["{oops", "[]", '{"format": 1}', '{"format": 1, "spec": {}, "dense_attention": 1, "sources": [3]}']
)
def test_a_damaged_description_of_a_factored_checkpoint(content, tmp_path):
    masa.save(masa.share(tiny_llama(attention_bias=False), {"method": "masa"}), tmp_path)
    (tmp_path / "masa.json").write_text(content)
    with pytest.raises(masa.MasaError, match=r"masa\.json"):
        masa.load(tmp_path)
