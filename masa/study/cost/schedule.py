"""How long all jobs take together: list scheduling, as the workflow does it."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence

from masa.study.cost.jobs import Job, Name

OVERHEAD = 0.8
"""Seconds between the end of one job and the start of the next."""

START = 6.0
"""Seconds until the first job: reading the workflow, making the graph of its jobs."""


def makespan(
    jobs: Sequence[Job],
    capacity: int,
    units: Callable[[Job], int],
    priority: Mapping[Name, int],
    overhead: float = OVERHEAD,
) -> float:
    """Seconds until the last of some jobs is done.

    Args:
        jobs: each after those that it needs; needs that are not among them count as done.
        capacity: cores or GPUs.
        units: how many of them a job takes; more than there are count as all, and 0 as none.
        priority: which of those that could start goes first (:mod:`masa.study.order`); 0 where nothing is said.
        overhead: seconds added to each job.
    """
    names = {(job.rule, job.name) for job in jobs}
    waiting: dict[Name, int] = {}
    followers: dict[Name, list[int]] = {}
    ready: list[tuple[int, int]] = []
    for i, job in enumerate(jobs):
        open_needs = [need for need in job.needs if need in names]
        waiting[job.rule, job.name] = len(open_needs)
        for need in open_needs:
            followers.setdefault(need, []).append(i)
        if not open_needs:
            heapq.heappush(ready, (-priority.get((job.rule, job.name), 0), i))
    running: list[tuple[float, int, int]] = []
    now, free = 0.0, capacity
    while ready or running:
        postponed = []
        while ready:
            entry = heapq.heappop(ready)
            job = jobs[entry[1]]
            taken = min(capacity, units(job))
            if taken <= free:
                free -= taken
                heapq.heappush(running, (now + job.seconds + overhead, entry[1], taken))
            else:
                postponed.append(entry)
            if not free:
                break
        for entry in postponed:
            heapq.heappush(ready, entry)
        now, done, taken = heapq.heappop(running)
        free += taken
        for follower in followers.get((jobs[done].rule, jobs[done].name), ()):
            name = (jobs[follower].rule, jobs[follower].name)
            waiting[name] -= 1
            if not waiting[name]:
                heapq.heappush(ready, (-priority.get(name, 0), follower))
    return now


def on_cores(jobs: Sequence[Job], cores: int, priority: Mapping[Name, int]) -> float:
    """Seconds on one machine without a GPU; a job that takes 0 cores takes all."""
    return START + makespan(jobs, cores, lambda job: job.cores or cores, priority)


def on_gpus(jobs: Sequence[Job], gpus: int, priority: Mapping[Name, int]) -> float:
    """Seconds on a cluster with so many GPUs, and cores enough for what needs none."""
    return START + makespan(jobs, gpus, lambda job: job.devices, priority)
