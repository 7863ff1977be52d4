"""Pretrained folders and GGUF files that used to be read wrong, or not at all, without a word."""

from __future__ import annotations

import json

import pytest
import torch
from compression_models import tiny_llama, tokens
from safetensors.torch import load_file, save_file
from test_compression_pretrained import TEXT, tokenizer
from transformers import AutoModelForCausalLM

import masa
from masa import MasaError, cli
from masa.models.pretrained import load_pretrained, save_plain

WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def change(folder, edit):
    """The folder's tensors, changed."""
    tensors = load_file(folder / WEIGHTS)
    tensors = edit(dict(tensors)) or tensors
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS, {"format": "pt"})


def configure(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model):
    with torch.no_grad():
        return model(tokens()).logits


def test_a_head_that_differs_from_the_embeddings_is_kept_though_the_config_says_tied(folder, tmp_path):
    change(folder, lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"].flip(0)})
    model, _ = load_pretrained(folder)
    expected = logits(AutoModelForCausalLM.from_pretrained(folder).eval())
    assert torch.equal(logits(model), expected)
    assert not model.config.tie_word_embeddings
    tied = tiny_llama()
    assert float((expected - logits(tied)).abs().max()) > 0.1, "or it would not matter"
    save_plain(model, tmp_path / "again")
    assert torch.equal(logits(load_pretrained(tmp_path / "again")[0]), expected)


def test_a_tied_file_that_keeps_the_head_alone(folder):
    expected = logits(load_pretrained(folder)[0])
    change(folder, lambda t: {n.replace("model.embed_tokens", "lm_head"): x for n, x in t.items()})
    model, _ = load_pretrained(folder)
    assert torch.equal(logits(model), expected)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod.", "_orig_mod.module."])
def test_names_of_compiled_and_parallel_models(folder, prefix):
    expected = logits(load_pretrained(folder)[0])
    change(folder, lambda t: {prefix + name: tensor for name, tensor in t.items()})
    assert torch.equal(logits(load_pretrained(folder)[0]), expected)


@pytest.mark.parametrize("plain", [[], ["--plain"]])
def test_what_is_read_under_wrapped_names_is_written_under_the_models_own(folder, tmp_path, plain):
    change(folder, lambda t: {"module._orig_mod." + name: tensor for name, tensor in t.items()})
    call = ["compress", str(folder), "--method", "svd", "--device", "cpu", "--out", str(tmp_path / "out"), *plain]
    assert cli.main(call) == 0
    assert not any("_orig_mod" in n or "module" in n for n in load_file(tmp_path / "out" / WEIGHTS))
    masa.load(tmp_path / "out")


def test_shards_without_their_index_are_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(MasaError, match=r"model\.safetensors\.index\.json is missing, .* shards"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    "values", [{"num_attention_heads": 5}, {"hidden_size": "48"}, {"rope_parameters": {"rope_type": "unheard"}}]
)
def test_a_strange_value_of_the_config_is_said_in_one_line(folder, values):
    configure(folder, **values)
    with pytest.raises(MasaError, match=r"config\.json does not describe a causal LM") as caught:
        load_pretrained(folder)
    said = str(caught.value)
    assert "\n" not in said and not said.endswith(":") and str(next(iter(values.values()))).split("'")[-2:][0] in said


def test_names_of_blocks_that_are_wrapped_one_by_one(folder):
    expected = logits(load_pretrained(folder)[0])

    def wrap(found):
        found = {name.replace(".self_attn.", "._orig_mod.self_attn."): x for name, x in found.items()}
        return {name.replace("model.layers.1.", "model.layers.1._fsdp_wrapped_module."): x for name, x in found.items()}

    change(folder, wrap)
    assert torch.equal(logits(load_pretrained(folder)[0]), expected)


def test_a_tensor_that_two_shards_hold_is_named(tmp_path):
    tiny_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    first, second = sorted(tmp_path.glob("*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor + 1}, second, {"format": "pt"})
    with pytest.raises(MasaError, match=rf"{name} is stored in .*{first.name} and in {second.name}"):
        load_pretrained(tmp_path)


def test_a_file_of_a_folder_is_no_model(folder):
    with pytest.raises(MasaError, match=rf"is a file, and no GGUF file: give the folder of the model, {folder}"):
        load_pretrained(folder / WEIGHTS)


def test_a_folder_that_is_no_model_is_told_what_it_is(folder, tmp_path):
    for number, (made, message) in enumerate(
        (
            ("model_index.json", "a pipeline of diffusers"),
            ("tokenizer.json", "a tokenizer alone"),
            ("part.gguf", r"name one, as .*part\.gguf"),
            ("inner/config.json", r"There is one in .*inner"),
        )
    ):
        where = tmp_path / str(number)
        (where / made).parent.mkdir(parents=True)
        (where / made).write_text("{}")
        with pytest.raises(MasaError, match=rf"has no config\.json.*{message}"):
            load_pretrained(where)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere/else"}')
    with pytest.raises(MasaError, match=r"holds an adapter.*merge_and_unload"):
        load_pretrained(folder)


OWN = """
from transformers import LlamaConfig, LlamaForCausalLM
raise SystemExit("code of the folder has run")
"""


def test_code_of_a_folder_is_not_run_unless_that_is_said(folder, tmp_path, capsys):
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    configure(folder, model_type="of-my-own", auto_map=names)
    (folder / "own.py").write_text(OWN)
    call = ["compress", str(folder), "--method", "svd", "--out", str(tmp_path / "out")]
    capsys.readouterr()
    assert cli.main(call) == 2
    error = capsys.readouterr().err
    assert "folder's own Python alone (own.py)" in error and "--trust-remote-code" in error and error.count("\n") == 1
    code = OWN.split("\n")[1] + (
        "\nclass OwnConfig(LlamaConfig):\n    model_type = 'of-my-own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    (folder / "own.py").write_text(code)
    assert cli.main([*call, "--trust-remote-code"]) == 0
    assert (tmp_path / "out/own.py").read_text() == code


def test_dtype_of_the_command_line(folder, tmp_path, capsys):
    change(folder, lambda t: {n: (x * 60 if "embed" in n else x).to(torch.float16) for n, x in t.items()})
    change(folder, lambda t: {n: (x * 400 if "mlp" in n else x) for n, x in t.items()})  # overflows on the way
    tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text(" ".join(TEXT * 4))
    call = ["calibrate", str(folder), "--text", str(tmp_path / "text.txt"), "--samples", "4", "--length", "16"]
    call += ["--device", "cpu", "--projections", "qkvogud", "--out", str(tmp_path / "statistics")]
    assert cli.main(call) == 2
    assert "--dtype bfloat16 or float32" in capsys.readouterr().err
    assert cli.main([*call, "--dtype", "float32"]) == 0
    more = [
        "--method",
        "svd-llm",
        "--device",
        "cpu",
        "--calibration",
        str(tmp_path / "statistics"),
        "--dtype",
        "float32",
    ]
    assert cli.main(["compress", str(folder), *more, "--out", str(tmp_path / "out")]) == 0
    assert {p.dtype for p in masa.load(tmp_path / "out").parameters()} == {torch.float32}
    more[-1] = "float8"
    assert cli.main(["compress", str(folder), *more, "--out", str(tmp_path / "other")]) == 2
    assert "dtype 'float8' does not exist" in capsys.readouterr().err


def test_a_dtype_that_cannot_hold_what_is_stored(folder, tmp_path, capsys):
    change(folder, lambda t: t | {"model.norm.weight": t["model.norm.weight"] * 1e6})
    with pytest.raises(MasaError, match=r"model\.norm\.weight has numbers that float16 cannot hold.*--dtype bfloat16"):
        load_pretrained(folder, dtype=torch.float16)
    call = ["compress", str(folder), "--method", "svd", "--dtype", "float16", "--out", str(tmp_path / "out")]
    assert cli.main(call) == 2
    assert "model.norm.weight has numbers that float16 cannot hold" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_weights_that_the_config_has_no_place_for_are_named(folder):
    layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
    configure(folder, num_hidden_layers=layers - 1)
    with pytest.raises(MasaError, match=rf"no place for: \['model\.layers\.{layers - 1}\."):
        load_pretrained(folder)


def test_mixed_dtypes_become_one_that_holds_them_all(folder):
    def mix(found):
        norm = "model.norm.weight"
        return {n: x if n == norm else x.to(torch.bfloat16) for n, x in found.items()}

    change(folder, mix)
    model, _ = load_pretrained(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    calibration = masa.calibrate(model, tokens(), projections="qkvo")
    assert masa.compression.compress(model, "svd-llm", calibration, 0.2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.norm.weight", "model.embed_tokens.weight"])
def test_what_is_not_finite_is_named_with_its_file(folder, name, value):
    def spoil(found):
        found[name] = found[name].clone()
        found[name].view(-1)[3] = value
        return found

    change(folder, spoil)
    with pytest.raises(MasaError, match=rf"{WEIGHTS}: {name} holds NaN or infinity"):
        load_pretrained(folder)


def test_quantised_folders_are_refused_with_the_way_out(folder):
    configure(folder, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    with pytest.raises(MasaError, match=r"is quantised \(fp8\).*dequantize"):
        load_pretrained(folder)


def test_a_factored_folder_is_named_as_one(tmp_path):
    model = masa.share(tiny_llama(), {"method": "masa", "projections": "qkvo", "atoms": 2})
    model.save_pretrained(tmp_path)
    with pytest.raises(MasaError, match=r"factored folder of masa.*masa export .* --out"):
        load_pretrained(tmp_path)


def test_calibration_beyond_the_models_positions_is_refused_before_the_work(folder):
    configure(folder, max_position_embeddings=8)
    with pytest.raises(MasaError, match=r"knows 8 positions.*length"):
        masa.calibrate(load_pretrained(folder)[0], tokens())


def test_ids_beyond_the_embeddings_are_refused_before_scoring(folder):
    from masa.compression import perplexity

    class Tokenizer:
        bos_token_id = eos_token_id = 1

        def __call__(self, text, **_):
            return {"input_ids": [5, 10_000]}

    with pytest.raises(MasaError, match=r"id 10000.*vocabulary has \d+"):
        perplexity(load_pretrained(folder)[0], Tokenizer(), ["a text"], window=16)


def shared(folder, out):
    model = masa.share(load_pretrained(folder)[0], {"method": "masa", "projections": "qkvo", "atoms": 2})
    model.save_pretrained(out)
    return out


def test_numbers_that_float16_cannot_hold_are_named(folder, tmp_path, capsys):
    def grow(found):
        found["model.norm.weight"] = found["model.norm.weight"] * 1e6
        return found

    change(folder, grow)
    where = shared(folder, tmp_path / "shared")
    assert cli.main(["export", str(where), "--dtype", "float16", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "model.norm.weight has numbers that float16 cannot hold" in error and "bfloat16" in error
    assert not (tmp_path / "out").exists()


def test_how_a_model_generates_goes_along(folder, tmp_path):
    own = {"eos_token_id": [0, 1], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(own))
    save_plain(load_pretrained(folder)[0], tmp_path / "plain")
    where = shared(folder, tmp_path / "shared")
    assert cli.main(["export", str(where), "--out", str(tmp_path / "out")]) == 0
    for made in ("plain", "shared", "out"):
        found = json.loads((tmp_path / made / "generation_config.json").read_text())
        assert {name: found.get(name) for name in own} == own, made
