"""Seconds that the workflow itself takes: dry runs, calls with nothing to do, what a job costs beyond its own work.

    python benchmarks/workflow.py [--quick] [--rounds 3] [--out DIR]

All of it is wall time, medians of rounds in each of which every way is called once. It needs no training: finished
workflows are made in a temporary folder, of empty files whose times ``snakemake --touch`` sets, and for the tables of
the smoke configuration, which are really made, of what results/smoke has. Make that first if it is not there:

    snakemake --cores all --configfile config/smoke.yaml

* dry run: of all tables and figures of config/paper.yaml, nothing of which is there
* nothing to do: ``snakemake results/tables`` of the smoke and of the default configuration, everything made
* a job: six tables forced, one after another, by one Snakemake, less the same six commands by hand, over six: what
  Snakemake adds, its own start shared among the six; and without that start, as in a workflow of many jobs. What
  `masa` adds stands in both, so it is measured beside: the start of `masa --help` less that of Python alone
* imports: what the Snakefile imports of masa, in a Python that has just started, and which heavy modules come with it

Bytecode, and what masa.runs.fingerprint keeps beside it, is written in a round before that does not count.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from harness import Row, in_turn, parser, save

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}
SMOKE, PAPER = (["--configfile", f"config/{name}.yaml"] for name in ("smoke", "paper"))
TABLES = ("table1", "table2", "table3", "vision", "beyond", "coefficients")
SMALL = 1_000_000
"""Bytes of the largest file of results/smoke that is copied: no table is made of weights or statistics."""

HEAVY = ("torch", "transformers", "pandas", "numpy", "scipy", "matplotlib", "datasets")
IMPORT = """
import pathlib, re, sys, time
files = ["workflow/Snakefile", *pathlib.Path("workflow/rules").glob("*.smk")]
text = "\\n".join(pathlib.Path(file).read_text(encoding="utf-8") for file in files)
code = "\\n".join(re.findall(r"^(?:from|import) masa\\b.*", text, re.M))
assert code
started = time.perf_counter()
exec(code)
print(time.perf_counter() - started, *(name for name in sys.argv[1:] if name in sys.modules))
"""


def call(folder: Path, *arguments: str) -> str:
    """One command in a folder; what it printed."""
    done = subprocess.run(arguments, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)[:200]} has failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def snakemake(folder: Path, *arguments: str, cores: int = 2) -> str:
    return call(folder, "snakemake", "--cores", str(cores), *arguments)


def nothing(folder: Path, *arguments: str) -> None:
    """A call that must find everything made."""
    found = snakemake(folder, *arguments)
    if "Nothing to be done" not in found:
        raise SystemExit(f"{' '.join(arguments)}: there was something to do:\n{found[-3000:]}")


def project(folder: Path) -> Path:
    """A copy of the workflow, without results: an edit meanwhile would make jobs run again."""
    folder.mkdir()
    for name in ("masa", "workflow", "config"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def finish(folder: Path, *arguments: str) -> None:
    """Make every file that is not there, empty, and let Snakemake take all of them for made."""
    for line in snakemake(folder, "--summary", *arguments).splitlines():
        if line.startswith("results/"):
            file = folder / line.split("\t")[0]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch() if file.suffix else file.mkdir(exist_ok=True)
    snakemake(folder, "--touch", *arguments)
    nothing(folder, "-n", *arguments)


def smoke(folder: Path) -> Path:
    """The finished smoke configuration, with the real results that its tables are made of."""
    made = ROOT / "results" / "smoke"
    if not all((made / "parts" / "tables" / f"{name}.csv").is_file() for name in TABLES):
        raise SystemExit(f"{made} is not finished: snakemake --cores all --configfile config/smoke.yaml")

    def large(where: str, names: Sequence[str]) -> list[str]:
        files = (Path(where, name) for name in names)
        return [file.name for file in files if file.is_file() and file.stat().st_size > SMALL]

    shutil.copytree(made, project(folder) / "results" / "smoke", ignore=large)
    finish(folder, "results/smoke/tables", *SMOKE)
    return folder


def main() -> int:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3, help="of which the median is printed (default 3)")
    given = arguments.parse_args()
    rounds = 1 if given.quick else given.rounds
    with tempfile.TemporaryDirectory() as temporary:
        paper, tiny, default = project(Path(temporary, "paper")), smoke(Path(temporary, "smoke")), None
        if not given.quick:
            finish(default := project(Path(temporary, "default")), "results/tables")
        rows = measure(paper, tiny, default, rounds)
    return save("workflow", rows, {"rounds": rounds, "cores": os.cpu_count(), "tables": list(TABLES)}, given.out)


def measure(paper: Path, tiny: Path, default: Path | None, rounds: int) -> list[Row]:
    """All rows; without the default configuration in a quick run."""
    whole = ["-n", "results/tables", "results/figures", *PAPER]
    files = [f"results/smoke/parts/tables/{name}.csv" for name in TABLES]
    forced = [*files, "--force", "--printshellcmds", *SMOKE]
    jobs = int(re.search(r"^total\s+(\d+)", snakemake(paper, *whole), re.M)[1])
    commands = re.findall(r"^ *(?:Shell command: *)?(masa tables .*)$", snakemake(tiny, "-n", *forced), re.M)
    if len(commands) != len(TABLES):
        raise SystemExit(f"{len(commands)} shell commands found of {len(TABLES)} tables")
    imports: list[tuple[float, list[str]]] = []

    def by_hand() -> None:
        for command in commands:
            call(tiny, "bash", "-c", f"set -euo pipefail; {command}")

    def imported() -> None:
        taken, *heavy = call(paper, sys.executable, "-c", IMPORT, *HEAVY).split()
        imports.append((float(taken), heavy))

    ways = {
        "snakemake --version": lambda: call(paper, "snakemake", "--version"),
        "dry run": lambda: snakemake(paper, *whole),
        "nothing, smoke": lambda: nothing(tiny, "results/smoke/tables", *SMOKE),
        "python": lambda: call(paper, sys.executable, "-c", "pass"),
        "masa": lambda: call(paper, "masa", "--help"),
        "nothing, tables": lambda: nothing(tiny, *files, *SMOKE),
        "jobs": lambda: snakemake(tiny, *forced, cores=1),
        "by hand": by_hand,
        "imports": imported,
    }
    if default is not None:
        ways["nothing, default"] = lambda: nothing(default, "results/tables")
    seconds = in_turn("workflow", ways, rounds, clock=time.perf_counter).seconds

    def median(of: Callable[..., float], *names: str) -> float:
        return statistics.median(of(*values) for values in zip(*(seconds[name] for name in names), strict=True))

    def one(name: str) -> float:
        return statistics.median(seconds[name])

    count = len(TABLES)
    rows = [
        Row("start of Snakemake alone (--version)", one("snakemake --version"), "s"),
        Row(f"dry run of config/paper.yaml, {jobs} jobs", one("dry run"), "s", target="<= 3"),
        Row("nothing to do: results/tables of config/smoke.yaml", one("nothing, smoke"), "s", target="<= 4"),
    ]
    if default is not None:
        rows.append(Row("nothing to do: results/tables by default", one("nothing, default"), "s", target="<= 4"))
    started = median(lambda masa, python: masa - python, "masa", "python")
    shared = median(lambda jobs, hand: (jobs - hand) / count, "jobs", "by hand")
    alone = median(lambda jobs, hand, none: (jobs - hand - none) / count, "jobs", "by hand", "nothing, tables")
    return [
        *rows,
        Row("a table by hand, most of it the import of pandas", one("by hand") / count, "s"),
        Row("what masa adds to a job", started, "s"),
        Row("what Snakemake adds to a job, without its own start", alone, "s"),
        Row(f"what Snakemake adds to a job, its own start shared among {count}", shared, "s"),
        Row("what Snakemake (start shared) and masa add to a job", shared + started, "s", target="<= 0.5"),
        Row("imports of masa by the Snakefile", statistics.median(t for t, _ in imports[1:]), "s", target="<= 0.3"),
        Row("heavy modules among them", len(imports[-1][1]), "modules", target="<= 0"),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
