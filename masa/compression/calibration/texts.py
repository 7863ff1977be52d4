"""Texts in, calibration tokens out."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from masa.data import tokenizers
from masa.data.texts import COLUMNS, Chat, Documents, listed, template_of
from masa.errors import MasaError
from masa.models.positions import positions_of

SPOOL = 64 << 20
"""Bytes of tokens that are kept in memory; more go to a temporary file."""
SAY_EVERY = 10.0
"""Seconds between lines that say how much of a long text has been read."""
ID = np.dtype("<u4")


def read_documents(source: str | Path | Sequence[str], column: str | None = None) -> list[str]:
    """All documents of a source at once; what it may be says :class:`masa.data.texts.Documents`."""
    return list(Documents(source, column))


def draw_tokens(tokenizer: Any, documents: Iterable[str], samples: int, length: int, seed: int) -> torch.Tensor:
    """N windows of T tokens (N, T), without overlap, drawn from the concatenated documents.

    A document begins with the start token where the tokenizer itself puts one (:func:`masa.data.tokenizers.start_of`),
    and ends with the end token. Memory does not grow with the documents.

    Raises:
        MasaError: fewer than N x T tokens of text.
    """
    if samples < 1 or length < 1:
        raise MasaError(f"Calibration needs at least one token, got {samples} samples of {length} tokens.")
    with _Tokens(tokenizer, documents) as tokens:
        windows = tokens.count // length
        if windows < samples:
            most = f"ask for at most {windows} samples (masa calibrate --samples)"
            short = f"ask for shorter ones, of at most {tokens.count} tokens (masa calibrate --length)"
            needed = f"Calibration on {samples} x {length} tokens needs {samples * length}"
            raise MasaError(
                f"{needed}, but the text has {tokens.count}. Give more text, or {most if windows else short}."
            )
        return tokens.draw(samples, length, seed)


class _Tokens:
    """The tokens of documents, one after the other, in memory or, if they are many, in a temporary file."""

    def __init__(self, tokenizer: Any, documents: Iterable[str]) -> None:
        self.file = tempfile.SpooledTemporaryFile(max_size=SPOOL)  # noqa: SIM115
        self.count = 0
        start, stop = tokenizers.start_of(tokenizer), tokenizer.eos_token_id
        before, after = ([] if token is None else [token] for token in (start, stop))
        said = time.monotonic()
        for ids in tokenizers.encoded(tokenizer, documents):
            begun = ids[:1] == before  # by a chat's template
            self.add([*([] if begun else before), *ids, *after])
            if time.monotonic() - said > SAY_EVERY:
                said = time.monotonic()
                print(f"calibration text: {self.count:,} tokens read", file=sys.stderr, flush=True)

    def add(self, ids: Sequence[int]) -> None:
        self.file.write(np.array(ids, ID).tobytes())
        self.count += len(ids)

    def draw(self, samples: int, length: int, seed: int) -> torch.Tensor:
        """``samples`` of the windows that all tokens are cut into, (N, T)."""
        if not self.count:
            raise MasaError("The calibration data hold no tokens.")
        chosen = torch.randperm(self.count // length, generator=torch.Generator().manual_seed(seed))[:samples]
        found = np.empty((len(chosen), length), np.int64)
        for row, window in zip(found, chosen.tolist(), strict=True):
            self.file.seek(window * length * ID.itemsize)
            row[:] = np.frombuffer(self.file.read(length * ID.itemsize), ID)
        return torch.from_numpy(found)

    def __enter__(self) -> _Tokens:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


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
    length = min(length, positions_of(model) or length)
    if isinstance(data, str | Path):
        return _drawn(Documents(data, column, tokenizer=tokenizer), model, tokenizer, samples, length, seed)
    if hasattr(data, "column_names"):
        data = _column(data, column, lambda chat: template_of(tokenizer or _tokenizer_of(model))(chat))
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
        return _drawn(documents, model, tokenizer, samples, length, seed)
    if rows and len({len(row) for row in rows}) == 1 and len(rows[0]) <= max(length, 1):
        return torch.stack(rows[:samples])
    joined = torch.cat(rows) if rows else torch.zeros(0, dtype=torch.long)
    fits = min(length, len(joined))
    if not fits:
        raise MasaError("The calibration data hold no tokens.")
    count = min(samples, len(joined) // fits)
    return joined[: count * fits].view(count, fits)


def _drawn(
    documents: Iterable[str], model: nn.Module, tokenizer: Any, samples: int, length: int, seed: int
) -> torch.Tensor:
    """At most N windows of at most T tokens (N, T)."""
    with _Tokens(tokenizer or _tokenizer_of(model), documents) as tokens:
        fits = max(1, min(length, tokens.count))
        return tokens.draw(max(1, min(samples, tokens.count // fits)), fits, seed)


def _column(data: Any, column: str | None, chat: Chat) -> Iterable[Any]:
    """The texts or rows of ids of a data set."""
    names = data.column_names
    if isinstance(names, Mapping):
        raise MasaError(f"The data set has several splits ({', '.join(names)}): give one of them, data['train'].")
    wanted = [column] if column else ["input_ids", *COLUMNS]
    found = next((name for name in wanted if names is None or name in names), None)
    if found is None:
        missing = f"no column {column!r}" if column else "no column text"
        raise MasaError(f"The data set has {missing}, but {', '.join(names)}: say which one with column=.")
    if found == "input_ids":
        return (dict(row) for row in data)
    return listed((row[found] for row in data), chat, f"the data set's {found!r}, row")


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
    if where and tokenizers.has_tokenizer(Path(where)):
        return tokenizers.load_tokenizer(Path(where))
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
