"""The GPU that a process computes on: its name, driver and CUDA, without importing torch where nothing did."""

from __future__ import annotations

import functools
import subprocess
import sys


def used() -> dict[str, str | None]:
    """``gpu``, ``driver`` and ``cuda`` of this process's device, all None where it computes on the CPU.

    A driver that does not say its version, as in some containers, is None.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return {"gpu": None, "driver": None, "cuda": None}
    return {"gpu": name(), "driver": _driver(), "cuda": torch.version.cuda}


def name() -> str | None:
    """What CUDA calls this process's device, e.g. "NVIDIA H100 80GB HBM3"; None where there is none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_properties(torch.cuda.current_device()).name


@functools.cache
def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(said.split()), None)
