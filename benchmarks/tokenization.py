"""Tokens/s of masa's tokenization against the tokenizer alone, and its memory as the corpus grows.

    python benchmarks/tokenization.py

Text is that of the default run, API documentation (config/config.yaml), written to JSON lines and tokenized with a
tokenizer trained as there. Speed: four ways over the same documents, in turn and in one process, with one thread
(TOKENIZERS_PARALLELISM=false) and with all that this process may use (RAYON_NUM_THREADS).

- encode_batch: `tokenizers` alone, over the same batches of documents, which are in memory; the result is dropped;
- encode_batch_fast: the same without offsets, which is what masa calls: a harder comparison, without a target;
- writing: the documents in memory to token files, their checksum and state, as `masa tokenize` does it;
- whole call: that, and loading the tokenizer, reading JSON lines, splitting, shuffling and the held-out tokens.
  Tokens are those of the training files alone; the held-out ones cost the same however long these are.

Time is the clock's, since `tokenizers` runs on several threads: nothing else should run meanwhile.

Memory: a corpus of 1, 4 and 16 times as many tokens, each in a process of its own: its whole peak, as a cluster counts
it, and what is beyond that process with its libraries imported and the tokenizer loaded. The latter is small and, since
the threads of `tokenizers` allocate as they happen to run, differs by some MiB from one process to the next. Documents
wait in the shuffle buffer, whose size is a setting; it is small here, so that the smallest corpus fills it as well.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from harness import Row, in_turn, parser, save, status_bytes

from masa.data import documents, tokenize
from masa.study import config

TIMES = (1, 4, 16)
"""Sizes of the corpora whose memory is compared."""
BUFFER = 128
"""Documents in the shuffle buffer where memory is measured."""
BYTES_A_TOKEN = 4.4
"""Text a training token that is written, with the held-out part and something to spare; the tokenizer's own is 3.7."""
MIB = 2**20


def main() -> int:
    given = parser(__doc__).parse_args()
    tokens, unit, rounds = (60_000, 100_000, 3) if given.quick else (2_400_000, 2_000_000, 6)
    settings = config.load()
    data, cache = settings["data"], Path(settings["cache"])
    if given.quick:
        data["tokenizer"]["training_bytes"] = 1_000_000
    cores = len(os.sched_getaffinity(0))
    os.environ["RAYON_NUM_THREADS"] = str(cores)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        tokenize.make_tokenizer(data, cache, None, folder / "tokenizer")
        texts = list(documents.read(data["corpus"], cache, None, "all"))
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        rows = memory(texts, unit, folder)
        rows += speed(texts, tokens, rounds, cores, folder)
    found = {"tokens": tokens, "rounds": rounds, "threads": cores, "batch": tokenize.BATCH, "shard": tokenize.SHARD}
    found |= {"memory": {"tokens": [n * unit for n in TIMES], "shuffle_buffer": BUFFER}}
    return save("tokenization", rows, found | {"corpus": data["corpus"], "tokenizer": data["tokenizer"]}, given.out)


def corpus(texts: list[str], tokens: int, path: Path, buffer: int) -> dict[str, Any]:
    """Write documents for so many training tokens as JSON lines, from the start again where they run out."""
    size, number = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < tokens * BYTES_A_TOKEN:
            document = f"{number}. {texts[number % len(texts)]}"  # numbered, so that each falls into a split by itself
            file.write(json.dumps({"text": document}) + "\n")
            size, number = size + len(document), number + 1
    return {
        "corpus": {
            "source": f"file:{path}",
            "reader": "json",
            "validation_fraction": 0.06,
            "validation_tokens": 24_000,
            "shuffle_buffer": buffer,
        }
    }


def memory(texts: list[str], unit: int, folder: Path) -> list[Row]:
    """Peak memory of whole calls, and of the largest in terms of the smallest."""
    rows, peaks, beyond = [], [], []
    for times in TIMES:
        data = corpus(texts, times * unit, folder / f"{times}.jsonl", BUFFER)
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            before, peak = fresh.apply(resident, (data, times * unit, folder))
        peaks.append(peak / MIB)
        beyond.append((peak - before) / MIB)
        rows.append(Row(f"peak memory, {times * unit:,} tokens", peaks[-1], "MiB"))
        rows.append(Row(f"beyond libraries and tokenizer, {times * unit:,} tokens", beyond[-1], "MiB"))
    label = f"{TIMES[-1]} : {TIMES[0]} times the tokens"
    rows.append(Row(f"peak memory, {label}", peaks[-1] / peaks[0], target="<= 1.10"))
    rows.append(Row(f"beyond libraries and tokenizer, {label}", beyond[-1] / beyond[0]))
    return rows


def resident(data: Mapping[str, Any], tokens: int, folder: Path) -> tuple[int, int]:
    """Bytes of resident memory before a call and at its peak (Linux)."""
    tokenize.load_tokenizer(folder / "tokenizer")
    before = status_bytes("VmRSS")
    tokenize.tokenize(data, folder / "tokenizer", folder, None, tokens, folder / f"memory-{tokens}")
    return before, status_bytes("VmHWM")


def speed(texts: list[str], tokens: int, rounds: int, cores: int, folder: Path) -> list[Row]:
    """Tokens/s of every way, and of masa in terms of `tokenizers` alone."""
    data = corpus(texts, tokens, folder / "speed.jsonl", buffer=1000)
    tokenizer = tokenize.load_tokenizer(folder / "tokenizer")
    fast = tokenizer.backend_tokenizer
    stream = documents.read(data["corpus"], folder, None, "train")
    first = list(_of(tokens, stream, tokenizer))
    places = (folder / f"written-{number}" for number in itertools.count())  # every call begins anew

    def alone(encode: Callable[..., Any]) -> None:
        for group in tokenize._batched(first, tokenize.BATCH):
            encode(list(group), add_special_tokens=False)

    def write() -> None:
        dtype = np.dtype("<u2") if len(tokenizer) <= 2**16 else np.dtype("<u4")
        tokenize._write_train(iter(first), tokenizer, tokens, dtype, next(places), {}, "these documents")

    ways = {
        "encode_batch": lambda: alone(fast.encode_batch),
        "encode_batch_fast": lambda: alone(fast.encode_batch_fast),
        "writing": write,
        "whole call": lambda: tokenize.tokenize(data, folder / "tokenizer", folder, None, tokens, next(places)),
    }
    rows = []
    for threads in sorted({1, cores}):
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
        timed, label = (
            in_turn(f"{threads} threads", ways, rounds, clock=time.perf_counter),
            f"{threads} thread{'s' * (threads > 1)}",
        )
        rows += [Row(f"{way}, {label}", tokens / timed.median(way), "tokens/s") for way in ways]
        for way in ("writing", "whole call"):
            rows += [timed.speed(f"{way} : encode_batch, {label}", way, "encode_batch", ">= 0.90")]
            rows += [timed.speed(f"{way} : encode_batch_fast, {label}", way, "encode_batch_fast")]
    return rows


def _of(tokens: int, stream: Iterator[str], tokenizer: Any) -> Iterator[str]:
    """The documents that make up so many tokens."""
    for document, ids in tokenize._encode(stream, tokenizer, np.dtype("<u4")):
        yield document
        tokens -= len(ids)
        if tokens <= 0:
            return


if __name__ == "__main__":
    sys.exit(main())
