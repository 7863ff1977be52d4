"""What an interrupted healing goes on from: a file that is replaced every minute."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.statistics import model_sha256
from masa.compression.healing.trained import Trained
from masa.runs.files import whole_file

EVERY = 60.0
"""Seconds between two writings."""

_log = logging.getLogger("masa")


class State:
    """Where a healing stands.

    Args:
        file: of it; None keeps nothing.
        settings: JSON-able, that another state may not differ in.
        weights: tensors and models that it may not differ in either, as they are before the first step.

    Attributes:
        found: what the file held of the same healing, or None.
        steps: in all, or None where that is not known yet.
        layers: what solving the layers left of their errors.
        losses: by step.
        tokens: seen.
    """

    def __init__(self, file: str | Path | None, settings: Any, weights: Sequence[Tensor | nn.Module | None]) -> None:
        self.file = None if file is None else Path(file)
        self.layers: list[float] = []
        self.losses: list[float] = []
        self.steps: int | None = None
        self.tokens = 0
        self.found: dict[str, Any] | None = None
        self._written = time.monotonic()
        if self.file is None:
            return
        self.key = _digest(settings, weights)
        if self.file.is_file():
            self.found = _read(self.file)
            if self.found is None or self.found["key"] != self.key:
                self.found = None
                _log.warning(
                    "masa: %s is of another model, other data or other settings: healing begins anew", self.file
                )

    def restore(self, trained: Trained) -> None:
        """Where the file had something: the numbers, the optimiser and what is known go on from there."""
        if self.found is None:
            return
        self.steps, self.layers = self.found["steps"], self.found["layers"]
        self.losses, self.tokens = self.found["losses"], self.found["tokens"]
        for master, values in zip(trained.masters, self.found["masters"], strict=True):
            master.copy_(values)
        trained.optimiser.load_state_dict(self.found["optimiser"])
        trained.show()
        self.found = None  # as large as the masters

    def save(self, trained: Trained, now: bool = False) -> None:
        """Replace the file, if a minute has passed or ``now``."""
        if self.file is None or not (now or time.monotonic() - self._written > EVERY):
            return
        with whole_file(self.file) as part:
            torch.save(
                {
                    "key": self.key,
                    "steps": self.steps,
                    "layers": self.layers,
                    "losses": self.losses,
                    "tokens": self.tokens,
                    "masters": trained.masters,
                    "optimiser": trained.optimiser.state_dict(),
                },
                part,
            )
        self._written = time.monotonic()


def _read(file: Path) -> dict[str, Any] | None:
    """What a file holds, or None of one that is not whole."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # whatever torch makes of a foreign file
        return None
    return found if isinstance(found, dict) and "key" in found else None


@torch.no_grad()
def _digest(settings: Any, weights: Sequence[Tensor | nn.Module | None]) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    for values in weights:
        if isinstance(values, nn.Module):
            digest.update(model_sha256(values).encode())
        elif values is not None:
            digest.update(f"{values.dtype} {tuple(values.shape)}".encode())
            digest.update(values.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
