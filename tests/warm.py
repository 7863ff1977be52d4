"""``masa`` as a command that need not import everything again, as jobs of a workflow need not (masa/start).

A process of its own all the same, with its directory, streams, signals and exit status; tests/test_start.py compares
it with ``python -m masa.cli``, which is what tests of a fresh interpreter run.
"""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

from projects import ROOT

from masa.start import client

SHARED = "MASA_TEST_SERVERS"
"""Variable that tells the workers of pytest-xdist the folder of the servers: one server is enough for all of them."""


def _folder():
    folder = tempfile.mkdtemp(prefix="masa-tests-")
    Path(folder, "owner").write_text(str(os.getpid()))  # servers end with it
    return folder


if SHARED not in os.environ:
    os.environ[SHARED] = _folder()
    _maker = os.getpid()
    atexit.register(lambda: os.getpid() == _maker and shutil.rmtree(os.environ[SHARED], ignore_errors=True))

ENVIRONMENT = {
    k: v for k, v in os.environ.items() if not k.startswith("PYTEST_") and k not in (SHARED, client.VARIABLE)
}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), client.VARIABLE: os.environ[SHARED]}
"""That of this process as it began: whoever has another one needs a server of its own."""


def started(*arguments, **more):
    """``subprocess.Popen`` of ``masa ARGUMENTS`` in the project's folder."""
    command = [sys.executable, "-m", "masa.start", *map(str, arguments)]
    return subprocess.Popen(command, **({"cwd": ROOT, "env": ENVIRONMENT, "text": True} | more))


def masa(*arguments, **more):
    """``subprocess.run`` of ``masa ARGUMENTS`` in the project's folder; what it prints is kept."""
    command = [sys.executable, "-m", "masa.start", *map(str, arguments)]
    usual = {"cwd": ROOT, "env": ENVIRONMENT, "text": True, "capture_output": True, "check": False}
    return subprocess.run(command, **(usual | more))


@contextmanager
def servers(environment):
    """The environment in which commands have servers of their own, which end with the block."""
    folder = _folder()
    try:
        yield environment | {client.VARIABLE: folder}
    finally:
        shutil.rmtree(folder, ignore_errors=True)
