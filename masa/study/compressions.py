"""What the configuration asks of compression: which models, methods and reductions, as plain data. Needs no torch.

A compression run is ``{model}/{name}``, one method on one model, at every reduction that a table or figure wants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from masa.compression.names import METHODS, ORIGINAL, needs_gradients
from masa.errors import MasaError, unknown
from masa.models.llama_types import TYPES
from masa.study.sections.compression import Compression, Storage

Config = Mapping[str, Any]

CALIBRATION = ("samples", "length", "seed", "gradient_samples", "projections")
"""What statistics say of themselves, and a compression compares."""

_DEFAULTS = Compression.defaults()


def is_compression(config: Config, artefact: Config) -> bool:
    """Whether a table or figure is about pretrained models."""
    return "pretrained" in config["grids"][artefact["grid"]]


def check(config: Config) -> None:
    """Check the names and sizes that the schema cannot.

    Raises:
        MasaError: the first problem found, naming the key.
    """
    for name, entry in config["compressions"].items():
        where = f"compressions.{name}"
        if entry["method"] not in (ORIGINAL, *METHODS):
            raise unknown(f"{where}: method", entry["method"], (ORIGINAL, *METHODS))
        if (chosen := _calibration(config, name)) is None:
            if entry["method"] != ORIGINAL:
                raise MasaError(f"{where}: calibration may only be null for method {ORIGINAL}.")
        elif chosen not in config["calibrations"]:
            raise unknown(f"{where}: calibration", chosen, config["calibrations"])
        elif needs_gradients(entry["method"]) and not config["calibrations"][chosen]["gradient_samples"]:
            raise MasaError(f"{where}: {entry['method']} needs calibrations.{chosen}.gradient_samples of at least 1.")
        elif extra := set(_projections(entry)) - set(config["calibrations"][chosen]["projections"]):
            raise MasaError(f"{where}: calibrations.{chosen} has no projection {', '.join(sorted(extra))}.")
        if (kind := _storage(entry)) and kind["gguf"] not in (None, *TYPES):
            raise unknown(f"{where}.storage: gguf", kind["gguf"], TYPES)
        if kind and kind["gguf"] and (kind["embeddings"] or kind["dtype"] is None):
            raise MasaError(f"{where}.storage: gguf decides the bits of embeddings, and needs a dtype.")
        if kind and kind["embeddings"] and entry["method"] == ORIGINAL:
            raise MasaError(f"{where}.storage: embeddings of few bits belong to a compressed model.")
        if entry["method"] != ORIGINAL and 0 in entry.get("reductions", ()):
            raise MasaError(f"{where}.reductions: 0 is the original; give percentages above it.")
    for name, entry in config["calibrations"].items():
        if entry["text"] not in config["texts"]:
            raise unknown(f"calibrations.{name}: text", entry["text"], config["texts"])
    settings = config["compression"]["evaluation"]
    for name in settings["texts"]:
        if name not in config["texts"]:
            raise unknown("compression.evaluation.texts: text", name, config["texts"])
    for task in settings["tasks"]:
        if task not in config["evaluation"]["tasks"]:
            raise unknown(
                "compression.evaluation.tasks (a part of evaluation.tasks): task", task, config["evaluation"]["tasks"]
            )
    for name, grid in config["grids"].items():
        if 0 in grid.get("reductions", ()):
            raise MasaError(f"grids.{name}.reductions: 0 is the original; give percentages above it.")
        for model in grid.get("pretrained", ()):
            if not config["pretrained"].get(model):
                raise unknown(f"grids.{name}: pretrained model", model, config["pretrained"])


def _calibration(config: Config, name: str) -> str | None:
    return config["compressions"][name].get("calibration", _DEFAULTS["calibration"])


def _projections(entry: Config) -> str:
    return entry.get("projections", _DEFAULTS["projections"])


def reductions(config: Config, artefact: Config, name: str) -> list[float]:
    """Percentages at which one artefact wants one method."""
    return config["compressions"][name].get("reductions") or config["grids"][artefact["grid"]]["reductions"]


def artefact_runs(config: Config, artefact: Config) -> list[str]:
    """Compression runs of one table or figure."""
    return [
        f"{model}/{name}"
        for model in config["grids"][artefact["grid"]]["pretrained"]
        for name in artefact["experiments"]
    ]


def parse_run(run: str) -> tuple[str, str]:
    """Split a compression run id.

    Raises:
        MasaError: it is not of the form model/name.
    """
    parts = run.split("/")
    if len(parts) != 2:
        raise MasaError(f"Compression run {run!r} is not of the form MODEL/NAME, e.g. SmolLM2-135M/svd-llm.")
    return parts[0], parts[1]


def run_spec(config: Config, model: str, name: str) -> dict[str, Any]:
    """Everything that decides a compression run, apart from model, texts and statistics.

    Raises:
        MasaError: an unknown model or method.
    """
    if not config["pretrained"].get(model):
        raise unknown("Pretrained model", model, config["pretrained"])
    if name not in config["compressions"]:
        raise unknown("Compression", name, config["compressions"])
    wanted: set[float] = set()
    with_tasks: set[float] = set()
    for kind in ("tables", "figures"):
        for artefact in config[kind].values():
            if not artefact or not is_compression(config, artefact) or name not in artefact["experiments"]:
                continue
            if model in config["grids"][artefact["grid"]]["pretrained"]:
                wanted |= set(reductions(config, artefact, name))
                if name in artefact.get("tasks", ()):
                    with_tasks |= set(reductions(config, artefact, name))
    entry, section = config["compressions"][name], config["compression"]
    chosen = _calibration(config, name)
    calibration = {k: v for k, v in config["calibrations"][chosen].items() if k in CALIBRATION} if chosen else None
    return {
        "run": f"{model}/{name}",
        "method": entry["method"],
        "options": entry.get("options") or {},
        "projections": _projections(entry),
        "calibration": calibration,
        "heal": entry.get("heal"),
        "storage": _storage(entry),
        "cache": config["cache"],
        "reductions": sorted(wanted),
        "tasks_at": sorted(with_tasks),
        "evaluation": section["evaluation"],
        "threads": section["threads"],
        "keep_models": section["keep_models"],
    }


def _storage(entry: Config) -> dict[str, Any] | None:
    return Storage.defaults() | entry["storage"] if entry.get("storage") is not None else None


def calibration_of(config: Config, run: str) -> str | None:
    """Name of the calibration that a run uses."""
    return _calibration(config, parse_run(run)[1])


def rows(config: Config, artefact: Config) -> list[dict[str, Any]]:
    """Rows of a table or figure: the original first, then reduction by reduction, method by method."""
    grid, found = config["grids"][artefact["grid"]], []
    for model in grid["pretrained"]:
        percents = sorted({p for name in artefact["experiments"] for p in reductions(config, artefact, name)})
        for percent in percents:
            for name in artefact["experiments"]:
                if percent not in reductions(config, artefact, name):
                    continue
                entry = config["compressions"][name]
                same = config["pretrained"][model].get("compare_with")
                paper = {"scale": same, "model": same, "attn_cr_pct": float(percent)} | (entry.get("paper") or {})
                found.append(
                    {
                        "scale": model,
                        "experiment": name,
                        "label": entry["label"],
                        "reduction": percent,
                        "records": [f"compression/{model}/{name}/{percent:g}"],
                        "paper": paper if "paper" in entry else {"scale": same},
                    }
                )
    return found
