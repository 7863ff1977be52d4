"""The paper's claims as data: which runs a claim is judged by, and which runs say how much training again changes.

A claim never asks for a run of its own: where its runs are not among those of the tables and figures, it is absent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from masa.errors import MasaError, unknown
from masa.evaluation.metrics import METRICS
from masa.study import compressions, experiments
from masa.study.sections.artefacts import Claim

Config = Mapping[str, Any]


def check(config: Config) -> None:
    """Check names and weights.

    Raises:
        MasaError: the first problem found, naming the key.
    """
    judged = {metric.name for metric in METRICS if metric.better}
    for name, claim in config["claims"].items():
        if claim is None:
            continue
        where = f"claims.{name}"
        if claim["grid"] not in config["grids"]:
            raise unknown(f"{where}: grid", claim["grid"], config["grids"])
        if claim["metric"] not in judged:
            raise unknown(f"{where}: metric", claim["metric"], judged)
        pretrained = compressions.is_compression(config, claim)
        known = config["compressions" if pretrained else "experiments"]
        for experiment in claim["contrast"]:
            if experiment not in known:
                raise unknown(f"{where}.contrast: {'compression' if pretrained else 'experiment'}", experiment, known)
        if total := sum(claim["contrast"].values()):
            raise MasaError(f"{where}.contrast: the weights add up to {total:g}, not to 0, so they compare nothing.")
        if not any(claim["contrast"].values()):
            raise MasaError(f"{where}.contrast: all weights are 0.")


def spec(config: Config) -> list[dict[str, Any]]:
    """Every claim at every scale, or at every pretrained model and reduction, of its grid."""
    found, runs = [], set(experiments.all_runs(dict(config)))
    for name, claim in config["claims"].items():
        if claim is None:
            continue
        pretrained = compressions.is_compression(config, claim)
        places = list(_compressed(config, claim) if pretrained else _trained(config, claim, runs))
        known = config["compressions" if pretrained else "experiments"]
        said = {
            "name": name,
            "claim": claim["claim"],
            "source": claim["source"],
            "metric": claim["metric"],
            "margin": claim.get("margin", Claim.defaults()["margin"]),
            "equal_within": claim.get("equal_within", Claim.defaults()["equal_within"]),
            "weights": dict(claim["contrast"]),
            "contrast": contrast({known[e]["label"]: w for e, w in claim["contrast"].items()}),
        }
        found += [said | place for place in places or [{"scale": "", "trained": True, "records": None, "noise": {}}]]
    return found


def contrast(weights: Mapping[str, float]) -> str:
    """In words: ``MASA-QKVO − Low-rank``, ``4 MASA-QKV − 3 MASA-QKVO − Vanilla``; what is added comes first."""
    text = ""
    for label, weight in sorted(weights.items(), key=lambda item: item[1] < 0):
        sign = "−" if weight < 0 else "+"
        text += f" {sign} " if text else "− " if weight < 0 else ""
        text += label if abs(weight) == 1 else f"{abs(weight):g} {label}"
    return text


def _trained(config: Config, claim: Config, runs: set[str]) -> Iterator[dict[str, Any]]:
    grid = config["grids"][claim["grid"]]
    for scale in grid["scales"]:
        wanted = {name: [f"{scale}/{name}/seed{seed}" for seed in grid["seeds"]] for name in claim["contrast"]}
        there = all(run in runs for of_one in wanted.values() for run in of_one)
        yield {
            "scale": scale,
            "trained": True,
            "records": {name: _records(of_one) for name, of_one in wanted.items()} if there else None,
            "noise": {name: _records(of_one) for name, of_one in several_seeds(runs, scale).items()} if there else {},
        }


def several_seeds(runs: set[str], scale: str) -> dict[str, list[str]]:
    """Experiment -> its runs: the experiments of one scale that share several seeds, as many as make the most pairs."""
    seeds: dict[str, set[int]] = {}
    for run in runs:
        at, name, seed = experiments.parse_run(run)
        if at == scale:
            seeds.setdefault(name, set()).add(seed)
    blocks = []
    for common in {frozenset(found) for found in seeds.values()}:
        names = sorted(name for name, found in seeds.items() if found >= common)
        blocks.append(((len(names) - 1) * (len(common) - 1), sorted(common), names))
    freedom, common, names = max(blocks, default=(0, [], []))
    return {name: [f"{scale}/{name}/seed{seed}" for seed in common] for name in names} if freedom > 0 else {}


def _records(runs: list[str]) -> list[str]:
    return [f"evaluations/{run}" for run in runs]


def _compressed(config: Config, claim: Config) -> Iterator[dict[str, Any]]:
    grid = config["grids"][claim["grid"]]
    for model in grid["pretrained"]:
        made = {name: set(compressions.run_spec(config, model, name)["reductions"]) for name in claim["contrast"]}
        for percent in grid["reductions"]:
            there = all(percent in found for found in made.values())
            yield {
                "scale": f"{model} − {percent:g} %",
                "trained": False,
                "records": {n: [f"compression/{model}/{n}/{percent:g}"] for n in made} if there else None,
                "noise": {},
            }


def power_spec(config: Config) -> list[dict[str, Any]]:
    """Every scale of language models at which several experiments have several seeds, and those runs."""
    runs = set(experiments.all_runs(dict(config)))
    known, found = config["experiments"], []
    for scale in config["scales"]:
        chosen = several_seeds(runs, scale)
        if chosen:
            order = [name for name in known if name in chosen]
            labels = {name: known[name]["label"] for name in order}
            found.append({"scale": scale, "runs": {name: chosen[name] for name in order}, "labels": labels})
    return found


def records(claim: Mapping[str, Any]) -> list[str]:
    """The directories of metrics files that judging a claim reads, below the results."""
    return [r for part in ("records", "noise") for of_one in (claim[part] or {}).values() for r in of_one]


def files(found: list[dict[str, Any]]) -> list[str]:
    """The files that judging some claims reads, below the results; of compressions their manifests."""
    read = [record for claim in found for record in records(claim)]
    evaluations = [f"{record}/metrics.json" for record in read if record.startswith("evaluations/")]
    compressed = [f"{record.rpartition('/')[0]}/manifest.json" for record in read if record.startswith("compression/")]
    return list(dict.fromkeys(evaluations + compressed))
