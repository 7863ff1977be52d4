"""What every folder that compression writes has, by which it is known again."""

from __future__ import annotations

from pathlib import Path

from masa.errors import MasaError

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
