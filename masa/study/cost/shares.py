"""Small runs that share a GPU: what share each asks for (``plan.gpus``), and how many fit one card."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from masa.errors import MasaError, unknown
from masa.runs.devices import WHOLE, percent
from masa.study import experiments
from masa.study.cost.devices import GIB
from masa.study.cost.jobs import Job, Plan

SHOWN = 6
"""Scales that the plan's line names; of more it says how many there are."""

ALONE = ("time_methods",)
"""Rules whose jobs never share: what they measure is time."""


def hundredths(config: Mapping[str, Any], rule: str, name: str, processes: int = 1) -> int:
    """What a job asks for of this machine's GPUs.

    Args:
        rule: of the workflow.
        name: the value of its wildcards, which begins with a scale or a pretrained model.
        processes: of the job on one machine, one a GPU.
    """
    if processes > 1 or rule in ALONE:
        return WHOLE * processes
    return percent(_given(config).get(name.split("/")[0], 1.0))


def _given(config: Mapping[str, Any]) -> Mapping[str, float]:
    return (config.get("plan") or {}).get("gpus") or {}


def check(config: Mapping[str, Any]) -> None:
    """See that ``plan.gpus`` names what exists, and runs of one process.

    Raises:
        MasaError: it does not.
    """
    sizes = experiments.sizes(dict(config))
    for name, share in _given(config).items():
        if name not in sizes and name not in config["pretrained"]:
            raise unknown("plan.gpus: scale or pretrained model", name, [*sizes, *config["pretrained"]])
        own = (sizes.get(name) or {}).get("training") or {}
        recipe = own if name in config["vision_scales"] else config["training"] | own
        for key in ("nodes", "processes_per_node"):
            if share < 1 and (count := recipe.get(key) or 1) > 1:
                raise MasaError(
                    f"plan.gpus.{name} = {share:g} shares a GPU, but runs of {name} have training.{key} = {count}: set "
                    "that to 1, or leave the share out."
                )


def note(config: Mapping[str, Any], limits: Collection[str], cluster: bool) -> str | None:
    """What is to be said, once, of shares where the workflow starts; None if there is nothing.

    Args:
        limits: resources that Snakemake was given a limit of.
        cluster: whether jobs go to a cluster, which gives out whole GPUs.
    """
    shared = ", ".join(f"{name}: {share:g}" for name, share in _given(config).items() if share < 1)
    if not shared or config["plan"]["device"] == "cpu":
        return None
    if cluster:
        return f"plan.gpus ({shared}): a cluster gives out whole GPUs, so each of these jobs asks for one."
    if "gpu" in limits and "gpu_percent" not in limits:
        return (
            f"plan.gpus ({shared}): --resources gpu=N counts each of these jobs as a whole GPU. Give gpu_percent=N "
            "instead, 100 a GPU, and as many run at once as their shares allow."
        )
    return None


def at_once(plan: Plan, jobs: Sequence[Job]) -> dict[str, int]:
    """Scale -> how many of its trainings the memory of one GPU holds at once, where that is more than one."""
    if not plan.device.gpu:
        return {}
    largest = _largest(job for job in jobs if job.rule == "pretrain")
    fits = {name: int(plan.device.memory_bytes // size) for name, size in largest.items()}
    return {name: count for name, count in sorted(fits.items(), key=lambda item: -item[1]) if count > 1}


def line(plan: Plan, jobs: Sequence[Job]) -> str:
    """One line of the plan: how many small runs fit a card, and what sharing one brought where it was measured."""
    fits = at_once(plan, jobs)
    if not fits:
        return ""
    said = ", ".join(f"{count} of {name}" for name, count in list(fits.items())[:SHOWN])
    more = f" and of {len(fits) - SHOWN} scales more" if len(fits) > SHOWN else ""
    text = f"at once on one {plan.device.name}, by memory: {said}{more} (plan.gpus; times above are of a run alone)"
    if plan.paces and (found := plan.paces.reading.data["together"]):
        together, alone = found["tokens_per_second"] / 1e6, found["alone"] / 1e6
        text += f"; measured with d = {found['width']}: {found['runs']} at once make {together:.2f} M tokens/s in sum, "
        text += f"one alone {alone:.2f} M"
    return text


def too_small(plan: Plan, jobs: Sequence[Job]) -> list[str]:
    """One sentence for every share whose part of the memory does not hold the jobs that have it."""
    found = []
    for name, need in _largest(jobs).items():
        share = _given(plan.config).get(name, 1.0)
        whole = plan.device.memory_bytes
        if plan.device.gpu and share < 1 and need > share * whole:
            enough = min(1.0, percent(need / whole) / WHOLE)
            found.append(
                f"plan.gpus.{name} = {share:g} is {share * whole / GIB:.1f} GiB of {plan.device.name}, and its jobs "
                f"need up to {need / GIB:.1f}: raise it to {enough:g}."
            )
    return found


def _largest(jobs: Any) -> dict[str, float]:
    """Scale or pretrained model -> most memory that one of its jobs needs on the one GPU that it takes."""
    found: dict[str, float] = {}
    for job in jobs:
        if job.known and job.devices == 1 and job.rule not in ALONE:
            name = job.name.split("/")[0]
            found[name] = max(found.get(name, 0.0), job.memory_bytes)
    return found
