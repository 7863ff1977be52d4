"""Results that another machine or an earlier version finished, taken over on purpose (``masa adopt``).

Code and processor may have been others, so a result that was adopted is kept where it is of what is asked for: of the
same specification, data and models, not of the same code and not of the same bits of statistics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ADOPTED = "adopted"
"""Key of a point's ``metrics.json`` and of a run's ``manifest.json``: which folder it was taken from."""


def adopted(record: Mapping[str, Any], asked: str) -> bool:
    """Whether a point of a sweep was adopted and is of what is asked for now.

    Args:
        record: of ``metrics.json``.
        asked: hash of all that is asked for: method, options, data and models.
    """
    return ADOPTED in record and record.get("asked") == asked
