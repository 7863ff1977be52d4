"""What a configuration asks for: its runs, and its tables and figures as pure data. Needs neither torch nor Snakemake.

A run is ``{scale}/{experiment}/seed{n}``; its spec is everything that decides its bits, as JSON-able data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from masa.errors import MasaError, did_you_mean, unknown
from masa.models.recipes import without_later
from masa.sharing.spec import METHODS, ModelShape, SharingSpec
from masa.study import compressions, kinds

Config = dict[str, Any]

MANY = 24
"""Names that a message still lists; of more it says how many there are."""


def active(config: Config, kind: str) -> dict[str, Config]:
    """The tables or figures whose grid has at least one scale or pretrained model, and that something is left of where
    experiments cannot exist at their scales (:func:`misfit`)."""
    grids = {name: grid.get("scales") or grid.get("pretrained") for name, grid in config["grids"].items()}
    return {n: a for n, a in config[kind].items() if a and grids[a["grid"]] and not _all_left_out(config, a)}


def _all_left_out(config: Config, artefact: Config) -> bool:
    pairs = _pairs(config, artefact)
    return bool(pairs) and all(misfit(config, *pair) for pair in pairs)


def artefact_runs(config: Config, artefact: Config) -> list[str]:
    """Run ids of one table or figure: every scale, experiment and seed; none if it is about pretrained models."""
    grid = config["grids"][artefact["grid"]]
    if compressions.is_compression(config, artefact):
        return []
    return [
        f"{scale}/{name}/seed{seed}"
        for scale in grid["scales"]
        for name in experiments_at(config, artefact["experiments"], scale)
        for seed in grid["seeds"]
    ]


def experiments_at(config: Config, names: Iterable[str], scale: str, possible: bool = False) -> list[str]:
    """Those of some experiments that are made at one scale: not those that :func:`misfit` says cannot exist there.

    Args:
        possible: also leave out what that kind of model cannot have: grouped heads in vision.
    """
    return [
        name
        for name in names
        if _wanted_at(config["experiments"][name], scale)
        and not (possible and _is_grouped_vision(config, name, scale))
        and not misfit(config, name, scale)
    ]


def _wanted_at(entry: Mapping[str, Any], scale: str) -> bool:
    return scale in entry.get("only", [scale])


def _is_grouped_vision(config: Config, name: str, scale: str) -> bool:
    """Whether an experiment groups heads at a scale of vision, whose models have no such thing with any number."""
    grouped = getattr(METHODS.get(config["experiments"][name]["method"]), "source", None) == "grouped_heads"
    return grouped and scale in sizes(config) and kind_of(config, scale) is not kinds.LANGUAGE


def misfit(config: Config, name: str, scale: str) -> str:
    """Why an experiment cannot exist at a scale, with the mend; empty where it can.

    A number that is written relative to the model, as ``H/6``, is meant for many scales, and some have no such whole
    number. One that is written out is meant as it stands, and wrong where it does not fit (:func:`run_spec`).
    """
    if scale not in sizes(config) or name not in config["experiments"]:
        return ""  # which run_spec says
    if _is_grouped_vision(config, name, scale):
        return ""  # no number mends it: it is refused where it is asked for
    model = sizes(config)[scale]["model"]
    known = {"L": model["num_layers"], "d": model["hidden_size"], "H": model["num_attention_heads"]}
    sharing = _sharing_at(config["experiments"][name], scale)
    for key, value in (METHODS[sharing["method"]].defaults | sharing).items():
        for number in value.values() if isinstance(value, Mapping) else [value]:
            found = re.fullmatch(r"([LdH])/([1-9]\d*)", str(number)) if key in RELATIVE else None
            if found and (size := known[found[1]]) % int(found[2]):
                fits = [n for n in range(1, size + 1) if size % n == 0]
                nearest = min((abs(n - size / int(found[2])), n) for n in fits)[1]
                return (
                    f"{key} = {number!r} is not an integer there: {found[1]} = {size}. To make it, set "
                    f"experiments.{name}.per_scale.{scale}: {{{key}: {nearest}}} (or another of {fits})."
                )
    return ""


RELATIVE = ("atoms", "sets", "num_key_value_heads")
"""Numbers of a sharing spec that must come out whole where they are written as a part of the model (a rank is rounded).
"""


def left_out(config: Config, artefacts: Iterable[Config] | None = None) -> list[str]:
    """A sentence for every experiment that a table or figure names and that cannot exist at a scale of its grid.

    Args:
        artefacts: the tables and figures; by default all.
    """
    if artefacts is None:
        artefacts = [a for kind in ("tables", "figures") for a in config[kind].values() if a]
    wanted = dict.fromkeys(pair for artefact in artefacts for pair in _pairs(config, artefact))
    said = ((name, scale, misfit(config, name, scale)) for name, scale in wanted)
    return [f"{name} is left out at scale {scale}: {why}" for name, scale, why in said if why]


def _pairs(config: Config, artefact: Config) -> list[tuple[str, str]]:
    """(experiment, scale) that a table or figure asks for, whether they can exist or not."""
    if compressions.is_compression(config, artefact):
        return []
    return [
        (name, scale)
        for scale in config["grids"][artefact["grid"]]["scales"]
        for name in artefact["experiments"]
        if _wanted_at(config["experiments"][name], scale)
    ]


def sizes(config: Config) -> dict[str, Config]:
    """All scales, of language models and of vision."""
    return {name: size for section in ("scales", "vision_scales") for name, size in config[section].items() if size}


def kind_of(config: Config, scale: str) -> kinds.Kind:
    """What kind of model a scale is of."""
    return kinds.of(sizes(config)[scale])


def all_runs(config: Config) -> list[str]:
    """Run ids of all tables and figures, each once, in the order of the artefacts."""
    ids = (
        run for kind in ("tables", "figures") for a in active(config, kind).values() for run in artefact_runs(config, a)
    )
    return list(dict.fromkeys(ids))


def all_compressions(config: Config) -> list[str]:
    """Compression runs of all tables and figures, each once."""
    return list(
        dict.fromkeys(
            run
            for kind in ("tables", "figures")
            for artefact in active(config, kind).values()
            if compressions.is_compression(config, artefact)
            for run in compressions.artefact_runs(config, artefact)
        )
    )


def parse_run(run: str) -> tuple[str, str, int]:
    """Split a run id.

    Raises:
        MasaError: it is not of the form scale/experiment/seedN.
    """
    parts = run.split("/")
    if len(parts) != 3 or not parts[2].startswith("seed") or not parts[2][4:].isdigit():
        raise MasaError(f"Run {run!r} is not of the form SCALE/EXPERIMENT/seedN, e.g. nano/masa-qkvo/seed0.")
    return parts[0], parts[1], int(parts[2][4:])


def unknown_run(what: str, name: str, known: Sequence[str], results: Path) -> MasaError:
    """Build the error for a run that does not exist: the nearest ones, or that there are no results to look in.

    Args:
        what: is named so, as in "Run".
        name: what was asked for.
        known: all that could have been named.
        results: where they were looked for.
    """
    if not known:
        why = "holds no runs yet" if results.is_dir() else "does not exist here"
        return MasaError(
            f"{what} {name!r} does not exist: the directory of results, {results}, {why}. Call masa in the directory "
            "of the project, name the results by --results DIR, or make them with `snakemake --cores all`."
        )
    if len(known) <= MANY:
        return unknown(what, name, known)
    hint = did_you_mean(name, sorted(known))
    return MasaError(
        f"{what} {name!r} does not exist.{hint} There are {len(known)}; `masa status` lists those of trainings."
    )


def vanilla_parameters(model: Mapping[str, Any], vocab_size: int) -> int:
    """Parameters of the vanilla model with biases, LayerNorms and tied embeddings."""
    d, ffn, layers = model["hidden_size"], model["intermediate_size"], model["num_layers"]
    return vocab_size * d + layers * (4 * (d * d + d) + 2 * d * ffn + ffn + d + 4 * d) + 2 * d


def sharing_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of :class:`masa.SharingSpec` in an experiment, whatever the scale."""
    return {k: v for k, v in entry.items() if k not in ("label", "paper", "per_scale", "only")}


