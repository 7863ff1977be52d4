"""Exports of models trained for real here: read without masa, described truly, refused in time."""

import json
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from huggingface_hub import ModelCard
from test_detection import drawn as drawn
from test_detection import spec_of as detector_spec
from test_image_training import spec_of as image_spec

import masa
from masa import cli
from masa.data import tokenize
from masa.data.tokens import PackedTokens
from masa.errors import MasaError
from masa.evaluation import language as evaluation
from masa.export import Options, card, export
from masa.models import gguf_writing as gguf
from masa.runs import files, run
from masa.training import detection
from masa.training import images as image_training
from masa.training import language as training

WITHOUT_MASA = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "masa":
            raise ImportError("masa is forbidden here")
sys.meta_path.insert(0, Forbidden())
try:
    import masa
except ImportError:
    pass
else:
    raise SystemExit("masa could be imported")
"""
needs_llama_cpp = pytest.mark.skipif(
    not all(map(find_spec, ("xllamacpp", "sentencepiece"))), reason=f"llama.cpp is not installed: {gguf.EXTRA}"
)


def without_masa(code, folder):
    """Run code in a folder where masa cannot be imported; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", WITHOUT_MASA + code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def usage(folder):
    """The code of the card's section on loading."""
    return (folder / "README.md").read_text().split("```python\n")[1].split("```")[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """``results`` with a tokenizer, tokens and two language models that learned some real paragraphs."""
    folder = tmp_path_factory.mktemp("exported") / "results"
    words = folder.parent / "texts" / "documents.jsonl"
    words.parent.mkdir()
    paragraphs = [p for p in (ROOT / "LICENSE").read_text().split("\n\n") if len(p) > 400][:6]
    documents = [f"{i} {p}" for i in range(80) for p in paragraphs]  # few and often: they are soon known by heart
    words.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    corpus = {"source": f"file:{words}", "reader": "json", "column": "text", "validation_fraction": 0.1}
    corpus |= {"shuffle_buffer": 100, "validation_tokens": 600, "sha256": None}
    data = {"corpus": corpus, "tokenizer": {"source": "train", "vocab_size": 512, "training_bytes": None}}
    tokenize.make_tokenizer(data, None, None, folder / "data/tokenizer")
    tokenize.tokenize(data, folder / "data/tokenizer", None, None, 80_000, folder / "data/tokens/tiny")
    for sharing, steps in (({"method": "masa", "projections": "qkvo"}, RECIPE["steps"]), ({"method": "vanilla"}, 10)):
        spec = {
            "run": f"tiny/{sharing['method']}/seed0",
            "seed": 0,
            "model": {"num_layers": 6, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
            "sharing": sharing,
            "training": RECIPE | {"steps": steps},
        }
        spec["model"]["vocab_size"] = 512
        training.pretrain(spec, folder / "data/tokens/tiny", folder / "runs" / spec["run"])
    settings = {"limit": None, "limit_per_task": {}, "max_length": 128, "batch_size": 4}
    done = folder / "runs/tiny/masa/seed0"
    where = folder / "evaluations/tiny/masa/seed0"
    evaluation.evaluate(done, folder / "data/tokens/tiny", folder / "data/tokenizer", {}, settings, where)
    return folder


RECIPE = {
    "steps": 150,
    "batch_size": 8,
    "micro_batch_size": 8,
    "context": 64,
    "learning_rate": 1e-2,
    "min_learning_rate_ratio": 0.1,
    "warmup_fraction": 0.1,
    "weight_decay": 0.1,
    "adam_betas": [0.9, 0.999],
    "max_grad_norm": 1.0,
    "coefficients_learning_rate_ratio": 1.0,
    "dtype": "auto",
    "evaluations": 1,
    "checkpoint_minutes": 5,
    "threads": 1,
    "nodes": 1,
    "processes_per_node": 1,
    "parallel": "ddp",
}


@pytest.fixture(scope="module")
def plain(results, tmp_path_factory):
    """The run, exported by its id."""
    out = tmp_path_factory.mktemp("plain") / "hf"
    return out, export("tiny/masa/seed0", out, results=results)


def test_transformers_computes_the_same_without_masa(results, plain, tmp_path):
    out, account = plain
    ids = torch.randint(0, 512, (2, 40))
    with torch.no_grad():
        expected = masa.load(results / "runs/tiny/masa/seed0/model")(ids).logits
    np.save(tmp_path / "ids.npy", ids.numpy())
    without_masa(
        f"""
import numpy as np, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(".")
assert model.dtype == torch.float32 and type(model).__name__ == "Starcoder2ForCausalLM"
assert model.lm_head.weight is model.model.embed_tokens.weight
tokenizer = AutoTokenizer.from_pretrained(".")
assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 0
assert tokenizer.model_max_length == 64 and model.config.use_cache and model.generation_config.use_cache
assert len(tokenizer) == model.config.vocab_size
with torch.no_grad():
    np.save({str(tmp_path / "logits.npy")!r}, model(torch.from_numpy(np.load({str(tmp_path / "ids.npy")!r}))).logits)
""",
        out,
    )
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, rtol=0, atol=0)
    assert account["parameters"]["folded"] > account["parameters"]["total"]
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644
    shutil.copytree(out, tmp_path / "moved")  # elsewhere, too
    assert "The name of the" in without_masa(usage(out), tmp_path / "moved")


def test_the_tokenizer_is_the_runs(results, plain):
    out, account = plain
    kept = run.read_json(results / "runs/tiny/masa/seed0/provenance.json")["inputs"]["tokenizer"]
    assert account["tokenizer"] == {
        "sha256": kept,
        "vocab_size": 512,
        "eos_token": "</s>",
        "eos_token_id": 0,
        "verified": True,
    }
    assert files.sha256_of(out / "tokenizer.json") == kept


def test_the_card_says_what_the_files_say(results, plain):
    out, account = plain
    folder = results / "runs/tiny/masa/seed0"
    manifest, provenance = run.read_json(folder / "manifest.json"), run.read_json(folder / "provenance.json")
    tokens = run.read_json(results / "data/tokens/tiny/manifest.json")
    metrics = run.read_json(results / "evaluations/tiny/masa/seed0/metrics.json")
    written = (out / "README.md").read_text()
    cells = [line.strip("| ").split(" | ") for line in written.splitlines() if line.startswith("| ")]
    rows = dict(pair for pair in cells if len(pair) == 2)
    assert rows["method"] == "masa"
    assert rows["atoms"] == "2"
    assert rows["attention reduction"] == f"{manifest['parameters']['attention_reduction']:.2%}"
    assert rows["parameters, factored"] == f"{manifest['parameters']['total']:,}"
    assert rows["parameters in this folder, folded"] == f"{account['parameters']['folded']:,}"
    assert rows["source"] == "file:documents.jsonl"
    assert rows["tokens available for training"] == f"{tokens['train']['tokens']:,}"
    assert set(RECIPE) <= {name.replace(" ", "_") for name in rows}
    assert rows["learning rate"] == "0.01"
    assert rows["seed"] == "0"
    assert rows["run identity"] == manifest["identity"]
    assert rows["revision"] == provenance["revision"]
    assert rows["cpu"] == provenance["cpu"]
    assert f"torch {torch.__version__.split('+')[0]}" in rows["packages"]
    assert f"| Held-out loss (nats/token) | {metrics['corpus']['loss']:.4f} |" in written
    assert str(results.parent) not in written
    assert str(ROOT) not in written
    read = ModelCard.load(out / "README.md")  # front matter that the hub understands
    assert (read.data.library_name, read.data.pipeline_tag) == ("transformers", "text-generation")
    assert read.data.license == "unknown"
    scores = {r.metric_type: r.metric_value for r in read.data.eval_results}
    assert scores["validation_loss"] == metrics["corpus"]["loss"]
    assert scores["byte_ppl"] == metrics["corpus"]["byte_perplexity"]


def test_a_run_without_evaluation_says_so(results, tmp_path):
    account = export(str(results / "runs/tiny/vanilla/seed0"), tmp_path / "out", options=Options(license="mit"))
    written = (tmp_path / "out/README.md").read_text()
    assert not account["evaluated"]
    assert "Not evaluated, beyond what its training measured." in written
    assert "trained without sharing weights (`vanilla`)" in written
    assert account["parameters"]["folded"] == account["parameters"]["total"]
    data = ModelCard.load(tmp_path / "out/README.md").data
    assert data.license == "mit"
    assert not data.eval_results


def test_the_account_has_every_file(plain):
    out, account = plain
    assert run.read_json(out / "export.json") == account
    there = {p.name for p in out.iterdir()} - {"export.json"}
    assert there == set(account["files"])
    for name, record in account["files"].items():
        assert files.sha256_of(out / name) == record["sha256"]
        assert (out / name).stat().st_size == record["bytes"]


def test_half_precision(results, tmp_path):
    account = export("tiny/masa/seed0", tmp_path / "out", results=results, options=Options(dtype="bfloat16"))
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert account["dtype"] == "bfloat16"
    written = (tmp_path / "out/README.md").read_text()
    assert "Measured before the export, in float32; the weights here are bfloat16." in written
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    whole = masa.fold(masa.load(results / "runs/tiny/masa/seed0/model")).state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, whole[name].bfloat16(), rtol=0, atol=0)


