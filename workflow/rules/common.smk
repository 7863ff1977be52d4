# Helpers of all rules. Everything here is cheap: no torch, and nothing is written but what masa.runs.fingerprint keeps.

import functools
import json
import os
import re
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir).parent))

from masa.compression.names import modules
from masa.data import benchmarks
from masa.data import image_sets
from masa.data import sources
from masa.errors import MasaError
from masa.report.page import assets
from masa.runs.fingerprint import fingerprint
from masa.start import client as start
from masa.study import artefacts
from masa.study import claims
from masa.study import compressions
from masa.study import config as settings
from masa.study import cost
from masa.study import experiments
from masa.study import inputs
from masa.study import order
from masa.study.cost import progress
from masa.study.cost import shares
from masa.training import launch

try:
    settings.override(config, workflow.config_settings.config or {})
    settings.check(config)
except MasaError as error:
    raise WorkflowError(f"Configuration: {error}") from None

if not workflow.remote_exec:  # a job on a cluster reads this file again
    settings.say_left_out(config)

RESULTS = config["results"]
DATA = f"{RESULTS}/data"
PARTS = f"{RESULTS}/parts"
LOGS = f"{RESULTS}/logs"

# all cores that Snakemake was given; on a cluster, where it was given none, nothing else runs beside a job
CORES = None if workflow.remote_exec else workflow.resource_settings.cores
MACHINE = CORES or config["training"]["threads"]
ENVIRONMENT = "../envs/masa.yaml"  # only with --sdm conda

# configuration files of the command line, as the commands on the report's page name them
OVERLAYS = [
    os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    for path in workflow.overwrite_configfiles
]

TABLES = artefacts.table_names(config)
FIGURES = list(experiments.active(config, "figures"))

LACKING = {
    name: said
    for kind in ("tables", "figures")
    for name, said in artefacts.without_runs(config, kind).items()
}


def refusing(said):
    """An input function that says why there is nothing to be made."""

    def refuse(wildcards):
        raise WorkflowError(said)

    return refuse


# runs of vision are evaluated by a rule of their own
VISION = "|".join(re.escape(n) for n, size in config["vision_scales"].items() if size)


wildcard_constraints:
    run="[A-Za-z0-9._-]+/[A-Za-z0-9._-]+/seed[0-9]+",
    vision_run=f"({VISION})/[A-Za-z0-9._-]+/seed[0-9]+",
    language_run=f"(?!({VISION})/)[A-Za-z0-9._-]+/[A-Za-z0-9._-]+/seed[0-9]+",
    scale="[A-Za-z0-9._-]+",
    model="[A-Za-z0-9._-]+",
    name="[A-Za-z0-9._-]+",


def as_json(data):
    """A parameter as one stable line: the same meaning gives the same text, so nothing reruns for nothing."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False)


def meaning(*modules):
    """Fingerprint of the code of a job; it changes with what the code does, not with a comment."""
    return fingerprint(*modules)


@functools.cache
def spec_of(run):
    return experiments.run_spec(config, *experiments.parse_run(run))


def run_spec(wildcards):
    return as_json(spec_of(wildcards.run))


def kind_of(run):
    """What kind of model a run trains, which says what data and which code it needs."""
    return experiments.kind_of(config, run.split("/")[0])


# what a share of a GPU means here, said once and by the call that starts the jobs
if not workflow.remote_exec and (
    said := shares.note(
        config,
        set(workflow.global_resources),
        cluster=workflow.resource_settings.nodes is not None,
    )
):
    print(said, file=sys.stderr)


RESOURCES = ("mem_mb", "runtime")
ACROSS_NODES = ("nodes", "tasks", "tasks_per_gpu", "mpi")
ON_GPU = (
    "pretrain",
    "evaluate",
    "evaluate_vision",
    "calibrate",
    "compress",
    "time_methods",
)


def recipes():
    """The recipe of all trainings, and what scales change of it."""
    own = (size.get("training") or {} for size in experiments.sizes(config).values())
    return [config["training"], *own]


def asks_for(kind):
    """Resources of a rule's jobs: what the cost model says of each, and GPUs where the configuration plans with them.

    ``gpu`` is whole GPUs, which clusters give out; ``gpu_percent`` is what a job leases on one machine, 100 a GPU.
    Snakemake asks each function here for each job, so there are none of what no job of the rule needs.
    """

    def one(key):
        return lambda wildcards, attempt: job_resources(
            kind, "/".join(wildcards), attempt
        )[key]

    keys = [*RESOURCES]
    if kind in ON_GPU and config["plan"]["device"] != "cpu":
        keys.append("gpu")
    if kind == "pretrain" and any(recipe.get("nodes", 1) > 1 for recipe in recipes()):
        keys += ACROSS_NODES
    leased = {"gpu_percent": 100} if kind in ON_GPU else {}
    if leased and (
        config["plan"].get("gpus")
        or kind == "pretrain"
        and any(recipe.get("processes_per_node", 1) > 1 for recipe in recipes())
    ):
        keys.append("gpu_percent")
    return {"gpu": 0} | leased | {key: one(key) for key in keys}


PRIORITIES = order.priorities(config)


def place_of(kind):
    """The priority of a rule's jobs."""
    return lambda wildcards: PRIORITIES.get((kind, "/".join(wildcards)), 0)


def progress_of(workflow):
    """Lines on how far the jobs of this call are."""
    jobs = [
        (job.rule.name, "/".join(job.wildcards)) for job in workflow.dag.needrun_jobs()
    ]
    jobs = [name for name in jobs if name in PRIORITIES]
    capacity = workflow.resource_settings.nodes or CORES or 1
    return progress.Progress(cost.Plan(config), jobs, Path(LOGS), capacity, PRIORITIES)


