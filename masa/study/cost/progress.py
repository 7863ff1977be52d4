"""How far a running workflow is: jobs done, and when the rest will be, from the plan and from what was seen."""

from __future__ import annotations

import dataclasses
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from masa.runs.progress import clock
from masa.study.cost.jobs import Job, Name, Plan
from masa.study.cost.logs import log_of, read
from masa.study.cost.schedule import makespan

EVERY = 30.0
"""Seconds between two lines."""


class Progress:
    """Lines ``masa: 41 of 126 jobs done, 9:31 on the clock, about 14:20 to go``, until :meth:`close`.

    Args:
        plan: of the configuration.
        names: (rule, name) of the jobs that this call will run.
        logs: of the workflow.
        capacity: jobs of one core at a time: cores, or a cluster's jobs.
        priority: see :func:`masa.study.cost.schedule.makespan`.
    """

    def __init__(
        self, plan: Plan, names: Iterable[Name], logs: Path, capacity: int, priority: Mapping[Name, int]
    ) -> None:
        self.jobs = {name: plan.job(*name) for name in names}
        self.logs, self.capacity, self.priority = logs, capacity, priority
        self.started = time.time()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> Callable[[], None]:
        """Print from now on; the result ends it."""
        self._thread.start()
        return self._closed.set

    def _run(self) -> None:
        said = ""
        while not self._closed.wait(EVERY):
            line = self.line()
            if line.partition(",")[0] != said:  # nothing new in between is not worth a line
                said = line.partition(",")[0]
                print(line, file=sys.stderr, flush=True)

    def line(self) -> str:
        """How far it is."""
        took, running = self._seen()
        left = clock(self._left(took, running))
        elapsed = clock(time.time() - self.started)
        return f"masa: {len(took)} of {len(self.jobs)} jobs done, {elapsed} on the clock, about {left} to go"

    def _seen(self) -> tuple[dict[Name, float], dict[Name, float]]:
        """Seconds of each job that this call has finished, and since when others run."""
        took, running = {}, {}
        for name, job in self.jobs.items():
            log = log_of(job, self.logs)
            try:
                changed = log.stat().st_mtime
            except OSError:
                continue
            if changed < self.started:
                continue
            done = read(log)
            if done:
                took[name] = done[0]
            else:
                running[name] = time.time() - changed
        return took, running

    def _left(self, took: Mapping[Name, float], running: Mapping[Name, float]) -> float:
        """Seconds until the last job is done, each job as long as the plan says times what its rule took so far."""
        seen, all_seen = _ratios(self.jobs, took)
        open_ = []
        for name, job in self.jobs.items():
            if name not in took:
                seconds = job.seconds * seen.get(job.rule, all_seen)
                seconds = max(1.0, seconds - running[name]) if name in running else seconds
                open_.append(dataclasses.replace(job, seconds=seconds))
        return makespan(open_, self.capacity, lambda job: job.cores or self.capacity, self.priority)


def _ratios(jobs: Mapping[Name, Job], took: Mapping[Name, float]) -> tuple[dict[str, float], float]:
    """Measured by estimated seconds: of each rule, and of all."""
    measured, estimated = defaultdict(float), defaultdict(float)
    for name, seconds in took.items():
        measured[jobs[name].rule] += seconds
        estimated[jobs[name].rule] += jobs[name].seconds
    ratios = {rule: measured[rule] / estimated[rule] for rule in measured if estimated[rule] > 0}
    whole = sum(estimated.values())
    return ratios, sum(measured.values()) / whole if whole > 0 else 1.0
