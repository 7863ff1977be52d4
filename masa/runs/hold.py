"""One process an output: a lock that the system drops with its holder, and waiting for it."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from masa.errors import Interrupted, MasaError
from masa.runs.faults import writing

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
POLL, SAY = 0.2, 60.0
"""Seconds between two looks at the lock, and between two lines about it."""


@contextmanager
def stop_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle :data:`STOP_SIGNALS` so while the block runs; only in the main thread."""
    previous = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


_held: set[IO[str]] = set()


def _let_go() -> None:
    """In a forked process, such as a data loader's worker: the lock is its parent's, and must end with that one."""
    for lock in _held:
        lock.close()
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def exclusive(out: Path, wait: bool = False, *, beside: bool = False, keep: bool = True) -> Iterator[bool]:
    """Hold an output, so that nobody else writes it meanwhile; yields whether another process had to be waited for.

    Args:
        out: a folder, made if needed; if nothing is put into it, it goes again.
        wait: for as long as another process holds it, saying so every minute; a stop signal ends the waiting.
        beside: ``out`` is a file, or a folder that is replaced as a whole: the lock lies beside it instead of in it.
        keep: leave the lock's file behind, which says who wrote last.

    Raises:
        MasaError: another live process holds it, and ``wait`` is false.
        Interrupted: a stop signal came while waiting.
    """
    path, waited = (out.with_name(f".{out.name}.lock") if beside else out / ".lock"), False
    missing: list[Path] = []  # folders that are made here
    try:
        while True:
            missing = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()] or missing
            with _opened(path, out) as lock:
                if not _taken(lock):
                    if not wait:
                        raise MasaError(f"{out} is being written by {_holder(lock)}; wait for it.")
                    _wait(lock, out)
                    waited = True
                if not _is_ours(lock, path):
                    continue  # removed while we waited: what we hold is not there any more
                with writing(path):
                    lock.truncate(0)
                    since = datetime.now().astimezone().isoformat(timespec="seconds")
                    lock.write(f"process {os.getpid()} on {os.uname().nodename} since {since}")
                    lock.flush()
                _held.add(lock)
                try:
                    yield waited
                finally:
                    _held.discard(lock)
                    _tidy(lock, path, keep and not beside, bool(missing))
                return
    finally:
        for folder in missing:  # the innermost first
            try:
                folder.rmdir()
            except OSError:  # it is used
                break


def _opened(path: Path, out: Path) -> IO[str]:
    """The lock's file, whose folder may be tidied away between two moments."""
    for _ in range(1000):
        with writing(out, below=path.parent):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with writing(path):
                return path.open("a+")
        except FileNotFoundError:
            continue
    raise MasaError(f"{path} cannot be made: its folder is removed again and again, or it is a link to nowhere.")


def _is_ours(lock: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(lock.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _tidy(lock: IO[str], path: Path, keep: bool, new: bool) -> None:
    """Remove the lock's file, still held, unless it is to be kept beside what was written."""
    with suppress(OSError):
        empty = new and not any(other.name != path.name for other in path.parent.iterdir())
        if (empty or not keep) and _is_ours(lock, path):
            path.unlink()


def _taken(lock: IO[str]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(lock: IO[str]) -> str:
    lock.seek(0)
    return lock.read().strip() or "another process"


def _wait(lock: IO[str], out: Path) -> None:
    began, said = time.monotonic(), 0.0
    with _interruptible(out, lock):
        while not _taken(lock):
            now = time.monotonic()
            if not said or now - said >= SAY:
                said = now
                print(
                    f"{out} is being written by {_holder(lock)}; waiting for it ({now - began:.0f} s so far)",
                    file=sys.stderr,
                    flush=True,
                )
            time.sleep(POLL)


@contextmanager
def _interruptible(out: Path, lock: IO[str]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield
        return

    def stop(number: int, _: Any) -> None:
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} while waiting for {out}, which {_holder(lock)} goes on writing. "
            "The same command waits again."
        )

    with stop_signals(stop):
        yield