def test_a_vision_transformer_for_timm(digits, tmp_path):
    results = tmp_path / "results"
    (results / "data/images").mkdir(parents=True)
    (results / "data/images/digits").symlink_to(digits)
    image_training.pretrain(image_spec(steps=2), digits, results / "runs/digits/masa/seed0")
    account = export("digits/masa/seed0", tmp_path / "out", results=results)
    images = torch.rand(2, 1, 8, 8)
    with torch.no_grad():
        expected = masa.load(results / "runs/digits/masa/seed0/model")(images).logits
    np.save(tmp_path / "images.npy", images.numpy())
    code = f"""
import numpy as np, timm, torch
torch.set_num_threads(1)
model = timm.create_model("local-dir:.", pretrained=True).eval()
with torch.no_grad():
    np.save({str(tmp_path / "logits.npy")!r}, model(torch.from_numpy(np.load({str(tmp_path / "images.npy")!r}))))
"""
    without_masa(code, tmp_path / "out")
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "logits.npy")), expected, rtol=0, atol=0)
    assert "indices" in without_masa(usage(tmp_path / "out"), tmp_path / "out")
    written = (tmp_path / "out/README.md").read_text()
    manifest = run.read_json(digits / "manifest.json")
    assert manifest["splits"]["train"]["sha256"] in written
    assert account["tokenizer"] is None
    with pytest.raises(MasaError, match=r"a Vision Transformer, which has no format 'gguf': use --format hf"):
        export("digits/masa/seed0", tmp_path / "gguf", "gguf", results=results)
    with pytest.raises(MasaError, match="has no tokenizer: leave --tokenizer away"):
        export("digits/masa/seed0", tmp_path / "gguf", results=results, tokenizer=tmp_path)
    assert not (tmp_path / "gguf").exists()


