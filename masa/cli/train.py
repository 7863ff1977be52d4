"""Verbs that train and score."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from masa.cli.base import Verbs, add_gpus, add_out, spec_of
from masa.errors import MasaError
from masa.evaluation.metrics import is_of
from masa.runs import card, devices, memory
from masa.runs.adopted import ADOPTED
from masa.runs.run import read_mapping
from masa.study import config, experiments, kinds
from masa.study.cost import readings, shares
from masa.study.cost.limits import estimated_need
from masa.study.inputs import throughput_spec
from masa.study.specs import check as check_spec
from masa.training import launch


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    v = verbs.add(
        "pretrain",
        _pretrain,
        "train one language model",
        "masa pretrain --run nano/masa-qkvo/seed0 --tokens results/data/tokens/nano "
        "--out results/runs/nano/masa-qkvo/seed0",
    )  # leases its own GPUs: as many as the run has processes
    v.add_argument("--tokens", required=True, metavar="DIR", help="what `masa tokenize` wrote")
    _add_run(v)

    v = verbs.add(
        "train-vit",
        _pretrain,
        "train one Vision Transformer or detector",
        "masa train-vit --run digits-compact/masa-qkvo/seed0 --images results/data/images/digits "
        "--out results/runs/digits-compact/masa-qkvo/seed0",
    )
    data = v.add_mutually_exclusive_group(required=True)
    data.add_argument("--images", metavar="DIR", help="of a Vision Transformer: what `masa images` wrote")
    data.add_argument("--boxes", metavar="DIR", help="of a detector: what `masa boxes` wrote")
    _add_run(v)

    v = verbs.add(
        "evaluate",
        _evaluate,
        "score a finished run",
        "masa evaluate results/runs/nano/masa-qkvo/seed0 --tokens results/data/tokens/nano --tokenizer "
        "results/data/tokenizer --benchmarks results/data/benchmarks --out results/evaluations/nano/masa-qkvo/seed0",
        gpu=True,
    )
    v.add_argument("directory", metavar="RUN_DIR")
    v.add_argument("--spec", metavar="JSON", help="evaluation settings; default: from the configuration")
    v.add_argument("--tokens", metavar="DIR", help="of a language model, with --tokenizer and --benchmarks")
    v.add_argument("--tokenizer", metavar="DIR")
    v.add_argument("--benchmarks", metavar="DIR")
    v.add_argument("--images", metavar="DIR", help="of a Vision Transformer")
    v.add_argument("--boxes", metavar="DIR", help="of a detector")
    add_out(v)

    v = verbs.add(
        "throughput",
        _throughput,
        "time training and folded inference",
        "masa throughput --scale nano --out t.json",
        gpu=True,
    )
    which = v.add_mutually_exclusive_group(required=True)
    which.add_argument("--scale", help="a scale of the configuration")
    which.add_argument("--spec", metavar="JSON", help="{runs, settings, threads}")
    add_out(v, "FILE", lock="beside")


def _add_run(v: argparse.ArgumentParser) -> None:
    which = v.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="SCALE/EXPERIMENT/seedN", help="a run of the configuration")
    which.add_argument("--spec", metavar="JSON", help="a resolved run, as JSON or as a file")
    add_out(v, "DIR", "the run's directory; the same again goes on from it, or says that it is finished", lock=None)
    v.add_argument(
        "--restart",
        nargs="?",
        const="always",
        choices=("always", "changed"),
        help="begin anew; the run in DIR is kept in DIR/before until the new one has finished. changed: only where "
        "what differs changes bits",
    )
    v.add_argument(
        "--extend",
        metavar="RUN_DIR",
        help="train a finished run on to the steps that are asked for now, in another DIR: the rate warms up and falls "
        "again over the steps that are left",
    )
    add_gpus(v, "one a process, or what plan.gpus says of a --run")


def _pretrain(given: argparse.Namespace) -> None:
    if given.run:
        experiments.parse_run(given.run)
    spec = spec_of(given, lambda c: experiments.run_spec(c, *experiments.parse_run(given.run)), "run")
    kind = kinds.of(spec)
    data = _needed(given, kind.data, spec)
    with devices.leased(_gpus(given, spec)):
        if launch.is_wanted(spec):
            launch.launch(spec, ["-m", "masa.cli", *_without(given.arguments, "--log")])
        else:
            train = import_module(kind.training).pretrain
            peak = readings.peak(spec, name) if (name := card.name()) else None
            try:
                extend = Path(given.extend) if given.extend else None
                how = {"wait": not given.no_wait, "restart": given.restart, "extend": extend}
                train(spec, data, Path(given.out), peak=peak, **how)
            except memory.OutOfMemory as error:
                raise MasaError(f"{error} {estimated_need(spec)}".rstrip()) from error


def _gpus(given: argparse.Namespace, spec: Mapping[str, Any]) -> float:
    """GPUs to lease: one a process, or the share of one that the command line or the configuration says."""
    processes = launch.layout(spec)[1]
    if given.gpus is None:
        run = given.run and shares.hundredths(config.load(given.configfile), "pretrain", given.run, processes)
        return run / devices.WHOLE if run else processes
    if given.gpus > processes or (processes > 1 and given.gpus < processes):
        raise MasaError(
            f"--gpus = {given.gpus:g}, but {spec['run']} has {processes} process{'es' * (processes > 1)} "
            "(training.processes_per_node), each with a GPU of its own; one process may share one."
        )
    return given.gpus


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments of the command line but for one option and its value."""
    left, rest = [], iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest, None)
        elif not argument.startswith(f"{option}="):
            left.append(argument)
    return left


