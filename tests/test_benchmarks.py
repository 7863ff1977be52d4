"""The benchmarks run and write what they say; no number of theirs is judged here, since nothing timed is tested."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["calibration_speed", "compression_growth", "growth", "inference", "mixing", "serving", "tokenization"]
QUICK += ["calibration_memory", "multiple_choice", "training_loop", "training_step"]
SLOW = ["default_run", "job_parts", "workflow"]
"""They run whole workflows, as tests/test_workflow.py does."""
GPU = ["gpu_step", "gpu_resume", "gpu_evidence"]
"""Parts of gpu.py."""

sys.path.insert(0, str(ROOT / "benchmarks"))
import harness  # noqa: E402


def test_every_benchmark_is_known() -> None:
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py")}
    assert scripts == {*QUICK, *SLOW, *GPU, "gpu", "harness", "minimal_gpt", "table"}


@pytest.mark.parametrize("name", QUICK)
def test_quick(name: str, tmp_path: Path) -> None:
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode in (0, 1), done.stderr  # 1: a target was missed, as may be at such sizes
    with (tmp_path / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows and list(rows[0]) == harness.COLUMNS
    assert all(math.isfinite(float(row["value"])) for row in rows)
    assert all(row["what"] in done.stdout for row in rows)
    assert (done.returncode == 1) == any(row["met"] == "no" for row in rows)


def test_gpu_quick(tokens: Path, tmp_path: Path) -> None:
    """Every kind of part that has no test of its own; what a part says of itself is kept, and so are failures."""
    out = tmp_path / "gpu.json"
    prepare = [sys.executable, "benchmarks/gpu_evidence.py", "--tokens", str(tokens), "--prepare"]
    subprocess.run(prepare, cwd=ROOT, check=True, capture_output=True)
    command = [sys.executable, "benchmarks/gpu.py", "--quick", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command += ["--parts", "steps, S eager", "killed", "evidence", "--tokens", str(tokens)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert {part["ended"] for part in found["parts"].values()} == {"done"}, found["parts"]
    assert found["parts"]["killed and resumed"]["the same bits"] == {"eager": True}
    [(run, result)] = found["parts"]["evidence"]["evidence"]["runs"].items()
    assert run == "d48/vanilla/seed0" and result["validation_loss"] > 0 and result["device"] == "CPU"
    steps = {(one["method"], one["mode"]): one for one in found["steps"]}
    assert ("minimal GPT", "eager") in steps and ("masa-qkvo", "eager") in steps
    assert all(one["tokens_per_second"] > 0 and one["share"] > 0 for one in steps.values())
    assert found["matrix_tflops"] > 0 and found["card"]


WITHOUT = ["pydantic", "datasets", "lm_eval", "snakemake", "matplotlib", "pyarrow", "timm"]
IMPORTS = f"""
import os, sys, traceback
sys.path.insert(0, "benchmarks")
sys.modules |= dict.fromkeys({WITHOUT})
import torch, transformers  # once, for the processes that are forked
for name in sys.argv[1:]:
    child = os.fork()
    if not child:
        try:
            __import__(name)
            print(name, flush=True)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(0)
    os.waitpid(child, 0)
"""
ON_A_GPU = [*GPU, "gpu", "serving", "calibration_memory"]


@pytest.fixture(scope="module")
def imported() -> subprocess.CompletedProcess[str]:
    """Which benchmarks can be imported without the study's packages, each in a process of its own."""
    return subprocess.run([sys.executable, "-c", IMPORTS, *ON_A_GPU], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("name", ON_A_GPU)
def test_a_machine_with_a_gpu_needs_none_of_the_studys_packages(
    name: str, imported: subprocess.CompletedProcess[str]
) -> None:
    assert imported.returncode == 0 and name in imported.stdout.split(), imported.stderr[-3000:]


@pytest.mark.parametrize("name", SLOW)
def test_help(name: str) -> None:
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout


@pytest.mark.parametrize(
    ("value", "target", "met"),
    [
        (0.966, ">= 0.97", "yes"),  # rounded to two decimals
        (0.964, ">= 0.97", "no"),
        (1.004, "0.98 to 1.02", "yes"),
        (1.03, "0.98 to 1.02", "no"),
        (3.0, "<= 3", "yes"),
        (3.1, "<= 3", "no"),
        (5.0, "", ""),
    ],
)
def test_targets(value: float, target: str, met: str) -> None:
    assert harness.Row("", value, target=target).met == met


def test_table_is_that_of_the_committed_numbers() -> None:
    done = subprocess.run([sys.executable, "benchmarks/table.py", "--check"], cwd=ROOT)
    assert done.returncode == 0, "run python benchmarks/table.py"
