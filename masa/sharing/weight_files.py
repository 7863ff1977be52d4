"""The safetensors files of a model folder, and what their heads say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from masa.errors import MasaError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def weight_files(folder: Path) -> list[Path]:
    """One file, or the shards that the index names.

    Raises:
        MasaError: a file is missing, or the index cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise MasaError(f"{folder / WEIGHTS} is missing: a model folder has config.json and safetensors files.")
    try:
        shards = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()
        names = sorted({Path(name).name for name in shards})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MasaError(f"{folder / INDEX} is no index of safetensors files ({error}); fetch it again.") from error
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise MasaError(f"{folder / absent[0]} is missing, which {INDEX} names.")
    return [folder / name for name in names]


def heads(files: Iterable[Path]) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Name -> shape, and dtype where it is a floating one; no tensor is read.

    Raises:
        MasaError: a file is corrupt or truncated.
    """
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for file in files:
        with _opened(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), _DTYPES.get(part.get_dtype())
    return found


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MasaError(f"{file} is corrupt or truncated ({error}); fetch or train it again.") from error
