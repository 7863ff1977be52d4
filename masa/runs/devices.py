"""GPUs of this machine, one job each: jobs that run side by side lease them, as Slurm would give them out."""

from __future__ import annotations

import fcntl
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from masa.errors import MasaError

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible() -> list[str]:
    """The GPUs that this process may use, as CUDA names them: what ``CUDA_VISIBLE_DEVICES`` says, else all."""
    given = os.environ.get(VISIBLE)
    if given is None:
        return [str(i) for i, _ in enumerate(sorted(Path("/dev").glob("nvidia[0-9]*")))]
    return [name for name in given.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]


@contextmanager
def leased(count: int = 1) -> Iterator[list[str]]:
    """Hold some GPUs alone while the block runs; CUDA sees no others. Nothing happens where there is none.

    Where Slurm has given GPUs to the job, and in a process of a training that was launched, those are used as they are.
    The lease is a lock of the operating system on a file, so that it ends with the process, however that ends.

    Args:
        count: how many.

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


def _wait_for(names: list[str], count: int, held: ExitStack) -> list[str]:
    """Lock ``count`` of the GPUs, all at once, so that two jobs never wait for each other's."""
    folder = Path(tempfile.gettempdir()) / f"masa-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    said = False
    while True:
        with ExitStack() as tried:
            mine = []
            for name in names:
                file = tried.enter_context((folder / f"{name.replace('/', '-')}.lock").open("w"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                mine.append(name)
                if len(mine) == count:
                    held.push(tried.pop_all())
                    return mine
        if not said:
            said = True
            print(f"waiting for {count} of the GPUs {', '.join(names)}, which other jobs use", file=sys.stderr)
        time.sleep(0.5)
