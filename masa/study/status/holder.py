"""Who writes a run directory, asked without touching its lock: a trainer that starts must never find it taken."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

LOCKS = Path("/proc/locks")
SHARED_NAMES = ("localhost", "localhost.localdomain")
"""Names that many machines have, and that therefore say nothing about which it is."""


@dataclass(frozen=True)
class Holder:
    """The process that holds a run directory, or did so last.

    Attributes:
        pid, host, since: what it wrote into the lock; None or empty if that cannot be read.
        alive: True: it holds the lock now, on this machine. False: it was on this machine and is gone. None: it is or
            was on another machine, of which this one knows nothing.
        taken: when the lock was taken, by the clock of the file system, in seconds since the epoch.
    """

    pid: int | None
    host: str
    since: datetime | None
    alive: bool | None
    taken: float


def holder_of(directory: Path) -> Holder | None:
    """The holder of a run directory; None if nobody has ever taken its lock."""
    path = directory / ".lock"
    try:
        stat, text = path.stat(), path.read_bytes()[:300].decode("utf-8", "replace")
    except OSError:
        return None
    found = re.match(r"process (\d{1,10}) on (\S+) since (\S+)", text)
    pid, host, since = (int(found[1]), found[2], _time(found[3])) if found else (None, "", None)
    here = host == os.uname().nodename and host not in SHARED_NAMES
    held = _is_held(stat.st_dev, stat.st_ino, pid if here else None)
    if held is None:  # no such table on this system
        held = here and pid is not None and _lives(pid)
    return Holder(pid, host, since, True if held else False if here else None, stat.st_mtime)


def _is_held(device: int, inode: int, pid: int | None) -> bool | None:
    """Whether a process of this machine holds a lock on a file; None where the system does not say.

    Some file systems give another device number here, so the process's own number does as well.
    """
    lines = set()
    for _ in range(2):  # the system gives the table page by page, and an entry that moves meanwhile may be missed once
        try:
            lines |= set(LOCKS.read_text(encoding="ascii", errors="replace").splitlines())
        except OSError:
            return None
    for line in lines:
        fields = line.split()
        if len(fields) != 8 or "->" in fields or fields[5].count(":") != 2:  # "->": one that waits for it
            continue
        major, minor, number = fields[5].split(":")
        same_device = (int(major, 16), int(minor, 16)) == (os.major(device), os.minor(device))
        if number == str(inode) and (same_device or fields[4] == str(pid)):
            return True
    return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there is one, of another user
        return True
    return True


def _time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
