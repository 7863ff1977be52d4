"""The safetensors files of a model folder, and what their heads say."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from masa.errors import MasaError
from masa.runs.run import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def weight_files(folder: Path, made_by: str | None = None) -> list[Path]:
    """One file, or the shards that the index names.

    Args:
        made_by: the command that made the folder, for messages.

    Raises:
        MasaError: a file is missing, or the index cannot be read.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        if shards := sorted(folder.glob("model-*-of-*.safetensors")):
            raise MasaError(
                f"{folder / INDEX} is missing, which says what the {len(shards)} shards there hold; fetch it again."
            )
        raise MasaError(
            f"{folder / WEIGHTS} is missing, and so is {INDEX}; only safetensors weights are read, never pickles. "
            "Where you trust the folder, transformers turns one into the other: from_pretrained(…).save_pretrained(X)."
        )
    index = read_json(folder / INDEX, made_by)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict) or not all(isinstance(n, str) and Path(n).name == n for n in shards.values()):
        raise MasaError(f"{folder / INDEX} is no index of safetensors files in this folder; fetch it again.")
    names = sorted(set(shards.values()))
    if absent := [name for name in names if not (folder / name).is_file()]:
        raise MasaError(f"{folder} lacks the shards {', '.join(absent)} that {INDEX} names.")
    return [folder / name for name in names]


def heads(
    files: Iterable[Path], mend: str = "fetch or train it again"
) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Name -> shape, and dtype where it is a floating one; no tensor is read.

    Args:
        mend: what to do about a broken file, for messages.

    Raises:
        MasaError: a file is corrupt or truncated.
    """
    found: dict[str, tuple[tuple[int, ...], torch.dtype | None]] = {}
    for file in files:
        with _opened(file, mend) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), _DTYPES.get(part.get_dtype())
    return found


def kinds(files: Iterable[Path], mend: str = "fetch it again") -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> shape, and dtype as safetensors calls it.

    Raises:
        MasaError: a file is corrupt or truncated.
    """
    found = {}
    for file in files:
        with _opened(file, mend) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                part = opened.get_slice(name)
                found[name] = tuple(part.get_shape()), part.get_dtype()
    return found


def stored_tensor(file: Path, name: str) -> torch.Tensor:
    """One tensor of a file, mapped."""
    with _opened(file) as opened:
        return opened.get_tensor(name)


def _opened(file: Path, mend: str = "fetch or train it again") -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise MasaError(f"{file} is corrupt or truncated ({error}); {mend}.") from error
