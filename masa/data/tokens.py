"""Read token directories (made by :mod:`masa.data.tokenize`): packed training blocks and held-out tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from masa.data.tokenizers import load_tokenizer as load_tokenizer
from masa.errors import MasaError
from masa.runs import files, run

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model")
"""One of these holds a tokenizer: ours the first, Llama 2's and Gemma's the second, or both."""

MEND = "masa tokenize"
"""The command that makes a token directory anew."""


def some(items: range, place: Callable[[int], str], unit: str, most: int = 8) -> str:
    """Name the first few of a range of items, for messages: ``items 0 to 3: blocks 7, 2, 0, 5``."""
    named = ", ".join(place(item) for item in items[:most])
    return f"items {items.start} to {items.stop - 1}: {unit} {named}{', …' * (len(items) > most)}"


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest of a token directory.

    Raises:
        MasaError: it is missing, corrupt or of something else.
    """
    path = directory / "manifest.json"
    manifest = run.read_json(path, MEND)
    try:
        records = [*manifest["train"]["shards"], manifest["validation"]]
        whole = {"vocab_size", "tokenizer", "dtype"} <= set(manifest)
        whole &= all(isinstance(r["tokens"], int) and Path(r["name"]).name == r["name"] for r in records)
        np.dtype(manifest["dtype"])
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise MasaError(f"{path} is not one of tokens; make it anew with `{MEND}`.")
    return manifest


class PackedTokens:
    """Blocks of ``context`` tokens from a token directory, in a random order that depends on the seed alone.

    Works as a map-style data set for Hugging Face's Trainer: item i is ``{"input_ids", "labels"}`` of length
    ``context``.

    Raises:
        MasaError: a shard is missing, damaged or of the wrong size, or there are fewer blocks than asked for.
    """

    def __init__(self, directory: Path, context: int, blocks: int, seed: int) -> None:
        self.context = context
        manifest = read_manifest(directory)
        dtype = np.dtype(manifest["dtype"])
        self.shards = [_open_shard(directory, record, dtype) for record in manifest["train"]["shards"]]
        _verify(directory, manifest["train"]["shards"])
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
    manifest = read_manifest(directory)
    record = manifest["validation"]
    ids = _open_shard(directory, record, np.dtype(manifest["dtype"]))
    _verify(directory, [record])
    return np.array(ids, np.int64), record


def _verify(directory: Path, records: list[dict[str, Any]]) -> None:
    files.verify(directory, {r["name"]: r.get("sha256") for r in records}, f"make it anew with `{MEND}`")


def _open_shard(directory: Path, record: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    path = directory / record["name"]
    expected = record["tokens"] * dtype.itemsize
    actual = path.stat().st_size if path.is_file() else -1
    if actual != expected:
        raise MasaError(
            f"{path} {'is missing' if actual < 0 else f'has {actual} bytes'}, expected {expected}; delete "
            f"{directory / 'manifest.json'} and make it anew with `{MEND}`."
        )
    return np.memmap(path, dtype=dtype, mode="r")
