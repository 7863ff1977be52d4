"""Quantised checkpoints: the right numbers, or a refusal that says the way on."""

from __future__ import annotations

import json

import pytest
import torch
from compression_models import tiny_llama, tokens
from safetensors.torch import load_file, save_file

import masa
from masa import MasaError, cli
from masa.models.pretrained import load_pretrained

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "attention_bias": False}


def quantised(folder, block, **sizes):
    """A folder in float8 by blocks, and what its numbers are in float64: q * s."""
    tiny_llama(**(SIZES | sizes)).save_pretrained(folder)
    stored, exact = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if "_proj.weight" not in name:
            stored[name] = tensor.to(torch.bfloat16)
            exact[name] = stored[name].double()
            continue
        rows, columns = (-(-size // width) for size, width in zip(tensor.shape, block, strict=True))
        scales = torch.rand(rows, columns) * 0.01 + 1e-4
        wide = scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: len(tensor), : tensor.shape[1]]
        stored[name] = (tensor / wide).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scales
        exact[name] = stored[name].double() * wide.double()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    configure(folder, quantization_config=FP8 | {"weight_block_size": list(block)}, dtype="bfloat16")
    return exact


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_float8_by_blocks_is_multiplied_out(tmp_path):
    exact = quantised(tmp_path / "fp8", (16, 16))
    model, _ = load_pretrained(tmp_path / "fp8")
    state = model.state_dict()
    for name, expected in exact.items():
        assert state[name].dtype == torch.float32, "the scales are, and the products need it"
        torch.testing.assert_close(state[name].double(), expected, rtol=2**-23, atol=0)
    assert not hasattr(model.config, "quantization_config")
    model, _ = load_pretrained(tmp_path / "fp8", dtype=torch.bfloat16)
    for name, expected in exact.items():
        torch.testing.assert_close(model.state_dict()[name].double(), expected, rtol=2**-8, atol=0)


def test_a_float8_model_is_compressed_and_written_plain(tmp_path):
    exact = quantised(tmp_path / "fp8", (16, 16))
    out = tmp_path / "out"
    call = ["compress", str(tmp_path / "fp8"), "--method", "svd", "--projections", "qk", "--plain", "--out", str(out)]
    assert cli.main(call) == 0
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    written = load_file(out / "model.safetensors")
    assert not [name for name in written if "scale" in name]
    kept = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(written[kept].double(), exact[kept], rtol=2**-23, atol=0)
    model, _ = load_pretrained(tmp_path / "fp8")
    assert masa.calibrate(model, tokens())
    masa.share(model, {"method": "masa", "atoms": 1}).save_pretrained(tmp_path / "shared")
    masa.load(tmp_path / "shared")


def test_blocks_that_transformers_would_place_wrongly_are_refused(tmp_path):
    quantised(tmp_path / "fp8", (16, 16), intermediate_size=24)  # two blocks of scales: 16 rows and 8, not 12 and 12
    with pytest.raises(MasaError, match=r"quantised \(fp8\).*has 24 numbers a side, no multiple of .*\[16, 16\]"):
        load_pretrained(tmp_path / "fp8")


def test_a_matrix_without_scales_is_named(tmp_path):
    quantised(tmp_path / "fp8", (16, 16))
    stored = load_file(tmp_path / "fp8/model.safetensors")
    lost = "model.layers.0.self_attn.q_proj.weight"
    save_file({n: t for n, t in stored.items() if n != f"{lost}_scale_inv"}, tmp_path / "fp8/model.safetensors")
    with pytest.raises(MasaError, match=rf"{lost} has no scales beside it"):
        load_pretrained(tmp_path / "fp8")


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8])
def test_weights_of_another_kind_without_a_word_in_the_configuration(tmp_path, kind):
    tiny_llama(**SIZES).save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    save_file(stored | {name: stored[name].to(kind)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(MasaError, match=rf"{name} is stored as (F8_E4M3|I8), and config\.json says nothing"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "something-new"])
def test_what_is_not_multiplied_out_is_refused_in_one_line(tmp_path, capsys, method):
    tiny_llama(**SIZES).save_pretrained(tmp_path / "model")
    configure(tmp_path / "model", quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    call = ["compress", str(tmp_path / "model"), "--method", "svd", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert cli.main(call) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"is quantised ({method})" in error and "Give the original folder" in error
    assert not (tmp_path / "out").exists()
