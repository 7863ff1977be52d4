"""The configuration: read, merge, check, and turn into runs. Needs neither torch nor Snakemake.

A run is ``{scale}/{experiment}/seed{n}``; its spec is everything that decides its bits, as JSON-able data.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from masa import kinds
from masa.compression import plan
from masa.errors import MasaError, unknown
from masa.fingerprint import ROOT
from masa.report.metrics import METRIC_NAMES
from masa.spec import METHODS, ModelShape, SharingSpec

BASE = tuple(f"config/{name}.yaml" for name in ("config", "experiments", "vision", "compression", "artefacts"))
SCHEMA = ROOT / "config" / "schemas" / "config.schema.yaml"

FIGURES = {
    "curves": ("tokens", "images", "boxes"),
    "quality": ("tokens",),
    "effective_rank": ("tokens", "images", "boxes"),
    "coefficients": ("tokens", "images", "boxes"),
    "accuracy_parameters": ("images",),
    "confusion": ("images",),
    "per_class": ("images",),
    "predictions": ("images",),
    "detections": ("boxes",),
    "perplexity_reduction": ("pretrained",),
    "ranks": ("pretrained",),
    "drift": ("pretrained",),
}
"""Kinds of figures, and what models they are about: :attr:`masa.kinds.Kind.data`, or pretrained ones."""

TASKS = ("piqa", "hellaswag", "lambada_openai", "arc_easy", "arc_challenge", "sciq", "race", "mmlu", "wikitext")
"""lm-eval tasks whose data a mirror or pip may have (see :mod:`masa.benchmarks`)."""

Config = dict[str, Any]


def load(overlays: Iterable[str | Path] = (), root: Path = ROOT) -> Config:
    """Read the base files and the overlays, later ones winning key by key, and check the result.

    Raises:
        MasaError: a file that is missing or not YAML, or a key that the schema does not know.
    """
    config: Config = {}
    for path in [*(root / name for name in BASE), *map(Path, overlays)]:
        _merge(config, _read_yaml(path))
    check(config)
    return config


def _read_yaml(path: Path) -> Config:
    if not path.is_file():
        raise MasaError(f"Configuration file {path} does not exist.")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MasaError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise MasaError(f"{path} must hold a mapping of keys, found {type(data).__name__}.")
    return data


def _merge(base: Config, over: Mapping[str, Any]) -> None:
    """Snakemake's own rule for --configfile: mappings merge, everything else is replaced."""
    for key, value in over.items():
        if isinstance(value, Mapping) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        else:
            base[key] = value


@functools.cache
def schema() -> dict[str, Any]:
    return yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))


