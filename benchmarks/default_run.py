"""Where the time of a whole workflow goes, and how much of the machine it uses.

    python benchmarks/default_run.py                                     # the default run, as `make results` makes it
    python benchmarks/default_run.py --configfile config/smoke.yaml
    python benchmarks/default_run.py --finished                          # of logs that are there: nothing is run

Run it in a fresh clone. What is made already costs nothing: then the numbers are of the rest. Core utilisation is the
processor time of Snakemake and everything that it started, a core and second of the clock. The rest is read from the
jobs' logs and the runs' manifests: seconds of jobs by rule, and what a training spends outside its steps (start-up,
evaluation, checkpoints, storing the model).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

from harness import Row, parser, save

from masa.study.cost import logs

TRAINING = "pretrain"


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--configfile", help="an overlay, as Snakemake takes it")
    made.add_argument("--results", type=Path, default=Path("results"), help="where they are (default results)")
    made.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--finished", action="store_true", help="only read the logs that are there")
    given = made.parse_args()
    rows = [] if given.finished else running(given.cores, given.configfile)
    rows = [replace(row, what=f"a whole run: {row.what}") for row in [*rows, *by_rule(given.results)]]
    settings = {"cores": given.cores, "configfile": given.configfile, "finished": given.finished}
    return save("default_run", rows, settings, given.out)


def running(cores: int, configfile: str | None) -> list[Row]:
    """Wall time and core utilisation of a Snakemake that makes all tables and figures."""
    command = ["snakemake", "results/tables", "results/figures", "--cores", str(cores), "--quiet", "rules"]
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command, *(["--configfile", configfile] if configfile else [])], check=True)
    wall = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return [
        Row("wall time", wall / 60, "min"),
        Row("core utilisation", busy / wall / cores, "of the cores", target=">= 0.90"),
    ]


def by_rule(results: Path) -> list[Row]:
    """Parts of all jobs' seconds, the longest rule first, and what trainings spend outside their steps."""
    seconds: dict[str, float] = defaultdict(float)
    for log in (results / "logs").rglob("*.log"):
        if took := logs.read(log):
            seconds[log.relative_to(results / "logs").parts[0].removesuffix(".log")] += took[0]
    if not seconds:
        raise SystemExit(f"no log in {results / 'logs'} says what its job took; run the workflow first")
    manifests = [json.loads(path.read_text()) for path in (results / "runs").rglob("manifest.json")]
    steps = sum(manifest["training"]["training_seconds"] for manifest in manifests)
    total = sum(seconds.values())
    rows = [
        Row("all jobs", total / 60, "min"),
        Row("outside training steps, of all jobs", 1 - steps / total, "of the seconds", target="<= 0.10"),
        Row("outside training steps, of trainings", 1 - steps / seconds[TRAINING], "of the seconds", target="<= 0.10"),
    ]
    for rule, took in sorted(seconds.items(), key=lambda item: -item[1]):
        rows.append(Row(f"rule {rule}", took / total, "of the seconds"))
    return rows


if __name__ == "__main__":
    sys.exit(main())
