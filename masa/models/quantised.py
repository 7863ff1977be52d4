"""Quantised checkpoints: multiplied out where transformers can do that on a CPU, refused in a line where it cannot."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from masa.errors import MasaError
from masa.sharing.description import METHOD
from masa.sharing.parameters import cast
from masa.sharing.weight_files import kinds

SCALES = ("weight_scale_inv", "weight_scale", "scale", "qscale_weight")
"""What the scales of a float8 ``weight`` are called beside it."""

_FLOAT8 = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "F4")


def method_of(config: Any) -> str | None:
    """How a configuration says that its weights are quantised; None if it does not."""
    given = _given(config)
    return None if given is None else str(given.get("quant_method"))


def options(folder: Path, config: Any, files: list[Path]) -> dict[str, Any]:
    """What ``from_pretrained`` needs to multiply the weights out.

    Raises:
        MasaError: it cannot, or would do it wrong.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as KINDS

    given = _given(config) or {}
    method = str(given.get("quant_method"))
    if method == METHOD:
        raise MasaError(
            f"{folder} is a factored folder of masa, whose matrices are not stored; write them out first: masa export "
            f"{folder} --out PLAIN."
        )
    kind = KINDS.get(method)
    if kind is None or "dequantize" not in inspect.signature(kind.__init__).parameters:
        raise cannot(folder, method, "transformers has no way to multiply such weights out while it reads them")
    if method == "fp8":
        _check_blocks(folder, given, kinds(files))
    try:
        return {"quantization_config": kind.from_dict({**given, "dequantize": True})}
    except (ImportError, ValueError, TypeError) as error:
        raise cannot(folder, method, str(error)) from error


def cannot(folder: Path, method: str, why: str) -> MasaError:
    """The refusal."""
    return MasaError(
        f"{folder} is quantised ({method}) and cannot be read as plain numbers here: {' '.join(why.split())[:300]}. "
        "Give the original folder, or load it with transformers, call model.dequantize(), save that, and give that."
    )


def forget(model: Any, dtype: Any) -> None:
    """Take off a model what says that it is quantised: its weights are plain numbers of one dtype now."""
    if isinstance(dtype, torch.dtype):
        cast(model, dtype)  # those beside the quantised ones were left as stored
    for owner in (model.config, model.config.get_text_config()):
        vars(owner).pop("quantization_config", None)
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        vars(model).pop(name, None)
    model.is_quantized = False


def refuse_bare(folder: Path, files: list[Path]) -> None:
    """See that a folder that says nothing of quantisation holds plain numbers.

    Raises:
        MasaError: float8, or whole numbers under the name of a matrix.
    """
    for name, (_, kind) in kinds(files).items():
        if kind in _FLOAT8 or (
            kind in ("I8", "U8", "I32") and name.endswith((".weight", ".qweight", ".weight_packed"))
        ):
            raise MasaError(
                f"{folder}: {name} is stored as {kind}, and config.json says nothing of how it is scaled "
                "(quantization_config). Fetch the folder again, or give the original one."
            )


def _given(config: Any) -> Mapping[str, Any] | None:
    for owner in (config, config.get_text_config()):
        given = getattr(owner, "quantization_config", None)
        if given is not None:
            return given if isinstance(given, Mapping) else given.to_dict()
    return None


def _check_blocks(folder: Path, given: Mapping[str, Any], stored: Mapping[str, tuple[tuple[int, ...], str]]) -> None:
    """Every float8 matrix has its scales, one a block: transformers takes the sizes of blocks from the numbers of both.

    It so divides 192 rows into two blocks of 96, where two scales mean 128 rows and the 64 that are left.
    """
    block = given.get("weight_block_size")
    if not any(kind in _FLOAT8 for _, kind in stored.values()):
        raise cannot(folder, "fp8", "config.json says float8, but no tensor is stored so")
    for name, (shape, kind) in stored.items():
        if kind not in _FLOAT8 or not name.endswith("weight"):
            continue
        beside = name.removesuffix("weight")
        scale = next((stored[beside + end][0] for end in SCALES if beside + end in stored), None)
        if scale is None:
            raise cannot(folder, "fp8", f"{name} has no scales beside it ({beside}{SCALES[0]})")
        if not block or len(scale) < 2 or len(shape) < 2:
            continue
        partial = [size for size, width in zip(shape[-2:], block, strict=True) if size > width and size % width]
        if partial:
            raise cannot(
                folder, "fp8", f"{name} has {partial[0]} numbers a side, no multiple of the blocks' {list(block)}"
            )
