"""What each table and figure costs by itself: all jobs behind it, as `snakemake NAME` would run them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from masa.study.cost.jobs import Job, Plan
from masa.study.cost.logs import log_of, read
from masa.study.cost.report import aligned, duration
from masa.study.cost.schedule import on_cores
from masa.study.cost.workflow import behind
from masa.study.cost.workflow import jobs as all_jobs
from masa.study.order import priorities

RULES = ("table", "figure")


def costs(plan: Plan, cores: int, logs: Path) -> dict[str, dict[str, Any]]:
    """Artefact -> jobs behind it, estimated and measured seconds.

    Args:
        plan: of a configuration, for one device.
        cores: that share the jobs of a device without GPUs.
        logs: of the workflow; what they do not say of every job behind an artefact is not measured.

    Returns:
        ``jobs``, ``job_seconds`` (added up), on a GPU ``gpu_hours``, else ``seconds`` (on the clock), and
        ``measured_seconds`` (on the clock, from the jobs' own durations scheduled on ``cores``) or None.
    """
    jobs = all_jobs(plan)
    waits = {(job.rule, job.name): job.needs for job in jobs}
    order, found = priorities(plan.config), {}
    for job in (job for job in jobs if job.rule in RULES):
        names = behind((job.rule, job.name), waits)
        own = [one for one in jobs if (one.rule, one.name) in names]
        took = [_measured(one, logs) for one in own]
        found[job.name] = {
            "jobs": len(own),
            "job_seconds": sum(one.seconds for one in own),
            **(
                {"gpu_hours": sum(one.seconds * one.devices for one in own) / 3600}
                if plan.device.gpu
                else {"seconds": on_cores(own, cores, order)}
            ),
            "measured_seconds": on_cores([one for one in took if one], cores, order) if all(took) else None,
        }
    return found


def _measured(job: Job, logs: Path) -> Job | None:
    took = read(log_of(job, logs))
    return dataclasses.replace(job, seconds=took[0]) if took else None


def text(plan: Plan, cores: int, logs: Path) -> str:
    """For people: one line an artefact."""
    whole = "GPU-hours" if plan.device.gpu else f"on {cores} core{'s' if cores > 1 else ''}"
    rows = [["artefact", "jobs", "added up", whole, "measured"]]
    for name, cost in costs(plan, cores, logs).items():
        one = f"{cost['gpu_hours']:,.1f}" if plan.device.gpu else duration(cost["seconds"])
        measured = duration(cost["measured_seconds"]) if cost["measured_seconds"] else ""
        rows.append([name, f"{cost['jobs']:,}", duration(cost["job_seconds"]), one, measured])
    return aligned(rows)


def as_json(plan: Plan, cores: int, logs: Path) -> str:
    return json.dumps(costs(plan, cores, logs), indent=1)
