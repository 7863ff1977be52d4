"""Where the time of a whole workflow goes, and how much of the machine it uses.

    python benchmarks/default_run.py                                     # the default run, as `make results` makes it
    python benchmarks/default_run.py --configfile config/smoke.yaml
    python benchmarks/default_run.py --against REVISION                  # that build's run and this one's
    python benchmarks/default_run.py --finished                          # of logs that are there: nothing is run

Run it in a fresh clone. What is made already costs nothing: then the numbers are of the rest. Core utilisation is the
processor time of everything that the workflow started, a core and second of the clock; memory is the largest sum of
what its processes held at one moment, shared pages once. The rest is read from the jobs' logs and the runs' manifests:
seconds of jobs by rule, and what a training spends outside its steps. ``--against`` clones both builds into a temporary
folder and leaves nothing there; both run with this interpreter's packages and the downloads of ``cache``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
from harness import Row, parser, save

from masa.study.cost import logs

TRAINING = "pretrain"
EVERY = 0.5  # seconds between two looks at the processes


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--configfile", help="an overlay, as Snakemake takes it")
    made.add_argument("--results", type=Path, default=Path("results"), help="where they are (default results)")
    made.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    made.add_argument("--against", metavar="REVISION", help="another build, whose run is made first")
    made.add_argument("--finished", action="store_true", help="only read the logs that are there")
    given = made.parse_args()
    if given.against:
        rows = against(given.against, given.cores, given.configfile, given.results)
    else:
        rows = [] if given.finished else running(Path.cwd(), given.cores, given.configfile, given.results).rows()
        rows = [replace(row, what=f"a whole run: {row.what}") for row in [*rows, *by_rule(given.results)]]
    settings = {"cores": given.cores, "configfile": given.configfile, "finished": given.finished}
    return save("default_run", rows, settings | {"against": given.against}, given.out)


@dataclass(frozen=True)
class Run:
    """What one workflow took; ``first`` is when Table 1 stood, in seconds since its start."""

    wall: float
    busy: float
    first: float | None
    memory: int
    cores: int

    def rows(self) -> list[Row]:
        found = [
            Row("wall time", self.wall / 60, "min"),
            Row("core utilisation", self.busy / self.wall / self.cores, "of the cores", target=">= 0.90"),
            Row("peak memory", self.memory / 2**30, "GiB"),
        ]
        if self.first is not None:
            found.append(Row("Table 1 there after", self.first / 60, "min"))
        return found


def against(revision: str, cores: int, configfile: str | None, results: Path) -> list[Row]:
    """Both builds' runs, the other one's first, and their ratios."""
    known = subprocess.run(["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"], capture_output=True)
    if known.returncode:
        raise SystemExit(f"--against {revision}: this clone has no such revision; name a commit, branch or tag of it")
    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, commit in (("before", revision), ("this build", "HEAD")):
            tree = Path(folder) / name.replace(" ", "-")
            subprocess.run(["git", "clone", "--quiet", ".", str(tree)], check=True)
            subprocess.run(["git", "checkout", "--quiet", commit], cwd=tree, check=True)
            if Path("cache").is_dir():
                (tree / "cache").symlink_to(Path("cache").resolve())
            runs[name] = running(tree, cores, configfile, results)
    before, now = runs["before"], runs["this build"]
    rows = [replace(row, what=f"{name}: {row.what}", target="") for name, run in runs.items() for row in run.rows()]
    rows.append(Row("wall time, by that of before", now.wall / before.wall, target="<= 0.60"))
    if now.first is not None:
        rows.append(Row("Table 1 there, by the whole of before", now.first / before.wall, target="<= 0.20"))
    return [*rows, Row("peak memory, by that of before", now.memory / before.memory, target="<= 1.00")]


def running(tree: Path, cores: int, configfile: str | None, results: Path) -> Run:
    """A Snakemake that makes all tables and figures of a checkout, watched."""
    command = ["snakemake", "results/tables", "results/figures", "--cores", str(cores), "--quiet", "rules"]
    if configfile:
        command = [*command[:1], *command[3:], "--configfile", configfile]
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"PATH": f"{_program(tree, Path(folder))}:{os.environ['PATH']}"}
        environment["PYTHONPATH"] = str(tree)
        started, clock = time.time(), time.perf_counter()
        process = subprocess.Popen(command, cwd=tree, env=environment)
        watch = Watch(tree.resolve())
        watch.start()
        status = process.wait()
        wall = time.perf_counter() - clock
        watch.stop()
    if status:
        raise SystemExit(f"the workflow of {tree} ended with status {status}")
    table = next(iter((tree / results).rglob("parts/tables/table1.csv")), None)
    first = table.stat().st_mtime - started if table else None
    return Run(wall, sum(watch.seconds.values()), first, watch.peak, cores)


def _program(tree: Path, folder: Path) -> Path:
    """A folder with the ``masa`` of a checkout, which need not be the one that is installed."""
    module, name = tomllib.loads((tree / "pyproject.toml").read_text())["project"]["scripts"]["masa"].split(":")
    program = folder / "masa"
    program.write_text(f"#!{sys.executable}\nimport sys\nfrom {module} import {name}\nsys.exit({name}())\n")
    program.chmod(0o755)
    return folder


class Watch(threading.Thread):
    """Memory and processor time of all processes that work in a folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak = folder, 0
        self.seconds: dict[tuple[int, float], float] = {}
        self._stopped = threading.Event()

    def stop(self) -> None:
        self._stopped.set()
        self.join()

    def run(self) -> None:
        while not self._stopped.wait(EVERY):
            held = 0
            for process in psutil.process_iter():
                try:
                    if process.pid == os.getpid() or not Path(process.cwd()).is_relative_to(self.folder):
                        continue
                    held += process.memory_full_info().pss
                    times = process.cpu_times()
                    self.seconds[process.pid, process.create_time()] = times.user + times.system
                except (psutil.Error, OSError):  # it has just ended
                    continue
            self.peak = max(self.peak, held)


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
