"""Verbs that look at the configuration and at what it will cost."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from masa.cli.base import Verbs
from masa.errors import MasaError
from masa.study import config, experiments


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    v = verbs.add(
        "plan",
        _plan,
        "estimate hours, memory and disk of every run before it is started",
        "masa plan --configfile config/paper.yaml --device h100",
    )
    v.add_argument("--device", help="cpu, h100, a100, rtx4090, …; default: plan.device of the configuration")
    v.add_argument("--cores", type=int, help="CPU cores that share the work (default: all)")
    v.add_argument("--typical", action="store_true", help="a typical core instead of ten seconds of measuring this one")
    which = v.add_mutually_exclusive_group()
    which.add_argument("--measured", action="store_true", help="beside what the jobs of a finished workflow took")
    which.add_argument("--artefacts", action="store_true", help="what each table and figure costs by itself")
    v.add_argument("--json", action="store_true", help="print all numbers as JSON")

    v = verbs.add(
        "config", _config, "check the configuration and list its runs", "masa config --configfile config/paper.yaml"
    )
    v.add_argument("--describe", action="store_true", help="print every key with type, default and effect")
    v.add_argument("--json", action="store_true", help="print the merged configuration")
    v.add_argument("--schema", action="store_true", help="print the JSON schema of configuration files, for editors")


def _plan(given: argparse.Namespace) -> None:
    from masa.study.cost import Plan, device, report
    from masa.study.sections.evaluation import Plan as PlanSection

    c = config.load(given.configfile)
    on = device(given.device or PlanSection.filled(c.get("plan") or {}, "plan")["device"])
    cores = (os.cpu_count() or 1) if given.cores is None else given.cores
    if cores < 1:
        raise MasaError(f"--cores = {cores} must be at least 1.")
    if not on.gpu and not given.typical:
        from masa.study.cost import measure

        busy = os.getloadavg()[0]
        warning = f" (busy with a load of {busy:.1f}: jobs take longer while it is)" if busy > 0.5 * cores else ""
        print(f"measuring this machine{warning} …", file=sys.stderr)
        on = measure.calibrate(processes=cores)
    plan = Plan(c, on, mirrored=bool(config.mirror(c)))
    folder = Path(c["results"]) / "logs"
    if given.artefacts:
        from masa.study.cost import artefacts

        print((artefacts.as_json if given.json else artefacts.text)(plan, cores, folder))
    elif given.measured:
        from masa.study.cost import logs

        print(logs.compare(plan, folder, as_json=given.json))
    else:
        print(report.as_json(plan, cores) if given.json else report.text(plan, cores))


def _config(given: argparse.Namespace) -> None:
    if given.describe:
        print(config.describe(), end="")
        return
    if given.schema:
        import yaml

        print(yaml.safe_dump(config.schema(), sort_keys=False, allow_unicode=True, width=120), end="")
        return
    c = config.load(given.configfile)
    if given.json:
        print(json.dumps(c, indent=2, ensure_ascii=False))
        return
    for run_id in (runs := experiments.all_runs(c)):
        recipe = experiments.run_spec(c, *experiments.parse_run(run_id))["training"]
        length = f"{recipe['steps']:,} steps" if recipe["steps"] else f"{recipe['epochs']:g} epochs"
        batch = recipe["batch_size"]
        if "context" in recipe:
            amount = f"{recipe['steps'] * batch * recipe['context']:,} tokens"
        else:
            amount = f"batches of {batch:,} images"
        print(f"{run_id}\t{length}\t{amount}")
    for name in (compressions := experiments.all_compressions(c)):
        print(f"{name}\tcompression")
    print(
        f"the configuration is right: {len(runs)} runs of training, {len(compressions)} compressions", file=sys.stderr
    )
