"""Where one run stands: done, running, silent, failed, interrupted or waiting, and its newest numbers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masa.evaluation.metrics import is_of
from masa.runs.run import read_mapping
from masa.study.cost.report import duration
from masa.study.status.holder import Holder, holder_of
from masa.study.status.numbers import interval, is_number, newest, seconds_per_step
from masa.study.status.tail import last_records
from masa.training import earlier, resuming

STATES = ("running", "silent", "failed", "interrupted", "waiting", "done")
"""In the order in which they are shown."""

OVER = ("done", "failed")
"""States that nothing but a new command changes."""

PATIENCE, INTERVALS = 120.0, 10
"""A run is silent after this many seconds, and this many of its own intervals between lines, without a sign of life.
The first allows for what disks of clusters keep in their caches."""


@dataclass(frozen=True)
class Status:
    """One run. What is not known is None.

    Attributes:
        run, directory: its id and where it is.
        state: one of :data:`STATES`.
        note: in words: the error, from where it goes on, what is unusual.
        step, steps: done and all.
        unit, amount: "tokens" or "images", and how many were trained on.
        loss, validation_loss: the newest; of training and held-out data, in nats.
        per_second: tokens or images a second, lately, of the steps alone; of a run that is done, on average.
        training_seconds: of all steps so far.
        eta_seconds: until the last step at that speed; of a running one. It stands still where the next line is late.
        age_seconds: since the last line of its log, by the clock of the disk.
        host, pid: of the process that trains it, or did so last.
        checkpoint: step that the same command goes on from.
        evaluated: whether it is done and has been scored; an evaluation of an earlier training does not count.
        configured: whether the configuration names it.
        outdated: whether the configuration now asks for another model, recipe or seed than it was trained with.
    """

    run: str
    directory: str
    state: str
    note: str = ""
    step: int | None = None
    steps: int | None = None
    unit: str | None = None
    amount: int | None = None
    loss: float | None = None
    validation_loss: float | None = None
    per_second: float | None = None
    training_seconds: float | None = None
    eta_seconds: float | None = None
    age_seconds: float | None = None
    host: str | None = None
    pid: int | None = None
    checkpoint: int | None = None
    evaluated: bool = False
    configured: bool = True
    outdated: bool = False


@dataclass(frozen=True)
class Place:
    """Where the files of a run are.

    Attributes:
        run: its id.
        directory: run directory.
        log: of its job; None if it is not the workflow's.
        evaluation: metrics file of its evaluation, or None.
        expected: its spec as the configuration has it; None if that does not name it.
    """

    run: str
    directory: Path
    log: Path | None = None
    evaluation: Path | None = None
    expected: Mapping[str, Any] | None = None


def look(place: Place, now: float) -> Status:
    """Read where a run stands.

    Args:
        place: its files; any of them may be missing, cut short, or vanish while it is read.
        now: time by the clock of the file system, in seconds since the epoch.
    """
    directory = place.directory
    holder = holder_of(directory)  # first: what is over by then has left its manifest
    manifest, spec = read_mapping(directory / "manifest.json"), read_mapping(directory / "spec.json")
    records = _records(directory / "metrics.jsonl")
    numbers = newest(records) | {"steps": _steps(spec) or _steps(place.expected)}
    changed = _changed(directory / "metrics.jsonl")
    done = bool(manifest) and isinstance(manifest.get("training"), dict)
    common = {
        "run": place.run,
        "directory": str(directory),
        "age_seconds": max(0.0, now - changed) if changed is not None else None,
        "host": (holder and holder.host) or None,
        "pid": holder and holder.pid,
        "evaluated": done and _is_evaluated(place, manifest),
        "configured": place.expected is not None,
        "outdated": bool(place.expected and spec and differs(place.expected, spec)),
    }
    if done:
        return Status(state="done", **common | numbers | _of_manifest(manifest, numbers))
    checkpoint = _checkpoint(directory / "checkpoints")
    state, note = _state(place, holder, records, checkpoint, now)
    rest = (numbers["steps"] or 0) - (numbers["step"] or 0)
    if state == "running" and (seconds := seconds_per_step(records)) is not None and numbers["steps"]:
        since = min(common["age_seconds"] or 0.0, interval(records) or 0.0)  # of more we do not know that it was steps
        numbers["eta_seconds"] = max(0.0, rest * seconds - since)
    return Status(state=state, note=note, checkpoint=checkpoint, **common | numbers)


def is_run_directory(path: Path) -> bool:
    """Whether a directory is, or was, of a training."""
    return any((path / name).is_file() for name in ("spec.json", "metrics.jsonl"))


def _state(
    place: Place,
    holder: Holder | None,
    records: list[dict[str, Any]],
    checkpoint: int | None,
    now: float,
) -> tuple[str, str]:
    """State and note of a run that has no manifest."""
    alive = holder.alive if holder else False
    if not alive and (told := _told(place.log, holder.taken if holder else 0.0)):
        return told
    if holder is None:
        return ("interrupted", _goes_on(checkpoint)) if records else ("waiting", "")
    if alive is False:
        return "interrupted", _goes_on(checkpoint)
    signs = (_changed(place.directory / name) for name in ("metrics.jsonl", "checkpoints", ".lock"))
    quiet = now - max((sign for sign in signs if sign is not None), default=holder.taken)
    if quiet <= max(PATIENCE, INTERVALS * _interval(records, place)):
        return "running", "" if records else "no line yet"
    who = f"process {holder.pid or '?'} on {holder.host or '?'}"
    lives = "which is alive" if alive else "of which this machine knows nothing more"
    return "silent", f"no line for {duration(quiet)} from {who}, {lives}"


def _told(log: Path | None, since: float) -> tuple[str, str] | None:
    """What the log of a job says of its end; None where it says nothing, or speaks of an earlier attempt."""
    try:
        if log is None or log.stat().st_mtime < since - 1.0:
            return None
        lines = [line for line in log.read_bytes()[-(2**16) :].decode("utf-8", "replace").splitlines() if line.strip()]
    except OSError:
        return None
    for line in lines:
        if line.startswith("masa: error: "):
            return "failed", line.removeprefix("masa: error: ")
    if lines and "this is a defect" in lines[-1]:
        return "failed", lines[-2].strip() if len(lines) > 1 else lines[-1]
    if lines and lines[-1].startswith("masa: "):  # stopped by a signal
        return "interrupted", lines[-1].removeprefix("masa: ")
    return None


def _goes_on(checkpoint: int | None) -> str:
    then = f"go on from step {checkpoint:,}" if checkpoint is not None else "begin anew: there is no checkpoint yet"
    return f"the same command will {then}"


def _interval(records: list[dict[str, Any]], place: Place) -> float:
    """Seconds between two lines of a run; before there are two, between its checkpoints."""
    if (seconds := interval(records)) is not None:
        return seconds
    spec = read_mapping(place.directory / "spec.json") or place.expected or {}
    recipe = spec.get("training")
    minutes = recipe.get("checkpoint_minutes") if isinstance(recipe, Mapping) else None
    return 60 * minutes if is_number(minutes) else 0.0


def _records(path: Path) -> list[dict[str, Any]]:
    try:
        return last_records(path, "validation_loss")
    except OSError:
        return []


def _is_evaluated(place: Place, manifest: Mapping[str, Any]) -> bool:
    return place.evaluation is not None and is_of(read_mapping(place.evaluation), manifest.get("identity"))


def _of_manifest(manifest: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    training = manifest["training"]
    unit = next((u for u in ("tokens", "images") if u in training), numbers["unit"])
    found = {
        "step": training.get("steps"),
        "steps": training.get("steps"),
        "unit": unit,
        "amount": training.get(unit),
        "validation_loss": training.get("validation_loss"),
        "training_seconds": training.get("training_seconds"),
        "per_second": training.get(f"{unit}_per_second"),
    }
    return {key: value for key, value in found.items() if key == "unit" or is_number(value)}


RECIPE = ("seed", "model", "sharing", "training")
"""What the configuration says of a run; a run's own spec also names its data."""


def differs(expected: Mapping[str, Any], spec: Mapping[str, Any]) -> bool:
    """Whether a run was trained as the configuration does not say any more, in what changes bits.

    Epochs become steps in training.

    Args:
        expected: what the configuration says; spec: the ``spec.json`` of the training.
    """
    expected, recipe = json.loads(json.dumps(expected)), spec.get("training")
    if not isinstance(recipe, dict):
        return True
    if expected["training"].get("steps") is None:
        expected["training"]["steps"] = recipe.get("steps")
    ours, theirs = ({key: of.get(key) for key in RECIPE} for of in (spec, expected))
    return bool(earlier.changed(ours, theirs)[0])


def _steps(spec: Mapping[str, Any] | None) -> int | None:
    recipe = (spec or {}).get("training")
    steps = recipe.get("steps") if isinstance(recipe, Mapping) else None
    return steps if is_number(steps) else None


def _checkpoint(folder: Path) -> int | None:
    try:
        found = resuming.newest(folder)
    except OSError:
        return None
    return int(found.name.rpartition("-")[2]) if found else None


def _changed(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except OSError:
        return None
