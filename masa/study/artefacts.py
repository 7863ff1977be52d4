"""Tables and figures as data: their captions, their rows, and the files that each row is made from. No torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from masa.errors import MasaError, unknown
from masa.study import claims, compressions, experiments
from masa.study.experiments import Config


def labels(c: Config) -> dict[str, str]:
    """Experiment -> its name in tables."""
    return {name: entry["label"] for name, entry in c["experiments"].items()}


OWN_TABLES: dict[str, Callable[[Config], Any]] = {
    "runs": experiments.all_runs,
    "metrics": experiments.all_runs,
    "throughput": lambda c: {"scales": c["throughput"]["scales"], "labels": labels(c)},
    "parameters": lambda c: {"labels": labels(c)},
    "claims": claims.spec,
    "power": claims.power_spec,
}
"""Tables that every configuration has, beside its own -> what each is made of (:mod:`masa.report.own_tables`)."""


def table_names(c: Config) -> list[str]:
    """All tables that a configuration makes."""
    return [*OWN_TABLES, *experiments.active(c, "tables")]


def table_spec(c: Config, name: str) -> Any:
    """One table as data.

    Raises:
        MasaError: there is none of this name, or its grid is empty.
    """
    if name in OWN_TABLES:
        return OWN_TABLES[name](c)
    if not c["tables"].get(name):
        raise unknown("Table", name, table_names(c))
    return artefact_spec(c, "tables", name)


def without_runs(config: Config, kind: str) -> dict[str, str]:
    """Tables or figures that this configuration leaves out -> why, and what to do."""
    active = experiments.active(config, kind)
    return {
        name: f"{name} has no runs in this configuration: grids.{artefact['grid']} is empty. Fill it, or add an "
        "overlay that does (--configfile; config/README.md says what each is for)."
        for name, artefact in config[kind].items()
        if artefact and name not in active
    }


def artefact_spec(config: Config, kind: str, name: str) -> dict[str, Any]:
    """A table or figure as pure data: its caption and rows with their runs and labels.

    Raises:
        MasaError: no such artefact, or its grid has no scale in this configuration.
    """
    if name not in config[kind] or config[kind][name] is None:
        raise unknown(kind.removesuffix("s").capitalize(), name, [n for n, a in config[kind].items() if a])
    if name in (lacking := without_runs(config, kind)):
        raise MasaError(lacking[name])
    artefact = config[kind][name]
    rows = (
        compressions.rows(config, artefact)
        if compressions.is_compression(config, artefact)
        else _rows(config, artefact)
    )
    spec = {k: v for k, v in artefact.items() if k not in ("grid", "experiments")} | {"name": name, "rows": rows}
    lacking = experiments.left_out(config, [artefact])
    return spec | ({"left_out": lacking} if lacking else {})


def _rows(config: Config, artefact: Config) -> list[dict[str, Any]]:
    grid = config["grids"][artefact["grid"]]
    return [
        {
            "scale": scale,
            "experiment": experiment,
            "label": config["experiments"][experiment]["label"],
            **{
                k: v
                for k, v in experiments.run_spec(config, scale, experiment, grid["seeds"][0]).items()
                if k in ("model", "sharing")
            },
            "runs": [f"{scale}/{experiment}/seed{seed}" for seed in grid["seeds"]],
            "records": [f"evaluations/{scale}/{experiment}/seed{seed}" for seed in grid["seeds"]],
            "paper": {"scale": experiments.sizes(config)[scale].get("compare_with")}
            | (config["experiments"][experiment].get("paper") or {}),
        }
        for scale in grid["scales"]
        for experiment in experiments.experiments_at(config, artefact["experiments"], scale)
    ]
