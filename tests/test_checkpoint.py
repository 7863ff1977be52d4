"""Factored checkpoints: every parameter once, the same model back, and a clear word for what is broken."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import language_model, llama_model
from safetensors.torch import load_file, save_file
from test_sharing import SPECS, label

import masa
from masa.sharing.description import METHOD


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_round_trip(spec, tmp_path, ids):
    model = masa.share(language_model(), spec).eval()
    masa.save(model, tmp_path)
    back = masa.load(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-7)
    stored, counted = load_file(tmp_path / "model.safetensors"), masa.count_parameters(model)
    matrices = [t for t in stored.values() if t.shape != (1,)]  # the others are guards
    assert sum(t.numel() for t in matrices) == counted.total == masa.count_parameters(back).total
    assert masa.count_parameters(back).attention_reduction == counted.attention_reduction
    assert not any("layers.0.weight" in name or "embedding" in name for name in stored if ".shared." in name)
    assert not list(tmp_path.glob("*.tmp"))


def test_llama_round_trip_in_bfloat16(tmp_path, ids):
    model = masa.share(llama_model().bfloat16(), "masa").eval()
    back = masa.load(masa.save(model, tmp_path))
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in back.state_dict().items())
    torch.testing.assert_close(back(ids).logits, model(ids).logits, rtol=0.05, atol=0.05)
    other = masa.load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    assert back.model.rotary_emb.inv_freq.dtype == torch.float32, "RoPE's table is never rounded"


def test_a_loaded_model_trains_on(tmp_path, ids):
    back = masa.load(masa.save(masa.share(language_model(), "masa"), tmp_path)).train()
    back(input_ids=ids, labels=ids).loss.backward()
    assert back.model.shared["q"].atoms.grad.abs().sum() > 0


@pytest.fixture
def saved(tmp_path):
    return masa.save(masa.share(language_model(), "masa"), tmp_path)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_missing_file(saved, name):
    (saved / name).unlink()
    with pytest.raises(masa.MasaError, match=f"{name} is missing"):
        masa.load(saved)


def test_truncated_weights(saved):
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(masa.MasaError, match=r"model\.safetensors is corrupt or truncated"):
        masa.load(saved)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}', '{"format": 1}'])
def test_broken_description(saved, text):
    whole = json.loads((saved / "config.json").read_text())
    if text != "{":
        whole["quantization_config"] = {"quant_method": METHOD} | (json.loads(text) or {"format": []})
    (saved / "config.json").write_text(text if text == "{" else json.dumps(whole))
    with pytest.raises(masa.MasaError, match=r"config\.json"):
        masa.load(saved)
    (saved / "masa.json").write_text(text)  # of an earlier version
    with pytest.raises(masa.MasaError, match=r"masa\.json"):
        masa.load(saved)


def test_files_that_do_not_belong_together(saved):
    # copies: up to safetensors 0.7 what is loaded is the file itself, mapped, which is written anew below
    tensors = {k: v.clone() for k, v in load_file(saved / "model.safetensors").items()}
    save_file({k: v for k, v in tensors.items() if "shared.q.atoms" not in k}, saved / "model.safetensors")
    with pytest.raises(masa.MasaError, match=r"missing \['model.shared.q.atoms'\]"):
        masa.load(saved)
    save_file(tensors | {"extra": torch.zeros(1)}, saved / "model.safetensors")
    with pytest.raises(masa.MasaError, match=r"unexpected \['extra'\]"):
        masa.load(saved)
    save_file(tensors | {"model.shared.q.atoms": torch.zeros(2, 3, 3)}, saved / "model.safetensors")
    with pytest.raises(masa.MasaError, match=r"shape \(2, 3, 3\)"):
        masa.load(saved)


def test_unknown_kind_of_source(saved):
    config = json.loads((saved / "config.json").read_text())
    config["quantization_config"]["sources"][0]["kind"] = "atom"
    (saved / "config.json").write_text(json.dumps(config))
    with pytest.raises(masa.MasaError, match="Did you mean 'atoms'"):
        masa.load(saved)


PLAIN = """
import sys, json, torch
sys.modules["masa"] = None  # must not be needed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
ids = torch.arange(16).view(2, 8)
with torch.no_grad():
    print(json.dumps([model(ids).logits.double().tolist(), model.generate(ids, max_new_tokens=4, do_sample=False,
          pad_token_id=0).tolist()]))
"""


def test_a_folded_model_is_a_plain_hugging_face_model(tmp_path):
    model = masa.share(language_model(), {"method": "masa", "coefficients": "mlp"}).eval()
    plain = masa.fold(model)
    plain.save_pretrained(tmp_path)
    out = subprocess.run([sys.executable, "-c", PLAIN, str(tmp_path)], capture_output=True, text=True, check=True)
    logits, generated = json.loads(out.stdout)
    ids = torch.arange(16).view(2, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits.double(), torch.tensor(logits).double(), rtol=1e-4, atol=1e-6)
    assert model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist() == generated


LOADER = """
import json, sys, transformers
found = {}
for folder in sys.argv[1:]:
    for auto in ("AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"):
        try:
            getattr(transformers, auto).from_pretrained(folder)
            said = "loaded"
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
        found[folder.rpartition("/")[2] + " " + auto] = said
assert "masa" not in sys.modules
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def without_masa(tmp_path_factory):
    """What loaders say of factored folders in a process that never imports masa."""
    base, names = tmp_path_factory.mktemp("factored"), ("masa", "low-rank", "sequential")
    folders = [str(masa.save(masa.share(language_model(), name), base / name)) for name in names]
    done = subprocess.run([sys.executable, "-c", LOADER, *folders], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("spec", ["masa", "low-rank", "sequential"])
@pytest.mark.parametrize("auto", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"])
def test_other_loaders_stop_before_they_draw_a_weight(auto, spec, without_masa):
    """Attention would be random and nothing said; the message says the ways on."""
    said = without_masa[f"{spec} {auto}"]
    assert said.startswith("FileNotFoundError: ") and "import-masa-before-you-load-it-or-run-masa-export" in said


@pytest.mark.parametrize("spec", ["vanilla", "masa"])
def test_a_folded_model_and_one_without_shared_weights_load_anywhere(spec, tmp_path, ids):
    model = masa.share(language_model(), spec).eval()
    masa.save(model, tmp_path / "saved")
    back = masa.load(tmp_path / "saved")
    masa.fold(back).save_pretrained(tmp_path / "plain")
    masa.save(back, tmp_path / "again")
    for folder in ("plain", *(["saved"] if spec == "vanilla" else [])):
        plain = type(model).from_pretrained(tmp_path / folder)
        torch.testing.assert_close(plain(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(masa.load(tmp_path / "again")(ids).logits, model(ids).logits, rtol=1e-6, atol=1e-7)


EARLIER = Path(__file__).parent / "format1"


@pytest.mark.parametrize("name", sorted(p.name for p in EARLIER.iterdir() if p.is_dir()))
def test_folders_of_format_1_are_read(name, tmp_path):
    """Written by version 0.1.0 with masa.json, before transformers' loaders knew masa."""
    expected = json.loads((EARLIER / "expected.json").read_text())[name]
    model = masa.load(EARLIER / name)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        found = model(ids).logits[:, -1].double()
        torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=1e-5, atol=1e-6)
        again = masa.load(masa.save(model, tmp_path))
        assert torch.equal(again(ids).logits[:, -1].double(), found)
    assert not (tmp_path / "masa.json").exists()
    assert masa.count_parameters(again).attention_reduction == masa.count_parameters(model).attention_reduction