def test_a_detector_with_its_processor(drawn, tmp_path):
    results = tmp_path / "results"
    detection.pretrain(detector_spec(steps=2), drawn, results / "runs/shapes/masa/seed0")
    with pytest.raises(MasaError, match=r"--data DIR \(what `masa boxes` wrote\)"):
        export("shapes/masa/seed0", tmp_path / "out", results=results)
    assert not (tmp_path / "out").exists()
    export("shapes/masa/seed0", tmp_path / "out", results=results, data=drawn)
    from transformers import AutoImageProcessor, AutoModelForObjectDetection

    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        expected = masa.load(results / "runs/shapes/masa/seed0/model")(pixels)
        found = AutoModelForObjectDetection.from_pretrained(tmp_path / "out")(pixels)
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=0)
    torch.testing.assert_close(found.pred_boxes, expected.pred_boxes, rtol=0, atol=0)
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert list(processor.image_mean) == run.read_json(drawn / "manifest.json")["mean"]
    assert "boxes" in without_masa(usage(tmp_path / "out"), tmp_path / "out")


# ------------------------------------------------------------------------------------------------- compressed models


@pytest.fixture(scope="module")
def compressed(results, tmp_path_factory):
    """A tiny Llama that learned with the runs' tokenizer, compressed by ``masa compress``."""
    from compression_models import tiny_llama

    from masa.compression import run_compress

    folder = tmp_path_factory.mktemp("compressed")
    sizes = {"vocab_size": 512, "max_position_embeddings": 128, "bos_token_id": None, "attention_bias": False}
    model = tiny_llama(eos_token_id=0, pad_token_id=None, initializer_range=0.05, **sizes)
    blocks = PackedTokens(results / "data/tokens/tiny", 64, 150 * 8, 0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    for step in range(150):
        ids = torch.stack([blocks[i]["input_ids"] for i in range(8 * step, 8 * step + 8)])
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(results / "data/tokenizer" / name, folder / "llama" / name)
    run_compress(str(folder / "llama"), folder / "smaller", "svd", 0.2, device="cpu", quiet=True)
    return folder / "smaller"


def test_a_compressed_llama(compressed, tmp_path):
    account = export(str(compressed), tmp_path / "out")
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 512, (2, 20))
    with torch.no_grad():
        expected = masa.load(compressed, runtime="folded")(ids).logits
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(model(ids).logits, expected, rtol=0, atol=0)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not account["tokenizer"]["verified"], "no run tells which tokenizer it was"
    report = run.read_json(compressed / "compression.json")
    assert account["parameters"]["total"] == report["parameters_after"]
    assert account["parameters"]["folded"] == report["parameters_before"]
    written = (tmp_path / "out/README.md").read_text()
    assert "llama, its attention compressed by `svd` without training: 20." in written
    assert "Compression read no data." in written
    assert "the model that was compressed" in written
    assert str(compressed.parent) not in written
    assert "Starcoder2" not in written


