"""GPUs of this machine: jobs that run side by side lease them, whole as Slurm gives them out, or a share of one."""

from __future__ import annotations

import fcntl
import math
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from masa.errors import MasaError

WHOLE = 100
"""Shares of a GPU are counted in hundredths: whole numbers, as Snakemake's resources are."""

VISIBLE = "CUDA_VISIBLE_DEVICES"
LEASE = ".lease"


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA names them: what ``CUDA_VISIBLE_DEVICES`` says, else all."""
    given = os.environ.get(VISIBLE)
    if given is None:
        return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]
    return [name for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]


def percent(share: float) -> int:
    """A share of a GPU in hundredths, rounded up: 0.25 is 25, 0.333 is 34."""
    return math.ceil(WHOLE * share - 1e-9)


@contextmanager
def leased(count: float = 1) -> Iterator[list[str]]:
    """Hold some GPUs alone, or a share of one, while the block runs; CUDA sees no others. Nothing happens without any.

    Shares of one GPU add up to at most all of it. A share goes to the fullest GPU that has room, so that others stay
    free for jobs that need a whole one; it limits neither memory nor speed. Where Slurm has given GPUs to the job, and
    in a process of a training that was launched, those are used as they are. The lease is a lock of the operating
    system on a file, so that it ends with the process, however that ends.

    Args:
        count: how many, or less than one: a share, rounded up to hundredths.

    Yields:
        The names of the GPUs.

    Raises:
        MasaError: the machine has some, but fewer than ``count``.
    """
    names = visible()
    if not names or "RANK" in os.environ or ("SLURM_JOB_ID" in os.environ and VISIBLE in os.environ):
        yield names
        return
    if len(names) < count:
        raise MasaError(
            f"{count} GPUs are asked for (training.processes_per_node), but there are {len(names)} here: "
            f"{', '.join(names)}. Set it to {len(names)}, or use another machine."
        )
    before = os.environ.get(VISIBLE)
    with ExitStack() as held:
        mine = _wait_for(names, count, held)
        os.environ[VISIBLE] = ",".join(mine)
        try:
            yield mine
        finally:
            if before is None:
                del os.environ[VISIBLE]
            else:
                os.environ[VISIBLE] = before


def _wait_for(names: list[str], count: float, held: ExitStack) -> list[str]:
    """Lease GPUs, all at once, so that two jobs never wait for each other's.

    Each lease is a file that its process keeps locked, named by GPU and hundredths. Who looks at them holds one more
    lock meanwhile, so that nobody takes what somebody else is about to.
    """
    folder = Path(tempfile.gettempdir()) / f"masa-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    wanted = percent(count) if count < 1 else WHOLE
    said = False
    while True:
        with (folder / "door").open("w") as door:
            fcntl.flock(door, fcntl.LOCK_EX)
            if mine := _choice(names, count, wanted, _taken(folder)):
                for name in mine:
                    _lock(folder, f"{_safe(name)}.{wanted}.", held)
                return mine
        if not said:
            said = True
            many = f"{count:g} of one" if count < 1 else f"{count:g}"
            print(f"waiting for {many} of the GPUs {', '.join(names)}, which other jobs use", file=sys.stderr)
        time.sleep(0.5)


def _lock(folder: Path, prefix: str, held: ExitStack) -> None:
    descriptor, path = tempfile.mkstemp(dir=folder, prefix=prefix, suffix=LEASE)
    fcntl.flock(held.enter_context(os.fdopen(descriptor)), fcntl.LOCK_EX)
    held.callback(Path(path).unlink, missing_ok=True)  # before it is closed, and so while it is locked


def _safe(name: str) -> str:
    return name.replace("/", "-")


def _taken(folder: Path) -> Counter[str]:
    """GPU -> hundredths that processes hold; what a process left that was killed is cleared away."""
    taken: Counter[str] = Counter()
    for path in folder.glob(f"*{LEASE}"):
        with suppress(FileNotFoundError), path.open() as file:  # else it has ended just now
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
            except BlockingIOError:
                name, hundredths, _ = path.name.removesuffix(LEASE).rsplit(".", 2)
                taken[name] += int(hundredths)
    return taken


def _choice(names: list[str], count: float, wanted: int, taken: Counter[str]) -> list[str]:
    """GPUs to lease, none if there is no room."""
    room = [name for name in names if taken[_safe(name)] + wanted <= WHOLE]
    room.sort(key=lambda name: -taken[_safe(name)])  # keeps the order of those that are equally full
    many = max(1, int(count))
    return room[:many] if len(room) >= many else []
