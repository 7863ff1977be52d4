"""Texts in, calibration tokens out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from masa.data import excerpts
from masa.data.documents import lines
from masa.errors import MasaError


def read_documents(source: str | Path | Sequence[str]) -> list[str]:
    """Documents of a JSON-lines file, plain or gzip (key "text", "content" or "page"), of a file of
    :mod:`masa.data.excerpts` (.json), of a text file (one), or as given."""
    if not isinstance(source, str | Path):
        return [str(document) for document in source]
    path = Path(source)
    if not path.is_file():
        raise MasaError(f"Text file {path} does not exist.")
    if path.suffix == ".json":
        record = excerpts.load(path)
        if "unavailable" in record:
            raise MasaError(f"{path} holds no documents: {record['unavailable']}")
        return record["documents"]
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        return ["".join(line for _, line in lines(path))]
    documents = []
    for number, line in lines(path):
        try:
            row = json.loads(line)
            documents.append(next(str(row[key]) for key in ("text", "content", "page") if key in row))
        except (json.JSONDecodeError, StopIteration, TypeError) as error:
            raise MasaError(f"{path}, line {number}: expected an object with 'text', 'content' or 'page'.") from error
    return documents


def draw_tokens(tokenizer: Any, documents: Sequence[str], samples: int, length: int, seed: int) -> torch.Tensor:
    """N windows of T tokens (N, T), without overlap, drawn from the concatenated documents.

    Raises:
        MasaError: fewer than N x T tokens of text.
    """
    if samples < 1 or length < 1:
        raise MasaError(f"Calibration needs at least one token, got {samples} samples of {length} tokens.")
    stop = tokenizer.eos_token_id
    ids: list[int] = []
    for document in documents:
        ids += [*tokenizer(document, add_special_tokens=False)["input_ids"], *([] if stop is None else [stop])]
    windows = len(ids) // length
    if windows < samples:
        raise MasaError(
            f"Calibration on {samples} x {length} tokens needs {samples * length}, but the text has {len(ids)}. "
            f"Give more text, or ask for at most {windows} samples (masa calibrate --samples)."
        )
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.tensor(ids[: windows * length]).view(windows, length)[chosen]


def save_tokens(tokens: torch.Tensor, directory: str | Path) -> None:
    """Keep the calibration's tokens beside its statistics, for methods that run the model again."""
    from safetensors.torch import save_file

    save_file({"tokens": tokens.contiguous()}, Path(directory) / "tokens.safetensors")


def load_tokens(directory: str | Path) -> torch.Tensor | None:
    """The tokens that :func:`save_tokens` kept, or None."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(directory) / "tokens.safetensors"
    if not path.is_file():
        return None
    try:
        return load_file(path)["tokens"]
    except (SafetensorError, OSError, KeyError) as error:
        raise MasaError(f"{path} is corrupt or truncated ({error}); make it anew with `masa calibrate`.") from error
