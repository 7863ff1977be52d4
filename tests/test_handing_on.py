"""What a model folder has beside its weights, on every way out; and who reads what is written."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from compression_models import tiny_llama
from gguf_models import MODELS, byte_level, sentencepiece, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from masa import cli
from masa.models.beside import PATTERNS, hand_on, reason_to_leave
from masa.models.both_versions import earlier_names, write_for_both
from masa.models.pretrained import load_pretrained

needs_llama_cpp = pytest.mark.skipif(
    not all(map(find_spec, ("xllamacpp", "sentencepiece"))), reason="llama.cpp is not installed"
)
BESIDE = {
    "generation_config.json": '{"eos_token_id": [0, 1],   "do_sample": true, "temperature": 0.6, "top_p": 0.9}',
    "chat_template.jinja": "{% for m in messages %}{{ m.content }}{% endfor %}\n",
    "additional_chat_templates/tools.jinja": "{{ tools }}",
    "special_tokens_map.json": '{"bos_token":"<s>"}',
    "added_tokens.json": "{}",
    "preprocessor_config.json": '{"size": 3}',
    "merges.txt": "#version: 0.2\n",
    "LICENSE": "the licence",
    "NOTICE.txt": "the notice",
    "USE_POLICY.md": "the policy",
}
LEFT = {
    "consolidated.safetensors": "weights",
    "pytorch_model.bin": "weights",
    "original/params.json": "of weights in another format",
    "model.gguf": "weights",
    "modeling_own.py": "code, which is not trusted",
    "trainer_state.json": "of a training",
    "README.md": "not known to belong to a model",
    "config.json": "written anew",
    "model.safetensors": "weights",
}


@pytest.fixture
def folder(tmp_path):
    """A tiny Llama with all that a folder of the hub may have."""
    where = tmp_path / "model"
    tiny_llama(vocab_size=304, attention_bias=False).save_pretrained(where)
    byte_level(where)
    for name, text in (BESIDE | {name: "x" for name in LEFT if not (where / name).exists()}).items():
        (where / name).parent.mkdir(exist_ok=True)
        (where / name).write_text(text)
    return where


def compressed(folder, out, *more):
    call = ["compress", str(folder), "--method", "svd", "--device", "cpu", "--out", str(out), *more]
    assert cli.main(call) == 0
    return out


def unchanged(folder, out):
    for name in [*BESIDE, "tokenizer.json", "tokenizer_config.json"]:
        assert (out / name).read_bytes() == (folder / name).read_bytes(), name
    assert not [name for name in LEFT if (out / name).exists() and name not in ("config.json", "model.safetensors")]


def test_all_that_holds_goes_along_unchanged_on_every_way_out(folder, tmp_path, capsys):
    factored = compressed(folder, tmp_path / "factored")
    unchanged(folder, factored)
    account = json.loads((factored / "compression.json").read_text())["handed_on"]
    assert set(BESIDE) < set(account["files"]) and account["left"] == LEFT
    assert "handed on unchanged: LICENSE, NOTICE.txt" in capsys.readouterr().out
    unchanged(folder, compressed(folder, tmp_path / "plain", "--plain"))
    assert cli.main(["export", str(factored), "--check", "--out", str(tmp_path / "hf")]) == 0
    (tmp_path / "hf/README.md").rename(tmp_path / "card.md")
    unchanged(folder, tmp_path / "hf")
    card, said = (tmp_path / "card.md").read_text(), capsys.readouterr().out
    assert "read back by transformers: logits within" in said
    assert "Unchanged from the model's folder: LICENSE," in card and "Read back by transformers without masa" in card
    export = json.loads((tmp_path / "hf/export.json").read_text())
    assert set(BESIDE) < set(export["handed_on"]["files"])
    assert export["check"]["largest_logit_difference"] == 0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.generation_config.eos_token_id == [0, 1]


def test_code_goes_along_only_where_it_is_trusted(folder, tmp_path):
    out = compressed(folder, tmp_path / "out", "--trust-remote-code")
    assert (out / "modeling_own.py").read_bytes() == (folder / "modeling_own.py").read_bytes()


def test_what_is_fetched_is_what_goes_along_and_one_copy_of_the_weights():
    from fnmatch import fnmatch

    for name in [*BESIDE, "tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "tiktoken.tiktoken"]:
        assert any(fnmatch(name, pattern) for pattern in PATTERNS), name
        assert reason_to_leave(name) is None, name
    for name in ("consolidated.safetensors", "pytorch_model.bin", "modeling_own.py", "original/consolidated.00.pth"):
        assert not any(fnmatch(name, pattern) for pattern in PATTERNS), name
    assert any(fnmatch("model-00001-of-00002.safetensors", pattern) for pattern in PATTERNS)


def test_a_link_is_followed_and_hidden_files_stay(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs/1").write_text("{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/generation_config.json").symlink_to(tmp_path / "blobs/1")
    (tmp_path / "snapshot/.gitattributes").write_text("x")
    (tmp_path / "out").mkdir()
    assert list(hand_on(tmp_path / "snapshot", tmp_path / "out")["files"]) == ["generation_config.json"]
    assert not (tmp_path / "out/generation_config.json").is_symlink()


@needs_llama_cpp
def test_a_model_of_sentencepiece_becomes_gguf_and_is_checked(tmp_path, capsys):
    """llama.cpp's converter reads tokenizer.model, which used to be dropped."""
    where = tmp_path / "model"
    tiny("llama").save_pretrained(where)
    sentencepiece(where)
    settings = json.loads((where / "tokenizer_config.json").read_text()) | {"tokenizer_class": "LlamaTokenizer"}
    (where / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False}))
    (where / "LICENSE").write_text("the licence")
    factored = compressed(where, tmp_path / "factored")
    assert (factored / "tokenizer.model").read_bytes() == (where / "tokenizer.model").read_bytes()
    call = ["export", str(factored), "--format", "gguf", "--no-check", "--out", str(tmp_path / "gguf")]
    assert cli.main(call) == 0, capsys.readouterr().err
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    import gguf

    assert gguf.GGUFReader(file).fields["tokenizer.ggml.model"].contents() == "llama"
    assert (tmp_path / "gguf/LICENSE").read_text() == "the licence"
    assert load_pretrained(file)[1] is not None


