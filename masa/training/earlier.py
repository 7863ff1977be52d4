"""What an earlier call left in a run directory, compared with what is asked for now.

Nothing is touched before it is known: the same run goes on or is finished already, another one is refused, key by key,
or, with ``restart``, set aside until the new one has finished.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from masa.errors import MasaError
from masa.models.recipes import LATER
from masa.runs import run
from masa.runs.adopted import ADOPTED
from masa.runs.files import damaged
from masa.training import resuming
from masa.training.resuming import OTHER_SUM

RECORD = "identity.json"
"""What decides the run's bits, part by part, so that a later call can say what differs; the manifest, once there is."""

BEFORE = "before"
"""Folder in the run directory that keeps a run which ``restart`` has set aside."""

FREE = ("run", "training.checkpoint_minutes", "training.workers")
"""Keys of a spec that change no number of the model, log or scores: a run goes on with another value."""

DEFAULTS = {f"training.{key}": value for key, value in LATER.items()} | {
    "training.nodes": 1,
    "training.processes_per_node": 1,
    "training.parallel": "ddp",
    "training.workers": 0,
}
"""Keys that a spec may lack -> what it says then."""

Restart = Literal["changed", "always"] | None
"""What becomes of an earlier run: refuse another one; set it aside where what differs changes bits; or in any case."""

_FILES = ("manifest.json", RECORD, "provenance.json", "spec.json", "metrics.jsonl", "checkpoints", "model")
_MOVING = ".moving"
_ABSENT = object()


@dataclass(frozen=True)
class Asked:
    """What decides a run's bits: the resolved spec, sha256 of its inputs, the meaning of the code, a hash of all."""

    spec: Mapping[str, Any]
    inputs: Mapping[str, str]
    code: str
    identity: str

    def to_dict(self) -> dict[str, Any]:
        """The four, as JSON."""
        return {"identity": self.identity, "spec": self.spec, "inputs": dict(self.inputs), "code": self.code}


@dataclass
class Earlier:
    """What lies in a run directory.

    Attributes:
        there: whether it is anything that could be lost.
        manifest: of a finished run, else None.
        damage: what is wrong with the finished run's files, or "".
        differs: in words, what differs and changes bits.
        free: in words, what differs and changes none.
        longer: whether nothing differs but more steps.
    """

    there: bool = False
    manifest: dict[str, Any] | None = None
    damage: str = ""
    differs: list[str] = field(default_factory=list)
    free: list[str] = field(default_factory=list)
    longer: bool = False

    @property
    def finished(self) -> bool:
        return self.manifest is not None


def look(out: Path, asked: Asked) -> Earlier:
    """Compare a run directory with what is asked for; nothing is written.

    Raises:
        MasaError: ``manifest.json`` there is of something else than a training.
    """
    record = run.read_mapping(out / RECORD)
    found = Earlier(manifest=_manifest(out, record))
    steps = resuming.newest(out / "checkpoints") is not None or _lines(out / "metrics.jsonl")
    found.there = found.finished or steps
    if not found.there:
        return found
    taken = found.finished and ADOPTED in found.manifest  # without its model, by other code perhaps
    if found.manifest and not taken:
        found.damage = _damage(out / "model", found.manifest)
    if not {"identity", "spec", "inputs", "code"} <= set(record or {}):
        record = _before_records(out, found.manifest)
    if record["identity"] == asked.identity:
        return found
    if taken:
        record = record | {"code": asked.code}
    found.differs, found.free, found.longer = _differences(record, asked)
    return found


