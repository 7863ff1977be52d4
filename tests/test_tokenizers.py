"""Tokenizers as their files mean them, and start tokens: one choice in calibration, perplexity and lm-eval."""

import copy
import json
import math
import re
from pathlib import Path

import pytest
import torch
from compression_models import tiny_llama
from test_text import corpus
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Config, PreTrainedTokenizerFast

import masa
from masa import cli
from masa.compression import perplexity, run_calibrate
from masa.compression.calibration.texts import draw_tokens, load_tokens
from masa.data import tokenize
from masa.data.tokenizers import load_tokenizer, start_of
from masa.evaluation import language
from masa.runs import run

TEXTS = [
    f"Document {i}: the quick brown fox didn't jump over {i * i} lazy dogs; it slept.  " * (1 + i % 4)
    for i in range(80)
]


def byte_level(vocabulary=300, start=None) -> Tokenizer:
    """A byte-level BPE whose tokens may hold several words; with ``start``, one that puts <s> before every text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    if start:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return made


def fast(core: Tokenizer, **more) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", **more)


def counted(tokenizer, texts=TEXTS) -> int:
    return sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "docs.jsonl"
    path.write_text("".join(json.dumps({"content": text}) + "\n" for text in TEXTS))
    return {"corpus": corpus(path), "tokenizer": {"source": f"file:{tmp_path}/given", "vocab_size": 300}}


def test_a_tokenizer_saved_after_a_truncating_call_cuts_nothing_off(data, tmp_path):
    core = byte_level()
    core.enable_truncation(16)
    core.enable_padding(length=16, pad_token="</s>", pad_id=1)
    fast(core).save_pretrained(tmp_path / "given")
    assert json.loads((tmp_path / "given" / "tokenizer.json").read_text())["truncation"]["max_length"] == 16
    tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    written = json.loads((tmp_path / "tok" / "tokenizer.json").read_text())
    assert written["truncation"] is None and written["padding"] is None
    tokenize.tokenize(data, tmp_path / "given", None, None, 2000, tmp_path / "tokens")
    record = run.read_json(tmp_path / "tokens" / "manifest.json")["validation"]
    ends = record["document_ends"]
    assert min(b - a for a, b in zip([0, *ends], ends, strict=False)) > 17


@pytest.mark.parametrize("named", ["config.json", "tokenizer_config.json", "both"])
def test_the_files_own_splitting_is_kept_whatever_class_stands_beside_it(named, data, tmp_path):
    """GPT-2's class would put its own splitting in the place of the file's."""
    folder, core = tmp_path / "given", byte_level()
    fast(core).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPT2Tokenizer" if named != "config.json" else None
    settings = {k: v for k, v in settings.items() if v is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if named != "tokenizer_config.json":
        GPT2Config().save_pretrained(folder)
    expected = sum(len(core.encode(text, add_special_tokens=False).ids) for text in TEXTS)
    theirs = counted(AutoTokenizer.from_pretrained(folder))
    assert theirs != expected, "what this test is about: AutoTokenizer splits otherwise"
    assert counted(load_tokenizer(folder)) == expected
    tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    assert counted(load_tokenizer(tmp_path / "tok")) == expected
    assert counted(AutoTokenizer.from_pretrained(tmp_path / "tok")) == expected, "and others read it so too"
    tokenize.tokenize(data, tmp_path / "tok", None, None, 2000, tmp_path / "tokens")
    bytes_ = (tmp_path / "tokens" / "train-00000.bin").read_bytes()
    assert tokenize.tokenize(data, folder, None, None, 2000, tmp_path / "others")["train"]["tokens"] == 2000
    assert (tmp_path / "others" / "train-00000.bin").read_bytes() == bytes_


def test_a_model_folder_is_calibrated_with_its_files_own_splitting(tmp_path):
    folder, core = tmp_path / "model", byte_level()
    tiny_llama(vocab_size=300).save_pretrained(folder)
    fast(core).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | {"tokenizer_class": "GPT2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    run_calibrate(str(folder), tmp_path / "s", TEXTS, samples=8, length=32, quiet=True)
    assert torch.equal(load_tokens(tmp_path / "s"), draw_tokens(fast(core), TEXTS, 8, 32, 0))


def test_a_difference_is_refused_with_both_counts(tmp_path, monkeypatch):
    from masa.data import tokenizers

    fast(byte_level()).save_pretrained(tmp_path)
    other = fast(byte_level(vocabulary=290))
    monkeypatch.setattr(tokenizers, "_of_file", lambda directory: other)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    counts = counted(other, [tokenizers.SAMPLE]), len(plain.encode(tokenizers.SAMPLE, add_special_tokens=False).ids)
    with pytest.raises(masa.MasaError, match=rf"{counts[0]:,} tokens instead of {counts[1]:,} on a sample"):
        load_tokenizer(tmp_path)


def test_a_sentencepiece_folder_is_read(data, tmp_path):
    import sentencepiece

    folder = tmp_path / "given"
    folder.mkdir()
    (tmp_path / "text.txt").write_text("\n".join(TEXTS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        minloglevel=2,
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"})
    )
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    data["tokenizer"]["vocab_size"] = pieces.vocab_size()
    made = tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    assert made["vocab_size"] == pieces.vocab_size() and made["eos_token_id"] == pieces.eos_id()
    again = load_tokenizer(tmp_path / "tok")
    for text in (" ".join(text.split()) for text in TEXTS):  # of runs of spaces the two make different things
        assert again(text, add_special_tokens=False)["input_ids"] == pieces.encode(text)


@pytest.mark.parametrize(
    ("size", "limit", "said"),
    [
        (
            5000,
            None,
            r"bytes of training documents give [\d,]+ tokens, but .*vocab_size is 5,000\. That is all of the train",
        ),
        (5000, 1000, r"1,\d+ bytes of .* give \d+ tokens, .*\. Raise data\.tokenizer\.training_bytes, or lower"),
        (200, None, r"vocab_size = 200 is too small: bytes and </s> alone are 257"),
    ],
)
def test_too_little_text_for_a_vocabulary_is_said_to_be_too_little(size, limit, said, data, tmp_path):
    data["tokenizer"] = {"source": "train", "vocab_size": size, "training_bytes": limit}
    with pytest.raises(masa.MasaError, match=said):
        tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    assert not (tmp_path / "tok").exists()


def test_a_folder_without_a_tokenizer_is_not_told_to_train_one_into_itself(data, tmp_path, capsys):
    (tmp_path / "given").mkdir()
    spec = json.dumps({"data": data, "cache": str(tmp_path), "mirror": None})
    assert cli.main(["tokenizer", "--spec", spec, "--out", str(tmp_path / "tok")]) == 2
    said = capsys.readouterr().err
    assert "given holds no tokenizer.json" in said and "--out " + str(tmp_path / "given") not in said


def test_a_chat_becomes_text_by_the_tokenizers_template(data, tmp_path):
    chats = [[{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}] for text in TEXTS]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    tokenizer = fast(byte_level(), chat_template=template)
    texts = [f"<user>{text}\n<assistant>Yes.\n" for text in TEXTS]
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_calibrate(str(tmp_path / "model"), tmp_path / "s", path, samples=8, length=32, quiet=True)
    assert torch.equal(load_tokens(tmp_path / "s"), draw_tokens(tokenizer, texts, 8, 32, 0))
    data["corpus"] |= {"source": f"file:{path}", "column": "messages"}
    data["tokenizer"]["source"] = f"file:{tmp_path}/model"
    tokenize.make_tokenizer(data, None, None, tmp_path / "tok")
    tokenize.tokenize(data, tmp_path / "tok", None, None, 1000, tmp_path / "tokens")
    from masa.data.tokens import validation_tokens

    held_out, record = validation_tokens(tmp_path / "tokens")
    decoded = load_tokenizer(tmp_path / "tok").decode(held_out).split("</s>")[:-1]
    assert len(decoded) == record["documents"] and set(decoded) <= set(texts)
    data["tokenizer"] = {"source": "train", "vocab_size": 300}
    with pytest.raises(masa.MasaError, match=r"line 1: 'messages' is a chat, and there is no tokenizer yet"):
        tokenize.make_tokenizer(data, None, None, tmp_path / "no")
    fast(byte_level()).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(masa.MasaError, match=r"needs a tokenizer with a chat template, and this one has none"):
        run_calibrate(str(tmp_path / "model"), tmp_path / "s2", path, samples=8, length=32, quiet=True)


# ----------------------------------------------------------------------------------------------------- start tokens


def exact(model, tokenizer, page: str, window: int, filled: bool = False) -> float:
    """Negative log-likelihood of a text after the start token, which is not scored; token by token, in float64.

    ``filled``: the last window begins earlier, so that it is whole, as lm-eval's.
    """
    ids = [tokenizer.bos_token_id, *tokenizer(page, add_special_tokens=False)["input_ids"]]
    model, total = copy.deepcopy(model).double(), 0.0
    for start in range(0, len(ids) - 1, window):
        end = min(start + window, len(ids) - 1)
        first = max(0, end - window) if filled else start
        with torch.no_grad():
            logp = model(torch.tensor([ids[first:end]])).logits[0].log_softmax(-1)
        total -= sum(float(logp[i - first, ids[i + 1]]) for i in range(start, end))
    return total


@pytest.fixture(scope="module")
def wikitext(mirror, tmp_path_factory):
    """The first pages of WikiText-2: their beginnings, of which the last is longer than a window."""
    file = Path(mirror) / "lm_eval/wikitext/wikitext-2-raw-v1/test.jsonl"
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:3]]
    rows = [{"page": row["page"][:size]} for row, size in zip(rows, (300, 500, 1500), strict=True)]
    root = tmp_path_factory.mktemp("mirror")
    (root / "lm_eval/wikitext/wikitext-2-raw-v1").mkdir(parents=True)
    splits = [{"split": split, "path": "wikitext-2-raw-v1/test.jsonl"} for split in ("train", "validation", "test")]
    parts = {"config_name": "wikitext-2-raw-v1", "data_files": splits}
    (root / "lm_eval/wikitext/README.md").write_text(f"---\n{json.dumps({'configs': [parts]})}\n---\n")
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (root / "lm_eval/wikitext/wikitext-2-raw-v1/test.jsonl").write_text(text)
    return root, rows


@pytest.mark.parametrize("start", [True, False], ids=["a tokenizer that puts <s>", "one that puts none"])
def test_one_wikitext_number_from_the_perplexity_and_from_lm_eval(start, wikitext, tmp_path):
    from lm_eval.tasks.wikitext.preprocess_wikitext import wikitext_detokenizer

    from masa.data import benchmarks

    tokenizer, window = fast(byte_level(start=start)), 512
    assert start_of(tokenizer) == (0 if start else None)
    model = tiny_llama(vocab_size=300, max_position_embeddings=window).eval()
    root, rows = wikitext
    tasks = benchmarks.prepare(["wikitext"], ["mirror"], None, str(root), tmp_path)
    pages = [wikitext_detokenizer(row) for row in rows]
    for limit in (2, 3):
        settings = {"limit": limit, "limit_per_task": {}, "max_length": window, "batch_size": 4}
        raw = language.harness(model, tokenizer, tasks, settings, "cpu")
        assert raw["start_token"] == {"contexts": "<s>" if start else None, "rolling": "<s>"}
        filled = sum(exact(model, tokenizer, page, window, filled=True) for page in pages[:limit])
        size = sum(len(row["page"].encode()) for row in rows[:limit])
        words = sum(len(re.split(r"\s+", row["page"])) for row in rows[:limit])
        found = raw["results"]["wikitext"]
        assert found["byte_perplexity,none"] == pytest.approx(math.exp(filled / size), rel=1e-6)
        assert found["word_perplexity,none"] == pytest.approx(math.exp(filled / words), rel=1e-4)
        ours = perplexity(model, tokenizer, pages[:limit], window=window)
        assert ours.start_token == "<s>"
        assert ours.nll == pytest.approx(sum(exact(model, tokenizer, p, window) for p in pages[:limit]), rel=1e-6)
        if limit == 2:  # no page is longer than a window: then the two are one number
            assert ours.nll == pytest.approx(math.log(found["byte_perplexity,none"]) * size, rel=1e-6)
            assert max(ours.tokens_by_document) < window
    assert max(ours.tokens_by_document) > window


def test_calibration_begins_every_document_as_the_tokenizer_does(tmp_path):
    with_start, without = fast(byte_level(start=True)), fast(byte_level())
    drawn = draw_tokens(with_start, TEXTS, 1, 40, 0)
    every = [i for text in TEXTS for i in [*with_start(text)["input_ids"], with_start.eos_token_id]]
    windows = torch.tensor(every[: len(every) // 40 * 40]).view(-1, 40)
    assert any(torch.equal(drawn[0], window) for window in windows)
    joined = draw_tokens(with_start, TEXTS, len(windows), 40, 0)
    assert sorted(map(tuple, joined.tolist())) == sorted(map(tuple, windows.tolist()))
    assert not (draw_tokens(without, TEXTS, 50, 40, 0) == without.bos_token_id).any()
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")
    for tokenizer, said in ((with_start, "<s>"), (without, None)):
        tokenizer.save_pretrained(tmp_path / "model")
        made = run_calibrate(str(tmp_path / "model"), tmp_path / "s", TEXTS, samples=4, length=16, quiet=True)
        assert made["start_token"] == said


def test_a_model_trained_without_start_tokens_is_scored_without():
    """masa pretrain separates documents by the end token alone; a start token would be one it has never seen."""
    tokenizer = fast(byte_level(start=True))
    model = tiny_llama(vocab_size=300).eval()
    settings = {"batch_size": 1, "max_length": 64}
    ours = language.language_model(model, tokenizer, settings, "cpu", start=False)
    assert ours.tok_encode("a b") == tokenizer("a b", add_special_tokens=False)["input_ids"]
    assert ours.prefix_token_id == tokenizer.eos_token_id
    theirs = language.language_model(model, tokenizer, settings, "cpu")
    assert theirs.tok_encode("a b")[0] == theirs.prefix_token_id == tokenizer.bos_token_id