def test_a_model_of_a_sweep(compressed, results, tmp_path):
    """Each score is said to be of its own text, in the sweep's arithmetic, and healing is not kept silent."""
    shutil.copytree(compressed, tmp_path / "20/model")
    report = run.read_json(tmp_path / "20/model/compression.json")
    (tmp_path / "20/model/compression.json").unlink()
    del report["model"]  # a sweep's report does not have it
    counts = masa.count_parameters(masa.load(compressed)).to_dict()
    settings = {"dtype": "bfloat16", "limit": 12, "limit_per_task": {"mmlu": 1}}  # mmlu: of each subject
    score = {"loss": 3.0, "word_perplexity": 9.0, "byte_perplexity": 2.0, "token_perplexity": 20.0}
    record = {"run": "tiny/svd/20", "requested_pct": 20, "compression": report, "parameters": counts, "corpus": score}
    record |= {"healing": {"steps": 12, "seconds": 3.0}, "task_data": {}}
    record |= {"tasks": {"mmlu": {"acc": 0.25}}, "examples": {"mmlu": 57}}
    record |= {"texts": {"held_out": score, "wikitext": {"token_perplexity": 30.0}}, "settings": settings}
    run.write_json(tmp_path / "20/metrics.json", record | {"provenance": {"inputs": {}}})
    export(str(tmp_path / "20"), tmp_path / "out")
    written = (tmp_path / "out/README.md").read_text()
    assert "tiny, its attention compressed by `svd` and healed by a short training: 20." in written
    assert "| healing steps | 12 |" in written
    assert "| held-out text | Held-out perplexity (token) | 20.00 |" in written
    assert "| wikitext | WikiText-2 perplexity (token) | 30.00 |" in written
    assert "| mmlu | acc | 0.25 |  | 57 |" in written
    assert "Tasks are scored on the first of their examples alone; the last column says on how many." in written
    assert "Measured before the export, in bfloat16; the weights here are float32." in written