def check(config: Config) -> None:
    """Check a merged configuration: its keys, then every run and artefact that it asks for.

    Raises:
        MasaError: the first problem found, naming the key, what was expected and the nearest name that exists.
    """
    import jsonschema

    errors = sorted(
        jsonschema.Draft202012Validator(schema()).iter_errors(config), key=lambda e: (len(e.absolute_path), str(e.path))
    )
    if errors:
        raise _explain(errors[0])
    if "hub" not in config["evaluation"]["sources"]:  # the hub may have tasks that we do not know
        for where, tasks in (
            ("tasks", config["evaluation"]["tasks"]),
            ("limit_per_task", config["evaluation"]["limit_per_task"]),
        ):
            for task in tasks:
                if task not in TASKS:
                    raise unknown(f"evaluation.{where}: task", task, TASKS)
    for kind in ("tables", "figures"):
        for name, artefact in config[kind].items():
            if artefact is None:
                continue
            where = f"{kind}.{name}"
            if artefact["grid"] not in config["grids"]:
                raise unknown(f"{where}: grid", artefact["grid"], config["grids"])
            if plan.is_compression(config, artefact):
                what, known = "compression", config["compressions"]
            else:
                what, known = "experiment", config["experiments"]
            for experiment in [*artefact["experiments"], *artefact.get("tasks", ())]:
                if experiment not in known:
                    raise unknown(f"{where}: {what}", experiment, known)
            for column in [*artefact.get("columns", ()), artefact.get("judged", "avg_pct")]:
                if column not in METRIC_NAMES:
                    raise unknown(f"{where}: column", column, METRIC_NAMES)
            if kind == "figures" and artefact["kind"] not in FIGURES:
                raise unknown(f"{where}: kind", artefact["kind"], FIGURES)
            if (paper := artefact.get("paper")) and not (ROOT / paper["file"]).is_file():
                raise MasaError(f"{where}: the paper's numbers {paper['file']} do not exist.")
    clash = set(config["tables"]) & set(config["figures"])
    if clash:
        raise MasaError(f"{', '.join(sorted(clash))}: a table and a figure may not have the same name.")
    for where, names in (
        ("throughput.methods", config["throughput"]["methods"]),
        ("parameters.experiments", config["parameters"]["experiments"]),
    ):
        for name in names:
            if name not in config["experiments"]:
                raise unknown(f"{where}: experiment", name, config["experiments"])
    _check_vision(config)
    sizes = _sizes(config)
    named = dict.fromkeys([*config["scales"], *config["vision_scales"]], True)  # those that were removed as well
    for where, names, known in (
        *((f"grids.{name}", grid.get("scales", ()), sizes) for name, grid in config["grids"].items()),
        *((f"experiments.{name}.only", e.get("only", ()), named) for name, e in config["experiments"].items()),
        ("throughput.scales", config["throughput"]["scales"], config["scales"]),
        ("parameters.scales", config["parameters"]["scales"], sizes),
    ):
        for scale in names:
            if not known.get(scale):
                raise unknown(f"{where}: scale", scale, [s for s, v in known.items() if v])
    for kind in ("tables", "figures"):
        for name, artefact in active(config, kind).items():
            _check_models(config, kind, name, artefact)
    if config["throughput"]["methods"][:1] != ["vanilla"]:
        raise MasaError("throughput.methods must begin with vanilla, which all ratios refer to.")
    vocabulary = config["data"]["tokenizer"]["vocab_size"]
    for run in all_runs(config):
        spec = run_spec(config, *parse_run(run))
        if kinds.of(spec) is kinds.LANGUAGE and spec["model"]["vocab_size"] != vocabulary:
            raise MasaError(
                f"Run {run}: scales.{run.split('/')[0]}.model.vocab_size = {spec['model']['vocab_size']}, but "
                f"data.tokenizer.vocab_size = {vocabulary}. A run needs the tokenizer's vocabulary."
            )
    plan.check(config)
    for section, key in (("throughput", "methods"), ("parameters", "experiments")):
        for scale in config[section]["scales"]:
            for name in experiments_at(config, config[section][key], scale, possible=True):
                run_spec(config, scale, name, 0)


def _check_models(config: Config, kind: str, name: str, artefact: Config) -> None:
    """An artefact is about one kind of models, which its figure can draw, and has at least one run."""
    where, grid = f"{kind}.{name}", artefact["grid"]
    if plan.is_compression(config, artefact):
        found = {"pretrained"}
    else:
        found = {kind_of(config, scale).data for scale in config["grids"][grid]["scales"]}
        if not artefact_runs(config, artefact):
            raise MasaError(f"{where}: none of its experiments is made at a scale of grids.{grid} (`only`).")
    if len(found) > 1:
        raise MasaError(f"{where}: grids.{grid} mixes models of {' and '.join(sorted(found))}; use one grid for each.")
    if kind == "figures" and not found <= set(FIGURES[artefact["kind"]]):
        fits = [k for k, models in FIGURES.items() if found <= set(models)]
        raise MasaError(
            f"{where}: kind {artefact['kind']!r} cannot draw models of {found.pop()} (grids.{grid}). Kinds that can: "
            f"{', '.join(fits)}."
        )


def _check_vision(config: Config) -> None:
    """The names in ``vision_scales``."""
    for name, size in config["vision_scales"].items():
        if size is None:
            continue
        where = f"vision_scales.{name}"
        if config["scales"].get(name):
            raise MasaError(f"{where}: scales has an entry of the same name.")
        if (family := size["model"]["family"]) not in kinds.VISION:
            raise unknown(f"{where}.model.family: family", family, kinds.VISION)
        kind = kinds.VISION[family]
        if size["data"] not in config[kind.data]:
            raise unknown(f"{where}.data: an entry of {kind.data} named", size["data"], config[kind.data])
        try:
            kind.check(config[kind.data][size["data"]], size["model"])
        except MasaError as error:
            raise MasaError(f"{where}: {error}") from error


def _explain(error: Any) -> MasaError:
    """One sentence for a schema violation, with did-you-mean for keys and values."""
    path = ".".join(str(part) for part in error.absolute_path) or "the configuration"
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        extra = next((key for key in error.instance if key not in known), None)
        if extra is not None:
            return unknown(f"{path}: key", extra, known)
    if error.validator == "enum":
        return unknown(f"{path}: value", error.instance, error.validator_value)
    return MasaError(f"{path}: {error.message}.")


# ---------------------------------------------------------------------------------------------------------- runs


def active(config: Config, kind: str) -> dict[str, Config]:
    """The tables or figures whose grid has at least one scale or pretrained model."""
    grids = {name: grid.get("scales") or grid.get("pretrained") for name, grid in config["grids"].items()}
    return {n: a for n, a in config[kind].items() if a and grids[a["grid"]]}


