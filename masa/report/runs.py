"""What `masa compare` compares: trained or still training runs and compressions, found by id or directory."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masa.errors import MasaError, is_plain
from masa.evaluation import metrics as m
from masa.runs import run
from masa.study.experiments import unknown_run
from masa.study.sections.compression import Heal
from masa.study.status.numbers import is_number
from masa.study.status.runs import is_run_directory

UNITS = ("tokens", "images")
COMPRESSION = "a compressed model"
"""What a compression counts in: nothing, it is not trained."""


SEVERAL = r"(seed)?\d+(\.\d+)?"
"""Names of directories that differ in seeds, or in the percentage of a compression, alone."""


@dataclass(frozen=True)
class Run:
    """One run with all that its files say.

    Attributes:
        name: its id, or its directory where that alone tells it from another one.
        directory: of the run, or of the compression's metrics.
        group, seed: runs of one group differ in their seeds alone.
        unit: "tokens", "images", or :data:`COMPRESSION`.
        spec: what it was made with.
        provenance: versions, inputs and machine.
        log: lines of its metrics log.
        parameters: counted; None of a run that is still trained.
        training: steps, seconds and speed of a run that is done.
        scores: column of :data:`masa.evaluation.metrics.METRICS` -> number; empty before it is evaluated, and where the
            evaluation that is there is of an earlier training.
        done: whether it is whole.
    """

    name: str
    directory: Path
    group: str
    seed: int | None
    unit: str
    spec: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    log: Sequence[Mapping[str, Any]] = ()
    parameters: Mapping[str, Any] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    scores: Mapping[str, float] = field(default_factory=dict)
    done: bool = True

    def curve(self, key: str) -> dict[int, float]:
        """Tokens or images -> ``key``, of the lines that have it."""
        return {r[self.unit]: r[key] for r in self.log if is_number(r.get(key)) and is_number(r.get(self.unit))}


def find(words: Iterable[str], results: Path) -> list[Run]:
    """The runs that a user names.

    Args:
        words: directories, run ids, SCALE/EXPERIMENT for all its seeds, MODEL/NAME/PERCENT of compressions, MODEL/NAME
            for all its percentages.
        results: where ids are looked for.

    Raises:
        MasaError: there is no such run, one is named twice, there are fewer than two, or they are of different kinds.
    """
    found: dict[Path, Run] = {}
    for word in words:
        for directory in _directories(word, results):
            if (path := directory.resolve()) in found:
                raise MasaError(f"{found[path].name} is named twice ({word}).")
            found[path] = read(directory)
    runs = list(found.values())
    if len(runs) < 2:
        raise MasaError(f"Two runs at least are needed to compare, {len(runs)} found: {runs[0].name}.")
    if other := next((r for r in runs if r.unit != runs[0].unit), None):
        pair = " and ".join(f"{r.name} ({r.unit})" for r in (runs[0], other))
        raise MasaError(f"{pair} count in different units and cannot be compared; name runs of one kind.")
    names = [r.name for r in runs]
    twice = {r.group for r in runs if names.count(r.name) > 1}  # seeds of one directory stay together
    return [_renamed(r) if r.group in twice else r for r in runs]


def seeds_of(word: str, results: Path) -> list[Run]:
    """The runs of one method that differ in their seeds, or the one that is named.

    Raises:
        MasaError: there is none.
    """
    return [read(directory) for directory in _directories(word, results)]


def _renamed(r: Run) -> Run:
    return Run(**(vars(r) | {"name": str(r.directory), "group": str(r.directory.parent)}))


def _directories(word: str, results: Path) -> list[Path]:
    if _is_one(Path(word)):
        return [Path(word)]
    if all(map(is_plain, word.rstrip("/").split("/"))):
        for folder in (results / "runs" / word, results / "compression" / word):
            if _is_one(folder):
                return [folder]
            if below := [path for path in folder.glob("*") if re.fullmatch(SEVERAL, path.name) and _is_one(path)]:
                return sorted(below, key=lambda path: float(path.name.removeprefix("seed")))
    raise unknown_run("Run", word, known(results), results)


def _is_one(path: Path) -> bool:
    return is_run_directory(path) or (path / "metrics.json").is_file()


def known(results: Path) -> list[str]:
    """Ids of all that can be compared below ``results``."""
    runs = [p for p in (results / "runs").glob("*/*/seed*") if is_run_directory(p)]
    compressions = [p.parent for p in (results / "compression").glob("*/*/*/metrics.json")]
    return [str(p.relative_to(results / "runs")) for p in runs] + [
        str(p.relative_to(results / "compression")) for p in compressions
    ]


def read(directory: Path) -> Run:
    """Read one run, or one compression, or the run that an evaluation is of.

    Raises:
        MasaError: files that are corrupt, or none that say what it is.
    """
    parts = directory.resolve().parts
    if (directory / "metrics.json").is_file():
        metrics = _metrics(directory)
        if "requested_pct" in metrics:
            return _compression(directory, metrics)
        trained = Path(*parts[:-4], "runs", *parts[-3:])
        if parts[-4:-3] == ("evaluations",) and is_run_directory(trained):
            return read(trained)
        raise MasaError(f"{directory} is an evaluation whose run is not beside it; name the run's directory.")
    spec = _object(directory / "spec.json")
    if not (isinstance(spec.get("run"), str) and all(isinstance(spec.get(k), dict) for k in ("model", "training"))):
        raise MasaError(f"{directory / 'spec.json'} is no run spec; name a directory that `masa pretrain` wrote.")
    log = list(run.read_jsonl(directory / "metrics.jsonl")) if (directory / "metrics.jsonl").is_file() else []
    unit = next((u for r in log for u in UNITS if u in r), "images" if "family" in spec["model"] else "tokens")
    done = (directory / "manifest.json").is_file()
    manifest = _object(directory / "manifest.json") if done else {}
    scored = Path(*parts[:-4], "evaluations", *parts[-3:]) if parts[-4:-3] == ("runs",) else None
    metrics = _metrics(scored) if done and scored and (scored / "metrics.json").is_file() else None
    provenance = directory / "provenance.json"
    return Run(
        name=spec["run"],
        directory=directory,
        group=spec["run"].rpartition("/")[0],
        seed=spec.get("seed"),
        unit=unit,
        spec={key: value for key, value in spec.items() if key != "run"},
        provenance=_object(provenance) if done and provenance.is_file() else {},
        log=log,
        parameters=manifest.get("parameters"),
        training=manifest.get("training", {}),
        scores=m.flatten(metrics) if m.is_of(metrics, manifest.get("identity")) else {},
        done=done,
    )


def _object(path: Path) -> dict[str, Any]:
    found = run.read_json(path, "masa pretrain")
    if not isinstance(found, dict):
        raise MasaError(f"{path} must hold an object; delete it and make it anew with `masa pretrain`.")
    return found


def _metrics(folder: Path) -> dict[str, Any]:
    folder = folder.resolve()
    return m.load(folder.parent, folder.name)


def _compression(directory: Path, metrics: Mapping[str, Any]) -> Run:
    report = metrics["compression"] or {"method": "original"}
    spec = {k: report[k] for k in ("method", "options", "projections", "calibration") if k in report}
    name, healing = str(metrics.get("run", directory)), metrics.get("healing")
    return Run(
        name=name,
        directory=directory,
        group=name.rpartition("/")[0],
        seed=None,
        unit=COMPRESSION,
        spec={"model": name.partition("/")[0], "reduction": metrics["requested_pct"], "compression": spec}
        | ({"healing": {k: v for k, v in healing.items() if k in Heal.model_fields}} if healing else {}),
        provenance=metrics.get("provenance", {}),
        parameters=metrics["parameters"],
        scores=m.flatten(metrics),
    )
