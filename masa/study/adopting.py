"""Finished results of the same configuration, taken over from another folder: ``masa adopt``.

Metrics and logs travel, models do not: what is adopted is in all tables and figures, and cannot be loaded. What a table
or figure asks for and is not there, or is of another specification, is left to the workflow, which makes it.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.runs import run
from masa.runs.adopted import ADOPTED
from masa.study import compressions, experiments, kinds
from masa.training.earlier import changed

Config = Mapping[str, Any]

STATES = ("adopted", "there", "left")
ABSENT = "not there"
"""Why a result was left that the other folder does not have."""

RUN_FILES = ("spec.json", "provenance.json", "metrics.jsonl", "manifest.json")
"""Of a run, the last written last."""


@dataclasses.dataclass(frozen=True)
class Found:
    """One result that the configuration asks for.

    Attributes:
        name: run, as ``nano/vanilla/seed0`` or ``SmolLM2-135M/svd-llm``.
        state: of :data:`STATES`: adopted, already there in the results, or left.
        why: it was left, or how much of it was adopted.
    """

    name: str
    state: str
    why: str = ""


def adopt(source: Path, config: Config, results: Path) -> list[Found]:
    """Take over what the configuration's tables and figures ask for and ``source`` has.

    Args:
        source: a folder of results, as ``results/reference/whole``.
        results: where the workflow writes.

    Returns:
        One entry for each run and each method of compression that is asked for, in their order.

    Raises:
        MasaError: there are no results in ``source``, or it is ``results`` itself.
    """
    if source.resolve() == results.resolve():
        raise MasaError(f"{source} is where the workflow writes; name another folder, as results/reference/whole.")
    if not any((source / part).is_dir() for part in ("runs", "compression")):
        raise MasaError(f"{source} holds neither runs nor compression: it is no folder of results of a workflow.")
    runs = [_run(name, source, config, results) for name in experiments.all_runs(config)]
    return runs + [_compression(name, source, config, results) for name in experiments.all_compressions(config)]


def _found(name: str, to: Path, misfit: Callable[[], str], take: Callable[[], str]) -> Found:
    """One result: there already, left, or taken over.

    Args:
        to: its folder in the results.
        misfit: why it is left, or "".
        take: copies it, and says how much of it was there, or "".
    """
    if (to / "manifest.json").is_file():
        return Found(name, "there")
    if why := misfit():
        return Found(name, "left", why)
    return Found(name, "adopted", take())


def _run(name: str, source: Path, config: Config, results: Path) -> Found:
    place, to, scored = source / "runs" / name, results / "runs" / name, source / "evaluations" / name
    spec = experiments.run_spec(config, *experiments.parse_run(name))
    evaluation = config["evaluation" if kinds.of(spec) is kinds.LANGUAGE else "vision_evaluation"]

    def take() -> str:
        for file in RUN_FILES:
            if (place / file).is_file():
                _copy(place / file, to / file, source if file == "manifest.json" else None)
        target = results / "evaluations" / name
        shutil.copytree(scored, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
        return ""

    return _found(name, to, lambda: _misfit_of_run(place, scored, spec, evaluation), take)


def _misfit_of_run(place: Path, scored: Path, spec: Config, evaluation: Config) -> str:
    manifest, found = run.read_mapping(place / "manifest.json"), run.read_mapping(place / "spec.json")
    if manifest is None or found is None:
        return ABSENT
    if differs := list(changed(_as_asked(found, spec), spec)[0].values()):
        return "; ".join(differs)
    metrics = run.read_mapping(scored / "metrics.json")
    if metrics is None:
        return f"{scored / 'metrics.json'} is missing, and without the model it cannot be made"
    if metrics.get("settings") != json.loads(json.dumps(dict(evaluation))):
        return "it was scored in another way than the configuration says"
    return ""


def _as_asked(found: Config, spec: Config) -> dict[str, Any]:
    """A run's own spec without what a training finds out of its data, which another spec cannot say: images, steps."""
    known = {k: v for k, v in found.items() if k in spec}
    if spec["training"].get("steps", 0) is None:
        known["training"] = known["training"] | {"steps": None}
    return known


def _compression(name: str, source: Path, config: Config, results: Path) -> Found:
    place, to = source / "compression" / name, results / "compression" / name
    spec = compressions.run_spec(config, *compressions.parse_run(name))

    def take() -> str:
        points = [f"{percent:g}" for percent in spec["reductions"]]
        made = [percent for percent in points if (place / percent / "metrics.json").is_file()]
        for percent in made:
            if not (to / percent / "metrics.json").is_file():
                _copy(place / percent / "metrics.json", to / percent / "metrics.json", source)
        whole = made == points and (place / "manifest.json").is_file()
        if whole:
            _copy(place / "manifest.json", to / "manifest.json", None)
        return "" if whole else f"{len(made)} of {len(points)} reductions"

    return _found(name, to, lambda: _misfit_of_sweep(place, spec), take)


def _misfit_of_sweep(place: Path, spec: Config) -> str:
    if not place.is_dir():
        return ABSENT
    found = run.read_mapping(place / "spec.json")
    if found is None:
        return "an earlier version made it, which did not say of what"
    points = ("cache", "keep_models", "reductions", "tasks_at")  # which reductions are there is seen one by one
    wanted = json.loads(json.dumps({k: v for k, v in spec.items() if k not in points}))
    return "; ".join(changed({k: found.get(k) for k in wanted}, wanted)[0].values())


def _copy(file: Path, to: Path, source: Path | None) -> None:
    """A file, as one that is new; a record says where it is from where ``source`` is given."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if source is None:
        shutil.copyfile(file, to)
    else:
        run.write_json(to, run.read_json(file) | {ADOPTED: source.as_posix()})
