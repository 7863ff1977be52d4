"""GGUF files, read back: every architecture that is exported, every part, every key and every tensor."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT
from gguf_models import MODELS, SENTENCEPIECE, byte_level, convert, sentencepiece, tiny
from transformers import AutoModelForCausalLM

from masa import cli
from masa.errors import MasaError
from masa.models.both_versions import write_for_both
from masa.models.gguf_config import llama3
from masa.models.gguf_reading import parts_of, read_gguf
from masa.models.pretrained import convert_gguf

gguf = pytest.importorskip("gguf")
needs_llama_cpp = pytest.mark.skipif(
    not all(map(find_spec, ("xllamacpp", "sentencepiece"))), reason="llama.cpp is not installed"
)
EXACT = 1e-5
"""Nats between llama.cpp and transformers in float32."""
TABLES = {
    "gemma",
    "gemma2",
    "gemma3",
    "phi2",
    "starcoder2",
    "gpt2",
    "gpt_neox",
    "gpt_neox, one after the other",
    "bloom",
}
"""Those with GELU, which llama.cpp takes from a table in half precision."""


def folder_of(root, name):
    return root / name.replace(", ", "-").replace(" ", "-")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every model of the table, as a folder and as a GGUF file beside it, written by llama.cpp's converter."""
    from masa.models import gguf_writing as exporting

    root, folders = tmp_path_factory.mktemp("gguf"), []
    for name, (kind, _) in MODELS.items():
        folders.append(folder_of(root, name))
        tiny(name).save_pretrained(folders[-1])
        (sentencepiece if kind in SENTENCEPIECE else byte_level)(folders[-1])
        write_for_both(folders[-1])
    convert(exporting.converter(None, ROOT / "cache"), folders)
    return root


def ids():
    return torch.randint(4, 250, (1, 24), generator=torch.Generator().manual_seed(3))


def chances(model):
    with torch.no_grad():
        return model(ids()).logits[0, -1].log_softmax(-1)


def built(file):
    """The model of a file, without a folder between."""
    empty, weights = read_gguf(file)
    model = type(empty)(empty.config).eval()
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight", "embed_out.weight"}
    model.tie_weights()
    return model


