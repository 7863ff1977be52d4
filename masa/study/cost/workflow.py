"""Which jobs the workflow has, and which of them wait for which; what :mod:`masa.study.cost.jobs` costs one by one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from masa.study import compressions as compression
from masa.study import experiments, kinds
from masa.study.cost.jobs import Job, Name, Plan

Config = dict[str, Any]


def jobs(plan: Plan) -> list[Job]:
    """Every job behind all tables and figures, each once, before those that need it."""
    needs = dict(needed(plan.config))
    return [dataclasses.replace(plan.job(*name), needs=waits) for name, waits in needs.items()]


def behind(name: Name, waits: Mapping[Name, Sequence[Name]]) -> set[Name]:
    """A job and all that must be done before it; none if there is no such job.

    Args:
        waits: each job -> what it waits for; others count as done.
    """
    found, open_ = set(), [name]
    while open_:
        one = open_.pop()
        if one in waits and one not in found:
            found.add(one)
            open_ += waits[one]
    return found


def needed(config: Config) -> Iterator[tuple[Name, tuple[Name, ...]]]:
    """(rule, name) of each job, and what it needs."""
    runs, compressions = experiments.all_runs(config), experiments.all_compressions(config)
    language = [run for run in runs if _kind(config, run) is kinds.LANGUAGE]
    if language or compressions:
        yield ("benchmarks", ""), ()
    if language:
        yield ("tokenizer", ""), ()
        for scale in dict.fromkeys(run.split("/")[0] for run in language):
            yield ("tokenize", scale), (("tokenizer", ""),)
    for run in runs:
        if _kind(config, run) is not kinds.LANGUAGE:
            yield _data(config, run), ()
    for model, name in dict.fromkeys(_calibrations(config, compressions)):
        text = config["calibrations"][name]["text"]
        yield ("pretrained", model), ()
        yield ("text", text), ()
        yield ("calibrate", f"{model}/{name}"), (("pretrained", model), ("text", text))
    for run in runs:
        yield ("pretrain", run), (_data(config, run),)
    for run in compressions:
        model, name = run.split("/")
        texts = tuple(("text", text) for text in config["compression"]["evaluation"]["texts"])
        for text in texts:
            yield text, ()
        yield ("pretrained", model), ()
        chosen = compression.calibration_of(config, run)
        calibration = (("calibrate", f"{model}/{chosen}"),) if chosen else ()
        yield ("compress", run), (("pretrained", model), ("benchmarks", ""), *texts, *calibration)
    for run in runs:
        language = (("tokenizer", ""), ("benchmarks", "")) if _kind(config, run) is kinds.LANGUAGE else ()
        yield _evaluation(config, run), (("pretrain", run), _data(config, run), *language)
    for scale in config["throughput"]["scales"]:
        yield ("time_methods", scale), ()
    yield ("count_parameters", ""), ()
    yield from _artefacts(config, runs)


def _artefacts(config: Config, runs: list[str]) -> Iterator[tuple[Name, tuple[Name, ...]]]:
    """Tables and figures; four tables are not of the configuration's own."""
    yield ("table", "runs"), tuple(_evaluation(config, run) for run in runs)
    yield ("table", "metrics"), tuple(("pretrain", run) for run in runs)
    yield ("table", "throughput"), tuple(("time_methods", scale) for scale in config["throughput"]["scales"])
    yield ("table", "parameters"), (("count_parameters", ""),)
    for kind, rule in (("tables", "table"), ("figures", "figure")):
        for name, artefact in experiments.active(config, kind).items():
            if compression.is_compression(config, artefact):
                waits = tuple(("compress", run) for run in compression.artefact_runs(config, artefact))
            else:
                waits = tuple(_evaluation(config, run) for run in experiments.artefact_runs(config, artefact))
            yield (rule, name), waits


def _kind(config: Config, run: str) -> kinds.Kind:
    return experiments.kind_of(config, run.split("/")[0])


def _data(config: Config, run: str) -> Name:
    """The job that makes what a run is trained on."""
    scale, kind = run.split("/")[0], _kind(config, run)
    if kind is kinds.LANGUAGE:
        return "tokenize", scale
    return kind.data, config["vision_scales"][scale]["data"]


def _evaluation(config: Config, run: str) -> Name:
    return ("evaluate" if _kind(config, run) is kinds.LANGUAGE else "evaluate_vision"), run


def _calibrations(config: Config, runs: list[str]) -> Iterator[tuple[str, str]]:
    for run in runs:
        if name := compression.calibration_of(config, run):
            yield run.split("/")[0], name