def test_fewer_heads_are_not_called_sharing(tmp_path):
    from conftest import language_model

    masa.save(masa.share(language_model(), {"method": "gqa", "num_key_value_heads": 1}), tmp_path / "gqa")
    account = export(str(tmp_path / "gqa"), tmp_path / "out")
    assert account["parameters"]["folded"] == account["parameters"]["total"]
    written = (tmp_path / "out/README.md").read_text()
    assert "fewer numbers in Q, K, V and O (`gqa`). Nothing had to be written out: it is as small here." in written
    assert "as large as one that shares nothing" not in written


def test_a_run_directory_beside_the_root(results, tmp_path):
    """Nothing is looked for above it."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        shutil.copytree(results / "runs/tiny/masa/seed0", folder, dirs_exist_ok=True)
        account = export(folder, tmp_path / "out", tokenizer=results / "data/tokenizer")
    assert account["run"] == "tiny/masa/seed0"


def test_a_bare_checkpoint_without_tokenizer(tmp_path):
    from conftest import language_model

    masa.save(masa.share(language_model(), {"method": "masa"}), tmp_path / "bare")
    account = export(str(tmp_path / "bare"), tmp_path / "out")
    assert account["tokenizer"] is None
    written = (tmp_path / "out/README.md").read_text()
    assert "exported from a checkpoint without a run" in written
    assert "Not evaluated." in written
    assert "(1, 1, 64)" in without_masa(usage(tmp_path / "out"), tmp_path / "out").replace("[", "(").replace("]", ")")
    with pytest.raises(MasaError, match="holds its tokenizer, and none came with this model"):
        export(str(tmp_path / "bare"), tmp_path / "gguf", "gguf", options=Options(cache=ROOT / "cache"))
    with pytest.raises(MasaError, match="is no run, and nothing says what it was trained on: leave --data away"):
        export(str(tmp_path / "bare"), tmp_path / "gguf", data=tmp_path)
    assert not (tmp_path / "gguf").exists()


# ------------------------------------------------------------------------------------------------------------- GGUF


def greedy(folder, prompt, tokens):
    """Greedy tokens of transformers, one after another from the logits; and how far the second choice was away."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    ids, found, gaps = tokenizer(prompt)["input_ids"], [], []
    with torch.no_grad():
        for _ in range(tokens):
            best = model(torch.tensor([ids + found])).logits[0, -1].topk(2)
            found.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
    return ids, found, gaps


@needs_llama_cpp
@pytest.mark.parametrize("model", ["starcoder2", "llama"])
def test_llama_cpp_says_the_same_greedy_tokens(model, results, compressed, tmp_path):
    """At least 32 tokens a prompt, all equal; where a near-tie made them differ, the gap would show it."""
    from masa.export import llama_cpp

    source = str(compressed) if model == "llama" else "tiny/masa/seed0"
    options = Options(check=True, cache=ROOT / "cache")
    account = export(source, tmp_path / "gguf", "gguf", results=results, options=options)
    assert account["gguf"]["converter"] == gguf.PACKAGE
    assert account["gguf"]["sha256"] == gguf.SHA256
    assert account["gguf"]["architecture"] == model
    assert account["gguf"]["pre_tokenizer"] == "gpt-2", "what masa.data.tokenize trains"
    assert account["check"]["texts"] == len(llama_cpp.TEXTS) + len(llama_cpp.PROMPTS)
    assert account["check"]["tokens"] >= 3 * 32
    assert account["check"]["largest_logprob_difference"] < 5e-3
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    export(source, tmp_path / "hf", results=results)
    loaded = llama_cpp.LlamaCpp(file, 64)
    ids, expected, gaps = greedy(tmp_path / "hf", "of this License, each Contributor hereby", 36)
    found = [token for token, _ in loaded.continue_(ids, 36)]
    assert found == expected, f"smallest gap: {min(gaps)}"
    assert len(set(found)) > 3, "a model that says one thing only shows nothing"
    assert "llama.cpp" in (tmp_path / "gguf/README.md").read_text()
    assert without_masa(usage(tmp_path / "gguf"), tmp_path / "gguf").strip()


