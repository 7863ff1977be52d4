"""Which jobs go first: those behind the artefacts that a reader wants to see first, then the longest."""

from __future__ import annotations

from masa.study.cost.jobs import Name
from masa.study.cost.workflow import behind, needed
from masa.study.experiments import Config

RULES = {"calibrate": 20, "pretrain": 10, "compress": 5}
"""Among equals: what others wait for, then the longest; 0 for all other rules."""

STEP = 100
"""Between the jobs of one artefact of ``first`` and those of the next; more than any rule has."""


def priorities(config: Config) -> dict[Name, int]:
    """(rule, name) of each job of the workflow -> its priority, higher ones first."""
    waits = dict(needed(config))
    found = {name: RULES.get(name[0], 0) for name in waits}
    first = [name for name in config.get("first", []) if config["tables"].get(name) or config["figures"].get(name)]
    for place, artefact in enumerate(reversed(first), 1):
        rule = "table" if config["tables"].get(artefact) else "figure"
        for name in behind((rule, artefact), waits):
            found[name] = STEP * place + RULES.get(name[0], 0)
    return found