@needs_llama_cpp
def test_a_gguf_file_is_checked_unless_that_is_refused(folder, tmp_path, capsys):
    factored = compressed(folder, tmp_path / "factored")
    assert cli.main(["export", str(factored), "--format", "gguf", "--out", str(tmp_path / "gguf")]) == 0
    assert "llama.cpp: " in capsys.readouterr().out
    account = json.loads((tmp_path / "gguf/export.json").read_text())
    assert account["check"]["largest_logprob_difference"] < 1e-3
    assert account["handed_on"]["files"].keys() == {"LICENSE", "NOTICE.txt", "USE_POLICY.md"}
    assert "in the GGUF file" in account["handed_on"]["left"]["generation_config.json"]
    call = ["export", str(factored), "--format", "gguf", "--no-check", "--out", str(tmp_path / "other")]
    assert cli.main(call) == 0
    assert "check" not in json.loads((tmp_path / "other/export.json").read_text())


@needs_llama_cpp
@pytest.mark.parametrize("plain", [False, True], ids=["anybody's", "compressed and written out"])
def test_a_plain_model_becomes_gguf_and_needs_nothing_else(folder, tmp_path, plain, capsys):
    """The dense baseline beside a compressed model is one command, too."""
    model = compressed(folder, tmp_path / "plain", "--plain") if plain else folder
    assert cli.main(["export", str(model), "--format", "gguf", "--out", str(tmp_path / "gguf")]) == 0
    account = json.loads((tmp_path / "gguf/export.json").read_text())
    assert account["check"]["largest_logprob_difference"] < 1e-3
    assert account["parameters"]["folded"] == account["parameters"]["total"]
    card = (tmp_path / "gguf/README.md").read_text()
    assert ("compressed by `svd`" if plain else "masa changed no weight of it") in card
    assert ("weight-sharing" in card) == plain
    capsys.readouterr()
    assert cli.main(["export", str(model), "--out", str(tmp_path / "hf")]) == 2
    assert "plain model already" in (said := capsys.readouterr().err) and "--format gguf" in said