@needs_llama_cpp
@pytest.mark.parametrize("name", MODELS)
def test_read_back_as_llama_cpp_and_the_original_compute(exported, name):
    from masa.export.llama_cpp import LlamaCpp

    folder = folder_of(exported, name)
    file = folder.with_name(f"{folder.name}.gguf")
    original = chances(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert float(original.max() - original.min()) > 1, "a model that prefers nothing shows nothing"
    torch.testing.assert_close(chances(built(file)), original, rtol=0, atol=EXACT)
    tokens = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    theirs = LlamaCpp(file, 64).log_probabilities(ids()[0].tolist(), tokens.index("a"))
    assert len(theirs) == len(original)
    gap = max(abs(float(original[token]) - value) for token, value in theirs.items())
    assert gap < (5e-3 if name in TABLES else EXACT)


# ------------------------------------------------------------------------------------------- files that are not whole


def rewritten(file, out, keys=None, without=(), tensors=None, each=0):
    """A GGUF file with other keys or tensors, or in parts of ``each`` tensors."""
    reader = gguf.GGUFReader(file)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch, split_max_tensors=each)
    kinds = gguf.GGUFValueType
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key == "general.architecture" or key in (keys or {}):
            continue
        inner = field.types[-1] if field.types[0] == kinds.ARRAY else None
        writer.add_key_value(key, field.contents(), field.types[0], inner)
    for key, value in (keys or {}).items():
        if value is None:
            continue
        kind = kinds.get_type(value)
        writer.add_key_value(key, value, kind, kinds.get_type(value[0]) if kind == kinds.ARRAY else None)
    for tensor in reader.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, np.array(tensor.data))
    for name, values in (tensors or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def llama(exported):
    return exported / "llama.gguf"


@needs_llama_cpp
def test_a_split_file_is_read_whole_whichever_part_is_named(llama, tmp_path):
    rewritten(llama, tmp_path / "model.gguf", each=12)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-{n:05}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        assert parts_of(part) == parts
        assert torch.equal(chances(built(part)), chances(built(llama)))
    whole = convert_gguf(parts[1], tmp_path / "whole")
    assert torch.equal(chances(AutoModelForCausalLM.from_pretrained(whole)), chances(built(llama)))
    parts[1].unlink()
    with pytest.raises(MasaError, match=r"one of 3 parts, and model-00002-of-00003\.gguf is missing"):
        read_gguf(parts[0])
    parts[2].rename(tmp_path / "other.gguf")
    with pytest.raises(MasaError, match=r"call it NAME-00001-of-00003\.gguf"):
        read_gguf(tmp_path / "other.gguf")


@needs_llama_cpp
def test_parts_that_do_not_belong_together(llama, tmp_path):
    rewritten(llama, tmp_path / "model.gguf", each=12)
    one, two, three = sorted(tmp_path.glob("*.gguf"))
    two.write_bytes(three.read_bytes())
    with pytest.raises(MasaError, match="part 2 says that it is part 3"):
        read_gguf(one)


@needs_llama_cpp
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"without": ("blk.1.ffn_up.weight",)}, r"lacks weights of its model: \['blk\.1\.ffn_up\.weight'\]"),
        ({"without": ("token_embd.weight",)}, r"lacks the tensor token_embd\.weight"),
        ({"tensors": {"blk.0.attn_sinks.weight": np.ones(4, np.float32)}}, r"no place for here: \['blk\.0\.attn_sinks"),
        ({"keys": {"llama.attention.clamp_kqv": 3.0}}, r"llama\.attention\.clamp_kqv = 3\.0 is not taken over"),
        ({"keys": {"llama.expert_count": 8}}, r"llama\.expert_count = 8 is not taken over"),
        ({"keys": {"llama.attention.value_length": 4}}, r"attention\.value_length = 4 is not taken over"),
        ({"keys": {"llama.rope.dimension_count": 4}}, r"rope\.dimension_count = 4 is not taken over"),
        ({"keys": {"llama.attention.sliding_window": 16}}, r"attention\.sliding_window = 16 is not taken over"),
        ({"keys": {"llama.something.new": 1}}, r"llama\.something\.new = 1 is not taken over"),
        ({"keys": {"llama.rope.scaling.type": "su"}}, r"rope\.scaling\.type = su is not taken over"),
        ({"keys": {"llama.rope.scaling.attn_factor": 1.5}}, r"rope\.scaling\.attn_factor = 1\.5 is not taken over"),
        ({"keys": {"llama.feed_forward_length": [48, 48, 32]}}, r"feed_forward_length differs from layer to layer"),
        ({"keys": {"llama.vocab_size": 99}}, r"has 304 embeddings, but its vocab_size is 99"),
        ({"keys": {"llama.block_count": 4}}, r"lacks weights of its model: \['blk\.3\."),
        ({"keys": {"llama.block_count": 2}}, r"no place for here: \['blk\.2\."),
        ({"keys": {"llama.embedding_length": None}}, r"lacks the key llama\.embedding_length"),
        ({"keys": {"llama.context_length": None}}, r"lacks the key llama\.context_length"),
        ({"keys": {"llama.attention.layer_norm_rms_epsilon": None}}, r"lacks the key llama\.attention\.layer_norm_rms"),
        (
            {"keys": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 4.0}},
            r"rope\.scaling\.factor = 4\.0 is not taken over beside longrope",
        ),
        ({"keys": {"llama.attention.head_count": 3}}, r"multiple of the number of attention heads \(3\)"),
        ({"tensors": {"rope_freqs.weight": np.float32([1, 0, 1, 1])}}, r"rope_freqs\.weight holds factors that are no"),
        (
            {"tensors": {"rope_freqs.weight": np.float32([1, np.nan, 1, 1])}},
            r"rope_freqs\.weight holds factors that are",
        ),
        ({"tensors": {"rope_freqs.weight": np.float32([1, 1, 1])}}, r"rope_freqs\.weight has 3 factors for heads of 8"),
        ({"keys": {"general.type": "adapter"}}, r"holds no model, but 'adapter'"),
        (
            {"without": ("output_norm.weight",), "tensors": {"output_norm.weight": np.full(32, np.nan, np.float32)}},
            r"output_norm\.weight holds NaN or infinity",
        ),
    ],
)
def test_what_is_not_taken_over_is_named(llama, tmp_path, change, message):
    file = rewritten(llama, tmp_path / "changed.gguf", **change)
    with pytest.raises(MasaError, match=message) as caught:
        convert_gguf(file, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["changed.gguf"]


@needs_llama_cpp
@pytest.mark.parametrize(
    "keys",
    [
        {"llama.attention.sliding_window": 0, "llama.expert_count": 0, "llama.attention.causal": True},
        {
            "llama.rope.scaling.type": "none",
            "llama.rope.scaling.finetuned": False,
            "llama.feed_forward_length": [48] * 3,
        },
        {"llama.attention.key_length": 8, "llama.attention.value_length": 8},
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.0},
    ],
)
def test_what_changes_nothing_is_no_reason_to_refuse(llama, tmp_path, keys):
    file = rewritten(llama, tmp_path / "changed.gguf", keys)
    assert torch.equal(chances(built(file)), chances(built(llama)))


