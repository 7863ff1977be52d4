"""Pretrained folders, the bodies of the command line's verbs, and perplexity."""

from __future__ import annotations

import gzip
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from compression_models import VOCABULARY, tiny_llama, tokens
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import masa
from masa import cli, count_parameters, load
from masa.compression import perplexity, run_calibrate, run_compress
from masa.compression.calibration.texts import draw_tokens, read_documents
from masa.errors import MasaError
from masa.models.pretrained import convert_gguf, load_pretrained

WORDS = [f"w{i}" for i in range(VOCABULARY - 3)]
TEXT = [" ".join(WORDS[(7 * i * i + j) % len(WORDS)] for i in range(60)) for j in range(12)]


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2} | {word: i + 3 for i, word in enumerate(WORDS)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture
def folder(tmp_path) -> Path:
    """A pretrained model with its tokenizer, as a Hugging Face folder."""
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded_as_transformers_does(folder):
    ours, tok = load_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(ours(tokens()).logits, theirs(tokens()).logits)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert tok("w0 w1")["input_ids"] == [3, 4]
    assert {p.dtype for p in load_pretrained(folder, dtype=torch.bfloat16)[0].parameters()} == {torch.bfloat16}


def test_sharded_and_untied_folders_are_loaded(tmp_path):
    model = tiny_llama(tie_word_embeddings=False)
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, tok = load_pretrained(tmp_path)
    assert tok is None
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(MasaError, match="lacks the shards model-00002"):
        load_pretrained(tmp_path)


def test_weights_are_mapped_and_the_file_is_never_written(folder):
    before = (folder / "model.safetensors").read_bytes()
    loaded, _ = load_pretrained(folder)
    with torch.no_grad():
        loaded.model.norm.weight.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before


def test_broken_folders_are_named(folder, tmp_path):
    with pytest.raises(MasaError, match="local folder"):
        load_pretrained(folder, revision="main")
    with pytest.raises(MasaError, match=r"no config\.json"):
        load_pretrained(tmp_path)
    with pytest.raises(MasaError, match=r"GGUF file .* does not exist"):
        load_pretrained(tmp_path / "nothing.gguf")
    config = json.loads((folder / "config.json").read_text())
    for change, message in (
        ({"num_hidden_layers": 7}, "lacks weights"),
        ({"vocab_size": 97}, "has shape"),
        ({"model_type": "nonsense"}, "does not describe"),
    ):
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(MasaError, match=message):
            load_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(MasaError, match="corrupt"):
        load_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(MasaError, match="never pickles"):
        load_pretrained(folder)


def test_a_broken_gguf_file_leaves_nothing_behind(tmp_path):
    file = tmp_path / "broken.gguf"
    file.write_bytes(b"GGUF but not really")
    with pytest.raises(MasaError, match="cannot be read as a GGUF"):
        convert_gguf(file, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["broken.gguf"]


def test_calibrate_and_compress_from_plain_arguments(folder, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"page": document}) + "\n" for document in TEXT))
    made = run_calibrate(str(folder), tmp_path / "statistics", text, samples=6, length=20, quiet=True)
    assert made["samples"] == 6 and made["tokens_per_second"] > 0 and made["peak_rss_bytes"] > 2**20
    summary = run_compress(
        str(folder),
        tmp_path / "out",
        "svd-llm-update",
        0.2,
        tmp_path / "statistics",
        evaluate=text,
        window=32,
        quiet=True,
    )
    assert summary["calibration"]["tokens_sha256"] == made["tokens_sha256"]
    assert summary["parameters_before"] - summary["parameters_after"] == summary["dense"] - summary["stored"]
    assert json.loads((tmp_path / "out" / "compression.json").read_text()) == summary
    # what was reported holds for the model read back from the disk
    again = perplexity(masa.load(tmp_path / "out"), tokenizer(), TEXT, window=32)
    assert again.token_perplexity == pytest.approx(summary["perplexity_after"]["token_perplexity"], rel=1e-5)
    assert summary["perplexity_before"]["token_perplexity"] != summary["perplexity_after"]["token_perplexity"]
    run_compress(str(folder), tmp_path / "plain", "svd", 0.2, options={"ranks": "global"}, plain=True, quiet=True)
    assert not (tmp_path / "plain" / "masa.json").exists()
    with pytest.raises(MasaError, match="choose another"):
        run_compress(str(folder), folder, "svd", 0.2, quiet=True)
    assert not list(tmp_path.glob(".*"))
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")