def artefact_runs(config: Config, artefact: Config) -> list[str]:
    """Run ids of one table or figure: every scale, experiment and seed; none if it is about pretrained models."""
    grid = config["grids"][artefact["grid"]]
    if plan.is_compression(config, artefact):
        return []
    return [
        f"{scale}/{name}/seed{seed}"
        for scale in grid["scales"]
        for name in experiments_at(config, artefact["experiments"], scale)
        for seed in grid["seeds"]
    ]


def experiments_at(config: Config, names: Iterable[str], scale: str, possible: bool = False) -> list[str]:
    """Those of some experiments that are made at one scale.

    Args:
        possible: also leave out what that kind of model cannot have: grouped heads in vision.
    """
    grouped = possible and kind_of(config, scale) is not kinds.LANGUAGE
    return [
        name
        for name in names
        if scale in (entry := config["experiments"][name]).get("only", [scale])
        and not (grouped and getattr(METHODS.get(entry["method"]), "source", None) == "grouped_heads")
    ]


def _sizes(config: Config) -> dict[str, Config]:
    """All scales, of language models and of vision."""
    return {name: size for section in ("scales", "vision_scales") for name, size in config[section].items() if size}


def kind_of(config: Config, scale: str) -> kinds.Kind:
    """What kind of model a scale is of."""
    return kinds.of(_sizes(config)[scale])


def all_runs(config: Config) -> list[str]:
    """Run ids of all tables and figures, each once, in the order of the artefacts."""
    ids = (
        run for kind in ("tables", "figures") for a in active(config, kind).values() for run in artefact_runs(config, a)
    )
    return list(dict.fromkeys(ids))


def parse_run(run: str) -> tuple[str, str, int]:
    """Split a run id.

    Raises:
        MasaError: it is not of the form scale/experiment/seedN.
    """
    parts = run.split("/")
    if len(parts) != 3 or not parts[2].startswith("seed") or not parts[2][4:].isdigit():
        raise MasaError(f"Run {run!r} is not of the form SCALE/EXPERIMENT/seedN, e.g. nano/masa-qkvo/seed0.")
    return parts[0], parts[1], int(parts[2][4:])


def model_shape(model: Mapping[str, Any]) -> ModelShape:
    """Shapes of the paper's standard Transformer, from its sizes alone (the model itself: :mod:`masa.models`)."""
    d, heads, ffn = model["hidden_size"], model["num_attention_heads"], model["intermediate_size"]
    shapes = dict.fromkeys("qkvo", (d, d)) | {"u": (ffn, d), "d": (d, ffn)}
    return ModelShape(model["num_layers"], d, heads, heads, shapes)


def vanilla_parameters(model: Mapping[str, Any], vocab_size: int) -> int:
    """Parameters of the vanilla model with biases, LayerNorms and tied embeddings."""
    d, ffn, layers = model["hidden_size"], model["intermediate_size"], model["num_layers"]
    return vocab_size * d + layers * (4 * (d * d + d) + 2 * d * ffn + ffn + d + 4 * d) + 2 * d


