"""Read token directories (made by :mod:`masa.text`): packed training blocks and held-out tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from masa.errors import MasaError


def some(items: range, place: Callable[[int], str], unit: str, most: int = 8) -> str:
    """Name the first few of a range of items, for messages: ``items 0 to 3: blocks 7, 2, 0, 5``."""
    named = ", ".join(place(item) for item in items[:most])
    return f"items {items.start} to {items.stop - 1}: {unit} {named}{', …' * (len(items) > most)}"


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a directory, and never one of the same name on the hub.

    Raises:
        MasaError: there is none, or it cannot be read.
    """
    from transformers import AutoTokenizer

    if not (directory / "tokenizer.json").is_file():
        raise MasaError(f"{directory} holds no tokenizer.json; make one with `masa tokenizer --out {directory}`.")
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise MasaError(f"No tokenizer could be read from {directory} ({error}).") from error


class PackedTokens:
    """Blocks of ``context`` tokens from a token directory, in a random order that depends on the seed alone.

    Works as a map-style data set for Hugging Face's Trainer: item i is ``{"input_ids", "labels"}`` of length
    ``context``.

    Raises:
        MasaError: a shard is missing or has the wrong size, or there are fewer blocks than asked for.
    """

    def __init__(self, directory: Path, context: int, blocks: int, seed: int) -> None:
        self.context = context
        manifest = json.loads((directory / "manifest.json").read_text())
        dtype = np.dtype(manifest["dtype"])
        self.shards = [_open_shard(directory, record, dtype) for record in manifest["train"]["shards"]]
        self.starts = np.cumsum([0] + [len(s) for s in self.shards])
        available = int(self.starts[-1]) // context
        if blocks > available:
            raise MasaError(f"{directory} holds {available:,} blocks of {context} tokens, the run needs {blocks:,}.")
        self.order = np.random.default_rng(seed).permutation(available)[:blocks]

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> dict[str, Any]:
        import torch

        start = int(self.order[index]) * self.context
        block = torch.from_numpy(self._read(start, start + self.context).astype(np.int64))
        return {"input_ids": block, "labels": block}

    def where(self, items: range) -> str:
        """Which blocks, shards and positions a range of items are, for messages."""
        return some(items, self._place, "blocks")

    def _place(self, item: int) -> str:
        block = int(self.order[item])
        start = block * self.context
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        first = start - int(self.starts[shard])
        return f"{block} (train-{shard:05d}.bin, tokens {first} to {first + self.context - 1})"

    def _read(self, start: int, stop: int) -> np.ndarray:
        shard = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        while start < stop:
            offset = start - int(self.starts[shard])
            parts.append(self.shards[shard][offset : offset + stop - start])
            start, shard = start + len(parts[-1]), shard + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def validation_tokens(directory: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The held-out tokens and their record (documents, words, bytes) in the manifest."""
    manifest = json.loads((directory / "manifest.json").read_text())
    record = manifest["validation"]
    return np.array(_open_shard(directory, record, np.dtype(manifest["dtype"])), np.int64), record


def _open_shard(directory: Path, record: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    path = directory / record["name"]
    expected = record["tokens"] * dtype.itemsize
    actual = path.stat().st_size if path.is_file() else -1
    if actual != expected:
        raise MasaError(
            f"{path} {'is missing' if actual < 0 else f'has {actual} bytes'}, expected {expected}; delete "
            f"{directory / 'manifest.json'} and run again to tokenize anew."
        )
    return np.memmap(path, dtype=dtype, mode="r")