def decide(out: Path, asked: Asked, restart: Restart = None) -> dict[str, Any] | Literal["begin", "go on", "restart"]:
    """What is to be done in a run directory: its manifest where the run is finished, else what :func:`take` does.

    Raises:
        MasaError: another run lies there, or a damaged one, and ``restart`` does not say that it may be set aside; the
            message says key by key what differs.
    """
    _end_moving(out)
    found, name = look(out, asked), asked.spec["run"]
    if not found.there:
        if other := _foreign(out):
            raise MasaError(
                f"{name}: {other} is of no run of masa and would be overwritten. Choose another --out, or move it away."
            )
        return "begin"
    state = "finished" if found.finished else resuming.reached(out / "checkpoints")
    other = found.differs or found.damage
    if restart == "always" and (found.finished or other or not _set_aside(out)):
        return "restart"
    if restart == "changed" and other:
        _say(f"{name}: {'; '.join(found.differs or [found.damage])}: {out} is begun anew")
        return "restart"
    kept = f"--restart begins anew and keeps that run in {out / BEFORE} until the new one has finished"
    if found.differs:
        longer = f", or --extend {out} with another --out trains it on" * (found.longer and found.finished)
        raise MasaError(
            f"{name}: {out} holds another run, {state}, and is left as it is: {'; '.join(found.differs)}. {kept}; or "
            f"choose another --out{longer}."
        )
    if found.damage:
        raise MasaError(f"{name}: {out} holds this run, {state}, but {found.damage}. {kept}.")
    if found.manifest:
        changed = f" ({'; '.join(found.free)} would change none of its numbers)" if found.free else ""
        trained = found.manifest["training"].get("steps")
        source = found.manifest.get(ADOPTED)
        taken = f", taken over from {source}" if source else ""
        _say(
            f"{name}: {out} holds this run, finished after {trained:,} steps{changed}{taken}; nothing is trained again"
        )
        return found.manifest
    if found.free:
        _say(f"{name}: goes on with {'; '.join(found.free)}, which changes none of its numbers")
    return "go on"


def _foreign(out: Path) -> Path | None:
    """What a run would overwrite or delete in a folder in which none has begun: another program's results."""
    begun = {"identity", "spec"} <= set(run.read_mapping(out / RECORD) or {}) or (
        out / "checkpoints" / "identity"
    ).is_file()
    if begun or "training" in (run.read_mapping(out / "spec.json") or {}):  # the last, of an earlier version of masa
        return None
    for name in _FILES:
        path = out / name
        if path.is_dir() and any(not inside.name.startswith(".") for inside in path.iterdir()):
            return path
        if path.is_file() and path.stat().st_size:
            return path
    return None


def take(out: Path, asked: Asked, how: Literal["begin", "go on", "restart"]) -> None:
    """Make the run directory this run's: set another one aside, drop what is not whole, write what is asked for."""
    if how == "restart":
        set_aside(out)
    checkpoints = out / "checkpoints"
    (out / "manifest.json").unlink(missing_ok=True)  # not a finished run's, which is set aside
    if how != "go on":
        resuming.remove(checkpoints)
        (out / "metrics.jsonl").unlink(missing_ok=True)
    checkpoints.mkdir(parents=True, exist_ok=True)
    resuming.drop_damaged(checkpoints, asked.spec["run"])
    for place in (out, out / "model", checkpoints):
        for left in place.glob(".*.*"):  # temporary folders of whole_file that a kill left behind
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
    run.write_json(out / RECORD, asked.to_dict())
    run.write_json(out / "spec.json", asked.spec)


