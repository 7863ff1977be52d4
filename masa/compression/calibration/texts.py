"""Texts in, calibration tokens out."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
    ids = [_ids(tokenizer, document) for document in documents]
    count = sum(map(len, ids))
    if count // length < samples:
        raise MasaError(
            f"Calibration on {samples} x {length} tokens needs {samples * length}, but the text has {count}. "
            f"Give more text, or ask for at most {count // length} samples (masa calibrate --samples)."
        )
    return _draw(ids, samples, length, seed)


def _ids(tokenizer: Any, document: str) -> list[int]:
    """A document's tokens, and the one that ends it."""
    stop = tokenizer.eos_token_id
    return [*tokenizer(document, add_special_tokens=False)["input_ids"], *([] if stop is None else [stop])]


def _draw(ids: Sequence[Sequence[int]], samples: int, length: int, seed: int) -> torch.Tensor:
    """``samples`` of the windows that the documents, one after the other, are cut into."""
    joined = [token for document in ids for token in document]
    if not joined:
        raise MasaError("The calibration data hold no tokens.")
    windows = len(joined) // length
    chosen = torch.randperm(windows, generator=torch.Generator().manual_seed(seed))[:samples]
    return torch.tensor(joined[: windows * length]).view(windows, length)[chosen]


def tokens_of(
    data: Any, model: nn.Module, tokenizer: Any, column: str | None, samples: int, length: int, seed: int
) -> torch.Tensor:
    """Token ids (N, T) of whatever holds text or ids, at most ``samples`` x ``length`` of them.

    Texts are drawn from as :func:`draw_tokens` does; batches and rows of ids are taken in their order, without padding,
    and as they are where all are whole and of one length.

    Args:
        data: see :func:`masa.compress`.
        model: whose tokenizer and context it is.
        tokenizer, column, samples, length, seed: see there.

    Raises:
        MasaError: data of another kind, a data set without such a column, no tokenizer, or no tokens.
    """
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    if hasattr(data, "column_names"):
        data = _column(data, column)
    if isinstance(data, str | Path):
        data = read_documents(data)
    if isinstance(data, torch.Tensor) or hasattr(data, "__array__"):
        data = [torch.as_tensor(data)]
    if not isinstance(data, Iterable):
        raise MasaError(
            f"Calibration data are texts, a datasets.Dataset, a DataLoader or token ids, not {type(data).__name__}."
        )
    rows, documents, characters, enough = [], [], 0, samples * length
    for item in data:
        if isinstance(item, str):
            documents.append(item)
            characters += len(item)
            if characters > 64 * enough and not hasattr(data, "__len__"):  # a stream, which may have no end
                break
            continue
        rows += _rows(item)
        if sum(map(len, rows)) >= enough:
            break
    if documents:
        tokenizer = tokenizer or _tokenizer_of(model)
        ids = [_ids(tokenizer, document) for document in documents]
        count = sum(map(len, ids))
        fits = min(length, count)
        return _draw(ids, max(1, min(samples, count // max(1, fits))), fits, seed)
    if rows and len({len(row) for row in rows}) == 1 and len(rows[0]) <= max(length, 1):
        return torch.stack(rows[:samples])
    joined = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    fits = min(length, len(joined))
    if not fits:
        raise MasaError("The calibration data hold no tokens.")
    count = min(samples, len(joined) // fits)
    return joined[: count * fits].view(count, fits)


def _column(data: Any, column: str | None) -> Iterable[Any]:
    """The texts or rows of ids of a data set."""
    names = data.column_names
    if isinstance(names, Mapping):
        raise MasaError(f"The data set has several splits ({', '.join(names)}): give one of them, data['train'].")
    wanted = [column] if column else ["input_ids", "text", "content", "page"]
    found = next((name for name in wanted if names is None or name in names), None)
    if found is None:
        missing = f"no column {column!r}" if column else "no column text"
        raise MasaError(f"The data set has {missing}, but {', '.join(names)}: say which one with column=.")
    if found == "input_ids":
        return (dict(row) for row in data)
    return (row[found] for row in data)


def _rows(item: Any) -> list[torch.Tensor]:
    """The sequences of a batch or of one row, without padding."""
    mask = None
    if isinstance(item, Mapping) or hasattr(item, "input_ids"):
        if "input_ids" not in item:
            raise MasaError(f"A batch of calibration data has no input_ids, but {', '.join(map(str, item))}.")
        item, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, tuple | list) and item and isinstance(item[0], torch.Tensor):
        item = item[0]
    try:
        ids = torch.as_tensor(item)
        kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else torch.as_tensor(mask).bool()
    except (TypeError, ValueError, RuntimeError) as error:
        raise MasaError(f"Calibration data are texts or token ids; among them is {type(item).__name__}.") from error
    if ids.is_floating_point() or ids.ndim not in (1, 2):
        raise MasaError(f"Calibration tokens must be integers (N, T), got {ids.dtype} {tuple(ids.shape)}.")
    if ids.ndim == 1:
        ids, kept = ids[None], kept[None]
    return [row[keep].long().cpu() for row, keep in zip(ids, kept, strict=True) if keep.any()]


def _tokenizer_of(model: nn.Module) -> Any:
    from transformers import AutoTokenizer

    where = getattr(model.config, "_name_or_path", "")
    try:
        if where:
            return AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    except Exception as error:  # of the hub, or of a folder without one, in many classes
        raise MasaError(f"No tokenizer could be read from {where} ({error}): give tokenizer=.") from error
    raise MasaError("Texts need a tokenizer, and this model was not read from a folder: give tokenizer=.")


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
