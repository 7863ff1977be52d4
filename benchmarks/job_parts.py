"""Where the time of one job of each kind goes: imports, data, steps, scores, saving, writing.

    python benchmarks/job_parts.py                                   # of a finished default run in results
    python benchmarks/job_parts.py --configfile config/smoke.yaml    # of a finished smoke run

It repeats jobs of a workflow that has run, one of each kind, each in a fresh process that imports what it needs, and
with their outputs in a temporary folder. Time in a function below counts for its part and for no other that it is
called from; what is left, beginning and end of the process among it, is "other". Snakemake is asked for the commands,
so that they are those of the workflow.
"""

from __future__ import annotations

import builtins
import functools
import importlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from harness import Row, parser, save

KINDS = ("pretrain", "train-vit", "evaluate", "calibrate", "sweep", "tables", "figures", "tokenize", "throughput")
PARTS = {
    "data": (
        "masa.data.tokens:PackedTokens.__getitem__",
        "masa.data.tokens:validation_tokens",
        "masa.data.tokenize:tokenize",
        "masa.models.pretrained:load_pretrained",
        "masa.compression.calibration.statistics:Calibration.load",
        "lm_eval.tasks:TaskManager.__init__",
        "lm_eval.tasks:get_task_dict",
        "lm_eval.evaluator:get_task_dict",
    ),
    "steps": ("masa.training.watch:Trainer.training_step",),
    "compression": ("masa.compression.api:compress", "masa.compression.calibration.calibrate:calibrate"),
    "healing": ("masa.compression.healing.heal:heal",),
    "scores": (
        "masa.evaluation.perplexity:held_out_loss",
        "masa.compression.scoring:perplexity",
        "lm_eval.evaluator:evaluate",
        "masa.evaluation.analysis:describe",
    ),
    "saving": ("masa.sharing.checkpoint:save", "transformers.trainer:Trainer._save_checkpoint"),
    "writing": (
        "masa.runs.run:write_json",
        "masa.runs.run:provenance",
        "masa.report.tables:write",
        "masa.report.figures:write",
    ),
}
"""Part -> functions whose time it is."""


class Clock:
    """Seconds of each part; a part that is entered within another interrupts it."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.stack: list[str] = ["other"]
        self.since = time.perf_counter()

    def turn(self) -> None:
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def during(self, part: str, call: Any) -> Any:
        """``call`` with its time counted for a part."""

        @functools.wraps(call)
        def timed(*arguments: Any, **named: Any) -> Any:
            self.turn()
            self.stack.append(part)
            try:
                return call(*arguments, **named)
            finally:
                self.turn()
                self.stack.pop()

        return timed


def child(out: Path, arguments: list[str]) -> int:
    """Run ``masa ARGUMENTS`` here and write the seconds of each part."""
    clock = Clock()
    open_ = {name: part for part, names in PARTS.items() for name in names}
    imports, again = clock.during("imports", builtins.__import__), builtins.__import__

    def watched(name: str, *rest: Any, **named: Any) -> Any:
        if clock.stack[-1] == "imports":
            return again(name, *rest, **named)
        found = imports(name, *rest, **named)
        _patch(clock, open_)
        return found

    builtins.__import__ = watched
    importlib.import_module = clock.during("imports", importlib.import_module)
    from masa.cli.main import main

    status = main(arguments)
    clock.turn()
    out.write_text(json.dumps(clock.seconds))
    return status


def _patch(clock: Clock, open_: dict[str, str]) -> None:
    """Time those functions that have been imported since, wherever masa or lm-eval holds them."""
    for name, part in list(open_.items()):
        module, _, path = name.partition(":")
        holder = sys.modules.get(module)
        *outer, last = path.split(".")
        for step in outer:
            holder = getattr(holder, step, None)
        before = getattr(holder, last, None) if holder is not None else None
        if before is None:
            continue
        del open_[name]
        timed = clock.during(part, before)
        setattr(holder, last, timed)
        for other in [m for n, m in sys.modules.items() if n.split(".")[0] in ("masa", "lm_eval")]:
            for key, value in list(vars(other).items()):
                if value is before:
                    setattr(other, key, timed)


def commands(configfile: str | None) -> dict[str, list[str]]:
    """Verb -> the arguments of ``masa`` of its first job."""
    command = ["snakemake", "--dry-run", "--forceall", "--printshellcmds", "--cores", "1"]
    command += ["--configfile", configfile] if configfile else []
    dry = subprocess.run(command, capture_output=True, text=True, check=False)
    if dry.returncode:
        raise SystemExit(f"the workflow cannot be planned: {(dry.stderr + dry.stdout).strip().splitlines()[-1]}")
    found: dict[str, list[str]] = {}
    for line in re.findall(r"^Shell command: masa (.*)$", dry.stdout, re.M):
        arguments = shlex.split(line)
        found.setdefault(arguments[0], arguments)
    return {verb: arguments for verb, arguments in found.items() if verb in KINDS}


def parts_of(kind: str, arguments: list[str], folder: Path) -> dict[str, float]:
    """Seconds of each part of one job whose output goes to a temporary folder."""
    words = [w for w in arguments if w not in (">", "/dev/null")]
    for option in ("--out", "--log"):
        if option in words:
            words[words.index(option) + 1] = str(folder / kind / option.strip("-"))
    out = folder / f"{kind}.json"
    started = time.perf_counter()
    subprocess.run([sys.executable, __file__, "--child", str(out), *words], check=True)
    seconds = json.loads(out.read_text())
    return seconds | {"other": seconds["other"] + time.perf_counter() - started - sum(seconds.values())}


def main() -> int:
    if "--child" in sys.argv[:2]:
        return child(Path(sys.argv[2]), sys.argv[3:])
    made = parser(__doc__)
    made.add_argument("--configfile", help="an overlay, as Snakemake takes it")
    made.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    given = made.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, arguments in commands(given.configfile).items():
            if kind not in given.kinds:
                continue
            seconds = parts_of(kind, arguments, Path(folder))
            whole = sum(seconds.values())
            rows.append(Row(f"{kind}: whole", whole, "s"))
            rows += [
                Row(f"{kind}: {part}", s / whole, "of the seconds") for part, s in seconds.items() if s > 0.01 * whole
            ]
    return save("job_parts", rows, {"configfile": given.configfile}, given.out)


if __name__ == "__main__":
    sys.exit(main())
