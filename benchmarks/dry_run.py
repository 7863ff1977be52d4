"""Seconds that Snakemake takes over the paper's whole grid: a dry run of all its jobs, and a call with nothing to do.

    python benchmarks/dry_run.py [--rounds 3]

The second is of the smoke configuration's 64 jobs, whose results are made first if they are not there (a few minutes).
Beside them the start-up of Snakemake alone.
"""

import argparse
import re
import statistics
import subprocess
import time

SMOKE = ["--configfile", "config/smoke.yaml"]
CALLS = {
    "snakemake --version": ["--version"],
    "dry run of config/paper.yaml": ["-n", "results/tables", "results/figures", "--configfile", "config/paper.yaml"],
    "dry run of config/paper.yaml, all of it forced": [
        "-n", "--forceall", "results/tables", "results/figures", "--configfile", "config/paper.yaml",
    ],
    "nothing to do, config/smoke.yaml": ["-n", *SMOKE],
}  # fmt: skip


def call(arguments):
    start = time.perf_counter()
    done = subprocess.run(["snakemake", "--cores", "2", *arguments], capture_output=True, text=True, check=True)
    return time.perf_counter() - start, done.stdout + done.stderr


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is printed (default 3)")
    rounds = parser.parse_args().rounds
    call(SMOKE)
    for name, arguments in CALLS.items():
        found = [call(arguments) for _ in range(rounds)]
        jobs = re.search(r"^total\s+(\d+)", found[0][1], re.M)
        count = f"{jobs[1]:>5} jobs" if jobs else " " * 10
        print(f"{statistics.median(seconds for seconds, _ in found):6.2f} s {count}  {name}")


if __name__ == "__main__":
    main()