@functools.cache
def job_resources(kind, name, attempt):
    """What one job asks for; a resource of None is not asked for."""
    found = dict.fromkeys(ACROSS_NODES)
    found |= cost.resources(config, kind, name, attempt)
    nodes, processes = launch.layout(spec_of(name)) if kind == "pretrain" else (1, 1)
    if nodes > 1:
        # no srun around the job: it starts one itself, with a task on each node
        found |= {"nodes": nodes, "tasks": nodes, "tasks_per_gpu": 0, "mpi": "srun"}
    hundredths = shares.hundredths(config, kind, name, processes)
    return found | {"gpu": nodes * processes, "gpu_percent": hundredths}


def threads_of(run):
    return spec_of(run)["training"]["threads"]


def local_files(*given):
    """Local files among some sources: an edit of one of them is noticed. Downloads are pinned instead."""
    local = [s for s in given if s and s.startswith(("file:", "mirror:"))]
    return [
        str(p)
        for s in local
        for p in sources.local_files(sources.parse(s), settings.mirror(config))
    ]


def corpus_files():
    """Local files that the corpus is read from."""
    corpus = config["data"]["corpus"]
    try:
        return local_files(corpus["source"], corpus.get("validation_source"))
    except MasaError as error:
        raise WorkflowError(f"data.corpus: {error}") from None


def benchmark_files():
    """Files of the mirror that task data may be read from; a task that it lacks is reported later."""
    spec = inputs.benchmarks_spec(config)
    if not spec["mirror"]:
        return []
    return [
        str(path) for path in benchmarks.mirror_files(spec["tasks"], spec["mirror"])
    ]


def local_text_files(name):
    """Local files that a text is read from; none where an optional one cannot be had."""
    text = config["texts"][name]
    try:
        return local_files(text["source"])
    except MasaError as error:
        if text.get("optional"):
            return []
        raise WorkflowError(f"texts.{name}: {error}") from None


def local_model_files(name):
    """Local files of a pretrained model."""
    source = config["pretrained"][name]["source"]
    if not source.startswith(("file:", "mirror:")):
        return []
    try:
        return local_files(source if source.endswith(".gguf") else f"{source}/*")
    except MasaError as error:
        raise WorkflowError(f"pretrained.{name}: {error}") from None


def calibration_of(wildcards):
    """The statistics that a compression needs, if any."""
    name = compressions.calibration_of(config, f"{wildcards.model}/{wildcards.name}")
    folder = f"{RESULTS}/compression/{wildcards.model}/calibrations"
    return [f"{folder}/{name}/calibration.json"] if name else []


def data_of(run):
    """The manifest of what a run is trained on."""
    scale, kind = run.split("/")[0], kind_of(run)
    name = config["vision_scales"][scale]["data"] if kind.resolve else scale
    return f"{DATA}/{kind.data}/{name}/manifest.json"


def local_image_files(section, name):
    """Local files of a data set of vision, or the folders that stand for many."""
    source = config[section][name].get("source")
    if not source or not source.startswith(("file:", "mirror:")):
        return []
    if section == "boxes":  # COCO's annotations stand for its hundred thousand images
        try:
            return local_files(f"{source}/annotations/*.json")
        except MasaError:
            pass  # then it is Parquet
    try:
        root = sources.local_folder(sources.parse(source), settings.mirror(config))
    except MasaError as error:
        raise WorkflowError(f"{section}.{name}: {error}") from None
    return [str(path) for path in image_sets.standing_for(root)]


def calibration_text_of(wildcards):
    """The text of those statistics."""
    name = compressions.calibration_of(config, f"{wildcards.model}/{wildcards.name}")
    return [f"{DATA}/texts/{config['calibrations'][name]['text']}.json"] if name else []


# what artefacts.OWN_TABLES are made from
OWN_INPUTS = {
    "runs": lambda: expand(
        f"{RESULTS}/evaluations/{{run}}/metrics.json", run=experiments.all_runs(config)
    ),
    "metrics": lambda: expand(
        f"{RESULTS}/runs/{{run}}/manifest.json", run=experiments.all_runs(config)
    ),
    "throughput": lambda: expand(
        f"{RESULTS}/throughput/{{scale}}.json", scale=config["throughput"]["scales"]
    ),
    "parameters": lambda: [f"{RESULTS}/parameters.json"],
    "claims": lambda: expand(
        f"{RESULTS}/{{record}}",
        record=claims.files(artefacts.table_spec(config, "claims")),
    ),
    "power": lambda: [
        f"{RESULTS}/runs/{run}/manifest.json"
        for scale in artefacts.table_spec(config, "power")
        for runs in scale["runs"].values()
        for run in runs
    ],
}


def table_inputs(wildcards):
    """What a table is made from."""
    if wildcards.name in OWN_INPUTS:
        return OWN_INPUTS[wildcards.name]()
    return made_from(config["tables"][wildcards.name])


def made_from(artefact):
    """What a table or figure is made from: its evaluations, and the paper's numbers beside them."""
    paper = [artefact["paper"]["file"]] if "paper" in artefact else []
    return evaluations_of(artefact) + paper


def evaluations_of(artefact):
    """Metrics files, or manifests of compressions."""
    if compressions.is_compression(config, artefact):
        return expand(
            f"{RESULTS}/compression/{{run}}/manifest.json",
            run=compressions.artefact_runs(config, artefact),
        )
    return expand(
        f"{RESULTS}/evaluations/{{run}}/metrics.json",
        run=experiments.artefact_runs(config, artefact),
    )
