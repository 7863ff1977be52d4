"""Files that are whole or not there, and the checksums that tell whether they still are what was written."""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from masa.errors import MasaError
from masa.runs.faults import CannotWrite, writing
from masa.runs.outputs import resolved

_CLONE = Path(__file__).resolve().parents[2]
PROJECT = _CLONE if (_CLONE / "config" / "config.yaml").is_file() else Path.cwd()
"""Where ``config/`` and ``results/`` are: the clone that holds this package, else the folder where it is called."""

VERIFIED = 2**30
"""Bytes of a directory up to which every file's checksum is verified when it is opened; beyond, sizes alone are."""


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: Path, sha256: Mapping[str, str | None], mend: str) -> None:
    """See that files are those that were written: same size and other bytes is damage that nothing else notices.

    Reading a gigabyte takes a second or two; where the files hold more than :data:`VERIFIED` together, this is said
    and left to the sizes, which whoever opens the files checks.

    Args:
        sha256: file name -> checksum; None where there is none.
        mend: what to do, e.g. "make it anew with `masa images`".

    Raises:
        MasaError: a file has other bytes; it is named.
    """
    wanted = {directory / name: expected for name, expected in sha256.items() if expected}
    total = sum(path.stat().st_size for path in wanted if path.is_file())
    if total > VERIFIED:
        print(
            f"{directory}: {total / 2**30:.1f} GiB are checked by size alone (checksums: up to "
            f"{VERIFIED / 2**30:g} GiB)",
            file=sys.stderr,
        )
        return
    if found := damaged(wanted):
        path, actual = found
        if actual is None:
            raise MasaError(f"{path} is missing; {mend}.")
        raise MasaError(f"{path} is corrupt: sha256 {actual}, expected {wanted[path]}; {mend}.")


def damaged(sha256: Mapping[Path, str]) -> tuple[Path, str | None] | None:
    """The first of some files that is not what its checksum says, and the one that it has: None of a missing file."""
    for path, expected in sha256.items():
        actual = sha256_of(path) if path.is_file() else None
        if actual != expected:
            return path, actual
    return None


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Write to the yielded path; the file appears under its own name only when the block ends without an error.

    Raises:
        CannotWrite: the disk is full or read-only, or this user may not write there.
    """
    with whole_files(path.parent, path) as folder:
        yield folder / path.name


@contextmanager
def whole_files(directory: Path, named: Path | None = None) -> Iterator[Path]:
    """:func:`whole_file` for several: every file that is put into the yielded folder appears in ``directory``.

    Args:
        named: what an error names instead of ``directory``.
    """
    named = named or directory
    with writing(named, below=directory):
        directory.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=directory, prefix=f".{named.name}.")
    with folder, writing(named, below=Path(folder.name)):
        yield Path(folder.name)
        for file in sorted(Path(folder.name).iterdir()):
            file.replace(directory / file.name)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """:func:`whole_file` for a folder: what is yielded takes the place of ``path`` if the block ends without error.

    Of a link, the folder that it leads to is replaced.
    """
    path = resolved(path)
    with writing(path, below=path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        with writing(path, below=temporary):
            yield temporary
            temporary.chmod(0o755)
            if path.exists():
                shutil.rmtree(path)
            temporary.replace(path)
    except CannotWrite as fault:  # of one of its files, where it will be
        raise CannotWrite(fault.number, path) if temporary in fault.path.parents else fault from fault
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
