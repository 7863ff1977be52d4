"""The account of one compression: what was asked, what came out, what it cost."""

from __future__ import annotations

import contextlib
import dataclasses
import resource
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class CompressionReport:
    """Everything that a table needs of one compression.

    Attributes:
        method, options, projections: as asked.
        reduction_requested, reduction_achieved: 1 - stored / dense over ``projections``, everything stored counted.
        attention_reduction, model_reduction: of the attention matrices and of the whole model.
        parameters_before, parameters_after: of the whole model.
        stored, dense: numbers of the compressed projections; positions and indices count by their bytes.
        stored_bytes, dense_bytes: the same as bytes of the file's tensors, with the number a matrix that tells other
            loaders that it is not stored.
        on_target: achieved lies within 0.5 point above requested; false only where a method's granularity is coarser.
        seconds, peak_rss_bytes: of the fit alone, a part done for an earlier reduction included; the peak is the
            process's.
        regularisation: matrix -> jitter relative to mean(diag H), only where one was needed.
        calibration: what the statistics were made of (:meth:`masa.compression.Calibration.made_of`), or None.
        shapes: projection -> (out, in).
        learned: ranks, groups, shared heads, relative error: what the method found.
    """

    method: str
    options: dict[str, Any]
    projections: str
    reduction_requested: float
    reduction_achieved: float
    attention_reduction: float
    model_reduction: float
    parameters_before: int
    parameters_after: int
    stored: int
    dense: int
    stored_bytes: int
    dense_bytes: int
    on_target: bool
    seconds: float
    peak_rss_bytes: int
    regularisation: dict[str, float] = field(default_factory=dict)
    calibration: dict[str, Any] | None = None
    shapes: dict[str, list[int]] = field(default_factory=dict)
    learned: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return dataclasses.asdict(self)


def reset_peak_rss() -> None:
    """Start a new measurement of the peak where the kernel allows it (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """Peak resident memory in bytes since :func:`reset_peak_rss`, or since the process began."""
    with contextlib.suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
