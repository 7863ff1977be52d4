"""Copies of this project in a temporary folder, and Snakemake run in them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "MASA_MIRROR"} | {"PATH": f"{BIN}:{os.environ['PATH']}"}
UNFINISHED = shutil.ignore_patterns("tmp*", ".*")  # downloads of tests that run beside


def snakemake(folder, *arguments, overlays=(), check=True):
    command = [f"{BIN}/snakemake", "--cores", "2", *arguments, "--configfile", "config/smoke.yaml", *overlays]
    environment = ENVIRONMENT | {"PYTHONPATH": str(folder)}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-5000:]
    return result


def link(source, target):
    """A hard link where possible: the converted pretrained model is half a gigabyte, and no file here is written to."""
    if Path(target).exists():
        return
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def copy_project(folder):
    """What the workflow needs of the project, with the downloads that this machine already has."""
    for name in ("masa", "workflow", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "cache").is_dir():
        shutil.copytree(ROOT / "cache", folder / "cache", copy_function=link, ignore=UNFINISHED)
    return folder


def run_smoke(folder):
    """The whole workflow on ``config/smoke.yaml`` in a copy of the project; downloads are kept in this one's cache."""
    folder.mkdir()
    snakemake(copy_project(folder))
    shutil.copytree(folder / "cache", ROOT / "cache", copy_function=link, dirs_exist_ok=True, ignore=UNFINISHED)
    return folder


def copy_finished(source, folder):
    """A finished run that may be edited; downloads and weights, which are never written to in place, are linked."""

    def copy(path, target):
        linked = Path(path).relative_to(source).parts[0] == "cache" or path.endswith(".safetensors")
        return link(path, target) if linked else shutil.copy2(path, target)

    return Path(shutil.copytree(source, folder, copy_function=copy))
