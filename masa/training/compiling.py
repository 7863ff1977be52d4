"""Which trainings are compiled: known without torch, since the plan asks, too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

COMPILED_FROM = 1000
"""Optimiser steps from which ``training.compile: auto`` compiles on a GPU: compiling takes about a minute."""


def is_compiled(recipe: Mapping[str, Any], gpu: bool) -> bool:
    """Whether a model is compiled: on request, or by "auto" on a GPU where the training is long enough.

    Args:
        recipe: resolved, with its ``steps``.
        gpu: whether it trains on one.
    """
    choice, parts = recipe.get("compile", "auto"), recipe.get("parallel", "ddp") == "fsdp"
    return choice is True or (choice == "auto" and gpu and not parts and recipe["steps"] >= COMPILED_FROM)
