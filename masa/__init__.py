"""masa: cross-layer weight sharing in Transformers (Matrix Atom Sharing in Attention, arXiv 2508.04581)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masa.errors import MasaError
from masa.sharing.registration import register
from masa.sharing.spec import METHODS, ModelShape, SharingSpec

if TYPE_CHECKING:
    from masa.compression import calibrate
    from masa.compression.one_call import compress
    from masa.compression.quantization import quantize
    from masa.sharing.checkpoint import load, save
    from masa.sharing.fold import fold
    from masa.sharing.share import ParameterCount, count_parameters, share

__version__ = "0.1.0"
__all__ = [
    "METHODS",
    "MasaError",
    "ModelShape",
    "ParameterCount",
    "SharingSpec",
    "calibrate",
    "compress",
    "count_parameters",
    "fold",
    "load",
    "quantize",
    "save",
    "share",
]

# torch is imported when one of these is first used: the workflow reads specs without it
_LAZY = dict.fromkeys(("share", "count_parameters", "ParameterCount"), "masa.sharing.share")
_LAZY |= {"fold": "masa.sharing.fold", "save": "masa.sharing.checkpoint", "load": "masa.sharing.checkpoint"}
_LAZY |= {"calibrate": "masa.compression", "compress": "masa.compression.one_call", "quantize": "masa.compression"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'masa' has no attribute {name!r}")


register()
