"""What the results cost: parameters of every method, time of every rule, disk."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.report.page.found import Found, number
from masa.report.serving import table
from masa.study.cost import Plan
from masa.study.cost.jobs import Job
from masa.study.cost.logs import log_of, read
from masa.study.cost.report import by_rule


def parameters(found: Found) -> list[dict[str, Any]]:
    """One entry a scale: ``rows`` of label, attention, other, total and the attention's reduction in percent.

    Counted models (``parameters.json``) come first, then those runs whose method was not counted at their scale.
    """
    counted = found.json(found.results / "parameters.json")
    rows = [(str(r.get("scale")), str(r.get("experiment")), r) for r in counted or () if isinstance(r, dict)]
    rows += [(run.scale, run.method, run.manifest.get("parameters")) for run in found.runs]
    scales: dict[str, dict[str, dict[str, Any]]] = {}
    for scale, method, record in rows:
        values = [number(record.get(k)) for k in ("total", "attention")] if isinstance(record, dict) else [None]
        if None not in values and method not in scales.setdefault(scale, {}):
            total, attention = values
            share = number(record.get("attention_reduction"))
            scales[scale][method] = {
                "label": found.labels.get(method, method),
                "attention": int(attention),
                "other": int(total - attention),
                "total": int(total),
                "reduction": None if share is None else 100 * share,
            }
    views = []
    for scale, methods in scales.items():
        largest = max((row["total"] for row in methods.values()), default=1) or 1
        for row in methods.values():
            row["bars"] = [round(100 * row[part] / largest, 3) for part in ("attention", "other")]
        if methods:
            views.append({"scale": scale, "rows": list(methods.values())})
    return views


def rules(found: Found, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """One entry a rule: jobs, how many have said what they took, their seconds together, the longest, memory.

    ``estimated`` is :mod:`masa.study.cost`'s figure for those very jobs on the configuration's device.
    """
    views = []
    for rule, found_jobs in by_rule(jobs).items():
        took = [(job, t) for job in found_jobs if (t := read(log_of(job, found.results / "logs")))]
        longest = max(took, key=lambda pair: pair[1][0], default=None)
        views.append(
            {
                "rule": rule,
                "jobs": len(found_jobs),
                "done": len(took),
                "seconds": sum(t[0] for _, t in took),
                "longest": longest[1][0] if longest else None,
                "longest_name": longest[0].name if longest else "",
                "memory": max((t[1] for _, t in took), default=0.0),
                "estimated": sum(job.seconds for job, _ in took),
            }
        )
    return views


def serving(found: Found) -> list[dict[str, Any]]:
    """How factored models serve, where ``benchmarks/serving.py`` was run (:mod:`masa.report.serving`)."""
    path = found.results / "benchmarks" / "serving.csv"
    if not path.is_file():
        return []
    try:
        return table(path)
    except MasaError as error:
        found.problems.append(str(error))
        return []


def device(found: Found) -> str:
    """What the estimates are for."""
    return Plan(found.config).device.name


def disk(found: Found) -> list[dict[str, Any]]:
    """Files and bytes of every folder of results; logs are left out, since the page's own is among them."""
    folders = [p for p in sorted(found.results.iterdir()) if p.is_dir() and p.name not in ("logs", "reference")]
    views = [{"name": folder.name, **_measure(folder)} for folder in folders if not folder.name.startswith(".")]
    return sorted(views, key=lambda view: -view["bytes"])


def _measure(folder: Path) -> dict[str, int]:
    sizes = [i.st_size for path in folder.rglob("*") if stat.S_ISREG((i := path.lstat()).st_mode)]
    return {"files": len(sizes), "bytes": sum(sizes)}