def _evaluate(given: argparse.Namespace) -> None:
    from masa.runs import run

    directory, out = Path(given.directory), Path(given.out)
    manifest = run.read_json(directory / "manifest.json")  # written last: without it, the run is not whole
    if ADOPTED in manifest:
        _adopted(directory, manifest, out)
        return
    spec = run.read_json(directory / "spec.json", "masa pretrain")
    check_spec("run", spec, str(directory / "spec.json"))
    kind = kinds.of(spec)
    module = import_module(kind.evaluation)
    if kind is not kinds.LANGUAGE:
        settings = spec_of(given, lambda c: c["vision_evaluation"], "vision_evaluation")
        module.evaluate(directory, _needed(given, kind.data, spec), settings, out)
        return
    settings = spec_of(given, lambda c: c["evaluation"], "evaluation")
    tokens, tokenizer, benchmarks = (_needed(given, name, spec) for name in ("tokens", "tokenizer", "benchmarks"))
    tasks = benchmarks_of(benchmarks)
    tasks = {task: tasks[task] for task in settings["tasks"] if task in tasks}
    module.evaluate(directory, tokens, tokenizer, tasks, settings, out)


def _adopted(directory: Path, manifest: Mapping[str, Any], out: Path) -> None:
    """See that a run which came without its model came with its scores."""
    if not is_of(read_mapping(out / "metrics.json"), manifest["identity"]):
        raise MasaError(
            f"{directory} was taken over from {manifest[ADOPTED]} without its model, and {out} holds no scores of it. "
            f"Delete {directory} and train it, or adopt it again (`masa adopt`)."
        )
    print(f"{directory}: scored where it was trained; {out} holds that", file=sys.stderr)


def benchmarks_of(directory: Path) -> dict[str, Any]:
    """The manifest of ``masa fetch``."""
    from masa.runs import run

    tasks = run.read_json(directory / "manifest.json", "masa fetch")
    check_spec("benchmarks", tasks, str(directory / "manifest.json"))
    return tasks


def _needed(given: argparse.Namespace, name: str, spec: Any) -> Path:
    """The directory of an option that this kind of run needs."""
    if getattr(given, name, None) is None:
        kind = kinds.of(spec)
        verb = f" (masa {kind.verb})" if given.call is _pretrain else ""
        raise MasaError(f"{spec['run']} is {kind.label} and needs --{name} DIR{verb}.")
    return Path(getattr(given, name))


def _throughput(given: argparse.Namespace) -> None:
    spec = spec_of(given, lambda c: throughput_spec(c, given.scale), "throughput")
    from masa.training import throughput

    throughput.measure(spec["runs"], spec["settings"], spec["threads"], Path(given.out))
