"""Documents, tokenizer and token files, on real text from pip and on small files made to break."""

import gzip
import json
import re

import numpy as np
import pytest

import masa
from masa.data import documents, sources, tokenize
from masa.data import tokens as token_files
from masa.runs import files, run
from masa.study import config


def corpus(path, **more):
    return {
        "source": f"file:{path}",
        "reader": "json",
        "column": "content",
        "validation_fraction": 0.2,
        "validation_tokens": 200,
        "shuffle_buffer": 50,
    } | more


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "docs.jsonl"
    lines = [
        json.dumps({"content": f"Document {i}: " + "the quick brown fox jumps. " * (1 + i % 5)}) for i in range(200)
    ]
    path.write_text("\n".join(lines) + "\n" + lines[3] + "\n")
    return path


def read(spec, split="train", seed=0):
    return list(documents.read(spec, None, None, split, seed))


def test_no_document_is_in_both_splits_and_none_is_lost(jsonl):
    train, held_out = read(corpus(jsonl)), read(corpus(jsonl), "validation")
    assert not set(train) & set(held_out)
    assert len(train) + len(held_out) == 201
    assert 20 < len(held_out) < 60


def test_order_depends_on_the_seed_alone(jsonl):
    assert read(corpus(jsonl)) == read(corpus(jsonl))
    assert read(corpus(jsonl)) != read(corpus(jsonl), seed=1)
    assert sorted(read(corpus(jsonl))) == sorted(read(corpus(jsonl), seed=1))


def test_separate_validation_source(jsonl, tmp_path):
    other = tmp_path / "held.jsonl"
    other.write_text(json.dumps({"content": "only this"}) + "\n")
    spec = corpus(jsonl, validation_source=f"file:{other}")
    assert read(spec, "validation") == ["only this"]
    assert len(read(spec)) == 201


def test_real_api_documentation_shares_no_sentence_between_splits(cache):
    spec = config.load()["data"]["corpus"]
    train = documents.read(spec, cache, None, "train")
    held_out = documents.read(spec, cache, None, "validation")
    sentences = [
        {s for page in pages for s in re.split(r"(?<=[.!?])\s+", page) if len(s) > 40} for pages in (train, held_out)
    ]
    assert min(map(len, sentences)) > 1000
    assert not sentences[0] & sentences[1]


def test_mirror_text(mirror):
    spec = corpus("", source="mirror:text/train-00000-*.jsonl.gz", validation_source="mirror:text/validation.jsonl.gz")
    held_out = list(documents.read(spec, None, mirror, "validation"))
    assert len(held_out) == 1035
    assert next(documents.read(spec, None, mirror, "train"))
    with pytest.raises(masa.MasaError, match="MASA_MIRROR"):
        list(documents.read(spec, None, None, "train"))


def test_a_hub_data_set_is_read_from_the_mirror_where_that_has_it(tmp_path):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    (folder / "a.jsonl").write_text("".join(json.dumps({"content": f"document {i}"}) + "\n" for i in range(40)))
    spec = corpus("", source=f"hub:org/name@{'0' * 40}", reader="hub")
    texts = [
        *documents.read(spec, None, str(tmp_path), "train"),
        *documents.read(spec, None, str(tmp_path), "validation"),
    ]
    assert sorted(texts) == sorted(f"document {i}" for i in range(40))
    with pytest.raises(masa.MasaError, match=r"column 'text' does not exist"):
        list(documents.read(spec | {"column": "text"}, None, str(tmp_path), "train"))


def test_an_unreachable_hub_is_said_to_be_so(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    spec = corpus("", source=f"hub:org/none@{'0' * 40}", reader="hub")
    with pytest.raises(masa.MasaError, match=r"hub:org/none@0+ could not be read .*MASA_MIRROR"):
        list(documents.read(spec, None, str(tmp_path), "train"))


def test_parquet_and_plain_text(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"content": [f"row {i}" for i in range(30)]}).to_parquet(tmp_path / "a.parquet")
    spec = corpus(tmp_path / "*.parquet", reader="parquet")
    assert len(read(spec)) + len(read(spec, "validation")) == 30
    with pytest.raises(masa.MasaError, match=r"column 'contents' does not exist. Did you mean 'content'"):
        read(spec | {"column": "contents"})
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-40])
    with pytest.raises(masa.MasaError, match=r"b\.parquet is corrupt"):
        read(spec)
    (tmp_path / "c.txt").write_text("one\n\n\ntwo\nstill two\n\n\nthree\n")
    (tmp_path / "d.txt").write_text("four")
    spec = corpus(tmp_path / "*.txt", reader="text", validation_source=f"file:{tmp_path}/d.txt")
    assert sorted(read(spec)) == ["four", "one", "three", "two\nstill two"]