def _sharing_at(entry: Mapping[str, Any], scale: str) -> dict[str, Any]:
    return sharing_of(entry) | (entry.get("per_scale") or {}).get(scale, {})


def run_spec(config: Config, scale: str, experiment: str, seed: int) -> dict[str, Any]:
    """Everything that decides a run's bits, apart from the data: model, sharing, recipe and seed.

    Raises:
        MasaError: an unknown name, or a model, sharing spec or recipe that cannot be built; the message says where.
    """
    known = sizes(config)
    if scale not in known:
        raise unknown("Scale", scale, known)
    if experiment not in config["experiments"]:
        raise unknown("Experiment", experiment, config["experiments"])
    size, entry = known[scale], config["experiments"][experiment]
    sharing, kind = _sharing_at(entry, scale), kinds.of(size)
    if why := misfit(config, experiment, scale):
        raise MasaError(f"Run {scale}/{experiment}/seed{seed}: {why}")
    if kind.resolve:
        model, training = size["model"], size["training"]
        run = f"{scale}/{experiment}/seed{seed}"
        return kind.resolve({"run": run, "seed": seed, "model": model, "sharing": sharing, "training": training})
    model = _language_model(config, size)
    where = f"Run {scale}/{experiment}/seed{seed}"
    heads, width = model["num_attention_heads"], model["hidden_size"]
    if width % heads or (width // heads) % 2:
        raise MasaError(
            f"{where}: num_attention_heads = {heads} must divide hidden_size = {width} into heads of even width (RoPE)."
        )
    try:
        resolved = SharingSpec.coerce(sharing).resolve(ModelShape.of_sizes(model))
    except MasaError as error:
        raise MasaError(f"{where}: {error}") from error
    return {
        "run": f"{scale}/{experiment}/seed{seed}",
        "seed": seed,
        "model": model,
        "sharing": resolved.to_dict(),
        "training": _recipe(where, config["training"] | (size.get("training") or {}), model),
    }


def _language_model(config: Config, size: Mapping[str, Any]) -> dict[str, Any]:
    return {"vocab_size": config["data"]["tokenizer"]["vocab_size"]} | size["model"]


def _recipe(where: str, given: Mapping[str, Any], model: Mapping[str, Any]) -> dict[str, Any]:
    recipe = without_later(given)
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
    size = sizes(config)[scale]
    recipe = _recipe(f"Scale {scale}", config["training"] | (size.get("training") or {}), _language_model(config, size))
    return recipe["steps"] * recipe["batch_size"] * recipe["context"]
