"""What a cluster is asked for, from the same estimates that `masa plan` prints."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from masa.errors import MasaError
from masa.study.cost import jobs, sizes, transformer
from masa.study.cost.devices import GIB
from masa.study.cost.jobs import Plan

LEAST_MINUTES = 5
LEAST_MEMORY = 2 * GIB

_last: list[Plan] = []


def resources(config: Mapping[str, Any], rule: str, name: str = "", attempt: int = 1) -> dict[str, int]:
    """Memory, time and disk to ask for, with the configuration's ``plan.margin``.

    Args:
        config: checked; the same object for all jobs of a workflow, since what they have in common is kept.
        rule: of the workflow, e.g. "pretrain".
        name: the value of its wildcards, e.g. "nano/masa-qkvo/seed0", or "SmolLM2-135M/svd" of a compression.
        attempt: 1, 2, …: memory grows with it, up to twice. Time does not: a training goes on from its checkpoint.

    Returns:
        ``mem_mb`` (of the host; a GPU's own memory is not asked for), ``runtime`` in minutes and ``disk_mb``.
    """
    if not _last or _last[0].config is not config:
        _last[:] = [Plan(config)]
    plan = _last[0]
    job, settings = plan.job(rule, name), plan.settings
    margin, most = settings["margin"], max(LEAST_MINUTES, math.ceil(60 * settings["max_hours"]))
    minutes = math.ceil(margin * job.seconds / 60) if job.known else most
    more = min(1 + (attempt - 1) / 2, 2)  # a job may be tried again for other reasons, and nodes have an end
    memory = max(LEAST_MEMORY, min(margin, 1.5) * job.host_bytes) * more
    return {
        "mem_mb": math.ceil((memory if job.known else max(memory, 32 * GIB * more)) / 1e6),
        "runtime": min(most, max(LEAST_MINUTES, minutes)),
        "disk_mb": math.ceil(margin * job.disk_bytes / 1e6) + 200,
    }


def estimated_need(spec: Mapping[str, Any]) -> str:
    """What the training of a run is expected to need on this device, as a sentence; empty for a spec without sizes."""
    recipe = spec["training"]
    torch = sys.modules.get("torch")
    gpu = torch is not None and torch.cuda.is_available()
    dtype = "bfloat16" if recipe["dtype"] == "bfloat16" or (recipe["dtype"] == "auto" and gpu) else "float32"
    try:  # with no memory left, even this may fail
        need = transformer.training_bytes(sizes.of_run(spec), recipe["micro_batch_size"], dtype)
    except (MasaError, LookupError, TypeError, ValueError, MemoryError, OSError):
        return ""
    need += jobs.CONTEXT if gpu else jobs.PROCESS["training"]
    return f"It is estimated to need {need / 2**30:.1f} GiB (`masa plan`)."
