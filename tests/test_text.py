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


def test_a_reader_that_does_not_read_the_source_is_named(jsonl):
    with pytest.raises(masa.MasaError, match=r"a\.jsonl is json, not text: set the reader to json"):
        read(corpus(jsonl.rename(jsonl.with_name("a.jsonl")), reader="text"))
    hub, file = {"source": f"hub:a/b@{'0' * 40}"}, {"reader": "hub"}
    with pytest.raises(masa.MasaError, match=r"hub:a/b@0+ is not read by the reader files: set the reader to hub"):
        read(corpus(jsonl, reader="files") | hub)
    with pytest.raises(masa.MasaError, match=r"is not read by the reader hub, which reads hub:ORG/NAME@COMMIT"):
        read(corpus(jsonl) | file)


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


# -------------------------------------------------------------------------------------------- splits of small corpora

STORY = "".join(f"Line {i} of a story that has no end, and so on.\n" for i in range(200))


@pytest.mark.parametrize("name", ["a.txt", "b.txt", "story", "x y.txt", "some-other-name.text"])
def test_one_text_file_has_two_splits_whatever_it_is_called(name, tmp_path):
    """By documents where it has several, by position where it is one."""
    path = tmp_path / name
    path.write_text(STORY)
    spec = corpus(path, reader="text")
    (train,), (held_out,) = read(spec), read(spec, "validation")
    assert train + held_out == STORY.strip()
    assert train.endswith("\n") and 0.15 < len(held_out) / len(STORY) < 0.2
    documents_ = [f"Chapter {i}\n" + STORY[: 100 + i] for i in range(300)]
    path.write_text("\n\n\n".join(documents_))
    train, held_out = read(spec), read(spec, "validation")
    assert sorted(train + held_out) == sorted(d.strip() for d in documents_)
    assert 30 < len(held_out) < 90


@pytest.mark.parametrize("count", range(2, 9))
def test_a_few_documents_or_files_leave_no_side_empty(count, tmp_path):
    for kind in ("json", "text", "files"):
        folder = tmp_path / kind
        folder.mkdir()
        texts = [f"document number {i} of {count}" for i in range(count)]
        if kind == "json":
            (folder / "a.jsonl").write_text("".join(json.dumps({"content": text}) + "\n" for text in texts))
        elif kind == "text":
            (folder / "a.txt").write_text("\n\n\n".join(texts))
        else:
            for i, text in enumerate(texts):
                (folder / f"{i}.txt").write_text(text)
        for fraction in (0.06, 0.5):
            spec = corpus(folder, reader=kind if kind != "files" else "text", validation_fraction=fraction)
            train, held_out = read(spec), read(spec, "validation")
            assert train and held_out, (kind, fraction)
            assert sorted(train + held_out) == texts
            assert sorted(read(spec, "all")) == texts