@needs_llama_cpp
@pytest.mark.parametrize(("name", "kind", "error"), [("q8_0", "Q8_0", 0.01), ("q4_0", "Q4_0", 0.12)])
def test_llama_cpps_types_of_few_bits_are_an_option(folder, tmp_path, name, kind, error, capsys):
    call = ["export", str(folder), "--format", "gguf", "--no-check", "--out"]
    assert cli.main([*call, str(tmp_path / "whole")]) == 0
    assert cli.main([*call, str(tmp_path / "few"), "--type", name]) == 0
    said = capsys.readouterr().out
    (whole,), (few,) = ((tmp_path / out).glob("*.gguf") for out in ("whole", "few"))
    assert few.name.endswith(f"-{kind}.gguf") and few.stat().st_size < whole.stat().st_size
    types = json.loads((tmp_path / "few/export.json").read_text())["types"]
    assert types[kind] > 0 and f"{types[kind]} {kind}" in said
    assert f"{types[kind]} {kind}" in (tmp_path / "few/README.md").read_text()
    exact, found = (load_pretrained(file, cache=tmp_path / "read")[0].state_dict() for file in (whole, few))
    assert exact.keys() == found.keys()
    worst = max(
        float((found[k].float() - w.float()).norm() / w.float().norm().clamp_min(1e-9)) for k, w in exact.items()
    )
    assert 0 < worst < error


@pytest.mark.parametrize(
    ("more", "message"),
    [(["--type", "q8_0"], "--type belongs to --format gguf"), (["--format", "gguf", "--type", "q9"], "GGUF type 'q9'")],
)
def test_a_type_that_cannot_be_is_refused_before_the_work(folder, tmp_path, more, message, capsys):
    assert cli.main(["export", str(folder), *more, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@needs_llama_cpp
def test_what_llama_cpp_does_not_know_is_refused_before_the_work(folder, tmp_path, capsys):
    factored = compressed(folder, tmp_path / "factored")
    config = json.loads((factored / "config.json").read_text())
    (factored / "config.json").write_text(json.dumps(config | {"architectures": ["OwnForCausalLM"]}))
    capsys.readouterr()
    assert cli.main(["export", str(factored), "--format", "gguf", "--out", str(tmp_path / "gguf")]) == 2
    error = capsys.readouterr().err
    assert "does not know OwnForCausalLM" in error and "folded" not in error
    assert not (tmp_path / "gguf").exists()


# --------------------------------------------------------------------------------------------------- transformers 4.57


@pytest.mark.parametrize("name", MODELS)
def test_the_configuration_says_rope_by_both_versions_names(tmp_path, name):
    """What 4.57 reads must be there; and 5 must find in the file what it found without the further names."""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    before = AutoConfig.from_pretrained(tmp_path)
    write_for_both(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    after = AutoConfig.from_pretrained(tmp_path)
    rope = getattr(before, "rope_parameters", None)
    assert getattr(after, "rope_parameters", None) == rope
    if rope:
        whole = rope.get("full_attention", rope)
        assert written["rope_theta"] == whole["rope_theta"]
        assert (written["rope_scaling"] or {"rope_type": "default"})["rope_type"] == whole["rope_type"]
        for key in set(whole) - {"rope_theta", "partial_rotary_factor", "rope_type"}:
            assert written["rope_scaling"][key] == whole[key]
    ids = torch.randint(4, 250, (1, 24))
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert write_for_both(tmp_path) == [], "twice is once"


def test_rope_that_4_cannot_say_is_not_said_half():
    kinds = {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}
    kinds["sliding_attention"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    assert "rope_theta" not in earlier_names({"rope_parameters": kinds})
