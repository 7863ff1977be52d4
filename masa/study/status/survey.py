"""All runs of a configuration, and those that lie beside them."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.study import experiments
from masa.study.experiments import unknown_run
from masa.study.status.clock import FileClock
from masa.study.status.runs import OVER, STATES, Place, Status, is_run_directory, look

Config = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Survey:
    """What was found at one moment.

    Attributes:
        results: directory of results.
        runs: sorted by state, then in the configuration's order.
        compressions: done and all; of the configuration.
        clock: whose clock the ages are by: "file system" or "this machine".
        notes: sentences about what is unusual.
    """

    results: str
    runs: tuple[Status, ...]
    compressions: tuple[int, int]
    clock: str
    notes: tuple[str, ...] = ()

    @property
    def counts(self) -> dict[str, int]:
        """How many runs are in each state."""
        found = Counter(run.state for run in self.runs)
        return {state: found[state] for state in STATES}

    @property
    def eta_seconds(self) -> float | None:
        """Until the last of the running ones is done."""
        return max((run.eta_seconds for run in self.runs if run.eta_seconds is not None), default=None)

    @property
    def over(self) -> bool:
        """Whether nothing will change any more without a new command."""
        return all(run.state in OVER for run in self.runs)

    def as_json(self) -> str:
        """All of it; a number that is not finite is null."""
        summary = {"runs": len(self.runs)} | self.counts
        summary |= {"evaluated": sum(run.evaluated for run in self.runs), "eta_seconds": self.eta_seconds}
        summary |= dict(zip(("compressions_done", "compressions"), self.compressions, strict=True))
        data = {
            "results": self.results,
            "clock": self.clock,
            "notes": list(self.notes),
            "summary": summary,
            "runs": [{k: _finite(v) for k, v in dataclasses.asdict(run).items()} for run in self.runs],
        }
        return json.dumps(data, indent=1, ensure_ascii=False)


class Surveyor:
    """Looks again and again, and reads what is done only once.

    Args:
        results: directory of results.
        config: whose runs are looked for.
        wanted: run ids, patterns such as ``nano/*``, beginnings such as ``nano/vanilla``, or run directories; by
            default all runs of the configuration and all that lie in ``results``.
        named: whether ``results`` are of this configuration; of others, only what lies there is shown.

    Raises:
        MasaError: nothing is known by such a name, or ``results`` is a file.
    """

    def __init__(self, results: Path, config: Config, wanted: Sequence[str] = (), named: bool = True) -> None:
        self.results, self.config, self.wanted = results, config, wanted
        self.clock = FileClock(results)
        self.specs = {
            run: experiments.run_spec(config, *experiments.parse_run(run)) for run in experiments.all_runs(config)
        }
        self.compressions = experiments.all_compressions(config)
        if results.exists() and not results.is_dir():
            raise MasaError(f"{results} is no directory; --results takes the one that holds runs/.")
        self.notes: tuple[str, ...] = ()
        if not named:
            what = "These are the runs that lie" if results.is_dir() else "There is nothing yet"
            self.notes = (f"{what} in {results}; --configfile adds the runs that have not begun.",)
            self.specs, self.compressions = {}, []
        elif not results.is_dir():
            self.notes = (f"{results} does not exist here: nothing has run yet, or the project lies elsewhere.",)
        self._done: dict[Path, tuple[tuple[int | None, ...], Status]] = {}
        self._places()  # unknown names are said at once

    def survey(self) -> Survey:
        """Look at all of them now."""
        places, now = self._places(), self.clock.now()
        found = [self._look(place, now) for place in places]
        found.sort(key=lambda run: STATES.index(run.state))
        done = sum((self.results / "compression" / c / "manifest.json").is_file() for c in self.compressions)
        return Survey(str(self.results), tuple(found), (done, len(self.compressions)), self.clock.source, self.notes)

    def _look(self, place: Place, now: float) -> Status:
        written = tuple(_written(path) for path in (place.directory / "manifest.json", place.evaluation) if path)
        known = self._done.get(place.directory)
        if known and known[0] == written:
            return known[1]
        status = look(place, now)
        if status.state == "done":
            self._done[place.directory] = (written, status)
        return status

    def _places(self) -> list[Place]:
        everything = list(dict.fromkeys([*self.specs, *runs_on_disk(self.results)]))
        if not self.wanted:
            return [self._place(run) for run in everything]
        found: dict[Path, Place] = {}
        for word in self.wanted:
            chosen = [self._place(run) for run in everything if _matches(run, word)]
            if not chosen and is_run_directory(Path(word)):
                chosen = [Place(run_id_of(Path(word)), Path(word))]
            if not chosen:
                raise unknown_run("Run", word, everything, self.results)
            found |= {place.directory: place for place in chosen}
        return list(found.values())

    def _place(self, run: str) -> Place:
        return Place(
            run,
            self.results / "runs" / run,
            self.results / "logs" / "pretrain" / f"{run}.log",
            self.results / "evaluations" / run / "metrics.json",
            self.specs.get(run),
        )


def runs_on_disk(results: Path) -> list[str]:
    """Ids of the run directories below ``results``, sorted; of those that can be read."""
    folder = results / "runs"
    try:
        return sorted(str(path.relative_to(folder)) for path in folder.glob("*/*/seed*") if path.is_dir())
    except OSError:
        return []


def run_id_of(directory: Path) -> str:
    """What a run directory calls itself, or else its path."""
    try:
        found = json.loads((directory / "spec.json").read_bytes())["run"]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return str(directory)
    return found if isinstance(found, str) else str(directory)


def _written(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def _matches(run: str, word: str) -> bool:
    word = word.rstrip("/")
    return run == word or run.startswith(f"{word}/") or fnmatch.fnmatchcase(run, word)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
