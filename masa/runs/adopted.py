"""Results that another machine or an earlier version finished, taken over instead of made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADOPTED = "adopted"


def adopted(record: Mapping[str, Any], asked: str) -> bool:
    """Whether a record was taken over on purpose (``masa adopt``), and is of what is asked for now.

    Args:
        record: of ``metrics.json`` or of a run's ``manifest.json``.
        asked: hash of everything that was asked for: the method, its options, data and models, not the code and not
            the bits of statistics, in which machines and versions may differ.
    """
    return bool(record.get(ADOPTED)) and record.get("asked") == asked