def test_the_command_line_calibrates_and_compresses(folder, tmp_path, capsys):
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in TEXT))
    calls = (
        ["calibrate", folder, "--text", text, "--samples", "4", "--length", "16", "--out", tmp_path / "statistics"],
        ["compress", folder, "--calibration", tmp_path / "statistics", "--out", tmp_path / "smaller"],
    )
    for call in calls:
        assert cli.main([str(argument) for argument in call]) == 0, capsys.readouterr().err
    assert count_parameters(load(tmp_path / "smaller")).attention_reduction >= 0.2
    said = capsys.readouterr().out
    assert (
        "% of qkvo saved" in said and "asked for 20 %" in said and "parameters:" in said and "compression.json" in said
    )
    full = [*map(str, calls[1]), "--json", "--evaluate", str(text), "--out", str(tmp_path / "again")]
    assert cli.main(full) == 0
    assert json.loads(capsys.readouterr().out)["perplexity_after"]["tokens"] > 100
    without = ["compress", str(folder), "--out", str(tmp_path / "no")]
    assert cli.main(without) == 2
    assert "masa calibrate" in capsys.readouterr().err and not (tmp_path / "no").exists()
    text.write_text(text.read_text() * 60)
    passing = [*without, "--text", str(text), "--option", "ranks=global", "--projections", "qv", "--reduction", "0.3"]
    assert cli.main(passing) == 0, capsys.readouterr().err
    assert load(tmp_path / "no").sharing.spec.options == {"ranks": "global"}
    for out, message in ((folder, "is what is read (model)"), (tmp_path, "lies in it")):
        assert cli.main(["compress", str(folder), "--method", "svd", "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    wrong = [str(argument) for argument in calls[1]] + ["--method", "svd-globl"]
    assert cli.main(wrong) == 2
    assert "Did you mean 'svd-global'" in capsys.readouterr().err


def test_bad_texts_are_refused(folder, tmp_path):
    with pytest.raises(MasaError, match="needs 800"):
        draw_tokens(tokenizer(), TEXT, 8, 100, 0)
    with pytest.raises(MasaError, match="does not exist"):
        read_documents(tmp_path / "none.txt")
    with gzip.open(tmp_path / "good.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"text": "a \u2028 b"}\n{"page": "c"}\n')
    assert read_documents(tmp_path / "good.jsonl.gz") == ["a \u2028 b", "c"]
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(MasaError, match="line 1: not UTF-8"):
        read_documents(tmp_path / "latin.txt")
    with pytest.raises(MasaError, match="at least one token"):
        draw_tokens(tokenizer(), TEXT, 4, 0, 0)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"words": "b"}\n')
    with pytest.raises(MasaError, match="line 2"):
        read_documents(tmp_path / "bad.jsonl")
    with pytest.raises(MasaError, match="float32"):
        run_calibrate(str(folder), tmp_path / "s", TEXT, samples=2, length=8, dtype="flaot32", quiet=True)


def test_drawn_windows_do_not_overlap_and_depend_on_the_seed():
    drawn = draw_tokens(tokenizer(), TEXT, 10, 20, 0)
    assert drawn.shape == (10, 20)
    assert torch.equal(drawn, draw_tokens(tokenizer(), TEXT, 10, 20, 0))
    assert not torch.equal(drawn, draw_tokens(tokenizer(), TEXT, 10, 20, 1))


def by_hand(model, document: str, window: int, stride: int) -> float:
    """Negative log-likelihood of one document, token by token."""
    ids = [1, *tokenizer()(document)["input_ids"]]
    total = 0.0
    for position in range(1, len(ids)):
        target = position - 1  # index among the predicted tokens
        start = 0 if target < window else stride * math.ceil((target + 1 - window) / stride)
        context = torch.tensor([ids[start:position]])
        with torch.no_grad():
            logp = model(context).logits[0, -1].log_softmax(-1)
        total -= float(logp[ids[position]])
    return total


@pytest.mark.parametrize(("window", "stride"), [(64, None), (16, None), (16, 8), (16, 5)])
def test_perplexity_agrees_with_scoring_token_by_token(window, stride):
    model, documents = tiny_llama(), [TEXT[0], TEXT[1][:100], "w5"]
    found = perplexity(model, tokenizer(), documents, window=window, stride=stride, batch_size=3)
    exact = sum(by_hand(model, document, window, stride or window) for document in documents)
    assert found.nll == pytest.approx(exact, rel=1e-4)
    assert found.tokens == found.words == sum(len(document.split()) for document in documents)
    assert found.token_perplexity == pytest.approx(math.exp(exact / found.tokens), rel=1e-4)


def test_perplexity_refuses_what_it_cannot_score():
    with pytest.raises(MasaError, match="stride <= window"):
        perplexity(tiny_llama(), tokenizer(), TEXT, window=16, stride=17)
    with pytest.raises(MasaError, match="window <= 64"):
        perplexity(tiny_llama(), tokenizer(), TEXT, window=65)
    with pytest.raises(MasaError, match="list of documents"):
        perplexity(tiny_llama(), tokenizer(), "text")
    with pytest.raises(MasaError, match="one word"):
        perplexity(tiny_llama(), tokenizer(), ["", " "])
    broken = tiny_llama()
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(MasaError, match="not finite"):
        perplexity(broken, tokenizer(), TEXT, window=64)


def test_wikitext_pages_are_read_from_the_mirror(mirror):
    pages = read_documents(Path(mirror) / "lm_eval/wikitext/wikitext-2-raw-v1/test.jsonl")
    assert len(pages) == 62 and "Robert Boulter" in pages[0]


def test_a_folder_left_half_written_is_replaced(folder, tmp_path):
    """Saving again over an old factored checkpoint leaves the new one whole."""
    run_compress(str(folder), tmp_path / "out", "svd", 0.2, quiet=True)
    run_compress(str(folder), tmp_path / "out", "direct-share", 0.3, quiet=True)
    assert masa.load(tmp_path / "out").sharing.spec.method == "direct-share"
    shutil.rmtree(tmp_path / "out")


def test_all_linear_layers_at_a_size_from_the_command_line(folder, tmp_path, capsys):
    """Calibrated, compressed to a size, read again, folded and exported: not a byte above what was asked for."""
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 4))
    whole = sum(p.nbytes for p in tiny_llama().parameters())
    statistics, out = str(tmp_path / "statistics"), tmp_path / "smaller"
    told = ["--text", str(tmp_path / "text.txt"), "--samples", "8", "--length", "24", "--gradient-samples", "8"]
    assert cli.main(["calibrate", str(folder), *told, "--projections", "all", "--out", statistics]) == 0
    for size in (f"{(whole - 150_000) / 1024:.2f}KiB", str(whole - 150_000)):
        given = ["--method", "sparse-fisher", "--projections", "all", "--size", size, "--calibration", statistics]
        assert cli.main(["compress", str(folder), *given, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        stored = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
        assert whole - 152_500 < stored <= whole - 149_990
        account = json.loads((out / "compression.json").read_text())
        assert f"-> {account['stored_bytes']:,}, all counted" in said
        assert whole - stored == account["dense_bytes"] - account["stored_bytes"]
    assert cli.main(["export", str(out), "--out", str(tmp_path / "plain")]) == 0
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        torch.testing.assert_close(exported(tokens()).logits, load(out)(tokens()).logits)
    capsys.readouterr()
    assert cli.main(["compress", str(folder), *given[:4], "--size", "1KB", "--out", str(out)]) == 2
    both = ["--size", "1KB", "--reduction", "0.2", "--out", str(out)]
    with pytest.raises(SystemExit, match="2"):
        cli.main(["compress", str(folder), *both])


@pytest.mark.parametrize("share", [0.45, 0.3, 0.2])
def test_a_size_alone_chooses_what_loses_least_and_says_why(folder, tmp_path, capsys, share):
    (tmp_path / "text.txt").write_text("\n".join(TEXT * 9))
    whole = sum(p.nbytes for p in tiny_llama().parameters())
    size, out = int(share * whole), tmp_path / "smaller"
    told = ["--text", str(tmp_path / "text.txt"), "--evaluate", str(tmp_path / "text.txt")]
    assert cli.main(["compress", str(folder), "--size", str(size), *told, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "chosen: float16" in said and "chosen: embeddings with 8 bits" in said
    assert "chosen: sparse-fisher with 16, 8, 4 bits" in said and "costs the loss" in said
    stored = sum(t.nbytes for t in load_file(out / "model.safetensors").values())
    assert 0.97 * size < stored <= size
    account = json.loads((out / "compression.json").read_text())
    assert account["chosen"]["embeddings"] == 8 and account["method"] == "sparse-fisher"
    assert set(account["projections"]) == set("qkvogud")
    before, after = (account[f"perplexity_{when}"]["token_perplexity"] for when in ("before", "after"))
    assert after < (1.1 if share > 0.4 else 3) * before
    assert load(out).model.embed_tokens.table.bits == 8


def test_a_size_alone_without_gradients_or_without_need(folder, tmp_path, capsys):
    whole = sum(p.nbytes for p in tiny_llama().parameters())
    asked = ["compress", str(folder), "--out", str(tmp_path / "out"), "--size"]
    assert cli.main([*asked, str(int(0.4 * whole))]) == 0
    said = capsys.readouterr().out
    assert "chosen: sparse-magnitude" in said and "gradients" in said
    for size, words in ((whole, "Ask for less"), (int(0.6 * whole), "masa export --dtype float16")):
        assert cli.main([*asked, str(size)]) == 2
        assert words in capsys.readouterr().err
    assert cli.main([*asked, "100B"]) == 2 and "out of reach" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["svd", "svd-llm", "matrix-pca", "basis-sharing", "sparse-dictionary"])
def test_factors_beyond_a_dtype_that_holds_the_weights_are_refused(method):
    """A matrix of one sign has a first factor far larger than its numbers."""
    model = tiny_llama(attention_bias=False)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight.fill_(4e4)
    ids = tokens()
    statistics = masa.compression.calibrate(model, ids)
    masa.compression.compress(model, method, statistics, 0.3, tokens=ids)
    half = tiny_llama(attention_bias=False)
    with torch.no_grad():
        half.model.layers[1].self_attn.v_proj.weight.fill_(4e4)
    half, statistics = half.half(), masa.compression.calibrate(half.half(), ids, dtype=torch.float32)
    try:
        done, _ = masa.compression.compress(half, method, statistics, 0.3, tokens=ids)
    except MasaError as error:
        assert "float16" in str(error) and "--dtype bfloat16" in str(error)
        assert getattr(half, "sharing", None) is None, "the model is as it was"
    else:
        assert all(x.isfinite().all() for x in done.shared.state_dict().values())


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--dtype", "fp16"], "dtype 'fp16' does not exist"),
        (["--projections", "qx"], "must be distinct letters"),
        (["--gradient-samples", "-1"], "gradient_samples is a number of sequences, at least 0, got -1"),
        (["--batch-size", "0"], "batch_size is a number of sequences, at least 1, got 0"),
    ],
)
def test_statistics_that_are_there_stay_where_new_ones_are_asked_for_wrongly(folder, tmp_path, capsys, asked, message):
    run_calibrate(str(folder), tmp_path / "out", TEXT, samples=4, length=16, quiet=True)
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in TEXT))
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    call = ["calibrate", folder, "--text", text, "--samples", "3", "--length", "16", "--out", tmp_path / "out", *asked]
    assert cli.main([str(word) for word in call]) == 2
    assert message in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before


