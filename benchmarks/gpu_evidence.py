"""The evidence's runs on one GPU, as many as fit at once, until the time is up.

    python benchmarks/gpu_evidence.py --tokens FOLDER --prepare           # here: writes FOLDER/specs.json
    python benchmarks/gpu_evidence.py --tokens FOLDER --minutes 3 --out OUT.json [--at-once 10] [--methods vanilla ...]

Trains what config/evidence.yaml says at its scale d48 (`masa pretrain` would make the same), all methods of one seed
before the next seed, so that what is there when time is up can be compared in pairs. FOLDER is what `masa tokenize`
wrote, and --prepare puts the study's specs beside the tokens, since making them needs more packages than training does.
A run that is not done when time is up is not written. CPU and GPU runs are not to be mixed in one comparison: device
and dtype stand in the file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import count, islice
from pathlib import Path
from typing import Any

import torch

from masa.errors import MasaError, unknown
from masa.runs.run import provenance, read_json, write_json

METHODS = ("vanilla", "masa-qkvo", "masa-qkv", "repeat-all-over", "sequential", "low-rank", "gqa")
SCALE, SPECS = "d48", "specs.json"


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--tokens", type=Path, required=True, help="folder of packed tokens")
    made.add_argument("--methods", nargs="+", default=list(METHODS))
    made.add_argument("--at-once", type=int, default=10, help="runs side by side")
    made.add_argument("--seeds", type=int, help="at most; else as many as time allows")
    made.add_argument("--minutes", type=float, default=3.0)
    made.add_argument("--quick", action="store_true", help="a few steps of a small model")
    made.add_argument("--prepare", action="store_true", help=f"only write {SPECS}")
    made.add_argument("--out", type=Path, help="a JSON file, rewritten after every run")
    given = made.parse_args()
    if given.prepare:
        prepare(given.tokens)
        return 0
    if not given.out:
        made.error("--out is needed: a JSON file for what comes out")
    end = time.monotonic() + 60 * given.minutes
    specs = (spec_of(method, seed, given) for seed, method in in_order(given))
    result: dict[str, Any] = {"scale": SCALE, "provenance": provenance({}), "runs": {}}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(given.at_once, mp_context=context)
    with tempfile.TemporaryDirectory() as folder:
        waiting = {pool.submit(train, spec, given.tokens, Path(folder)): spec for spec in islice(specs, given.at_once)}
        while waiting and time.monotonic() < end:
            for done in as_completed(list(waiting)):
                spec = waiting.pop(done)
                result["runs"][spec["run"]] = done.result()
                write_json(given.out, result)
                if time.monotonic() < end and (following := next(specs, None)):
                    waiting[pool.submit(train, following, given.tokens, Path(folder))] = following
                break
        for process in list((pool._processes or {}).values()):
            process.terminate()  # those that are not done are of no use
        pool.shutdown(wait=False, cancel_futures=True)
    print(json.dumps({"runs done": len(result["runs"])}))
    return 0


def in_order(given: argparse.Namespace) -> Iterator[tuple[int, str]]:
    """(seed, method), all methods of a seed before the next seed."""
    seeds = range(given.seeds) if given.seeds else count()
    return ((seed, method) for seed in seeds for method in given.methods)


def prepare(tokens: Path) -> None:
    """Write the runs that the study would make of these tokens."""
    from masa.study import config, experiments

    settings = config.load([Path("config/evidence.yaml")])
    specs = {method: experiments.run_spec(settings, SCALE, method, 0) for method in METHODS}
    for spec in specs.values():
        spec["model"]["vocab_size"] = read_json(tokens / "manifest.json", "masa tokenize")["vocab_size"]
    write_json(tokens / SPECS, specs)


def spec_of(method: str, seed: int, given: argparse.Namespace) -> dict[str, Any]:
    """One run of another seed."""
    specs = read_json(given.tokens / SPECS, "benchmarks/gpu_evidence.py --prepare")
    if method not in specs:
        raise unknown("--methods: method", method, specs)
    spec = specs[method] | {"run": f"{SCALE}/{method}/seed{seed}", "seed": seed}
    if given.quick:
        spec["training"] |= {"steps": 2, "evaluations": 1, "batch_size": 2, "micro_batch_size": 2}
    return spec


def train(spec: dict[str, Any], tokens: Path, folder: Path) -> dict[str, Any]:
    """One run in a process of its own: its scores and speed."""
    from masa.training.language import pretrain

    out = folder / spec["run"]
    manifest = pretrain(spec, tokens, out)
    written = read_json(out / "provenance.json", "masa pretrain")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return manifest["training"] | {"device": device, "dtype": written["dtype"], "sha256": manifest["sha256"]}


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MasaError as error:
        raise SystemExit(str(error)) from None
