"""Faults of the machine as messages that say what to mend: a full or read-only disk, no permission, a killed worker."""

from __future__ import annotations

import errno
import os
import re
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from masa.errors import MasaError

MENDS = {
    errno.ENOSPC: "free space",
    errno.EDQUOT: "free space or raise the quota",
    errno.EFBIG: "raise the limit on the size of files",
    errno.EROFS: "make the file system writable",
    errno.EACCES: "allow this user to write there",
    errno.EPERM: "allow this user to write there",
    errno.EIO: "look after the disk",
}
"""What to do about errors of writing, by their number."""


class CannotWrite(MasaError):
    """Something could not be written: ``reason`` in the system's words, the ``path``, and what would ``mend`` it."""

    def __init__(self, number: int, path: str | Path) -> None:
        self.number, self.path = number, Path(path)
        self.reason, self.mend = os.strerror(number), MENDS.get(number, "mend that")
        super().__init__(f"{self}.")

    def __str__(self) -> str:
        return f"{self.reason}: {self.path}; {self.mend} and run the same command again"


def cannot_write(error: BaseException, path: Path, below: Path | None = None) -> CannotWrite | None:
    """The fault of writing ``path`` that an exception means, or None if it means something else.

    torch and NumPy drop the system's error number, so for those the disk is asked by writing a little.

    Args:
        error: what was raised while ``path`` was written.
        path: what to name.
        below: files in this folder are parts of ``path``; an error that names any other file is not about it.
    """
    if isinstance(error, MasaError):
        return error if isinstance(error, CannotWrite) else None
    if isinstance(error, OSError) and error.errno is not None:
        named = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else None
        ours = named is None or named == path or (below is not None and below in (named, *named.parents))
        return CannotWrite(error.errno, path) if error.errno in MENDS and ours else None
    if found := re.search(r"\(os error (\d+)\)", str(error)):  # of libraries in Rust
        number = int(found[1])
        return CannotWrite(number, path) if number in MENDS else None
    if isinstance(error, OSError | RuntimeError):
        number = why_not_writable(path if path.is_dir() else path.parent)
        return CannotWrite(number, path) if number in MENDS else None
    return None


def why_not_writable(folder: Path, size: int = 2**20) -> int | None:
    """The error number that writing ``size`` bytes to a folder meets, or None."""
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(size))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


@contextmanager
def writing(path: Path, below: Path | None = None) -> Iterator[None]:
    """Turn faults of writing inside the block into :class:`CannotWrite` that names ``path``."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MasaError) or (fault := cannot_write(error, path, below)) is None:
            raise
        raise fault from error


def killed_worker(error: BaseException) -> str | None:
    """What became of a data loader's worker process, in torch's words, if that is what an exception says."""
    if isinstance(error, ConnectionError | EOFError) and "/torch/utils/data/" in "".join(
        traceback.format_tb(error.__traceback__)
    ):
        return f"its pipe: {error or 'end of file'}"
    if not isinstance(error, RuntimeError):
        return None
    found = re.search(
        r"DataLoader worker \(pid\(?s?\)? ([\d, ]+)\) (is killed by signal: [\w ]+|exited unexpectedly)", str(error)
    )
    return f"process {found[1]} {found[2].strip()}" if found else None