def test_a_weight_beyond_the_dtype_of_calibration_is_said_with_the_dtype(folder, tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 1e6
    with pytest.raises(MasaError, match=r"'d' \(mlp.down_proj\) of layer 1.*--dtype bfloat16"):
        masa.compression.calibrate(model, tokens(), dtype=torch.float16)


@pytest.mark.parametrize("kind", ["mpt", "roberta", "whisper"])
def test_positions_are_found_by_every_name_and_behind_the_padding(tmp_path, kind):
    """MPT and Whisper call them otherwise; RoBERTa counts from behind the padding's id."""
    sizes = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 1}
    more = {
        "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 30},
        "roberta": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"max_position_embeddings": 32},
        "whisper": {"d_model": 32, "decoder_layers": 2, "decoder_ffn_dim": 48, "decoder_attention_heads": 4}
        | {"encoder_layers": 1, "max_target_positions": 30},
    }[kind]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **more)).eval()
    ids = torch.randint(3, VOCABULARY, (4, 30))
    masa.compression.calibrate(model, ids)
    with pytest.raises(MasaError, match="this model knows 30 positions"):
        masa.compression.calibrate(model, torch.randint(3, VOCABULARY, (4, 31)))
    with pytest.raises(MasaError, match="window <= 30"):
        perplexity(model, tokenizer(), TEXT, window=31)
    if kind == "mpt":
        model.save_pretrained(tmp_path / "model")
        tokenizer().save_pretrained(tmp_path / "model")
        done = run_compress(str(tmp_path / "model"), tmp_path / "out", "svd", evaluate=TEXT, quiet=True)
        assert done["perplexity_after"]["tokens"] > 100


