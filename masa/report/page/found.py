"""What a results directory holds: read as far as it goes. What is missing or damaged is said, never guessed."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from masa.errors import MasaError, is_plain
from masa.runs import run
from masa.study import experiments
from masa.study.status.runs import differs

SNAKEMAKE = "snakemake --cores all"


@dataclass
class Run:
    """One training run.

    Attributes:
        id: ``scale/experiment/seedN``; label: the experiment's name in tables.
        state: "finished", "outdated" (finished, but with another recipe than the configuration's), "unfinished" (a log
            but no result yet) or "missing".
        own: whether the configuration asks for it; others were left by another one, or trained by hand.
        log: records of ``metrics.jsonl``.
    """

    id: str
    label: str
    own: bool
    state: str = "missing"
    log: list[dict[str, Any]] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def scale(self) -> str:
        return self.id.split("/")[0]

    @property
    def method(self) -> str:
        return self.id.split("/")[1]

    @property
    def seed(self) -> int:
        return int(self.id.split("/")[2][4:])


class Found:
    """A results directory and the configuration that it was made for.

    Args:
        config: checked.
        results: the directory; it may be unfinished.
        overlays: configuration files that commands must name to mean the same configuration.

    Raises:
        MasaError: there is no such directory.
    """

    def __init__(self, config: Mapping[str, Any], results: Path, overlays: Iterable[str] = ()) -> None:
        if not results.is_dir():
            raise MasaError(
                f"{results} is no directory of results; make them with `{SNAKEMAKE}`, or name another by --results DIR."
            )
        self.config, self.results, self.overlays = dict(config), results, tuple(overlays)
        self.problems: list[str] = []
        self.labels = {name: entry["label"] for name, entry in config["experiments"].items()}
        self.runs = self._runs()
        self.evaluations = self._records("evaluations/*/*/seed*/metrics.json")
        self.compressions = self._records("compression/*/*/*/metrics.json")

    def command(self, *targets: str) -> str:
        """The command line that makes some targets of the workflow."""
        overlays = ["--configfile", *self.overlays] if self.overlays else []
        return shlex.join([*SNAKEMAKE.split(), *targets, *overlays])

    def json(self, path: Path) -> Any:
        """A JSON file, or None where it is missing or, which is noted, damaged."""
        if not path.is_file():
            return None
        try:
            return run.read_json(path)
        except (MasaError, OSError) as error:
            self.problems.append(str(error))
            return None

    def mapping(self, path: Path) -> dict[str, Any]:
        """A JSON object; empty where there is none."""
        data = self.json(path)
        if data is not None and not isinstance(data, dict):
            self.problems.append(f"{path} holds no mapping; delete it and run again.")
        return data if isinstance(data, dict) else {}

    def artefact(self, kind: str, name: str, suffix: str) -> Path | None:
        """A table's or figure's file: the one that its rule made, else the one in the common folder."""
        folders = (self.results / "parts" / kind, self.results / kind)
        return next((f / f"{name}.{suffix}" for f in folders if (f / f"{name}.{suffix}").is_file()), None)

    def _runs(self) -> list[Run]:
        asked = experiments.all_runs(self.config)
        folders = sorted((self.results / "runs").glob("*/*/seed*"))
        there = [path.relative_to(self.results / "runs").as_posix() for path in folders if path.is_dir()]
        others = [name for name in there if name not in set(asked) and _is_run(name)]
        return [self._run(name, name in set(asked)) for name in dict.fromkeys([*asked, *others])]

    def _run(self, name: str, own: bool) -> Run:
        folder = self.results / "runs" / name
        method = name.split("/")[1]
        found = Run(name, self.labels.get(method, method), own)
        found.manifest = self.mapping(folder / "manifest.json")
        found.provenance = self.mapping(folder / "provenance.json")
        if (folder / "metrics.jsonl").is_file():
            found.log = list(run.read_jsonl(folder / "metrics.jsonl"))
        found.state = "finished" if found.manifest else "unfinished" if found.log else "missing"
        spec = self.mapping(folder / "spec.json")
        if (
            own
            and found.manifest
            and spec
            and differs(experiments.run_spec(self.config, *experiments.parse_run(name)), spec)
        ):
            found.state = "outdated"
        return found

    def _records(self, pattern: str) -> dict[str, dict[str, Any]]:
        """Path below the results -> metrics file."""
        paths = sorted(self.results.glob(pattern))
        found = {path.parent.relative_to(self.results).as_posix(): self.mapping(path) for path in paths}
        return {name: record for name, record in found.items() if record}


def _is_run(name: str) -> bool:
    parts = name.split("/")
    return all(map(is_plain, parts)) and parts[2][4:].isdigit()


def number(value: Any) -> float | None:
    """A finite number, else None: logs and tables may hold NaN, text or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
