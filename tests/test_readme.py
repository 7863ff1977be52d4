"""Every command and every line of code of the README is run, the workflow's on the smoke configuration."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable

import pytest
from compression_models import tiny_llama
from projects import BIN, ENVIRONMENT, ROOT, copy_finished
from test_compression_pretrained import tokenizer
from warm import servers

README = (ROOT / "README.md").read_text()
SMOKE = ["--configfile", "config/smoke.yaml"]


def commands():
    """Lines of the README's indented blocks, without their comments."""
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    lines = re.findall(r"^ {4}(\S.*)$", prose, re.MULTILINE)
    return [re.sub(r"\s+# .*", "", line).strip() for line in lines]


@pytest.fixture(scope="module")
def project(smoke_results, tmp_path_factory):
    """A finished smoke run for this file alone, with all that the README's commands read."""
    folder = copy_finished(smoke_results.parents[1], tmp_path_factory.mktemp("readme") / "project")
    shutil.copy2(ROOT / "Makefile", folder)
    shutil.copytree(ROOT / "docs", folder / "docs", ignore=shutil.ignore_patterns("build"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder)
    tiny_llama().save_pretrained(folder / "MODEL")
    tokenizer().save_pretrained(folder / "MODEL")
    words = list(tokenizer().get_vocab())[3:]
    texts = [" ".join(words[(i * 7 + j * j) % len(words)] for j in range(60)) for i in range(40)]
    (folder / "documents.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "mine.yaml").write_text(
        "experiments:\n  mine: { label: Mine, method: masa, projections: qkvo, atoms: 3 }\n"
    )
    return folder


@pytest.fixture(scope="module", autouse=True)
def warm(project):
    """Commands need not import everything again, as under Snakemake."""
    with servers(ENVIRONMENT | {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}) as environment:
        WARM.update(environment)
        yield
    WARM.clear()


WARM: dict[str, str] = {}


def run(folder, words, status=0):
    done = subprocess.run(
        words, cwd=folder, env=WARM, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def smoke(*more: str) -> Callable:
    """The command itself, on the smoke configuration's runs and with some options more."""

    def call(folder, command):
        words = [re.sub("^nano/", "smoke/", word) for word in shlex.split(command)]
        words = [re.sub("^results/", "results/smoke/", word) for word in words]
        words = ["2" if before == "--cores" else word for before, word in zip(["", *words], words, strict=False)]
        return run(folder, [*words, *more, *([] if "--configfile" in words else SMOKE)])

    return call


def as_it_is(*more: str) -> Callable:
    return lambda folder, command: run(folder, [*shlex.split(command), *more])


def unlocked(folder, command):
    """Of a Snakemake that was killed: its lock is there, and another one refuses to start."""
    locks = folder / ".snakemake" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.output.lock").write_text("results/smoke/tables\n")
    refused = run(folder, ["snakemake", "--cores", "2", "results/smoke/tables", "--force", *SMOKE], status=1)
    assert "Directory cannot be locked" in refused.stdout + refused.stderr
    done = smoke()(folder, command)
    assert not list(locks.glob("*.lock"))
    return done


def make(*made: str) -> Callable:
    """What ``make`` would run, but for the environment: ``made``, each of which another test runs."""

    def call(folder, command):
        words = ["make", "--dry-run", "--assume-old=env", "BIN=bin", *shlex.split(command)[1:]]
        said = run(folder, words).stdout
        for line in made:
            assert line in said
        return said

    return call


def activated(folder, command):
    if not (BIN / "activate").is_file():
        pytest.skip("this environment is no virtual environment")
    venv = folder / ".venv"
    if not venv.exists():
        venv.symlink_to(BIN.parent)
    return run(folder, ["bash", "-c", f"{command} && masa --version"])


def exported_gguf(folder, command):
    pytest.importorskip("sentencepiece", reason="the extra gguf is not installed")
    return smoke()(folder, command)


SMALL = ("--samples", "4", "--length", "24", "--gradient-samples", "2")
HOW: dict[str, Callable] = {
    "make results": make("snakemake --cores all results/tables results/figures"),
    "make test": make("pytest -n 3"),  # .ci/run runs it
    "make report": make("snakemake --cores all report"),
    "source .venv/bin/activate": activated,
    "snakemake --cores all results/tables results/figures": smoke("-n"),
    "snakemake --cores all table2": smoke(),
    "snakemake --cores all --configfile config/smoke.yaml": smoke(),
    "snakemake --cores all -n results/tables --configfile config/paper.yaml": as_it_is(),
    "masa plan": as_it_is(),
    "masa plan --configfile config/paper.yaml --device h100": as_it_is(),
    "masa status --watch": smoke(),
    "masa compare nano/vanilla/seed0 nano/masa-qkvo/seed0 --out compared.png": smoke(),
    "masa export nano/masa-qkvo/seed0 --out plain": smoke(),
    "masa export nano/masa-qkvo/seed0 --format gguf --out gguf": exported_gguf,
    "masa calibrate MODEL --text documents.jsonl --gradient-samples 12 --out statistics": as_it_is(*SMALL),
    "masa compress MODEL --method svd-fisher --reduction 0.2 --calibration statistics --out smaller": as_it_is(),
    "masa export smaller --out smaller-plain": as_it_is(),
    # on a real Slurm: tests/test_slurm.py
    "snakemake --profile workflow/profiles/slurm results/tables results/figures --configfile config/paper.yaml": (
        as_it_is("-n")
    ),
    "snakemake --workflow-profile workflow/profiles/slurm results/tables results/figures"
    " --configfile config/paper.yaml": as_it_is("-n"),
    "snakemake --unlock": unlocked,
}
"""Command of the README -> how it is tried; in their order, since some read what others wrote."""


def test_no_command_is_left_out():
    assert commands() == [command for command in commands() if command in HOW]
    assert set(HOW) == set(commands()), "the README does not say this any more"
    assert "make test" in (ROOT / ".ci" / "run").read_text()


@pytest.mark.parametrize("command", list(dict.fromkeys(commands())))
def test_a_command_does_what_it_says(command, project):
    HOW[command](project, command)
    for made in ("plain", "smaller-plain", "gguf", "compared.png", "statistics", "smaller"):
        if command.endswith(f"--out {made}"):
            assert (project / made).exists()


def test_the_artefacts_of_the_table_can_be_made(project):
    """All at once; the whole smoke run, which ``project`` is a copy of, has made each of them."""
    made = re.findall(r"\| `snakemake --cores all (\w+)` \|", README)
    assert len(made) == 8
    done = run(project, ["snakemake", "--cores", "2", "-n", "--force", *made, *SMOKE])
    listed = set(re.findall(r"^(\w+) +1$", done.stdout + done.stderr, re.MULTILINE))
    assert set(made) <= listed


def test_an_overlay_is_checked(project):
    assert "masa config --configfile mine.yaml" in README
    run(project, ["masa", "config", "--configfile", "mine.yaml"])
    (project / "bad.yaml").write_text("experiments: { mine: { label: Mine, method: massa } }\n")
    assert "Did you mean 'masa'" in run(project, ["masa", "config", "--configfile", "bad.yaml"], status=2).stderr


def test_the_code_runs_and_prints_what_it_says(tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "66.7% fewer attention parameters" in done.stdout
    assert (tmp_path / "plain" / "model.safetensors").is_file()
    assert len(code.strip().splitlines()) - code.count("\n\n") <= 12, "ten lines beside the imports"
