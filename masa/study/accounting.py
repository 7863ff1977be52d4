"""Parameter counts of every scale and method, on models that take no memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.models import detector, language, timm_vit, yolos
from masa.runs import run
from masa.sharing.share import count_parameters
from masa.study import kinds


def build(spec: Mapping[str, Any]) -> nn.Module:
    """The model of a resolved run, of any kind."""
    if kinds.of(spec) is kinds.LANGUAGE:
        return language.build(spec["model"], spec["sharing"], spec["training"]["context"])
    family = detector if spec["model"]["family"] == yolos.FAMILY else timm_vit
    return family.build(spec["model"], spec["sharing"])


def count(specs: Sequence[Mapping[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Build each run's model on the meta device, count, and write a JSON list."""
    records = []
    for spec in specs:
        with torch.device("meta"):
            model = build(spec)
        scale, experiment, _ = spec["run"].split("/")
        records.append({"scale": scale, "experiment": experiment} | count_parameters(model).to_dict())
    run.write_json(out, records)
    return records
