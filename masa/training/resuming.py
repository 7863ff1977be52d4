"""The checkpoints of a run that is being trained: which are whole, which is the newest, and dropping the others."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.runs import run
from masa.runs.files import sha256_of, whole_file

COMPLETE = "complete.json"
"""File that a checkpoint gets last: the sha256 of all others."""

KEPT = 2
"""Whole checkpoints that are kept."""


def prepare(out: Path, checkpoints: Path, spec: Mapping[str, Any], identity: str) -> None:
    """Drop what an earlier, different spec or data left in the run directory, and checkpoints that are not whole."""
    (out / "manifest.json").unlink(missing_ok=True)
    marker = checkpoints / "identity"
    if not marker.is_file() or marker.read_bytes() != identity.encode():
        _remove(checkpoints)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        with whole_file(marker) as path:
            path.write_text(identity)
    for folder in every(checkpoints):
        if damage := _damage(folder):
            print(f"{spec['run']}: {damage}; the checkpoint is dropped", file=sys.stderr)
            _remove(folder)
    for place in (out, out / "model", checkpoints):
        for left in place.glob(".*.*"):  # temporary folders of sources.whole_file that a kill left behind
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
    run.write_json(out / "spec.json", spec)


def every(checkpoints: Path) -> list[Path]:
    """All checkpoints, whole or not, the newest first. By their steps: a clock may have been set back."""
    found = [path for path in checkpoints.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def newest(checkpoints: Path) -> Path | None:
    """The newest checkpoint that was written to its end."""
    return next((folder for folder in every(checkpoints) if (folder / COMPLETE).is_file()), None)


def finish(checkpoints: Path, folder: Path) -> None:
    """Mark a checkpoint as whole, then drop those that are too old."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    run.write_json(folder / COMPLETE, {str(path.relative_to(folder)): sha256_of(path) for path in files})
    for old in every(checkpoints)[KEPT:]:
        (old / COMPLETE).unlink(missing_ok=True)  # first, so that a kill leaves none that looks whole and is not
        _remove(old)


def drop_unfinished(checkpoints: Path) -> None:
    """Remove a checkpoint that could not be written to its end."""
    for folder in every(checkpoints):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def then(checkpoints: Path) -> str:
    """What the same command will do, for messages: "go on from step 12"."""
    last = newest(checkpoints)
    return f"go on from step {_step(last):,}" if last else "begin anew (there is no checkpoint yet)"


def explain(error: Exception, folder: Path | None) -> None:
    """Name the file of a checkpoint that cannot be read. Files are only ever read as data, never as pickled code.

    Raises:
        MasaError: there is one.
    """
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers.trainer import safe_globals

    for file in sorted(folder.glob("*")) if folder and not isinstance(error, MasaError) else ():
        try:
            if file.suffix in (".pt", ".pth") or file.name == "pytorch_model.bin":
                with safe_globals():
                    torch.load(file, map_location="cpu", weights_only=True)
            elif file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    opened.keys()
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
        except (pickle.UnpicklingError, SafetensorError, RuntimeError, ValueError, EOFError, OSError) as reason:
            raise MasaError(
                f"{file} is corrupt, or holds something other than numbers, which is never run "
                f"({str(reason).partition(chr(10))[0]}). Delete {file.parent} and run the same command again."
            ) from error


def finished(out: Path, identity: str) -> dict[str, Any] | None:
    """The manifest of a run that is whole and the same, or None."""
    try:
        manifest = run.read_json(out / "manifest.json")
        same = manifest["identity"] == identity
        whole = all(sha256_of(out / "model" / name) == value for name, value in manifest["sha256"].items())
    except (MasaError, OSError, KeyError, TypeError, AttributeError):
        return None
    return manifest if same and whole else None


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


def _remove(path: Path) -> None:
    """Remove a folder, or a file in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint: cut short by a kill, or a file that changed since it was written."""
    if not folder.is_dir():
        return f"{folder} is not a folder"
    if not (folder / COMPLETE).is_file():
        return f"{folder} was not written to its end"
    try:
        files = run.read_json(folder / COMPLETE).items()
    except (MasaError, AttributeError):
        return f"{folder / COMPLETE} is corrupt"
    if not files:
        return f"{folder / COMPLETE} names no files"
    for name, expected in files:
        if not (folder / name).is_file():
            return f"{folder / name} is missing"
        if sha256_of(folder / name) != expected:
            return f"{folder / name} is corrupt (its sha256 is not the one that it was written with)"
    return None