def status(call):
    """Of the command, also where its words are refused as they are read."""
    try:
        return cli.main(call)
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["--threads", "-1"], "a number of at least 1, not '-1'"),
        (["--threads", "0"], "a number of at least 1, not '0'"),
        (["--option", "ranks"], "--option is KEY=VALUE, such as ranks=global, not 'ranks'"),
        (["--option", "ranks="], "--option is KEY=VALUE"),
        (["--option", "ranks={a"], "'{a' is no value"),
        (["--method", "svd-fisher", "--option", "damping=x"], "Option 'damping' of 'svd-fisher' is float, not 'x'"),
        (["--method", "post-share", "--option", "steps=0.5"], "Option 'steps' of 'post-share' is int, not 0.5"),
        (["--method", "post-share", "--option", "lr=-1"], "lr positive and pull between 0 and 1; got"),
        (["--method", "basis-sharing", "--option", "shared=3"], "Option 'shared' of 'basis-sharing' is str, not 3"),
        (["--option", "ranks=3"], "Ranks are a rule, uniform, role"),
    ],
)
def test_words_of_the_command_line_that_mean_nothing(folder, tmp_path, capsys, asked, message):
    call = ["compress", str(folder), "--method", "svd", "--out", str(tmp_path / "out"), *asked]
    assert status(call) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_seed_of_more_than_64_bits(folder, tmp_path, capsys):
    call = ["calibrate", str(folder), "--text", "x.jsonl", "--seed", str(2**64), "--out", str(tmp_path / "out")]
    assert status(call) == 2
    assert "a whole number of 64 bits" in capsys.readouterr().err
