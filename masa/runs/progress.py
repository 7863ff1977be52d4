"""Progress of long work as one readable line now and then: fit for a terminal, a log file and many jobs at once."""

from __future__ import annotations

import sys
import time


class Progress:
    """Print ``name  done/total unit  rate  ETA`` at most every ``every`` seconds, and once at the end.

    Args:
        name: begins every line, so that the lines of parallel jobs can be told apart.
        total: amount of work; ``unit`` names it.
    """

    def __init__(self, name: str, total: int, unit: str, every: float = 10.0) -> None:
        self.name, self.total, self.unit, self.every = name, total, unit, every
        self.started = self.printed = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, note: str = "") -> None:
        """Say that ``done`` of the total is done; prints only if it is time to."""
        if self.first is None:
            self.first = done
        if time.monotonic() - self.printed >= self.every:
            self._print(done, note)

    def close(self, done: int, note: str = "") -> None:
        """Print the last line."""
        self.first = self.first or 0
        self._print(done, note)

    def _print(self, done: int, note: str) -> None:
        self.printed = time.monotonic()
        elapsed = max(self.printed - self.started, 1e-9)
        rate = (done - (self.first or 0)) / elapsed
        left = clock((self.total - done) / rate) if rate > 0 and done < self.total else ""
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        parts = [f"{self.name}: {done:,}/{self.total:,} {self.unit}", note, f"{speed} {self.unit}/s"]
        parts.append(f"ETA {left}" if left else f"took {clock(elapsed)}")
        print("  ".join(p for p in parts if p), file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Seconds as 1:02:03 or 4:05."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"
