"""The verbs on everybody's files of text: one reader for --text, --evaluate and the workflow, and its refusals."""

import gzip
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from compression_models import tiny_llama
from conftest import ROOT
from servers import COMMIT, data_set, served
from test_tokenizers import TEXTS, byte_level, fast

import masa
from masa import cli
from masa.compression import perplexity, run_calibrate
from masa.compression.calibration.texts import draw_tokens, load_tokens, read_documents, tokens_of
from masa.data.formats import File
from masa.data.texts import Documents
from masa.runs import run


@pytest.fixture
def model(tmp_path):
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    fast(byte_level()).save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def jsonl(path, column="text", rows=TEXTS):
    text = "".join(json.dumps({column: row}) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def calibrate(model, *more, out, samples=4, length=16):
    sizes = ["--samples", str(samples), "--length", str(length), "--threads", "1", "--device", "cpu"]
    return cli.main(["calibrate", model, *more, *sizes, "--out", str(out)])


def test_calibrate_and_evaluate_read_c4s_own_files(model, tmp_path, capsys):
    """`.json.gz` of JSON lines, with a column of another name; the tokens are those of the list of texts."""
    text = jsonl(tmp_path / "c4-validation.00000-of-00008.json.gz", "body", [*TEXTS, None])
    assert calibrate(model, "--text", text, "--column", "body", out=tmp_path / "s") == 0
    assert "1 of 81 rows hold no text (null); they are passed over" in capsys.readouterr().err
    assert torch.equal(load_tokens(tmp_path / "s"), draw_tokens(fast(byte_level()), TEXTS, 4, 16, 0))
    given = ["compress", model, "--method", "svd", "--evaluate", text, "--column", "body", "--device", "cpu", "--json"]
    assert cli.main([*given, "--out", str(tmp_path / "out")]) == 0
    said = json.loads(capsys.readouterr().out)
    reference = perplexity(tiny_model(model), fast(byte_level()), TEXTS, window=64)
    assert said["perplexity_before"]["documents"] == len(TEXTS)
    assert said["perplexity_before"]["nll"] == pytest.approx(reference.nll, rel=1e-6)
    assert said["perplexity_before"]["start_token"] == "<s>"


def tiny_model(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_every_refusal_is_one_line_with_status_2_and_nothing_written(model, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(json.dumps({"text": "a"}) + "\n" + json.dumps({"text": 12}) + "\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link.jsonl").symlink_to("not-fetched.jsonl")
    said = {
        str(bad): "bad.jsonl, line 2: 'text' is int, expected text",
        str(tmp_path / "bad.json"): "Did you mean 'bad.jsonl'",
        str(tmp_path / "empty"): "holds no file of text",
        "hub:org": "is not hub:ORG/NAME[@COMMIT]",
        str(tmp_path / "link.jsonl"): "link.jsonl is a link to what does not exist",
        "/dev/null": "/dev/null is no regular file",
    }
    for text, message in said.items():
        for given in (
            ["calibrate", model, "--text", text, "--out", str(tmp_path / "s")],
            ["compress", model, "--method", "svd", "--evaluate", text, "--out", str(tmp_path / "out")],
        ):
            assert cli.main(given) == 2
            err = capsys.readouterr().err
            assert message in err and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
        assert not (tmp_path / "s" / "calibration.json").exists() and not (tmp_path / "out").exists()


def test_what_cannot_begin_leaves_statistics_as_they_are(model, tmp_path, capsys):
    tiny_llama(vocab_size=270).save_pretrained(tmp_path / "small")
    fast(byte_level()).save_pretrained(tmp_path / "small")
    text = jsonl(tmp_path / "a.jsonl")
    assert calibrate(str(tmp_path / "small"), "--text", text, out=tmp_path / "new") == 2
    assert "but the vocabulary has 270. Use the tokenizer of this model" in capsys.readouterr().err
    assert not (tmp_path / "new").exists(), "nothing half-written"
    assert calibrate(model, "--text", text, out=tmp_path / "s") == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()}
    for given, more in ((tmp_path / "small", []), (model, ["--projections", "xy"]), (model, ["--dtype", "int4"])):
        assert calibrate(str(given), "--text", text, *more, out=tmp_path / "s") == 2
        assert {path.name: path.read_bytes() for path in (tmp_path / "s").iterdir()} == before, more


def test_too_little_text_for_one_sequence_is_not_told_to_ask_for_no_samples(model, tmp_path, capsys):
    text = jsonl(tmp_path / "a.jsonl", rows=["a b c"])
    assert calibrate(model, "--text", text, out=tmp_path / "s", length=60) == 2
    err = capsys.readouterr().err
    assert "at most 0" not in err and "ask for shorter ones, of at most " in err


def test_a_data_set_of_the_hubs_layout_by_its_id_and_split(model, tmp_path, monkeypatch):
    folder = tmp_path / "mirror" / "org" / "name"
    folder.mkdir(parents=True)
    jsonl(folder / "train.jsonl", rows=TEXTS)
    jsonl(folder / "test.jsonl", rows=TEXTS[:40])
    monkeypatch.setenv("MASA_MIRROR", str(tmp_path / "mirror"))
    for more, rows in (([], TEXTS), (["--split", "test"], TEXTS[:40])):
        assert calibrate(model, "--text", "hub:org/name", *more, out=tmp_path / "s") == 0
        assert torch.equal(load_tokens(tmp_path / "s"), draw_tokens(fast(byte_level()), rows, 4, 16, 0))
    assert calibrate(model, "--text", str(folder), "--split", "test", out=tmp_path / "s") == 0
    assert torch.equal(load_tokens(tmp_path / "s"), draw_tokens(fast(byte_level()), TEXTS[:40], 4, 16, 0))


def test_a_data_set_on_the_hub_is_streamed(tmp_path):
    """From a hub of ours, in a process of its own: gzip, found by the data set's splits, nothing kept on the disk."""
    generator = np.random.default_rng(0)  # of which gzip makes little
    texts = [f"document {i} " + generator.bytes(2000).hex() for i in range(4000)]
    shards = [
        gzip.compress("".join(json.dumps({"body": t}) + "\n" for t in texts[part::2]).encode()) for part in (0, 1)
    ]
    splits = [{"split": "train", "path": "data/a-*"}, {"split": "test", "path": "test.jsonl"}]
    card = f"---\n{json.dumps({'configs': [{'config_name': 'default', 'data_files': splits}]})}\n---\n"
    files = {f"data/a-{i}.jsonl.gz": shard for i, shard in enumerate(shards)} | {"README.md": card.encode()}
    files["test.jsonl"] = (json.dumps({"body": "a test"}) + "\n").encode()
    code = """
import itertools, sys
from masa.data import documents
from masa.data.texts import Documents
source = f"hub:org/name@{sys.argv[1]}"
corpus = {"source": source, "reader": "hub", "column": "body", "shuffle_buffer": 1}
print(sum(1 for _ in itertools.islice(documents.read(corpus, None, None, "all"), 10)))
print(len(set(Documents(source, "body"))), list(Documents(source, "body", split="test")))
"""
    sent = []
    with served(data_set(files, sent)) as url:
        environment = {k: v for k, v in os.environ.items() if k not in ("MASA_MIRROR", "HF_HUB_OFFLINE")}
        environment |= {"HF_ENDPOINT": url, "HF_HOME": str(tmp_path / "hf"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, COMMIT]
        result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["10", "4000 ['a test']"]
    assert {name for name, _ in sent} == {"data/a-0.jsonl.gz", "data/a-1.jsonl.gz", "test.jsonl"}
    assert not [p for p in (tmp_path / "hf").rglob("*") if p.is_file() and p.stat().st_size > 10000]


def test_tokens_beyond_memory_give_the_same_windows(monkeypatch):
    from masa.compression.calibration import texts

    tokenizer = fast(byte_level())
    whole = draw_tokens(tokenizer, TEXTS, 30, 50, 3)
    monkeypatch.setattr(texts, "SPOOL", 1000)
    assert torch.equal(draw_tokens(tokenizer, iter(TEXTS), 30, 50, 3), whole)
    joined = [i for text in TEXTS for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    windows = torch.tensor(joined[: len(joined) // 50 * 50]).view(-1, 50)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(3))[:30]
    assert torch.equal(whole, windows[order])


def test_perplexity_of_many_documents_is_the_sum_of_its_groups(model, monkeypatch):
    from masa.compression import scoring

    loaded, tokenizer = tiny_model(model), fast(byte_level())
    once = perplexity(loaded, tokenizer, TEXTS, window=32)
    monkeypatch.setattr(scoring, "GROUP", 7)
    grouped = perplexity(loaded, tokenizer, iter(TEXTS), window=32)
    assert grouped.tokens_by_document == once.tokens_by_document and grouped.words == once.words
    assert grouped.nll == pytest.approx(once.nll, rel=1e-9)
    assert grouped.nll_by_document == pytest.approx(once.nll_by_document, abs=2e-4)


def test_a_check_leaves_the_template_as_it_is():
    """Of what comes over a network, too, which a check does not read."""

    class Words:
        chat_template = "{{ messages }}"

        def apply_chat_template(self, messages, tokenize):
            return " ".join(message["content"] for message in messages)

    chat = [{"role": "user", "content": "two"}, {"role": "assistant", "content": "words"}]
    found = Documents([chat], tokenizer=Words())
    assert list(found.check()) == ["two words"]
    found.given, found.files = (
        None,
        [File("https://host/a", None, rows=lambda columns: iter([("row 1", {"messages": chat})]))],
    )
    assert list(found.check()) == ["two words"]


def test_data_in_memory_follow_the_same_rules(model, capsys):
    import datasets

    loaded, tokenizer = tiny_model(model), fast(byte_level())
    expected = tokens_of(TEXTS, loaded, tokenizer, None, 64, 16, 0)
    data = datasets.Dataset.from_dict({"body": [None, *TEXTS]})
    assert torch.equal(tokens_of(data, loaded, tokenizer, "body", 64, 16, 0), expected)
    assert "1 of 81 rows hold no text" in capsys.readouterr().err
    with pytest.raises(masa.MasaError, match=r"'n', row 1 is int, expected text"):
        tokens_of(datasets.Dataset.from_dict({"n": [1, 2]}), loaded, tokenizer, "n", 4, 16, 0)
    with pytest.raises(masa.MasaError, match=r"document 2 is int, expected text"):
        read_documents(["a", 12])


def test_a_text_of_the_workflow_is_read_again_by_calibrate(model, tmp_path, capsys):
    spec = {"source": f"file:{jsonl(tmp_path / 'a.ndjson')}", "reader": "files", "split": "all"}
    given = json.dumps({"text": spec, "cache": str(tmp_path), "mirror": None})
    assert cli.main(["text", "t", "--spec", given, "--out", str(tmp_path / "t.json")]) == 0
    texts = run.read_json(tmp_path / "t.json")["documents"]
    assert sorted(texts) == sorted(TEXTS)
    run_calibrate(model, tmp_path / "s", tmp_path / "t.json", samples=4, length=16, quiet=True)
    assert torch.equal(load_tokens(tmp_path / "s"), draw_tokens(fast(byte_level()), texts, 4, 16, 0))
    (tmp_path / "none.json").write_text(json.dumps({"name": "t", "source": "file:x", "unavailable": "no such file"}))
    assert calibrate(model, "--text", str(tmp_path / "none.json"), out=tmp_path / "s2") == 2
    assert "holds no documents: no such file" in capsys.readouterr().err
