"""Training-free compression: solve for the weight sources of a model that is trained already. ::

    calibration = calibrate(model, tokens)                                  # one pass over the data, for all methods
    model, report = compress(model, "svd-global", calibration, reduction=0.2)           # or a make_compressor(...)
    masa.save(model, "factored");  masa.fold(model).save_pretrained("plain")

To add a method, subclass :class:`masa.compression.base.Compressor` in a file of its own, decorate it with ``register``
and name it in :mod:`masa.compression.names`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from masa.sharing.compression_spec import CompressionSpec

if TYPE_CHECKING:
    from masa.compression.api import compress
    from masa.compression.base import COMPRESSORS, Compressor, make_compressor
    from masa.compression.calibration.calibrate import calibrate
    from masa.compression.calibration.collect import run_calibrate
    from masa.compression.calibration.statistics import Calibration
    from masa.compression.healing.heal import heal
    from masa.compression.healing.run import run_heal
    from masa.compression.quantization import quantize
    from masa.compression.report import CompressionReport
    from masa.compression.run import run_compress, run_quantize
    from masa.compression.scoring import perplexity

__all__ = [
    "COMPRESSORS",
    "Calibration",
    "CompressionReport",
    "CompressionSpec",
    "Compressor",
    "calibrate",
    "compress",
    "heal",
    "make_compressor",
    "perplexity",
    "quantize",
    "run_calibrate",
    "run_compress",
    "run_heal",
    "run_quantize",
]

_LAZY = {"compress": "api", "Compressor": "base", "make_compressor": "base", "calibrate": "calibration.calibrate"}
_LAZY |= {"Calibration": "calibration.statistics", "CompressionReport": "report", "perplexity": "scoring"}
_LAZY |= {"heal": "healing.heal", "quantize": "quantization"}
_LAZY |= {"run_calibrate": "calibration.collect", "run_compress": "run", "run_quantize": "run"}
_LAZY |= {"run_heal": "healing.run"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "COMPRESSORS":  # every method, which only who lists them needs
        from masa.compression.names import METHODS

        for module in sorted(set(METHODS.values())):
            import_module(f"masa.compression.methods.{module}")
        return import_module("masa.compression.base").COMPRESSORS
    if name in _LAZY:
        return getattr(import_module(f"masa.compression.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'masa.compression' has no attribute {name!r}")
