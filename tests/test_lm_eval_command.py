"""Our numbers of lm-eval's tasks against its own command line: on the exported folder, where it knows nothing of masa,
and on the factored folder, which it reads once masa is imported."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from compression_models import tiny_llama
from conftest import ROOT
from safetensors.torch import load_file, save_file

import masa
from masa.compression import compress
from masa.data import benchmarks
from masa.data.tokens import load_tokenizer
from masa.evaluation import language
from masa.export import export

SETTINGS = {"limit": 12, "limit_per_task": {}, "max_length": 1024, "batch_size": 8}
TASKS = ("piqa", "arc_easy", "sciq", "lambada_openai")
LM_EVAL = ("-m", "lm_eval")
VERB = ("-m", "masa.cli", "lm-eval")
IMPORT = ("-c", "import masa; from lm_eval.__main__ import cli_evaluate; cli_evaluate()")


def definitions(records, folder):
    """lm-eval's own task files with the data's place changed, under other names: what `--include_path` takes."""
    folder.mkdir()
    _, manager = benchmarks.load_tasks(records)
    for task, record in records.items():
        own = str(manager.task_index[task].yaml_path)
        changed = {"include": own, "task": f"{task}_here", "dataset_path": record["path"]}
        (folder / f"{task}.yaml").write_text(yaml.safe_dump(changed))
    return folder


def lm_eval(entry, tasks, out, limit=SETTINGS["limit"], **model):
    """``lm-eval run`` on a model, with the settings of ours."""
    model = {"max_length": SETTINGS["max_length"]} | model
    command = [sys.executable, *entry, "run", "--model", "hf"]
    command += ["--tasks", *[path.stem + "_here" for path in sorted(tasks.glob("*.yaml"))]]
    command += ["--model_args", ",".join(f"{key}={value}" for key, value in model.items())]
    command += ["--include_path", str(tasks), "--limit", str(limit), "--device", "cpu"]
    command += ["--batch_size", str(SETTINGS["batch_size"]), "--output_path", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    environment.pop("TQDM_DISABLE", None)
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def results(done, out):
    """What ``lm-eval run`` has written, as task -> metric -> value."""
    assert done.returncode == 0, done.stderr[-4000:]
    (written,) = out.rglob("results_*.json")
    return json.loads(written.read_text())["results"]


def compare(ours, theirs):
    """How many metrics are equal; one that is not fails. Standard errors are theirs alone.

    Accuracies to the last digit, perplexities to five: we read a question once, and so batch other requests otherwise.
    """
    compared = 0
    for task, metrics in ours.items():
        for metric, value in metrics.items():
            if isinstance(value, float) and metric != "answer_bits_per_byte":  # which lm-eval does not have
                near = pytest.approx(value, rel=1e-5 if "perplexity" in metric else 0, abs=0)
                assert theirs[f"{task}_here"][metric] == near, f"{task}: {metric}"
                compared += 1
    return compared


@pytest.fixture(scope="module")
def records(tmp_path_factory, cache):
    return benchmarks.prepare(TASKS, ["pypi"], cache, None, tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, records):
    return definitions(records, tmp_path_factory.mktemp("definitions") / "tasks")


def evaluate(smoke_results, name, records, out):
    """``masa evaluate``; the metrics that it returns."""
    run, data = smoke_results / f"runs/smoke/{name}/seed0", smoke_results / "data"
    return language.evaluate(run, data / "tokens/smoke", data / "tokenizer", records, SETTINGS, out)


@pytest.mark.parametrize("source", ["pypi", "mirror"])
def test_the_exported_folder_has_the_same_numbers(source, smoke_results, cache, tmp_path, request):
    """Those of atoms, whose product with many tokens is that of the folded matrix."""
    mirror = request.getfixturevalue("mirror") if source == "mirror" else None
    names = [*TASKS, *(["wikitext"] if mirror else [])]
    records = benchmarks.prepare(names, [source], cache, mirror, tmp_path / "benchmarks")
    ours = evaluate(smoke_results, "masa-qkvo", records, tmp_path / "ours")
    export(smoke_results / "runs/smoke/masa-qkvo/seed0", tmp_path / "exported")
    there = tmp_path / "theirs"
    done = lm_eval(
        LM_EVAL, definitions(records, tmp_path / "tasks"), there, pretrained=tmp_path / "exported", dtype="float32"
    )
    theirs = {task: language.scores(metrics) for task, metrics in results(done, there).items()}
    assert compare(ours["tasks"], theirs) == 2 * 3 + 2 + (3 if mirror else 0)
    assert ours["examples"]["piqa"] == SETTINGS["limit"]


@pytest.mark.parametrize(
    ("name", "entry"),
    [("masa-qkvo", VERB), ("low-rank", IMPORT)],
    ids=["verb", "import"],
)
def test_the_factored_folder_has_the_same_numbers(name, entry, smoke_results, records, tasks, tmp_path):
    evaluate(smoke_results, name, records, tmp_path / "ours")
    folder, tokenizer = smoke_results / f"runs/smoke/{name}/seed0/model", smoke_results / "data/tokenizer"
    done = lm_eval(entry, tasks, tmp_path / "theirs", pretrained=folder, tokenizer=tokenizer)
    ours = json.loads((tmp_path / "ours/lm_eval.json").read_text())["results"]
    assert compare(ours, results(done, tmp_path / "theirs")) == 2 * 3 + 2
    assert "Running loglikelihood requests: 100%" in done.stderr


def test_a_compressed_folder_has_the_numbers_of_the_model_in_memory(smoke_results, records, tasks, tmp_path):
    """Its tokenizer lies beside it; its kinds of weight source are known where transformers alone reads it."""
    tokenizer, folder = load_tokenizer(smoke_results / "data/tokenizer"), tmp_path / "smaller"
    model, _ = compress(tiny_llama(vocab_size=len(tokenizer)), "svd", reduction=0.2)
    masa.save(model, folder)
    tokenizer.save_pretrained(folder)
    ours = language.harness(masa.load(folder, runtime="factored"), tokenizer, records, SETTINGS, "cpu")
    done = lm_eval(VERB, tasks, tmp_path / "theirs", pretrained=folder)
    assert compare(ours["results"], results(done, tmp_path / "theirs")) == 2 * 3 + 2


def test_without_masa_lm_eval_stops_at_the_factored_folder(smoke_results, tasks, tmp_path):
    """It asks transformers for the quantisation of that name before it looks for the weights."""
    folder, tokenizer = smoke_results / "runs/smoke/low-rank/seed0/model", smoke_results / "data/tokenizer"
    done = lm_eval(LM_EVAL, tasks, tmp_path / "out", limit=1, pretrained=folder, tokenizer=tokenizer)
    assert done.returncode == 1
    assert "Unknown quantization type, got masa" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_a_folder_that_lacks_a_tensor_is_one_line_and_status_2(smoke_results, tasks, tmp_path):
    tokenizer = smoke_results / "data/tokenizer"
    folder = shutil.copytree(smoke_results / "runs/smoke/low-rank/seed0/model", tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.shared.q.left"]
    (folder / "model.safetensors").unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    done = lm_eval(VERB, tasks, tmp_path / "out", limit=1, pretrained=folder, tokenizer=tokenizer)
    assert done.returncode == 2
    said = done.stderr.splitlines()[-1]
    assert said.startswith("masa: error: ") and "missing ['model.shared.q.left']" in said
    assert "Traceback" not in done.stderr