BAD = {
    "not UTF-8": (lambda p: p.write_bytes(p.read_bytes() + b'{"content": "caf\xe9"}\n'), r"line 202: not UTF-8"),
    "not JSON": (lambda p: p.write_text(p.read_text() + "{oops\n"), r"line 202: not valid JSON"),
    "no column": (lambda p: p.write_text('{"text": "a"}\n'), r"line 1: no column 'content'"),
    "no text": (lambda p: p.write_text('{"content": 3}\n'), r"'content' is int, expected text"),
    "empty": (lambda p: p.write_text(""), r"holds no document"),
    "missing": (lambda p: p.unlink(), r"no file matches"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_corpus(name, jsonl):
    change, message = BAD[name]
    change(jsonl)
    with pytest.raises(masa.MasaError, match=message):
        read(corpus(jsonl))


def test_truncated_gzip(jsonl, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(jsonl.read_bytes())[:-200])
    with pytest.raises(masa.MasaError, match=r"a\.jsonl\.gz is corrupt or truncated after line"):
        read(corpus(path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pyp:botocore==1", "Did you mean 'pypi'"),
        ("pypi:botocore", "must pin a release"),
        ("hub:a/b@main", "must pin a commit"),
        ("file:", "needs a path"),
    ],
)
def test_bad_sources(source, message):
    with pytest.raises(masa.MasaError, match=message):
        sources.parse(source)


def test_a_wheel_with_another_checksum_is_refused_and_removed(tmp_path):
    source = sources.parse("pypi:six==1.17.0")
    with pytest.raises(masa.MasaError, match="expected 0000"):
        sources.fetch_wheel(source, "0" * 64, tmp_path)
    assert not list(tmp_path.rglob("*.whl"))
    wheel = sources.fetch_wheel(source, None, tmp_path)
    assert sources.fetch_wheel(source, files.sha256_of(wheel), tmp_path) == wheel
    with pytest.raises(masa.MasaError, match="could not be downloaded with pip"):
        sources.fetch_wheel(sources.parse("pypi:six==0.0.99"), None, tmp_path)


def test_a_file_is_whole_or_absent(tmp_path):
    with pytest.raises(RuntimeError), files.whole_file(tmp_path / "x") as path:
        path.write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tokenized(jsonl, tmp_path):
    data = {
        "corpus": corpus(jsonl),
        "tokenizer": {"source": "train", "vocab_size": 280, "training_bytes": 10000},
    }
    tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    return data, tmp_path


def test_tokens_are_the_documents_in_order_with_end_marks(tokenized):
    from transformers import AutoTokenizer

    data, folder = tokenized
    manifest = tokenize.tokenize(data, folder / "tok", None, None, 1000, folder / "tokens")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tok")
    stored = np.fromfile(folder / "tokens" / "train-00000.bin", dtype=manifest["dtype"])
    expected = [i for doc in read(data["corpus"]) for i in [*tokenizer(doc)["input_ids"], tokenizer.eos_token_id]]
    assert stored.tolist() == expected[:1000]
    held_out, record = token_files.validation_tokens(folder / "tokens")
    chosen = read(data["corpus"], "validation")[: record["documents"]]
    assert tokenizer.decode(held_out).split("</s>")[:-1] == chosen
    assert record["words"] == sum(len(d.split()) for d in chosen)
    assert record["bytes"] == sum(len(d.encode()) for d in chosen)
    assert manifest["train"]["shards"][0]["sha256"] == files.sha256_of(folder / "tokens" / "train-00000.bin")


def test_shards_and_resumption_give_the_same_tokens(tokenized, monkeypatch):
    data, folder = tokenized
    tokenize.tokenize(data, folder / "tok", None, None, 3000, folder / "one")
    monkeypatch.setattr(tokenize, "SHARD", 700)
    calls = 0
    write = tokenize._write_shard

    def killed(path, ids):
        nonlocal calls
        calls += 1
        if calls == 4:  # the validation file and two shards are written, then the process dies
            raise KeyboardInterrupt
        return write(path, ids)

    monkeypatch.setattr(tokenize, "_write_shard", killed)
    with pytest.raises(KeyboardInterrupt):
        tokenize.tokenize(data, folder / "tok", None, None, 3000, folder / "many")
    before = (folder / "many" / "train-00000.bin").stat().st_mtime_ns
    monkeypatch.setattr(tokenize, "_write_shard", write)
    manifest = tokenize.tokenize(data, folder / "tok", None, None, 3000, folder / "many")
    assert (folder / "many" / "train-00000.bin").stat().st_mtime_ns == before, "whole shards are kept"
    assert [s["tokens"] for s in manifest["train"]["shards"]] == [700] * 4 + [200]
    joined = b"".join(p.read_bytes() for p in sorted((folder / "many").glob("train-*.bin")))
    assert joined == (folder / "one" / "train-00000.bin").read_bytes()
    blocks = token_files.PackedTokens(folder / "many", 64, 40, seed=3)
    reference = np.frombuffer(joined, manifest["dtype"])
    for i in (0, 7, 39):
        start = int(blocks.order[i]) * 64
        assert blocks[i]["input_ids"].tolist() == reference[start : start + 64].tolist()
    assert len(set(blocks.order.tolist())) == 40
    assert blocks.order.tolist() == token_files.PackedTokens(folder / "one", 64, 40, seed=3).order.tolist()


def test_no_tokenizer_and_no_tokens(tokenized):
    data, folder = tokenized
    with pytest.raises(masa.MasaError, match=r"nowhere holds no tokenizer\.json"):
        tokenize.tokenize(data, folder / "nowhere", None, None, 100, folder / "tokens")
    with pytest.raises(masa.MasaError, match="at least 1, got -5"):
        tokenize.tokenize(data, folder / "tok", None, None, -5, folder / "tokens")


def test_a_process_that_dies_after_its_last_shard(tokenized, monkeypatch):
    data, folder = tokenized
    monkeypatch.setattr(
        tokenize, "write_json", lambda path, what: path.name == "manifest.json" or run.write_json(path, what)
    )
    tokenize.tokenize(data, folder / "tok", None, None, 1000, folder / "tokens")
    run.write_json(folder / "tokens" / "state.json", {"gone": True})
    monkeypatch.undo()
    for tokens in (1000, 700):
        state = tokenize.tokenize(data, folder / "tok", None, None, tokens, folder / "tokens")
        assert [s["tokens"] for s in state["train"]["shards"]] == [tokens]


def test_checksum_of_local_files(jsonl):
    right = files.sha256_of(jsonl)
    assert read(corpus(jsonl, sha256=right))
    with pytest.raises(masa.MasaError, match=f"sha256 is {right}, expected 000"):
        read(corpus(jsonl, sha256="0" * 64))


def test_too_small_a_corpus_and_missing_shards(tokenized):
    data, folder = tokenized
    with pytest.raises(masa.MasaError, match=r"holds only .* training tokens, but the run needs 10,000,000"):
        tokenize.tokenize(data, folder / "tok", None, None, 10_000_000, folder / "tokens")
    assert not (folder / "tokens" / "manifest.json").exists()
    tokenize.tokenize(data, folder / "tok", None, None, 1000, folder / "tokens")
    with pytest.raises(masa.MasaError, match="holds 15 blocks of 64 tokens, the run needs 16"):
        token_files.PackedTokens(folder / "tokens", 64, 16, 0)
    (folder / "tokens" / "train-00000.bin").write_bytes(b"123")
    with pytest.raises(masa.MasaError, match="has 3 bytes, expected 2000"):
        token_files.PackedTokens(folder / "tokens", 64, 2, 0)


def test_pretrained_tokenizer_and_vocabulary_mismatch(tokenized):
    data, folder = tokenized
    again = data | {"tokenizer": {"source": f"file:{folder}/tok", "vocab_size": 280}}
    assert tokenize.make_tokenizer(again, None, None, folder / "again")["vocab_size"] == 280
    again["tokenizer"]["vocab_size"] = 281
    with pytest.raises(masa.MasaError, match=r"has 280 tokens, but data.tokenizer.vocab_size is 281"):
        tokenize.make_tokenizer(again, None, None, folder / "again")
    again["tokenizer"]["source"] = f"file:{folder}/none"
    with pytest.raises(masa.MasaError, match=r"none holds no tokenizer\.json"):
        tokenize.make_tokenizer(again, None, None, folder / "again")


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    """Eight times the tokens in a process of its own, at most a tenth more memory."""
    import subprocess
    import sys

    path = tmp_path / "big.jsonl"
    with path.open("w") as file:
        for i in range(24000):
            file.write(json.dumps({"content": f"{i} " + "lorem ipsum dolor sit amet " * 40}) + "\n")
    data = {"corpus": corpus(path), "tokenizer": {"source": "train", "vocab_size": 280, "training_bytes": 20000}}
    tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    code = (
        "import sys, json, resource; from pathlib import Path; from masa.data import tokenize as text;"
        "text.SHARD = 50_000;"
        "data, folder, tokens = json.loads(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]);"
        "text.tokenize(data, folder / 'tok', None, None, tokens, folder / sys.argv[3]);"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    peaks = []
    for tokens in (200_000, 1_600_000):
        command = [sys.executable, "-c", code, json.dumps(data), str(tmp_path), str(tokens)]
        peaks.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.1 * peaks[0], peaks