def test_the_same_document_many_times_is_one(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text((json.dumps({"content": "the same words again"}) + "\n") * 5)
    assert not set(read(corpus(path))) & set(read(corpus(path), "validation"))


# --------------------------------------------------------------------------------------------------- rows that are odd


def mirrored(tmp_path, write):
    folder = tmp_path / "org" / "name"
    folder.mkdir(parents=True)
    write(folder)
    return corpus("", source=f"hub:org/name@{'0' * 40}", reader="hub"), str(tmp_path)


def rows(count, *odd):
    made = [{"content": f"row {i}: the quick brown fox"} for i in range(count)]
    return [*made, *odd, *made]


@pytest.mark.parametrize("reader", ["json", "files", "hub"])
def test_one_odd_row_among_thirty_thousand_is_refused_and_a_null_one_counted(reader, tmp_path, capsys):
    """And no document comes in quotes: datasets' json loader would make the column one of `Json`."""

    def write(*odd):
        lines = "".join(json.dumps(row) + "\n" for row in rows(15000, *odd))
        return lambda folder: (folder / "a.jsonl").write_text(lines)

    spec, mirror = mirrored(tmp_path, write({"content": None}, {"content": None}))
    file = tmp_path / "org" / "name" / "a.jsonl"
    spec = spec if reader == "hub" else corpus(file, reader=reader)
    found = list(documents.read(spec, None, mirror, "all"))
    assert len(found) == 30000 and set(found) == {row["content"] for row in rows(15000)}
    assert "a.jsonl: 2 of 30,002 rows hold no text (null); they are passed over" in capsys.readouterr().err
    for odd, kind in (({"content": 12}, "int"), ({"content": {"a": 1}}, "dict"), ({"content": ["a"]}, "list")):
        write(odd)(file.parent)
        with pytest.raises(masa.MasaError, match=rf"a\.jsonl, line 15001: 'content' is {kind}, expected text.*column"):
            list(documents.read(spec, None, mirror, "all"))


def test_parquet_from_the_hub_with_nulls_and_with_a_column_of_json(tmp_path, capsys):
    import datasets

    datasets.disable_progress_bars()
    texts = ["one", None, 'say "two"', "three"]

    def write(folder):
        rows_ = [{"content": text, "n": i} for i, text in enumerate(texts)]
        plain = datasets.Dataset.from_list(rows_)
        kept = datasets.Features({"content": datasets.Json(), "n": datasets.Value("int64")})
        plain.to_parquet(folder / "train-0.parquet")
        datasets.Dataset.from_list(rows_, features=kept).to_parquet(folder / "train-1.parquet")
        plain.to_parquet(folder / "test-0.parquet")

    spec, mirror = mirrored(tmp_path, write)
    assert sorted(documents.read(spec, None, mirror, "all")) == sorted([t for t in texts if t] * 2)
    assert capsys.readouterr().err.count("1 of 4 rows hold no text") == 2
    assert len(list(documents.read(spec | {"hub_split": "test"}, None, mirror, "all"))) == 3
    with pytest.raises(masa.MasaError, match=r"split 'tset' does not exist\. Did you mean 'test'"):
        list(documents.read(spec | {"hub_split": "tset"}, None, mirror, "all"))
    with pytest.raises(masa.MasaError, match=r"BuilderConfig 'no' not found.*Name one of its subsets"):
        list(documents.read(spec | {"subset": "no"}, None, mirror, "all"))


def test_a_readers_format_that_the_file_has_not_is_said(tmp_path):
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(
        masa.MasaError, match=r"a\.parquet is parquet, not json: set the reader to parquet, or to files"
    ):
        read(corpus(tmp_path / "a.parquet"))
    assert read(corpus(tmp_path / "a.parquet", reader="files"), "all") == ["a"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('[\n{"content": "a"},\n{"content": 3}\n]', 3),
        ('[\n{"content": "a"},\n\n{"content": }\n]', 4),
        ('[{"content": "a"},\n{"content": "b"}', 2),
        ('[{"content": "a"}]\n{"content": "b"}', 2),
        ('{\n"content": "a"\n}\n{\n"content": null,\n]', 6),
    ],
)
def test_a_fault_in_json_that_is_not_of_lines_is_told_with_its_line(text, line, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(masa.MasaError, match=rf"a\.json.*line {line}: "):
        read(corpus(tmp_path / "a.json"), "all")


def test_an_array_of_any_size_costs_the_memory_of_a_few_rows(tmp_path, monkeypatch):
    """An array on one line, forty times as long as what is read at once."""
    from masa.data import json_stream

    monkeypatch.setattr(json_stream, "CHUNK", 1000)
    longest = 0
    more = json_stream._Stream.more

    def watched(stream):
        nonlocal longest
        more(stream)
        longest = max(longest, len(stream.text))

    monkeypatch.setattr(json_stream._Stream, "more", watched)
    (tmp_path / "a.json").write_text(json.dumps(rows(600)))
    assert len(read(corpus(tmp_path / "a.json"), "all")) == 1200
    assert 1000 <= longest < 3000 < (tmp_path / "a.json").stat().st_size / 15


def test_a_parquet_file_of_one_large_group_is_read_bit_by_bit(tmp_path):
    """In a process of its own: a group of 80 MB of text costs a fraction of it."""
    import subprocess
    import sys

    import pyarrow.parquet

    generator = np.random.default_rng(0)
    texts = [generator.bytes(4000).hex() for _ in range(10000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10**6)
    code = (
        "import sys, resource, pyarrow.parquet; from masa.data.texts import Documents\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
        "before = peak(); count = sum(1 for _ in Documents(sys.argv[1])); print(count, peak() - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.parquet")]
    count, more = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(count) == 10000 and float(more) < 40
