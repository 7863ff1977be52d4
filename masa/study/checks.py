"""What compares sections of the configuration: names that must exist, runs that must fit."""

from __future__ import annotations

from masa.data import sources, task_names
from masa.data.benchmarks import BENCHMARKS
from masa.errors import MasaError, unknown
from masa.evaluation.metrics import METRIC_NAMES
from masa.runs.files import PROJECT
from masa.sharing.spec import SharingSpec
from masa.study import claims, compressions, experiments, kinds
from masa.study.cost import devices, shares
from masa.study.experiments import Config
from masa.study.sections.artefacts import Table

FIGURES = {
    "curves": ("tokens", "images", "boxes"),
    "gap": ("tokens",),
    "quality": ("tokens",),
    "effective_rank": ("tokens", "images", "boxes"),
    "coefficients": ("tokens", "images", "boxes"),
    "accuracy_parameters": ("images",),
    "confusion": ("images",),
    "per_class": ("images",),
    "predictions": ("images",),
    "detections": ("boxes",),
    "perplexity_reduction": ("pretrained",),
    "perplexity_bytes": ("pretrained",),
    "ranks": ("pretrained",),
    "drift": ("pretrained",),
}
"""Kinds of figures, and what models they are about: :attr:`masa.study.kinds.Kind.data`, or pretrained ones."""


def check(config: Config) -> None:
    """Check what one section says of another, in a configuration whose sections are right.

    Raises:
        MasaError: the first problem found, naming the key, what was expected and the nearest name that exists.
    """
    _check_sources(config)
    _check_tasks(config)
    _check_artefacts(config)
    _check_vision(config)
    _check_names(config)
    _check_runs(config)
    compressions.check(config)
    claims.check(config)
    if (name := config.get("plan", {}).get("device")) and name not in devices.DEVICES:
        raise unknown("plan.device: device", name, devices.DEVICES)
    shares.check(config)


def _check_sources(config: Config) -> None:
    """Every source is of a known scheme and pinned where it is downloaded."""
    data = config["data"]
    named = {f"data.corpus.{key}": data["corpus"].get(key) for key in ("source", "validation_source")}
    if data["tokenizer"]["source"] != "train":
        named["data.tokenizer.source"] = data["tokenizer"]["source"]
    for section in ("texts", "pretrained", "images", "boxes"):
        named |= {f"{section}.{name}.source": (entry or {}).get("source") for name, entry in config[section].items()}
    for where, source in named.items():
        if source:
            try:
                parsed = sources.parse(source)
                if where.startswith("data.corpus."):
                    sources.check_reader(parsed, data["corpus"]["reader"])
            except MasaError as error:
                raise MasaError(f"{where}: {error}") from error


def _check_tasks(config: Config) -> None:
    """Every task is one of lm-eval's, and may be had from some source."""
    section = config["evaluation"]
    for where, tasks in (("tasks", section["tasks"]), ("limit_per_task", section["limit_per_task"])):
        for task in tasks:
            if task in BENCHMARKS:
                continue
            if not task_names.folder():  # lm-eval is not installed here
                raise unknown(f"evaluation.{where}: task", task, BENCHMARKS)
            if task not in task_names.defined():
                raise task_names.no_task(task, f"evaluation.{where}")
            if set(section["sources"]) == {"pypi"}:
                raise MasaError(
                    f"evaluation.{where}: pip has no data of {task}; add mirror or hub to evaluation.sources, or "
                    f"choose of {', '.join(name for name, known in BENCHMARKS.items() if known.wheel)}."
                )


def _check_artefacts(config: Config) -> None:
    """What tables and figures name exists."""
    for kind in ("tables", "figures"):
        for name, artefact in config[kind].items():
            if artefact is None:
                continue
            where = f"{kind}.{name}"
            if artefact["grid"] not in config["grids"]:
                raise unknown(f"{where}: grid", artefact["grid"], config["grids"])
            if compressions.is_compression(config, artefact):
                what, known = "compression", config["compressions"]
            else:
                what, known = "experiment", config["experiments"]
            for experiment in [*artefact["experiments"], *artefact.get("tasks", ())]:
                if experiment not in known:
                    raise unknown(f"{where}: {what}", experiment, known)
            for column in [*artefact.get("columns", ()), artefact.get("judged", Table.defaults()["judged"])]:
                if column not in METRIC_NAMES:
                    raise unknown(f"{where}: column", column, METRIC_NAMES)
            if kind == "figures" and artefact["kind"] not in FIGURES:
                raise unknown(f"{where}: kind", artefact["kind"], FIGURES)
            if (paper := artefact.get("paper")) and not (PROJECT / paper["file"]).is_file():
                raise MasaError(f"{where}: the paper's numbers {paper['file']} do not exist.")
    clash = set(config["tables"]) & set(config["figures"])
    if clash:
        raise MasaError(f"{', '.join(sorted(clash))}: a table and a figure may not have the same name.")


def _check_names(config: Config) -> None:
    """Experiments and scales that are named elsewhere exist; experiments that no run needs make sense as well."""
    for name, entry in config["experiments"].items():
        try:
            SharingSpec.coerce(experiments.sharing_of(entry))
        except MasaError as error:
            raise MasaError(f"experiments.{name}: {error}") from error
    for where, names in (
        ("throughput.methods", config["throughput"]["methods"]),
        ("parameters.experiments", config["parameters"]["experiments"]),
    ):
        for name in names:
            if name not in config["experiments"]:
                raise unknown(f"{where}: experiment", name, config["experiments"])
    for name in config.get("first", []):
        if name not in (artefacts := {*config["tables"], *config["figures"]}):  # also those that were removed
            raise unknown("first: table or figure", name, artefacts)
    if config["throughput"]["methods"][:1] != ["vanilla"]:
        raise MasaError("throughput.methods must begin with vanilla, which all ratios refer to.")
    sizes = experiments.sizes(config)
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


def _check_runs(config: Config) -> None:
    """Every run can be built, and every artefact made of its runs."""
    for kind in ("tables", "figures"):
        for name, artefact in experiments.active(config, kind).items():
            _check_models(config, kind, name, artefact)
    vocabulary = config["data"]["tokenizer"]["vocab_size"]
    for run in experiments.all_runs(config):
        spec = experiments.run_spec(config, *experiments.parse_run(run))
        if kinds.of(spec) is kinds.LANGUAGE and spec["model"]["vocab_size"] != vocabulary:
            raise MasaError(
                f"Run {run}: scales.{run.split('/')[0]}.model.vocab_size = {spec['model']['vocab_size']}, but "
                f"data.tokenizer.vocab_size = {vocabulary}. A run needs the tokenizer's vocabulary."
            )
    for section, key in (("throughput", "methods"), ("parameters", "experiments")):
        for scale in config[section]["scales"]:
            for name in experiments.experiments_at(config, config[section][key], scale, possible=True):
                experiments.run_spec(config, scale, name, 0)


def _check_models(config: Config, kind: str, name: str, artefact: Config) -> None:
    """An artefact is about one kind of models, which its figure can draw, and has at least one run."""
    where, grid = f"{kind}.{name}", artefact["grid"]
    if compressions.is_compression(config, artefact):
        found = {"pretrained"}
    else:
        found = {experiments.kind_of(config, scale).data for scale in config["grids"][grid]["scales"]}
        if not experiments.artefact_runs(config, artefact):
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
