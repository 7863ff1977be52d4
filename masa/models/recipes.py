"""What the recipes of all kinds of models have in common, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

Optimizer = Literal["adamw", "muon"]
"""Names of :data:`masa.training.optimizers.OPTIMIZERS`."""

LATER: dict[str, Any] = {"optimizer": "adamw", "compile": "auto", "average_fraction": 0, "data_seed": None}
"""Keys that came after runs had been made -> their default, with which a recipe says no more than it did before."""


def without_later(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe without keys of :data:`LATER` at their default, so that earlier runs keep their identity."""
    return {name: value for name, value in recipe.items() if name not in LATER or value != LATER[name]}
