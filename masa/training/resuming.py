"""The checkpoints of a run that is being trained: which are whole, which is the newest, and dropping the others."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sys
from pathlib import Path

from masa.errors import MasaError
from masa.runs import run
from masa.runs.files import damaged, sha256_of

COMPLETE = "complete.json"
"""File that a checkpoint gets last: the sha256 of all others."""

KEPT = 2
"""Whole checkpoints that are kept."""

OTHER_SUM = "its sha256 is not the one that it was written with"


def drop_damaged(checkpoints: Path, name: str) -> None:
    """Drop checkpoints that are not whole, and say so."""
    for folder in every(checkpoints):
        if damage := _damage(folder):
            print(f"{name}: {damage}; the checkpoint is dropped", file=sys.stderr)
            remove(folder)


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
        remove(old)


def drop_unfinished(checkpoints: Path) -> None:
    """Remove a checkpoint that could not be written to its end."""
    for folder in every(checkpoints):
        if not (folder / COMPLETE).is_file():
            shutil.rmtree(folder, ignore_errors=True)


def then(checkpoints: Path) -> str:
    """What the same command will do, for messages: "go on from step 12"."""
    last = newest(checkpoints)
    return f"go on from step {_step(last):,}" if last else "begin anew (there is no checkpoint yet)"


def reached(checkpoints: Path) -> str:
    """How far an unfinished run is, for messages: "interrupted, with a checkpoint of step 12"."""
    last = newest(checkpoints)
    return f"interrupted, with a checkpoint of step {_step(last):,}" if last else "interrupted before a checkpoint"


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


def remove(path: Path) -> None:
    """Remove a folder, or a file in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _step(folder: Path) -> int:
    return int(folder.name.rpartition("-")[2])


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
    found = damaged({folder / name: expected for name, expected in files})
    if found is None:
        return None
    path, actual = found
    return f"{path} is {'missing' if actual is None else f'corrupt ({OTHER_SUM})'}"
