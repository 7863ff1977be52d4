"""What the jobs of a finished workflow took, from the last line of their logs, beside their estimates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.study.cost.jobs import Job, Plan
from masa.study.cost.report import aligned, by_rule, duration, size
from masa.study.cost.workflow import jobs as all_jobs

FOLDERS = {
    "text": "texts",
    "evaluate_vision": "evaluate",
    "time_methods": "throughput",
    "count_parameters": "parameters",
    "table": "tables",
    "figure": "figures",
}
"""Where a rule's logs are, if not under its own name."""

DONE = re.compile(r"^done in ([0-9.]+) s, peak memory ([0-9]+) MiB$", re.MULTILINE)


def log_of(job: Job, logs: Path) -> Path:
    """The log of one job."""
    folder = FOLDERS.get(job.rule, job.rule)
    return logs / (f"{folder}/{job.name}.log" if job.name else f"{folder}.log")


def read(path: Path) -> tuple[float, float] | None:
    """Seconds and peak bytes of a job that was done, else None."""
    found = DONE.search(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    return (float(found[1]), float(found[2]) * 2**20) if found else None


def compare(plan: Plan, logs: Path, as_json: bool = False) -> str:
    """Per rule: jobs, estimated and measured seconds and peak memory, and their ratios.

    Raises:
        MasaError: no log of any job says what it took.
    """
    rules: dict[str, Any] = {}
    for rule, jobs in by_rule(all_jobs(plan)).items():
        pairs = [(job, took) for job in jobs if (took := read(log_of(job, logs)))]
        if pairs:
            rules[rule] = {
                "jobs": len(pairs),
                "estimated_seconds": sum(job.seconds for job, _ in pairs),
                "measured_seconds": sum(took[0] for _, took in pairs),
                "estimated_bytes": max(job.host_bytes for job, _ in pairs),
                "measured_bytes": max(took[1] for _, took in pairs),
            }
    if not rules:
        raise MasaError(f"No log under {logs} says what its job took. Run the workflow first.")
    total = {
        key: sum(rule[key] for rule in rules.values()) for key in ("jobs", "estimated_seconds", "measured_seconds")
    }
    if as_json:
        return json.dumps({"rules": rules, "total": total}, indent=1)
    rows = [["rule", "jobs", "estimated", "measured", "ratio", "memory estimated", "measured", "ratio"]]
    for rule, found in [*rules.items(), ("all", total)]:
        memory = ["", "", ""]
        if "measured_bytes" in found:
            ratio = found["estimated_bytes"] / max(found["measured_bytes"], 1)
            memory = [size(found["estimated_bytes"]), size(found["measured_bytes"]), f"{ratio:.2f}"]
        estimated, measured = found["estimated_seconds"], found["measured_seconds"]
        ratio = f"{estimated / max(measured, 0.1):.2f}"
        rows.append([rule, str(found["jobs"]), duration(estimated), duration(measured), ratio, *memory])
    return aligned(rows)
