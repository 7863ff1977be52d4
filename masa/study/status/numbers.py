"""The newest numbers of a metrics log, and how fast they come."""

from __future__ import annotations

import math
from typing import Any

RECENT = 10
"""Lines of training that speed is taken over."""


def is_number(value: Any) -> bool:
    """Whether a value of a log may be counted with; logs may be damaged."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _losses(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Lines of training, whose steps and seconds are numbers that grow."""
    found: list[dict[str, Any]] = []
    for r in records:
        if "loss" in r and is_number(r.get("step")) and is_number(r.get("training_seconds")):
            if found and r["step"] <= found[-1]["step"]:
                found.clear()
            found.append(r)
    return found[-RECENT:]


def seconds_per_step(records: list[dict[str, Any]]) -> float | None:
    """Of late, of the steps alone; None before there are two lines."""
    lines = _losses(records)
    if len(lines) < 2 or lines[-1]["training_seconds"] <= lines[0]["training_seconds"]:
        return None
    return (lines[-1]["training_seconds"] - lines[0]["training_seconds"]) / (lines[-1]["step"] - lines[0]["step"])


def interval(records: list[dict[str, Any]]) -> float | None:
    """Seconds of steps between two lines; None before there are two."""
    seconds, lines = seconds_per_step(records), _losses(records)
    return None if seconds is None else seconds * (lines[-1]["step"] - lines[-2]["step"])


def newest(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Fields of :class:`masa.study.status.runs.Status` that a log alone gives, by name; else None."""

    def last(key: str) -> Any:
        return next((r[key] for r in reversed(records) if is_number(r.get(key))), None)

    unit = next((u for r in reversed(records) for u in ("tokens", "images") if is_number(r.get(u))), None)
    found = {key: last(key) for key in ("step", "loss", "validation_loss", "training_seconds")}
    found |= {"unit": unit, "amount": last(unit) if unit else None, "per_second": None}
    if (seconds := seconds_per_step(records)) and found["amount"] and found["step"]:
        found["per_second"] = found["amount"] / found["step"] / seconds
    return found
