"""How a factored model runs: through its factors, or folded to dense matrices when it is loaded.

=========== =============================== ===============================================
runtime     held in memory                  read for each generated token
=========== =============================== ===============================================
"factored"  what the folder stores          low-rank kinds: the same; atoms: S atoms a matrix
"folded"    every matrix, a plain model     every matrix once
"auto"      "factored"; where it reads more than "folded" would (atoms), it says so in a line
=========== =============================== ===============================================
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from masa.errors import MasaError, unknown
from masa.sharing.fold import fold_in_place
from masa.sharing.projections import bank_of

RUNTIMES = ("auto", "factored", "folded")
_log = logging.getLogger("masa")


def check_runtime(runtime: Any) -> str:
    """One of :data:`RUNTIMES`.

    Raises:
        MasaError: another.
    """
    if runtime not in RUNTIMES:
        raise unknown("runtime", runtime, RUNTIMES)
    return runtime


def choose(model: nn.Module, runtime: str) -> str:
    """What "auto" comes to for this model; the caller is told where it is a trade.

    Returns:
        "factored" or "folded".
    """
    if runtime != "auto":
        return runtime
    shared = bank_of(model)
    if shared is not None:
        size = next((p.element_size() for p in shared.parameters()), 1)
        held = size * sum(source.stored_numbers() for source in shared.values())
        read = size * sum(source.read_numbers() for source in shared.values())
        dense = size * sum(source.dense_numbers() for source in shared.values())
        if read > dense:
            _log.warning(
                "masa: runtime 'factored': the shared matrices take %s, and generating one token reads %s of them; "
                "with runtime='folded' they would take %s, and be read once.",
                *map(_size, (held, read, dense)),
            )
    return "factored"


def _size(number: int) -> str:
    return f"{number / 2**20:,.1f} MiB" if number >= 2**20 else f"{number / 2**10:,.1f} KiB"


def folded(model: nn.Module) -> nn.Module:
    """Fold a model that has just been loaded, in place.

    Raises:
        MasaError: parts of it are on other devices or on disk, where the dense matrices would have no place.
    """
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1 or any(
        p.is_meta for p in model.parameters()
    ):
        raise MasaError(
            "runtime = 'folded' needs the whole model on one device, and this device map spreads it. Leave device_map "
            "or runtime away, or fold the folder first: masa export FOLDER --out PLAIN."
        )
    fold_in_place(model)
    return model
