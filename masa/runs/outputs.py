"""Where an output goes: tried for writing before any work begins."""

from __future__ import annotations

import os
from pathlib import Path

from masa.errors import MasaError
from masa.runs.faults import CannotWrite, why_not_writable


def resolved(path: Path) -> Path:
    """What a link leads to, whether it is there yet or not; any other path as it is.

    Raises:
        MasaError: the link leads to itself.
    """
    if not path.is_symlink():
        return path
    try:
        found = path.resolve()
        circular = found.is_symlink()
    except (OSError, RuntimeError):
        circular = True
    if circular:
        raise MasaError(f"{path} is a link that leads to itself; choose another output.")
    return found


def tried(path: Path, folder: bool, option: str = "--out") -> Path:
    """See that an output can be written, by writing a byte beside it or into it.

    Args:
        path: of a folder or file that need not be there; of a link, what it leads to is meant.
        folder: which of the two it is to be.
        option: what a message names.

    Returns:
        Where it will really be.

    Raises:
        MasaError: a file where a folder is to be, a folder where a file is to be, or a file on the way.
        CannotWrite: the disk is full or read-only, or this user may not write there.
    """
    real = resolved(path)
    if folder and os.path.lexists(real) and not real.is_dir():
        raise MasaError(f"{option} {path} is a file; name a folder.")
    if not folder and real.is_dir():
        raise MasaError(f"{option} {path} is a directory; name a file in it.")
    place = real
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        place = place.parent if place == real else place
    if not place.is_dir():
        raise MasaError(f"{option} {path}: {place} is no folder, so that nothing can be made in it.")
    if (number := why_not_writable(place, size=1)) is not None:
        raise CannotWrite(number, real)
    return real
