"""Jobs of one workflow that need not import everything again.

Importing torch, transformers and lm-eval takes longer than many a job of the default run. Where ``MASA_WARM`` names a
directory (a local Snakemake sets it, :func:`open_for`), ``masa`` asks a server there to fork a process that has them:
the first job with an environment starts one (:mod:`masa.start.server`), which ends with the workflow. What is said
here is plain: a job is a process of its own with its own working directory, limits, output and exit status, signals
reach it, and it dies with the process that asked. Whatever cannot be had this way runs in the ordinary way.

Only standard modules are imported here: this is what a job waits for.
"""

from __future__ import annotations

import atexit
import fcntl
import hashlib
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

VARIABLE = "MASA_WARM"
VOLATILE = {VARIABLE, "_", "SHLVL", "PWD", "OLDPWD"}
"""Variables of the environment in which jobs of one server may differ."""

LIMITS = {name: getattr(resource, name) for name in dir(resource) if name.startswith("RLIMIT_")}
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
HEADER = 8  # bytes that say how long a request is


def possible() -> bool:
    """Whether processes can be forked after such imports.

    They can on Linux, where there is no GPU, whose drivers do not survive a fork; and a process of several that train
    one model has an environment of its own.
    """
    devices = map(Path, ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg"))
    return sys.platform == "linux" and "RANK" not in os.environ and not any(device.exists() for device in devices)


def open_for(owner: int) -> Callable[[], None]:
    """Let the commands that this process starts from now on be warm ones, while the ``owner`` process lives.

    Returns:
        Ends it.
    """
    if not possible() or VARIABLE in os.environ:
        return lambda: None
    folder = tempfile.mkdtemp(prefix="masa-")
    Path(folder, "owner").write_text(str(owner))
    os.environ[VARIABLE] = folder
    maker = os.getpid()

    def close() -> None:
        if os.getpid() != maker:  # forked from it
            return
        os.environ.pop(VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)  # servers end with their socket's file

    atexit.register(close)
    return close


def ask(arguments: Sequence[str]) -> int | None:
    """Have ``masa ARGUMENTS`` run by a server.

    Returns:
        Its exit status; None where there is no server to be had, and nothing has begun.
    """
    folder = Path(os.environ[VARIABLE])
    try:
        if not possible() or folder.stat().st_uid != os.getuid():
            return None
        connection = _connect(folder, key())
        _send(connection, arguments)
        answer = connection.makefile("rb")
        started = answer.readline()
    except OSError:
        return None
    if not started:
        return None
    return _wait(json.loads(started)["pid"], answer)


def key() -> str:
    """Equal for processes that one server may be forked into: one interpreter, one masa, one environment.

    And one set of hard limits: a server has those of the process that started it, and nobody may raise them.
    """
    environment = sorted((name, value) for name, value in os.environ.items() if name not in VOLATILE)
    hard = [(name, resource.getrlimit(limit)[1]) for name, limit in LIMITS.items()]
    said = repr([sys.executable, __file__, environment, hard])
    return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]


def _connect(folder: Path, name: str) -> socket.socket:
    """Connect to the server of this environment, which is started if there is none."""
    path = folder / f"{name}.socket"
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with suppress(OSError):
        connection.connect(str(path))
        return connection
    with (folder / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several first jobs, one starts it
        with suppress(OSError):
            connection.connect(str(path))
            return connection
        path.unlink(missing_ok=True)
        owner = (folder / "owner").read_text()
        subprocess.Popen(
            [sys.executable, "-m", "masa.start.server", str(path), owner],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        for _ in range(500):
            time.sleep(0.01)
            with suppress(OSError):
                connection.connect(str(path))
                return connection
    raise OSError("no server came up")


def _send(connection: socket.socket, arguments: Sequence[str]) -> None:
    """What a process inherits from the one that starts it."""
    request = {
        "arguments": list(arguments),
        "program": sys.argv[0],
        "directory": str(Path.cwd()),
        "environment": {name: os.environ[name] for name in VOLATILE & set(os.environ)},
        "umask": _umask(),
        "limits": {name: resource.getrlimit(limit) for name, limit in LIMITS.items()},
        "cores": sorted(os.sched_getaffinity(0)),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
    }
    text = json.dumps(request).encode()
    socket.send_fds(connection, [len(text).to_bytes(HEADER, "big")], [0, 1, 2])
    connection.sendall(text)


def _umask() -> int:
    before = os.umask(0o077)
    os.umask(before)
    return before


def _wait(pid: int, answer: Any) -> int:
    """Hand signals on until the job has ended; then end as it did."""

    def forward(number: int, frame: Any) -> None:
        with suppress(ProcessLookupError):
            if number == signal.SIGINT:  # Ctrl-C reaches a whole group
                os.killpg(pid, number)
            else:
                os.kill(pid, number)

    for number in FORWARDED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, forward)
    last = answer.readline()  # signals are handled meanwhile; reading goes on after them
    if not last:
        print("masa: error: the process that held the job was killed; run the same command again.", file=sys.stderr)
        return 1
    status = json.loads(last)["status"]
    if status < 0:
        for number in FORWARDED:
            signal.signal(number, signal.SIG_DFL)
        with suppress(OSError, ValueError):
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        return 128 - status
    return status
