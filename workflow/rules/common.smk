# Helpers of all rules. Everything here is cheap: no torch, no file is written.

import json
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

sys.path.insert(0, str(Path(workflow.basedir).parent))

from masa import cli
from masa import config as settings
from masa import sources
from masa.errors import MasaError
from masa.fingerprint import fingerprint

try:
    settings.check(config)
except MasaError as error:
    raise WorkflowError(f"Configuration: {error}") from None

RESULTS = config["results"]
DATA = f"{RESULTS}/data"
PARTS = f"{RESULTS}/parts"
LOGS = f"{RESULTS}/logs"

TABLES = ["runs", "throughput", "parameters", *settings.active(config, "tables")]
FIGURES = list(settings.active(config, "figures"))


wildcard_constraints:
    run="[A-Za-z0-9._-]+/[A-Za-z0-9._-]+/seed[0-9]+",
    scale="[A-Za-z0-9._-]+",
    name="[A-Za-z0-9._-]+",


def as_json(data):
    """A parameter as one stable line: the same meaning gives the same text, so nothing reruns for nothing."""
    return json.dumps(data, sort_keys=True, ensure_ascii=False)


def meaning(*modules):
    """Fingerprint of the code that a rule runs: it changes with what the code does, not with a comment."""
    return fingerprint(*(f"masa.{module}" for module in modules))


def run_spec(wildcards):
    return as_json(settings.run_spec(config, *settings.parse_run(wildcards.run)))


def training_threads(wildcards):
    return settings.run_spec(config, *settings.parse_run(wildcards.run))["training"][
        "threads"
    ]


def corpus_files():
    """Local files that the corpus is read from: an edit of one of them is noticed. Downloads are pinned instead."""
    corpus = config["data"]["corpus"]
    local = [
        s
        for s in (corpus["source"], corpus.get("validation_source"))
        if s and s.startswith(("file:", "mirror:"))
    ]
    try:
        return [
            str(p)
            for s in local
            for p in sources.local_files(sources.parse(s), settings.mirror(config))
        ]
    except MasaError as error:
        raise WorkflowError(f"data.corpus: {error}") from None


def tokens_of(wildcards):
    """The token manifest of a run's scale."""
    return f"{DATA}/tokens/{wildcards.run.split('/')[0]}/manifest.json"


def evaluations_of(artefact):
    """Metrics files of a table or figure."""
    return expand(
        f"{RESULTS}/evaluations/{{run}}/metrics.json",
        run=settings.artefact_runs(config, artefact),
    )
