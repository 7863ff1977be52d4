"""Where the results come from: versions, git revisions, processors, seeds, data; and what does not fit together."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import yaml

from masa.errors import redact
from masa.report.page.found import Found

MIXED = {
    "revision": "Results were made with {count} different git revisions: they may not be comparable.",
    "cpu": "Results were made on {count} different processors: equal runs differ there in the fourth digit.",
    "python": "Results were made with {count} versions of Python.",
}
"""What is said where a fact is not the same everywhere."""

FACTS = {"revision": "Git revision", "cpu": "Processor", "platform": "Platform", "python": "Python"}


def view(found: Found) -> dict[str, Any]:
    """``facts``, ``packages``, ``warnings``, ``runs``, ``data``, ``written`` and ``config``, all from files."""
    records = {f"runs/{run.id}": run.provenance for run in found.runs if run.provenance}
    for name, record in [*found.evaluations.items(), *found.compressions.items()]:
        if isinstance(record.get("provenance"), dict):
            records[name] = record["provenance"]
    if not records:  # a published copy keeps one file for all
        alone = found.mapping(found.results / "provenance.json")
        records = {"provenance.json": alone} if alone else {}
    facts = {key: _counted(records, key) for key in FACTS}
    plain = json.loads(json.dumps(found.config))  # without YAML's anchors
    packages = _packages(records)
    return {
        "facts": [(FACTS[key], values) for key, values in facts.items()],
        "packages": packages,
        "warnings": _warnings(facts, packages),
        "records": len(records),
        "runs": _runs(found),
        "data": _data(found),
        "written": _written(found),
        "machine": ", ".join(value for value, _ in facts["cpu"]) or ", ".join(value for value, _ in facts["platform"]),
        "revision": ", ".join(short(value) for value, _ in facts["revision"]),
        "config": redact(yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)),
    }


def short(revision: Any) -> str:
    """The first digits of a git revision, and whether files were changed."""
    commit, plus, changes = str(revision).partition("+")
    return commit[:10] + plus + changes


def _counted(records: Mapping[str, Mapping[str, Any]], key: str) -> list[tuple[str, int]]:
    """Values of one fact, the commonest first, and how many results have each."""
    counts = Counter(str(record[key]) for record in records.values() if record.get(key))
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _packages(records: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    versions: dict[str, set[str]] = {}
    for record in records.values():
        packages = record.get("packages")
        for name, version in packages.items() if isinstance(packages, dict) else ():
            versions.setdefault(name, set()).add(str(version))
    return [(name, sorted(found)) for name, found in sorted(versions.items())]


def _warnings(facts: Mapping[str, list[tuple[str, int]]], packages: list[tuple[str, list[str]]]) -> list[str]:
    said = [text.format(count=len(facts[key])) for key, text in MIXED.items() if len(facts[key]) > 1]
    said += [f"{name} was used in versions {' and '.join(versions)}." for name, versions in packages if versions[1:]]
    changed = sum(count for value, count in facts["revision"] if value.endswith("+changes"))
    if changed:
        said.append(f"{changed} results were made with changes that are in no git revision.")
    return said


def _runs(found: Found) -> list[dict[str, Any]]:
    return [
        {
            "id": run.id,
            "state": run.state if run.own else f"{run.state}, not of this configuration",
            "seed": run.provenance.get("seed"),
            "threads": run.provenance.get("threads"),
            "dtype": run.provenance.get("dtype"),
            "processes": run.provenance.get("processes"),
            "revision": short(run.provenance["revision"]) if run.provenance.get("revision") else None,
            "inputs": run.provenance.get("inputs") if isinstance(run.provenance.get("inputs"), dict) else {},
        }
        for run in found.runs
    ]


def _data(found: Found) -> list[dict[str, str]]:
    """What runs and evaluations read: name and sha256, and by how many results each was read."""
    counts: Counter[tuple[str, str]] = Counter()
    for record in [r.provenance for r in found.runs] + [e.get("provenance") for e in found.compressions.values()]:
        inputs = record.get("inputs") if isinstance(record, dict) else None
        for name, checksum in inputs.items() if isinstance(inputs, dict) else ():
            counts[str(name), str(checksum)] += 1
    return [{"name": n, "sha256": s, "results": str(count)} for (n, s), count in sorted(counts.items())]


def _written(found: Found) -> str:
    """When the results were written, by the times of their files, in UTC; empty where there are none."""
    patterns = ("runs/*/*/*/manifest.json", "evaluations/*/*/*/metrics.json", "compression/*/*/*/metrics.json")
    patterns += ("tables/*.csv", "parts/tables/*.csv")
    times = [path.stat().st_mtime for pattern in patterns for path in found.results.glob(pattern)]
    if not times:
        return ""
    first, last = (datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M") for t in (min(times), max(times)))
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"
