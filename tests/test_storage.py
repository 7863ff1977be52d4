"""Bytes of whole files: few bits, llama.cpp's types of the same model, and the same function off its grid."""

from __future__ import annotations

import json

import pytest
import torch
from compression_models import statistics, tiny_llama, tokens
from gguf_models import byte_level
from test_export import needs_llama_cpp

import masa
from masa.compression import compress
from masa.compression.storage import converted, resident_bytes, stored
from masa.errors import MasaError
from masa.models.pretrained import fetch, load_pretrained, locate
from masa.models.rescaling import RANGE, rescale


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A float16 model whose rows are whole blocks of llama.cpp's types, with a tokenizer."""
    root = tmp_path_factory.mktemp("storage")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 304}
    model = tiny_llama(**sizes, attention_bias=False)
    model.save_pretrained(root / "model")
    byte_level(root / "model")
    return root / "model"


@torch.no_grad()
def logits(model, ids=None):
    return model(input_ids=tokens() if ids is None else ids, use_cache=False).logits.float()


def test_a_rescaled_model_is_the_same_function_with_other_numbers(folder):
    before, _ = load_pretrained(folder)
    after, _ = load_pretrained(folder)
    rescale(after, 3)
    assert torch.allclose(logits(before), logits(after), atol=1e-4)
    changed = 0
    for (name, old), new in zip(before.named_parameters(), after.parameters(), strict=True):
        if "q_norm" in name or "embed" in name or name in ("model.norm.weight", "lm_head.weight"):
            assert torch.equal(old, new)
            continue
        ratio = (new / old)[old != 0]
        assert float(ratio.min()) > RANGE**-2.01 and float(ratio.max()) < RANGE**2.01 and float(ratio.std()) > 0.01, (
            name
        )
        changed += 1
    assert changed == 6 * 9
    again, _ = load_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(rescale(again, 3).parameters(), after.parameters(), strict=True))
    assert not torch.equal(
        rescale(again, 4).model.layers[0].mlp.up_proj.weight, after.model.layers[0].mlp.up_proj.weight
    )


def test_a_model_of_another_form_is_not_rescaled():
    with pytest.raises(MasaError, match="cannot be rescaled"):
        rescale(tiny_llama(), 0)  # biases


def test_a_rescaled_copy_is_fetched_with_its_tokenizer_and_kept(folder, tmp_path):
    spec = {"source": f"file:{folder}", "rescaled": 5}
    manifest = fetch("twin", spec, tmp_path / "cache", None, tmp_path / "twin")
    model, found = load_pretrained(locate(tmp_path / "twin"))
    assert found is not None and torch.allclose(logits(model), logits(load_pretrained(folder)[0]), atol=1e-4)
    assert fetch("twin", spec, tmp_path / "cache", None, tmp_path / "again")["sha256"] == manifest["sha256"]
    plain = fetch("plain", {"source": f"file:{folder}"}, tmp_path / "cache", None, tmp_path / "plain")
    assert plain["sha256"]["model.safetensors"] != manifest["sha256"]["model.safetensors"]


def test_bytes_are_those_of_the_file_and_memory_follows_it(folder, tmp_path):
    model, _ = load_pretrained(folder)
    converted(model, "float16", None)
    whole, account = stored(model, folder, {"embeddings": None, "gguf": None}, tmp_path)
    assert whole is model and account["types"] is None
    weights = 2 * sum(p.numel() for p in model.parameters())
    assert weights <= account["file_bytes"] < weights + 10_000  # and a header
    assert weights < 1.5 * account["resident_bytes"] < 3 * weights + 4_000_000
    model, _ = compress(model, "sparse-magnitude", None, 0.3, projections="all")
    exact = logits(model)
    _, large = stored(model, folder, {"embeddings": None, "gguf": None}, tmp_path)
    few, small = stored(model, folder, {"embeddings": 8, "gguf": None}, tmp_path)
    assert large["file_bytes"] < 0.85 * account["file_bytes"]
    assert large["file_bytes"] - small["file_bytes"] == pytest.approx(304 * 64 * (2 - 33 / 32), abs=2_000)
    assert not list(tmp_path.iterdir())
    assert float((logits(few) - exact).norm() / exact.norm()) < 0.05


def test_memory_of_a_process_that_runs_a_model_is_that_of_its_file(tmp_path):
    """Factors stay factors in memory: what a folder saves on disk is saved there, too."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "vocab_size": 512}
    model = tiny_llama(**sizes, attention_bias=False)
    masa.save(model, tmp_path / "dense")
    model, _ = compress(model, "sparse-magnitude", None, 0.5, projections="all")
    masa.save(model, tmp_path / "sparse")
    for name in ("dense", "sparse"):
        file = (tmp_path / name / "model.safetensors").stat().st_size
        assert 0.8 * file < resident_bytes(tmp_path / name) < 1.3 * file + 4 * 256 * 1024, name
    (tmp_path / "dense" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(MasaError, match="cannot be loaded again"):
        resident_bytes(tmp_path / "dense")


@needs_llama_cpp
@pytest.mark.parametrize(("name", "kind", "error"), [("q8_0", "Q8_0", 0.06), ("q4_0", "Q4_0", 0.6)])
def test_llama_cpps_file_is_read_again_and_scored_in_the_same_runtime(folder, tmp_path, name, kind, error):
    model, _ = load_pretrained(folder)
    converted(model, "float16", None)
    read, account = stored(model, folder, {"embeddings": None, "gguf": name}, tmp_path)
    assert account["types"][kind] > 0 and account["resident_bytes"] is None
    assert type(read) is type(model) and not any(p.is_meta for p in read.parameters())
    exact = logits(load_pretrained(folder)[0])
    assert 0 < float((logits(read) - exact).norm() / exact.norm()) < error
    dense = sum(p.numel() for p in model.parameters())
    assert account["file_bytes"] < 1.3 * dense + 60_000  # with the tokenizer and what the file says of the model


def test_statistics_are_of_the_model_before_it_is_converted():
    model, found = tiny_llama(), statistics()
    half = converted(model, "bfloat16", found)
    assert half is not found and half.model_sha256 != found.model_sha256
    compress(model, "svd-llm", half, 0.3)
    with pytest.raises(MasaError):
        converted(tiny_llama(seed=1), "bfloat16", found)
    huge = tiny_llama()
    huge.model.norm.weight.data.fill_(1e6)
    with pytest.raises(MasaError, match="cannot hold"):
        converted(huge, "float16", None)


def test_what_a_configuration_may_say_of_storage(tmp_path):
    from masa.study import compressions, config

    merged = config.load()
    for storage, said in (
        ({"gguf": "q9"}, "storage: gguf"),
        ({"gguf": "q8_0", "embeddings": 8}, "gguf decides"),
        ({"gguf": "q8_0", "dtype": None}, "needs a dtype"),
        ({"embeddings": 8}, "compressed model"),
    ):
        wrong = json.loads(json.dumps(merged))
        wrong["compressions"]["bytes-q8_0"]["storage"] = storage
        with pytest.raises(MasaError, match=said):
            compressions.check(wrong)
    spec = compressions.run_spec(merged, "SmolLM2-135M", "bytes-sparse")
    assert spec["storage"] == {"dtype": "float16", "embeddings": 8, "gguf": None}
    assert compressions.run_spec(merged, "SmolLM2-135M", "svd-llm")["storage"] is None
