"""What :func:`masa.compression.compress` was asked for, as plain data; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CompressionSpec:
    """The spec of a compressed model, stored in ``config.json`` in the place of a :class:`masa.SharingSpec`.

    Args:
        method: a key of :data:`masa.compression.COMPRESSORS`.
        reduction: requested, as a fraction of the numbers of ``projections``.
        projections: letters that were compressed.
        options: the method's hyperparameters.
    """

    method: str
    reduction: float
    projections: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the key "reduction" tells it from a sharing spec."""
        options = dict(self.options)
        return {
            "method": self.method,
            "reduction": self.reduction,
            "projections": self.projections,
            "options": options,
        }