@needs_llama_cpp
def test_the_check_notices_another_model(results, tmp_path):
    from masa.export import llama_cpp

    options = Options(cache=ROOT / "cache")
    export("tiny/masa/seed0", tmp_path / "gguf", "gguf", results=results, options=options)
    (file,) = (tmp_path / "gguf").glob("*.gguf")
    export("tiny/vanilla/seed0", tmp_path / "other", results=results)
    with pytest.raises(MasaError, match="does not compute what the model does"):
        llama_cpp.check(file, tmp_path / "other", "float32")


@needs_llama_cpp
def test_the_check_notices_another_splitting_of_text(results, tmp_path):
    """Digits one by one are known to llama.cpp under another name; a space put before every text is not GPT-2's way."""
    from tokenizers import Tokenizer, pre_tokenizers

    from masa.export import llama_cpp

    export("tiny/masa/seed0", tmp_path / "hf", results=results)
    program = gguf.converter(None, ROOT / "cache")
    gguf.convert(tmp_path / "hf", tmp_path / "gpt2.gguf", "float32", program)
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.save(str(tmp_path / "hf/tokenizer.json"))
    assert gguf.pre_tokenizer(tmp_path / "hf/tokenizer.json") == "smollm"
    described = gguf.convert(tmp_path / "hf", tmp_path / "smollm.gguf", "float32", program)
    assert described["pre_tokenizer"] == "smollm"
    assert llama_cpp.check(tmp_path / "smollm.gguf", tmp_path / "hf", "float32")["tokens"]
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(tmp_path / "hf/tokenizer.json"))
    with pytest.raises(MasaError, match="splits"):
        llama_cpp.check(tmp_path / "gpt2.gguf", tmp_path / "hf", "float32")


