"""Start one training on several devices: torchrun's launcher on every node, srun where there are several nodes.

``masa pretrain`` calls this where a recipe asks for more than one process; in each of them the same verb runs again.
Signals: the launcher passes SIGTERM, SIGINT and SIGUSR1 on as SIGUSR1, at which all processes write one checkpoint and
end, however long that takes; the launcher then ends with their exit status.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from masa.errors import Interrupted, MasaError
from masa.runs.hold import stop_signals

RENDEZVOUS = "MASA_RENDEZVOUS"
"""HOST:PORT where the nodes of a training meet; set by srun's caller, or by hand where there is no Slurm."""

ERRORS = "MASA_ERRORS"
"""Directory where a process that fails leaves its message for the launcher."""


def layout(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Nodes, and processes on each of them, of a resolved run."""
    recipe = spec.get("training", {})
    return recipe.get("nodes", 1), recipe.get("processes_per_node", 1)


def check_batch(spec: Mapping[str, Any]) -> None:
    """See that a batch can be cut into equal parts, before any process is started.

    Raises:
        MasaError: it cannot.
    """
    recipe, (nodes, processes) = spec["training"], layout(spec)
    if recipe["batch_size"] % (recipe["micro_batch_size"] * nodes * processes):
        raise MasaError(
            f"{spec['run']}: batch_size = {recipe['batch_size']} is not a multiple of micro_batch_size x processes = "
            f"{recipe['micro_batch_size']} x {nodes * processes}."
        )


def is_wanted(spec: Mapping[str, Any]) -> bool:
    """Whether a run needs to be launched: it has several processes, and this is none of them."""
    nodes, processes = layout(spec)
    return nodes * processes > 1 and "WORLD_SIZE" not in os.environ


def launch(spec: Mapping[str, Any], arguments: Sequence[str]) -> None:
    """Run Python with the given arguments in all processes of a run, and wait for them.

    Raises:
        Interrupted: a signal stopped the run after a checkpoint.
        MasaError: a batch that does not divide by the processes, what one of them says, or one that was killed, or no
            way to reach the other nodes.
    """
    check_batch(spec)
    nodes, processes = layout(spec)
    if nodes > 1 and RENDEZVOUS not in os.environ:
        _on_nodes(spec, nodes, processes, arguments)
    else:
        _on_devices(spec, nodes, processes, arguments)


def report_failure(message: str, status: int) -> None:
    """Called in a process that fails: leave its message for the launcher, where there is one."""
    if folder := os.environ.get(ERRORS):
        rank = int(os.environ.get("RANK", "0"))
        (Path(folder) / f"{rank:05d}.json").write_text(json.dumps({"message": message, "status": status}))


def _on_devices(spec: Mapping[str, Any], nodes: int, processes: int, arguments: Sequence[str]) -> None:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=processes,
        run_id=spec["run"].replace("/", "-"),
        rdzv_backend="c10d",
        rdzv_endpoint=os.environ.get(RENDEZVOUS, "localhost:0") if nodes > 1 else "localhost:0",
        max_restarts=0,
        signals_to_handle="SIGHUP",  # the others are ours, see below
        shutdown_timeout=600,  # the first node's first process may still be writing a checkpoint
    )
    with tempfile.TemporaryDirectory() as folder, _changed({ERRORS: folder}), _passing_signals(_workers):
        try:
            elastic_launch(config, sys.executable)(*arguments)
        except ChildFailedError as error:
            _raise(spec, Path(folder), error)


def _raise(spec: Mapping[str, Any], folder: Path, error: Any) -> None:
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]
    if not found:
        rank, failure = error.get_first_failure()
        if failure.exitcode == -signal.SIGUSR1:  # before it was ready to write a checkpoint
            raise Interrupted(f"{spec['run']} was stopped as it began; the same command starts it again.") from error
        raise MasaError(
            f"{spec['run']}: process {rank} ended with status {failure.exitcode} and left no message. A process that "
            "is killed (-9) has most often run out of memory; `masa plan` says how much a run needs. The last "
            "checkpoint is kept."
        ) from error
    said = next((f for f in found if f["status"] != 75), found[0])
    raise (Interrupted if said["status"] == 75 else MasaError)(said["message"]) from error


def _on_nodes(spec: Mapping[str, Any], nodes: int, processes: int, arguments: Sequence[str]) -> None:
    job = os.environ.get("SLURM_JOB_ID")
    if not job or not shutil.which("srun"):
        raise MasaError(
            f"{spec['run']} asks for {nodes} nodes (training.nodes) and this is no Slurm job. Start the same command "
            f"on each of them with {RENDEZVOUS}=HOST:PORT, a free port of one of them, or set training.nodes to 1."
        )
    command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--kill-on-bad-exit=0"]
    if os.environ.get("SLURM_GPUS") or os.environ.get("CUDA_VISIBLE_DEVICES"):
        command.append(f"--gpus={nodes * processes}")
    command += [sys.executable, *arguments]
    meeting = f"{socket.gethostname()}:{20000 + int(job) % 40000}"
    with _changed({RENDEZVOUS: meeting}):
        child = subprocess.Popen(command)
        with _passing_signals(lambda: [child.pid]):
            status = child.wait()
    if status == 75:
        raise Interrupted(f"{spec['run']} was stopped on {nodes} nodes and can be resumed with the same command.")
    if status:
        raise MasaError(f"{spec['run']}: the training failed on {nodes} nodes (srun's status {status}), see above.")


def _workers() -> list[int]:
    """The training processes among our children: torchrun gives them a rank."""
    import psutil

    found = []
    for child in psutil.Process().children():
        try:
            if "RANK" in child.environ():
                found.append(child.pid)
        except psutil.Error:
            continue
    return found


@contextmanager
def _passing_signals(receivers: Any) -> Iterator[None]:
    def forward(number: int, _: Any) -> None:
        found = receivers()
        if not found:
            raise Interrupted(f"stopped by {signal.Signals(number).name} before the training began.")
        for pid in found:
            os.kill(pid, signal.SIGUSR1)

    with stop_signals(forward):
        yield


@contextmanager
def _changed(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value
