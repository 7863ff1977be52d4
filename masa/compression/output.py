"""What every folder that compression writes has, by which it is known again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.runs.outputs import tried
from masa.runs.run import read_json

ACCOUNT = "compression.json"
"""Written into every output; a folder that has it may be replaced."""


def check_output(path: Path) -> Path:
    """``path`` itself.

    Raises:
        MasaError: it holds something that no compression wrote.
    """
    if path.exists() and not (path / ACCOUNT).is_file() and (not path.is_dir() or any(path.iterdir())):
        raise MasaError(f"{path} exists and is no earlier output of `masa compress`; choose another.")
    return path


def target_beside(output: str | Path, model: Path) -> Path:
    """Where what is made of a folder goes.

    Raises:
        MasaError: it is that folder itself, or see :func:`check_output`.
    """
    target = check_output(tried(Path(output), folder=True, option="output"))
    if model.resolve() == target.resolve():
        raise MasaError(f"{output} is the model itself; choose another folder for the result.")
    return target


def account_of(model: Path) -> dict[str, Any]:
    """What an earlier compression said of a folder; nothing where there was none."""
    return read_json(model / ACCOUNT) if (model / ACCOUNT).is_file() else {}
