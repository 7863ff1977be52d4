"""The printed plan: one line a run, then the sums of every rule, then the whole; or all of it as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

from masa.study.cost import shares
from masa.study.cost.devices import DEVICES, GIB
from masa.study.cost.jobs import Job, Plan
from masa.study.cost.schedule import on_cores, on_gpus
from masa.study.cost.workflow import jobs as all_jobs
from masa.study.order import priorities

RUNS = ("pretrain", "compress")
"""Rules whose jobs are printed one by one."""

GPUS = (8, 64)
"""Sizes of clusters that days are given for."""


def as_json(plan: Plan, cores: int) -> str:
    """All numbers: ``device``, ``reading``, ``jobs`` (seconds, bytes, FLOPs), ``rules``, ``total`` and others.

    ``reading`` is None, or the ``file``, ``card`` and ``date`` of what was measured. ``at_once``: how
    many trainings of a scale one GPU holds. ``too_large``: sentences.
    """
    jobs = all_jobs(plan)
    device = dataclasses.asdict(plan.device) | {"matmul_flops": dict(plan.device.matmul_flops)}
    data = {
        "device": device,
        "reading": _reading(plan),
        "jobs": [{k: v for k, v in dataclasses.asdict(job).items() if k != "needs"} for job in jobs],
        "rules": {rule: _sums(found) for rule, found in by_rule(jobs).items()},
        "total": totals(plan, jobs, cores),
        "at_once": shares.at_once(plan, jobs),
        "too_large": [*too_large(plan, jobs), *shares.too_small(plan, jobs)],
    }
    return json.dumps(data, indent=1)


def text(plan: Plan, cores: int) -> str:
    """For people."""
    jobs = all_jobs(plan)
    parts = [_runs(plan, jobs), _rules(jobs), _total(plan, jobs, cores), _speeds(plan), shares.line(plan, jobs)]
    wrong = [*too_large(plan, jobs), *shares.too_small(plan, jobs)]
    return "\n\n".join(part for part in [*parts, "\n".join(wrong)] if part)


def by_rule(jobs: Sequence[Job]) -> dict[str, list[Job]]:
    """Jobs of each rule, in the workflow's order."""
    found: dict[str, list[Job]] = {}
    for job in jobs:
        found.setdefault(job.rule, []).append(job)
    return found


def totals(plan: Plan, jobs: Sequence[Job], cores: int) -> dict[str, Any]:
    """Sums over all jobs: runs, tokens, images, FLOPs, seconds, GPU hours, days on clusters, disk."""
    found: dict[str, Any] = {
        "jobs": len(jobs),
        "runs": sum(job.rule in RUNS for job in jobs),
        "tokens": sum(job.amount for job in jobs if job.unit == "tokens"),
        "images": sum(job.amount for job in jobs if job.unit == "images"),
        "flops": sum(job.flops for job in jobs),
        "job_seconds": sum(job.seconds for job in jobs),
        "kept_bytes": sum(job.kept_bytes for job in jobs),
        "disk_bytes": sum(job.kept_bytes for job in jobs) + max(job.disk_bytes - job.kept_bytes for job in jobs),
        "unknown": [f"{job.rule} {job.name}" for job in jobs if not job.known],
    }
    order = priorities(plan.config)
    if plan.device.gpu:
        found["gpu_hours"] = sum(job.seconds * job.devices for job in jobs) / 3600
        found["days_on_gpus"] = {n: on_gpus(jobs, n, order) / 86400 for n in GPUS}
    else:
        found |= {"cores": cores, "seconds": on_cores(jobs, cores, order)}
    return found


def too_large(plan: Plan, jobs: Sequence[Job]) -> list[str]:
    """One sentence for every run that the device's memory does not hold, saying what to lower."""
    found = {}
    for job in jobs:
        if not job.known or job.memory_bytes <= plan.device.memory_bytes:
            continue
        if job.rule == "pretrain":
            scale, micro = job.name.split("/")[0], plan.spec(job.name)["training"]["micro_batch_size"]
            section = "vision_scales" if job.unit == "images" else "scales"
            cure = f"lower {section}.{scale}.training.micro_batch_size (now {micro})"
        elif job.rule == "calibrate":
            cure = f"lower batch_size or gradient_samples of calibrations.{job.name.split('/')[1]}"
        elif "post-share" in job.name:
            cure = "leave it out: it trains all weights of the model"
        else:
            setting = {"compress": "compression.evaluation", "evaluate_vision": "vision_evaluation"}
            cure = f"lower {setting.get(job.rule, 'evaluation')}.batch_size"
        name = f"{job.rule} {job.name.rsplit('/seed', 1)[0]}"
        found[name] = (
            f"{name} needs about {job.memory_bytes / GIB:.0f} GiB, and {plan.device.name} has "
            f"{plan.device.memory_bytes / GIB:.0f}: {cure}."
        )
    return list(found.values())