def run_spec(config: Config, scale: str, experiment: str, seed: int) -> dict[str, Any]:
    """Everything that decides a run's bits, apart from the data: model, sharing, recipe and seed.

    Raises:
        MasaError: an unknown name, or a model, sharing spec or recipe that cannot be built; the message says where.
    """
    sizes = _sizes(config)
    if scale not in sizes:
        raise unknown("Scale", scale, sizes)
    if experiment not in config["experiments"]:
        raise unknown("Experiment", experiment, config["experiments"])
    size, entry = sizes[scale], config["experiments"][experiment]
    sharing = {k: v for k, v in entry.items() if k not in ("label", "paper", "per_scale", "only")}
    sharing |= (entry.get("per_scale") or {}).get(scale, {})
    kind = kinds.of(size)
    if kind.resolve:
        model, training = size["model"], size["training"]
        run = f"{scale}/{experiment}/seed{seed}"
        return kind.resolve({"run": run, "seed": seed, "model": model, "sharing": sharing, "training": training})
    model = {"vocab_size": config["data"]["tokenizer"]["vocab_size"]} | size["model"]
    where = f"Run {scale}/{experiment}/seed{seed}"
    heads, width = model["num_attention_heads"], model["hidden_size"]
    if width % heads or (width // heads) % 2:
        raise MasaError(
            f"{where}: num_attention_heads = {heads} must divide hidden_size = {width} into heads of even width (RoPE)."
        )
    try:
        resolved = SharingSpec.coerce(sharing).resolve(model_shape(model))
    except MasaError as error:
        raise MasaError(f"{where}: {error}") from error
    return {
        "run": f"{scale}/{experiment}/seed{seed}",
        "seed": seed,
        "model": model,
        "sharing": resolved.to_dict(),
        "training": _recipe(where, config["training"] | (size.get("training") or {}), model),
    }


def _recipe(where: str, given: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    recipe = dict(given)
    per_parameter = recipe.pop("tokens_per_parameter")
    tokens = recipe.pop("tokens") or int(per_parameter * vanilla_parameters(model, model["vocab_size"]))
    recipe["micro_batch_size"] = recipe["micro_batch_size"] or recipe["batch_size"]
    if recipe["batch_size"] % recipe["micro_batch_size"]:
        raise MasaError(
            f"{where}: micro_batch_size = {recipe['micro_batch_size']} does not divide "
            f"batch_size = {recipe['batch_size']}."
        )
    recipe["steps"] = tokens // (recipe["batch_size"] * recipe["context"])
    if recipe["steps"] < 1:
        raise MasaError(
            f"{where}: {tokens} tokens are less than one step of {recipe['batch_size']} x {recipe['context']}."
        )
    return recipe


def tokens_needed(config: Config, scale: str) -> int:
    """Training tokens that every run at this scale reads."""
    recipe = run_spec(config, scale, next(iter(config["experiments"])), 0)["training"]
    return recipe["steps"] * recipe["batch_size"] * recipe["context"]


def mirror(config: Config) -> str | None:
    """The mirror directory, from the configuration or from MASA_MIRROR."""
    return config["data"]["mirror"] or os.environ.get("MASA_MIRROR") or None


def describe() -> str:
    """Markdown table of every configuration key: type, default and effect (the content of config/README.md)."""
    base: Config = {}
    for name in BASE:
        _merge(base, _read_yaml(ROOT / name))
    rows = ["| key | type | default | effect |", "|---|---|---|---|"]

    def visit(prefix: str, node: Mapping[str, Any], default: Any) -> None:
        node = {**schema()["$defs"].get(str(node.get("$ref", "")).rsplit("/", 1)[-1], {}), **node}
        if prefix and "description" in node:
            kinds = node.get("type", "one of " + ", ".join(map(str, node.get("enum", []))))
            kind = " or ".join(kinds) if isinstance(kinds, list) else kinds
            shown = "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"
            rows.append(f"| `{prefix}` | {kind} | {shown} | {node['description']} |")
        defaults = default if isinstance(default, dict) else {}
        for key, child in node.get("properties", {}).items():
            visit(f"{prefix}.{key}" if prefix else key, child, defaults.get(key))
        extra = node.get("additionalProperties")
        if isinstance(extra, dict) and "properties" in extra:
            visit(f"{prefix}.NAME", extra, None)

    visit("", schema(), base)
    return "\n".join(rows) + "\n"


# ------------------------------------------------------------------------------------------------ what reports need


def artefact_spec(config: Config, kind: str, name: str) -> dict[str, Any]:
    """A table or figure as pure data: its caption and rows with their runs and labels.

    Raises:
        MasaError: no such artefact, or its grid has no scale in this configuration.
    """
    if name not in config[kind] or config[kind][name] is None:
        raise unknown(kind.removesuffix("s").capitalize(), name, [n for n, a in config[kind].items() if a])
    if name not in active(config, kind):
        raise MasaError(f"{name} has no runs in this configuration: grids.{config[kind][name]['grid']} is empty.")
    artefact = config[kind][name]
    rows = plan.rows(config, artefact) if plan.is_compression(config, artefact) else _rows(config, artefact)
    return {k: v for k, v in artefact.items() if k not in ("grid", "experiments")} | {"name": name, "rows": rows}


def _rows(config: Config, artefact: Config) -> list[dict[str, Any]]:
    grid = config["grids"][artefact["grid"]]
    return [
        {
            "scale": scale,
            "experiment": experiment,
            "label": config["experiments"][experiment]["label"],
            **{
                k: v
                for k, v in run_spec(config, scale, experiment, grid["seeds"][0]).items()
                if k in ("model", "sharing")
            },
            "runs": [f"{scale}/{experiment}/seed{seed}" for seed in grid["seeds"]],
            "records": [f"evaluations/{scale}/{experiment}/seed{seed}" for seed in grid["seeds"]],
            "paper": {"scale": _sizes(config)[scale].get("compare_with")}
            | (config["experiments"][experiment].get("paper") or {}),
        }
        for scale in grid["scales"]
        for experiment in experiments_at(config, artefact["experiments"], scale)
    ]