def finish(out: Path, asked: Asked, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, last; then what it needs no more goes: checkpoints, and the run that was set aside.

    The record keeps a copy: the workflow deletes a job's outputs before it runs the job again.
    """
    run.write_json(out / RECORD, asked.to_dict() | {"manifest": manifest})
    run.write_json(out / "manifest.json", manifest)
    tidy(out)


def again(out: Path, manifest: Mapping[str, Any], spec: Mapping[str, Any]) -> None:
    """Leave a finished run as its end left it, where its manifest was deleted or the end was interrupted."""
    if run.read_mapping(out / "manifest.json") != manifest:
        run.write_json(out / "manifest.json", manifest)
    if run.read_mapping(out / "spec.json") is None:
        run.write_json(out / "spec.json", spec)
    tidy(out)


def tidy(out: Path) -> None:
    """Remove what a finished run needs no more."""
    shutil.rmtree(out / "checkpoints", ignore_errors=True)
    for folder in _set_aside(out):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(out: Path) -> Path:
    """Move the run in a directory into a folder of it: the lock stays where it is, and nothing is copied."""
    manifest = _manifest(out, run.read_mapping(out / RECORD))
    if manifest and run.read_mapping(out / "manifest.json") != manifest:
        run.write_json(out / "manifest.json", manifest)
    names = (BEFORE, *(f"{BEFORE}-{i}" for i in range(2, 10_000)))
    folder = next(out / name for name in names if not os.path.lexists(out / name))
    folder.mkdir()
    (folder / _MOVING).touch()
    _move(out, folder)
    return folder


def _move(out: Path, folder: Path) -> None:
    for name in _FILES:
        if os.path.lexists(out / name):
            (out / name).replace(folder / name)
    (folder / _MOVING).unlink()


def _end_moving(out: Path) -> None:
    """Move on what a kill interrupted: half a run in each place would be none."""
    for folder in _set_aside(out):
        if (folder / _MOVING).exists():
            _move(out, folder)


def _set_aside(out: Path) -> list[Path]:
    """Folders of :func:`set_aside`, which hold nothing else."""
    known = {*_FILES, _MOVING}
    return [
        folder
        for folder in sorted(out.glob(f"{BEFORE}*"))
        if re.fullmatch(rf"{BEFORE}(-\d+)?", folder.name) and folder.is_dir() and not folder.is_symlink()
        if known >= {path.name for path in folder.iterdir()}
    ]


def changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    """Keys that differ between two resolved specs -> how, in words: those that change bits, and those of :data:`FREE`.

    A key that one of them lacks has its default of :data:`DEFAULTS` there.
    """
    before, now = dict(_flat(old)), dict(_flat(new))
    said = {
        key: f"{key} {_shown(_value(before, key))} -> {_shown(_value(now, key))}"
        for key in dict.fromkeys([*before, *now])
        if _value(before, key) != _value(now, key)
    }
    free = {key: said[key] for key in said if key in FREE}
    return {key: said[key] for key in said if key not in FREE}, free


def _differences(old: Mapping[str, Any], asked: Asked) -> tuple[list[str], list[str], bool]:
    """What changes bits, what does not, and whether the first is more steps alone; all in words, key by key."""
    keys, others = changed(old["spec"], asked.spec) if old["spec"] is not None else ({}, {})
    deciding, free = list(keys.values()), list(others.values())
    longer = list(keys) == ["training.steps"] and _steps(old["spec"]) < _steps(asked.spec)
    if old["inputs"] is not None:
        for name in dict.fromkeys([*old["inputs"], *asked.inputs]):
            pair = [str(given.get(name))[:12] for given in (old["inputs"], asked.inputs)]
            if old["inputs"].get(name) != asked.inputs.get(name):
                deciding.append(f"the {name} are others (sha256 {pair[0]}… -> {pair[1]}…)")
                longer = False
    if old["code"] is not None and old["code"] != asked.code:
        deciding.append("the code of masa that trains means something else now")
        longer = False
    if old["code"] is None and not deciding:  # the hash of all differs, and what it was taken of is not known
        deciding.append(old["why"])
    return deciding, free, longer


def _steps(spec: Mapping[str, Any]) -> float:
    found = dict(_flat(spec)).get("training.steps")
    return found if isinstance(found, int | float) else math.inf


def _flat(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Keys with dots -> values; lists are values."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _flat(value, f"{path}.{key}" if path else str(key))
    elif path:
        yield path, node


def _value(flat: Mapping[str, Any], key: str) -> Any:
    value = flat.get(key, DEFAULTS.get(key, _ABSENT))
    return list(value) if isinstance(value, tuple) else value


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:60]} …"


def _manifest(out: Path, record: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Of a finished run: what lies there, or the record's copy where it was deleted or damaged.

    Raises:
        MasaError: it is the manifest of something else.
    """
    found = run.read_mapping(out / "manifest.json")
    if found is not None and {"identity", "sha256", "training"} <= set(found):
        return found
    if (out / "manifest.json").exists() and record is None and not (out / "spec.json").is_file():
        raise MasaError(f"{out / 'manifest.json'} is of something else than a training; choose another --out.")
    kept = (record or {}).get("manifest")
    return kept if isinstance(kept, dict) else None


def _before_records(out: Path, manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """What is known of a run whose record is not there, as of an earlier version of masa, or corrupt."""
    try:
        marker = (out / "checkpoints" / "identity").read_text(encoding="utf-8")
    except (OSError, ValueError):
        marker = None
    why = "its code or data, of which an earlier version of masa kept a hash alone"
    if (out / RECORD).is_file():
        why = f"{out / RECORD} is corrupt, so that whose checkpoints lie there cannot be told"
    provenance = run.read_mapping(out / "provenance.json") if manifest else None
    return {
        "identity": manifest["identity"] if manifest else marker,
        "spec": run.read_mapping(out / "spec.json"),
        "inputs": (provenance or {}).get("inputs"),
        "code": None,
        "why": why,
    }


def _damage(folder: Path, manifest: Mapping[str, Any]) -> str:
    found = damaged({folder / name: expected for name, expected in manifest["sha256"].items()})
    if found is None:
        return ""
    path, actual = found
    return f"{path} is {'missing' if actual is None else f'damaged ({OTHER_SUM})'}"


def _lines(log: Path) -> bool:
    return log.is_file() and any("step" in record for record in run.read_jsonl(log))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