@needs_llama_cpp
def test_a_tokenizer_that_nobody_knows(results, tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers

    export("tiny/masa/seed0", tmp_path / "hf", results=results)
    tokenizer = Tokenizer.from_file(str(tmp_path / "hf/tokenizer.json"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.save(str(tmp_path / "hf/tokenizer.json"))
    with pytest.raises(MasaError, match="does not know this tokenizer, and neither does masa"):
        gguf.convert(tmp_path / "hf", tmp_path / "x.gguf", "float32", gguf.converter(None, ROOT / "cache"))


def test_what_is_missing_for_gguf_is_named(results, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf, "find_spec", lambda name: None)  # as where the extra is not installed
    with pytest.raises(MasaError, match=r"not installed: pip install 'masa\[gguf\]'"):
        export("tiny/masa/seed0", tmp_path / "out", "gguf", results=results)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------------- wrong input


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("tiny/mas/seed0", {}, "Did you mean 'tiny/masa/seed0'"),
        ("tiny/masa/seed0", {"format": "gguff"}, "Did you mean 'gguf'"),
        ("tiny/masa/seed0", {"options": Options(dtype="float61")}, "Did you mean 'float16'"),
        ("tiny/masa/seed0", {"options": Options(converter=Path("x"))}, "belongs to --format gguf"),
        ("tiny/masa/seed0", {"tokenizer": "nowhere"}, "nowhere/tokenizer.json does not exist"),
        ("tiny/masa/seed0", {"data": "nowhere"}, "nowhere/manifest.json does not exist"),
        ("runs/tiny/masa", {}, "It holds the runs seed0: name one of them"),
        ("data", {}, "holds no model"),
        (
            "tiny/masa/seed0",
            {"format": "gguf", "options": Options(converter=Path("nowhere"))},
            "neither a wheel nor a folder with llama.cpp's",
        ),
    ],
)
def test_wrong_input(results, tmp_path, monkeypatch, name, more, message):
    if "llama.cpp" in message:
        pytest.importorskip("sentencepiece", reason=f"the converter needs it: {gguf.EXTRA}")
    monkeypatch.chdir(results)
    with pytest.raises(MasaError) as error:
        export(name, tmp_path / "out", results=results, **more)
    assert message in str(error.value)
    assert not (tmp_path / "out").exists()


def test_an_unfinished_run(results, tmp_path):
    folder = tmp_path / "results/runs/tiny/masa/seed0"
    shutil.copytree(results / "runs/tiny/masa/seed0", folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(MasaError, match="has not finished"):
        export("tiny/masa/seed0", tmp_path / "out", results=tmp_path / "results")


def test_files_that_are_not_the_runs(results, tmp_path):
    """A damaged checkpoint and another tokenizer stop the export; other data and evaluations are left out, and said."""
    copy = tmp_path / "results"
    shutil.copytree(results, copy)
    manifest = run.read_json(copy / "data/tokens/tiny/manifest.json")
    manifest["train"]["shards"][0]["sha256"] = "0" * 64
    run.write_json(copy / "data/tokens/tiny/manifest.json", manifest)
    metrics = run.read_json(copy / "evaluations/tiny/masa/seed0/metrics.json")
    metrics["provenance"]["inputs"]["run"] = "0" * 64
    run.write_json(copy / "evaluations/tiny/masa/seed0/metrics.json", metrics)
    export("tiny/masa/seed0", tmp_path / "out", results=copy)
    written = (tmp_path / "out/README.md").read_text()
    assert "The data found beside the run are others than it was trained on" in written
    assert "The evaluation found beside the run is of another training" in written
    assert "file:documents.jsonl" not in written
    with pytest.raises(MasaError, match="is not what the run was trained on"):
        export("tiny/masa/seed0", tmp_path / "out", results=copy, data=copy / "data/tokens/tiny")
    tokenizer = copy / "data/tokenizer/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text() + " ")
    with pytest.raises(MasaError, match="is not the tokenizer that the run was trained with"):
        export("tiny/masa/seed0", tmp_path / "out", results=copy)
    export("tiny/masa/seed0", tmp_path / "out", results=copy, tokenizer=results / "data/tokenizer")
    weights = copy / "runs/tiny/masa/seed0/model/model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    before = run.read_json(tmp_path / "out/export.json")
    with pytest.raises(MasaError, match="corrupt"):
        export("tiny/masa/seed0", tmp_path / "out", results=copy, tokenizer=results / "data/tokenizer")
    assert run.read_json(tmp_path / "out/export.json") == before, "the earlier export stays"


def test_only_earlier_exports_are_replaced(results, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("mine")
    with pytest.raises(MasaError, match="is no earlier export"):
        export("tiny/masa/seed0", other, results=results)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["mine.txt"]
    with pytest.raises(MasaError, match="is no earlier export"):
        export("tiny/masa/seed0", other / "mine.txt", results=results)
    (other / "mine.txt").unlink()
    export("tiny/masa/seed0", other, results=results)
    export("tiny/vanilla/seed0", other, results=results)
    assert run.read_json(other / "export.json")["run"] == "tiny/vanilla/seed0"
    (other / ".git").mkdir()
    (other / ".git/HEAD").write_text("mine")
    with pytest.raises(MasaError, match=r"holds .*\.git/HEAD, which is not of the earlier export"):
        export("tiny/masa/seed0", other, results=results)
    shutil.rmtree(other / ".git")
    assert [p.name for p in tmp_path.iterdir()] == ["other"], "nothing temporary is left"


def test_a_plain_folder_is_no_source(plain, tmp_path):
    with pytest.raises(MasaError, match="a plain model already"):
        export(str(plain[0]), tmp_path / "out")


def test_the_verb(results, tmp_path, capsys):
    command = ["export", "tiny/masa/seed0", "--results", str(results), "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == run.read_json(tmp_path / "out/export.json")
    assert "export: folded" in said.err
    assert cli.main(command) == 0
    assert "tokenizer: the run's, 512 tokens" in capsys.readouterr().out
    assert cli.main([*command[:2], "--out", str(tmp_path / "o"), "--format", "onnx"]) == 2
    assert "Format 'onnx' does not exist" in capsys.readouterr().err


def test_nothing_private_on_the_card(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecret")
    shown = card.public("https://me:pass@host/x /home/me/data/a.txt hf_secretsecret C:\\Users\\me\\b.txt ~/c/d.gz")
    assert shown == "https://****@host/x a.txt **** b.txt d.gz"
