"""Metrics logs that are still being written: their last records, and what has come since the last look."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

CHUNK, MOST = 2**14, 2**18
"""Bytes that are read from the end of a log first, and at most."""


def last_records(path: Path, wanted: str) -> list[dict[str, Any]]:
    """The last records of a log, read from its end; further back until one of them has the key ``wanted``.

    A line cut short, by a kill or because it is being written, is passed over.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        end, size = file.seek(0, os.SEEK_END), CHUNK
        while True:
            begin = max(0, end - size)
            file.seek(begin)
            lines = file.read(end - begin).split(b"\n")
            found = _parse(lines[1:] if begin else lines)
            if not begin or size >= MOST or any(wanted in record for record in found):
                return found
            size *= 4


class Growing:
    """A log that is read piece by piece.

    Args:
        path: of the log; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: tuple[int, int] | None = None
        self._offset, self._last = 0, b""

    def read(self) -> tuple[bool, list[dict[str, Any]]]:
        """What was written since the last call.

        Returns:
            Whether what came before does not hold any more (a run that was resumed has dropped lines), and the records
            that are new, or, in that case, all.

        Raises:
            OSError: the file cannot be read.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            anew = self._file is not None
            self._file, self._offset, self._last = None, 0, b""
            return anew, []
        with file:
            stat = os.fstat(file.fileno())
            anew = self._file is not None and not self._is_same(file, (stat.st_dev, stat.st_ino))
            self._file = (stat.st_dev, stat.st_ino)
            if anew:
                self._offset, self._last = 0, b""
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        if whole:
            self._last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
        return anew, _parse(whole.split(b"\n"))

    def _is_same(self, file: Any, identity: tuple[int, int]) -> bool:
        """The same file, which still has the line that was read last: numbers of files are used again."""
        if identity != self._file:
            return False
        file.seek(self._offset - len(self._last))
        return file.read(len(self._last)) == self._last


def _parse(lines: Iterable[bytes]) -> list[dict[str, Any]]:
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            found.append(record)
    return found