@needs_llama_cpp
def test_more_numbers_to_rotate_than_a_head_has(exported, tmp_path):
    file = rewritten(exported / "phi3.gguf", tmp_path / "changed.gguf", {"phi3.rope.dimension_count": 16})
    with pytest.raises(MasaError, match=r"rope\.dimension_count = 16 are not numbers of a head of 8"):
        convert_gguf(file, tmp_path / "out")


@needs_llama_cpp
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("llama", {"llama.rope.scaling.factor": 4.0}),  # of no kind: linear
        ("llama", {"rope_freqs.weight": np.float32([1, 0.25, 0.5, 1])}),  # none above 1
        ("granite", {"granite.attention.scale": None}),
        ("cohere", {"command-r.logit_scale": None}),
        ("granite", {"granite.attention.scale": 0.0, "granite.embedding_scale": 0.0, "granite.residual_scale": None}),
    ],
)
def test_what_is_missing_is_what_llama_cpp_takes_it_for(exported, tmp_path, name, keys):
    from masa.export.llama_cpp import LlamaCpp

    original = exported / f"{name}.gguf"
    tensors = {name: value for name, value in keys.items() if name == "rope_freqs.weight"}
    keys = {name: value for name, value in keys.items() if name not in tensors}
    file = rewritten(original, tmp_path / "changed.gguf", keys, tensors=tensors)
    found = chances(built(file))
    assert float((found - chances(built(original))).abs().max()) > 0.1, "or it would not matter"
    tokens = gguf.GGUFReader(file).fields["tokenizer.ggml.tokens"].contents()
    theirs = LlamaCpp(file, 64).log_probabilities(ids()[0].tolist(), tokens.index("a"))
    assert max(abs(float(found[token]) - value) for token, value in theirs.items()) < EXACT


@needs_llama_cpp
def test_an_architecture_that_is_not_read(llama, tmp_path, capsys):
    reader = gguf.GGUFReader(llama)
    writer = gguf.GGUFWriter(tmp_path / "mamba.gguf", "mamba")
    writer.add_tensor(reader.tensors[0].name, np.array(reader.tensors[0].data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    call = ["compress", str(tmp_path / "mamba.gguf"), "--method", "svd", "--out", str(tmp_path / "out")]
    assert cli.main(call) == 2
    error = capsys.readouterr().err
    assert "the architecture 'mamba'" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------------ Llama 3's RoPE


def factors(theta, half, factor, low, high, original):
    """As llama.cpp's converter writes them (conversion/llama.py, generate_extra_tensors)."""
    found = []
    for frequency in (theta ** -(i / half) for i in range(half)):
        wave = 2 * np.pi / frequency
        if wave < original / high:
            found.append(1.0)
        elif wave > original / low:
            found.append(factor)
        else:
            smooth = (original / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("theta", "half", "rule"),
    [
        (5e5, 64, (8.0, 1.0, 4.0, 8192)),  # Llama 3.1
        (5e5, 32, (32.0, 1.0, 4.0, 8192)),  # Llama 3.2 1B
        (1e4, 64, (16.0, 1.0, 4.0, 2048)),
        (5e5, 64, (3.7, 1.3, 5.1, 6000)),
    ],
)
def test_llama_3s_rule_is_found_in_its_factors(theta, half, rule):
    given = factors(theta, half, *rule)
    found = llama3(given.astype(np.float64), theta)
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    np.testing.assert_allclose(factors(theta, half, *(found[name] for name in names)), given, rtol=3e-7)
    if rule[3] == 8192:
        assert tuple(found[name] for name in names) == rule


def test_factors_of_no_rule_are_kept_as_they_are():
    assert llama3(np.array([1.0, 3.0, 2.0, 8.0]), 1e4) is None