def _runs(plan: Plan, jobs: Sequence[Job]) -> str:
    groups: dict[tuple[str, str], list[Job]] = {}
    for job in jobs:
        if job.rule in RUNS:
            groups.setdefault((job.rule, job.name.rsplit("/seed", 1)[0]), []).append(job)
    rows = [["run", "seeds", "parameters", "data", "FLOPs", "each", "speed", "memory", "disk"]]
    for (rule, name), found in groups.items():
        job = found[0]
        if not job.known:
            rows.append([name, "", "unknown", "", "", "", "", "", ""])
            continue
        data = f"{job.amount:,.0f} {job.unit}" if job.unit else "compression"
        rows.append(
            [
                name,
                f"× {len(found)}" if rule == "pretrain" else "",
                f"{job.parameters:,}",
                data,
                f"{job.flops:.2e}",
                duration(job.seconds) + (f" on {job.devices}" if job.devices > 1 else ""),
                _speed(plan, job),
                size(job.memory_bytes),
                size(job.disk_bytes),
            ]
        )
    return aligned(rows)


def _speed(plan: Plan, job: Job) -> str:
    """What a run's time is taken from."""
    if not plan.device.gpu:
        return "guess" if plan.device is DEVICES["cpu"] else "this machine's"
    return f"measured{' on one' if job.devices > 1 else ''}, {job.measured}" if job.measured else "guess"


def _reading(plan: Plan) -> dict[str, str] | None:
    if not plan.paces:
        return None
    data = plan.paces.reading.data
    return {"file": plan.paces.reading.name, "card": data["card"], "date": data["date"]}


def _speeds(plan: Plan) -> str:
    """What the column "speed" says: which numbers were measured, where and when, and what all others are."""
    if not plan.device.gpu:
        return {
            "guess": "speed: a typical core's, a guess; without --typical this machine is measured",
            "this machine's": "speed: this machine's, measured now; disk, network and memory are guesses",
        }[_speed(plan, Job("", "", 0.0))]
    sheet = "from the data sheet, with the utilisation in masa/study/cost/devices.py"
    if not (paces := plan.paces):
        return f"speed: {plan.device.name} was not measured; every time is a guess {sheet}"
    found, whole = paces.reading.data, paces.reading.flops
    said = "; ".join(
        f"{mode}: {', '.join(f'{scale} {100 * rate / whole:.0f} %' for scale, rate in shares.items())}"
        for mode, shares in paces.vanilla.items()
    )
    matrices = f"{whole / 1e12:,.0f} TFLOP/s of large matrix products"
    lines = [
        f"measured: steps of these sizes and this method on one {found['card']}, {found['date']} "
        f"({paces.reading.name}); vanilla reaches of the {matrices} {said or 'nothing that is known'}",
        f"guess: {'language models as vanilla at the nearest sizes measured, all else ' if said else ''}{sheet}",
    ]
    if "compiled" not in paces.vanilla:
        lines.append("no compiled step was measured: eager ones stand for them, and are slower")
    if paces.others:
        other = ", ".join(dict.fromkeys(paces.others))
        lines.append(f"not used: {other} of {paces.reading.name}, here another model of that name")
    return "\n".join(lines)


def _sums(jobs: Sequence[Job]) -> dict[str, float]:
    return {
        "jobs": len(jobs),
        "seconds": sum(job.seconds for job in jobs),
        "flops": sum(job.flops for job in jobs),
        "memory_bytes": max(job.memory_bytes for job in jobs),
        "kept_bytes": sum(job.kept_bytes for job in jobs),
    }


def _rules(jobs: Sequence[Job]) -> str:
    rows = [["rule", "jobs", "time", "longest", "FLOPs", "memory, at most", "disk"]]
    for rule, found in by_rule(jobs).items():
        sums = _sums(found)
        rows.append(
            [
                rule,
                str(len(found)),
                duration(sums["seconds"]),
                duration(max(job.seconds for job in found)),
                f"{sums['flops']:.1e}" if sums["flops"] else "",
                size(sums["memory_bytes"]),
                size(sums["kept_bytes"]),
            ]
        )
    return aligned(rows)


def _total(plan: Plan, jobs: Sequence[Job], cores: int) -> str:
    found = totals(plan, jobs, cores)
    data = [f"{found[unit]:,.0f} {unit}" for unit in ("tokens", "images") if found[unit]]
    lines = [
        f"{found['runs']} runs in {found['jobs']} jobs, {' and '.join(data) or 'nothing trained'}, "
        f"{found['flops']:.2e} FLOPs",
        f"disk: {size(found['kept_bytes'])} of results, {size(found['disk_bytes'])} while the largest run trains",
    ]
    if plan.device.gpu:
        days = ", ".join(f"{value:.1f} days on {n}" for n, value in found["days_on_gpus"].items())
        lines.append(f"{found['gpu_hours']:,.0f} GPU hours of {plan.device.name}: {days}")
    else:
        lines.append(f"about {duration(found['seconds'])} on {cores} core{'s' * (cores > 1)}")
    if found["unknown"]:
        lines.append(
            f"unknown: {len(found['unknown'])} jobs of models without `sizes` under pretrained; the sums leave them out"
        )
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """43 s, 12 min, 3.4 h or 5.1 days."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"


def size(count: float) -> str:
    """Bytes as MiB, GiB or TiB."""
    if count < 1:
        return ""
    power = min(4, max(2, math.floor(math.log(count, 1024))))
    value = count / 1024**power
    return f"{value:.{1 if value < 10 else 0}f} {' KMGT'[power]}iB"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under their headings: the first to the left, all others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
