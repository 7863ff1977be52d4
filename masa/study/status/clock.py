"""The time by which a file system dates its files: on a cluster, clocks of nodes and of the disk's server differ."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

KEPT = 60.0
"""Seconds for which a comparison of the two clocks is good."""


class FileClock:
    """The clock of the file system that a directory is on; this machine's own where nothing can be written there."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._ahead, self._asked = 0.0, -KEPT
        self.source = "this machine"

    def now(self) -> float:
        """Seconds since the epoch, to be compared with times of files."""
        if time.monotonic() - self._asked >= KEPT:
            self._ask()
        return time.time() + self._ahead

    def _ask(self) -> None:
        self._asked = time.monotonic()
        try:
            with tempfile.NamedTemporaryFile(dir=self.directory, prefix=".clock.") as file:
                self._ahead = Path(file.name).stat().st_mtime - time.time()
            self.source = "file system"
        except OSError:
            self._ahead, self.source = 0.0, "this machine"
