"""Statistics say what they were made of, and whoever reads them compares that with what is asked for."""

from pathlib import Path

import pytest
from test_compression_pretrained import TEXT
from test_compression_workflow import spec_of as sweep_spec
from test_outputs import written_model

import masa
from masa.compression import run_calibrate, run_compress
from masa.compression.calibration.statistics import Calibration
from masa.compression.sweep import sweep
from masa.models import pretrained
from masa.runs import run


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return written_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def results(model, tmp_path_factory):
    """Statistics of 8 samples, and what a sweep needs beside them."""
    root = tmp_path_factory.mktemp("results")
    pretrained.fetch("m", {"source": f"file:{model}/llama"}, root, None, root / "pretrained")
    run_calibrate(str(root / "pretrained"), root / "statistics", model / "text.jsonl", samples=8, length=16, quiet=True)
    record = {"name": "held_out", "source": "made", "sha256": "x", "documents": TEXT[8:]}
    run.write_json(root / "held_out.json", record)
    return root


ASKED = {"samples": 8, "length": 16, "seed": 0, "gradient_samples": 0, "projections": "qkvo"}


def sweep_one(results, model, out, text="text.jsonl", **changes):
    spec = sweep_spec("svd-llm", reductions=[20], tasks_at=[], calibration=ASKED | changes)
    texts = {"held_out": results / "held_out.json"}
    return sweep(results / "pretrained", spec, results / "statistics", texts, {}, out, model / text)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 9}, "calibration.samples is 9, these statistics are of 8"),
        ({"length": 32}, "calibration.length is 32, these statistics are of 16"),
        ({"seed": 1}, "calibration.seed is 1, these statistics are of 0"),
        ({"gradient_samples": 4}, "calibration.gradient_samples is 4, these statistics are of 0"),
        ({"projections": "qkvogud"}, "calibration.projections is qkvogud, these statistics are of ['qkv', 'o']"),
        ({"text": "other.jsonl"}, "calibration.text_sha256 is "),
    ],
    ids=lambda given: next(iter(given)) if isinstance(given, dict) else "",
)
def test_statistics_of_something_else_are_refused(changes, said, results, model, tmp_path):
    with pytest.raises(masa.MasaError) as raised:
        sweep_one(results, model, tmp_path / "out", **changes)
    message = str(raised.value)
    assert said in message and str(results / "statistics" / "calibration.json") in message
    assert "Delete that file and run the same command" in message
    assert not (tmp_path / "out").exists()


def test_a_result_says_what_its_statistics_were_made_of(results, model, tmp_path):
    sweep_one(results, model, tmp_path / "out")
    record = run.read_json(tmp_path / "out" / "20" / "metrics.json")
    found = record["provenance"]["calibration"]
    assert found == record["compression"]["calibration"] == Calibration.load(results / "statistics").made_of()
    assert {key: found[key] for key in ("samples", "length", "seed")} == {"samples": 8, "length": 16, "seed": 0}
    assert all(len(found[f"{name}_sha256"]) == 64 for name in ("tokens", "text", "model"))
    assert record["provenance"]["threads"] == found["threads"] == 1
    identity = record["identity"]
    spec = sweep_spec("svd-llm", reductions=[20], tasks_at=[])  # as before statistics were compared
    assert "calibration" in spec
    del spec["calibration"]
    texts = {"held_out": results / "held_out.json"}
    again = sweep(results / "pretrained", spec, results / "statistics", texts, {}, tmp_path / "out")
    assert again == {"20": identity}


def test_jobs_fix_their_threads_and_say_so(results, model, tmp_path):
    """Whatever the process had before: the number is the spec's."""
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        made = run_calibrate(
            str(results / "pretrained"), tmp_path / "s", model / "text.jsonl", samples=8, length=16, threads=2
        )
        assert made["threads"] == 2 == Calibration.load(tmp_path / "s").threads
        torch.set_num_threads(3)
        spec = sweep_spec("svd-llm", reductions=[20], tasks_at=[], calibration=ASKED, threads=2)
        texts = {"held_out": results / "held_out.json"}
        sweep(results / "pretrained", spec, tmp_path / "s", texts, {}, tmp_path / "out")
        assert run.read_json(tmp_path / "out" / "20" / "metrics.json")["provenance"]["threads"] == 2
    finally:
        torch.set_num_threads(before)


def test_tokens_of_another_calibration_are_refused(results, model, tmp_path):
    import shutil

    mixed = tmp_path / "mixed"
    shutil.copytree(results / "statistics", mixed)
    run_calibrate(str(model / "llama"), tmp_path / "b", model / "text.jsonl", samples=8, length=16, seed=1, quiet=True)
    shutil.copyfile(tmp_path / "b" / "tokens.safetensors", mixed / "tokens.safetensors")
    with pytest.raises(masa.MasaError, match=f"{mixed / 'tokens.safetensors'}: the tokens are not those"):
        run_compress(str(results / "pretrained"), tmp_path / "out", "svd-llm", calibration=mixed, quiet=True)
    assert not (tmp_path / "out").exists()


def test_statistics_of_an_earlier_version_are_still_read(results, model, tmp_path):
    import shutil

    old = tmp_path / "old"
    shutil.copytree(results / "statistics", old)
    data = run.read_json(old / "calibration.json")
    run.write_json(
        old / "calibration.json", {k: v for k, v in data.items() if k not in ("seed", "text_sha256", "threads")}
    )
    Calibration.load(old).expect(ASKED | {"text_sha256": "0" * 64})
    with pytest.raises(masa.MasaError, match="samples is 9"):
        Calibration.load(old).expect(ASKED | {"samples": 9})
    assert Calibration.load(old).digest() == Calibration.load(results / "statistics").digest()


def test_few_tokens_are_said_with_their_numbers(model, tmp_path, caplog):
    summary = run_calibrate(str(model / "llama"), tmp_path / "few", model / "text.jsonl", samples=1, length=8)
    assert "8 tokens are few to calibrate a width of 48 on (H has a rank of at most 8); 768 or more" in caplog.text
    assert (summary["samples"], summary["length"], summary["seed"]) == (1, 8, 0)
    caplog.clear()
    run_calibrate(str(model / "llama"), tmp_path / "enough", model / "text.jsonl", samples=8, length=16)
    assert "few" not in caplog.text
    assert Path(tmp_path / "few" / "calibration.json").is_file()
