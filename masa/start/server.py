"""The process that jobs are forked from: it imports what they needed, and computes nothing itself.

    python -m masa.start.server SOCKET OWNER

At the end of a job it is told which modules the job has imported beyond its own, and imports them before the next one.
It ends when the OWNER process or the socket's file is gone and no job runs.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import json
import os
import resource
import selectors
import shutil
import signal
import socket
import sys
import threading
import traceback
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masa.start.client import HEADER, LIMITS

FIRST = ("torch", "transformers")
"""Every job but the shortest needs these; they are imported before the first is asked for."""

PATIENCE = 0.5  # seconds between two looks at whether the workflow is still there
DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of prctl


@dataclass
class Job:
    """A process that runs, who asked for it, and where it says what it has imported."""

    pid: int
    connection: socket.socket
    learned: int
    ended: int


class Server:
    """One listening socket; a job a connection."""

    def __init__(self, path: str, owner: int) -> None:
        self.path, self.owner = path, owner
        self.jobs: dict[int, Job] = {}
        self.waiting: list[str] = list(FIRST)
        self.selector = selectors.DefaultSelector()
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(path)
        self.socket.listen(64)
        self.selector.register(self.socket, selectors.EVENT_READ, self._accept)

    def serve(self) -> None:
        """Until nobody needs it any more."""
        while self.jobs or self._wanted():
            events = self.selector.select(0 if self.waiting else PATIENCE)
            for key, _ in events:
                if key.fileobj in self.selector.get_map():  # not one that an earlier event has ended
                    key.data()
            if not events and self.waiting:
                self._learn()

    def _wanted(self) -> bool:
        try:
            os.kill(self.owner, 0)
        except ProcessLookupError:
            return False
        return Path(self.path).exists()

    def _learn(self) -> None:
        """Import the next module that a job had to import by itself."""
        name = self.waiting.pop(0)
        if name not in sys.modules:
            with suppress(Exception):  # it is the job's to say so
                importlib.import_module(name)
        if not self.waiting:
            gc.collect()
            gc.freeze()  # pages of what is there stay shared

    def _accept(self) -> None:
        connection, _ = self.socket.accept()
        try:
            request, streams = _receive(connection)
        except (OSError, ValueError):
            connection.close()
            return
        learned = os.memfd_create("learned")
        pid = os.fork()
        if pid == 0:
            self.selector.close()
            for job in self.jobs.values():
                job.connection.close()
                os.close(job.learned)
            connection.detach()  # stays open: it ends with the process, too
            self.socket.close()
            _become(request, streams, learned)
        for descriptor in streams:
            os.close(descriptor)
        job = Job(pid, connection, learned, os.pidfd_open(pid))
        self.jobs[pid] = job
        self.selector.register(job.ended, selectors.EVENT_READ, lambda: self._end(job))
        self.selector.register(connection, selectors.EVENT_READ, lambda: self._left_alone(job))
        self._say(job, {"pid": pid})

    def _left_alone(self, job: Job) -> None:
        """Who asked for it was killed: so is the job."""
        self.selector.unregister(job.connection)
        with suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)

    def _end(self, job: Job) -> None:
        _, status = os.waitpid(job.pid, 0)
        self.selector.unregister(job.ended)
        os.close(job.ended)
        with suppress(KeyError):
            self.selector.unregister(job.connection)
        self._say(job, {"status": os.waitstatus_to_exitcode(status)})
        job.connection.close()
        with os.fdopen(job.learned, "rb") as file:
            file.seek(0)
            names = file.read().decode().split()
        self.waiting += [name for name in names if name not in sys.modules]
        del self.jobs[job.pid]

    def _say(self, job: Job, what: dict[str, Any]) -> None:
        with suppress(OSError):
            job.connection.sendall(json.dumps(what).encode() + b"\n")


def _receive(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    connection.settimeout(5)
    header, streams, _, _ = socket.recv_fds(connection, HEADER, 3)
    length, text = int.from_bytes(header, "big"), b""
    while len(text) < length:
        part = connection.recv(length - len(text))
        if not part:
            raise ValueError("a request that ends early")
        text += part
    connection.settimeout(None)
    return json.loads(text), streams


def _become(request: dict[str, Any], streams: list[int], learned: int) -> None:
    """In the forked process: be what the client would have been; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(DEATH_SIGNAL, signal.SIGKILL)
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        for descriptor, target in zip(streams, (0, 1, 2), strict=True):
            os.dup2(descriptor, target)
            os.close(descriptor)
        for name, descriptor in (("stdin", 0), ("stdout", 1), ("stderr", 2)):
            setattr(sys, name, _stream(getattr(sys, name), descriptor))
        _inherit(request)
        known = set(sys.modules)
        status = _run(request)
        _tell([name for name in sys.modules if name not in known], learned)
    except BaseException:
        with suppress(BaseException):
            traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _stream(before: Any, descriptor: int) -> Any:
    """A text stream as Python makes it at its start; those of the server were made of other files."""
    return open(
        descriptor,
        "r" if descriptor == 0 else "w",
        buffering=1 if descriptor == 2 or os.isatty(descriptor) else -1,
        encoding=before.encoding,
        errors=before.errors,
        closefd=False,
    )


def _inherit(request: dict[str, Any]) -> None:
    os.chdir(request["directory"])
    os.umask(request["umask"])
    os.environ.update(request["environment"])
    os.sched_setaffinity(0, request["cores"])
    if request["niceness"] > os.getpriority(os.PRIO_PROCESS, 0):
        os.setpriority(os.PRIO_PROCESS, 0, request["niceness"])
    for name, limit in request["limits"].items():
        with suppress(ValueError, OSError):
            resource.setrlimit(LIMITS[name], tuple(limit))
    sys.argv = [request["program"], *request["arguments"]]
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # from the system, as in a process of its own


def _run(request: dict[str, Any]) -> int:
    """The command, and what Python does when a program ends."""
    from masa.cli.main import main

    try:
        status = main(None)
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    threading._shutdown()
    atexit._run_exitfuncs()
    return status


def _tell(names: list[str], learned: int) -> None:
    """Modules that an import statement finds again, in the order in which they were begun."""
    found = [
        name
        for name in names
        if (spec := getattr(sys.modules.get(name), "__spec__", None)) and spec.name == name and spec.origin
    ]
    with suppress(OSError), os.fdopen(learned, "w") as file:  # a client may allow no file of this size
        file.write("\n".join(found))


def main() -> None:
    os.environ["MPLBACKEND"] = "Agg"
    os.environ.setdefault("TQDM_DISABLE", "1")  # as masa.cli.main has it before anything is imported
    path, owner = Path(sys.argv[1]), int(sys.argv[2])
    Server(str(path), owner).serve()
    if path.exists():  # the workflow was killed
        shutil.rmtree(path.parent, ignore_errors=True)


if __name__ == "__main__":
    main()
