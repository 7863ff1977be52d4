"""From documents to tokens: train or fetch a tokenizer, then pack a stream of documents into token files.

A token directory holds ``train-00000.bin``, … and ``validation.bin`` (little-endian unsigned integers, documents
separated by the end-of-sequence token) and ``manifest.json`` with counts and checksums.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from masa.data import documents, sources, tokenizers
from masa.data.texts import template_of
from masa.data.tokenizers import load_tokenizer
from masa.errors import MasaError
from masa.runs import files
from masa.runs.fingerprint import fingerprint
from masa.runs.progress import Progress
from masa.runs.run import write_json

EOS = "</s>"
VOCAB = "data.tokenizer.vocab_size"
BATCH = 256
"""Documents that are encoded at once."""
SHARD = 2**26
"""Tokens a shard; also what is lost at most when tokenization is interrupted."""


def make_tokenizer(data: Mapping[str, Any], cache: Path, mirror: str | None, out: Path) -> dict[str, Any]:
    """Train or fetch the tokenizer that ``data.tokenizer`` names, and write it as a Hugging Face tokenizer.

    Raises:
        MasaError: the tokenizer cannot be had, or its vocabulary is not ``vocab_size``.
    """
    spec = data["tokenizer"]
    tokenizer = _train(data, cache, mirror) if spec["source"] == "train" else _pretrained(spec["source"], mirror)
    if len(tokenizer) != spec["vocab_size"]:
        raise MasaError(
            f"The tokenizer {spec['source']!r} has {len(tokenizer)} tokens, but data.tokenizer.vocab_size is "
            f"{spec['vocab_size']}. Correct it."
        )
    if tokenizer.eos_token_id is None:
        raise MasaError(f"The tokenizer {spec['source']!r} has no end-of-sequence token, which separates documents.")
    with files.whole_files(out) as folder:
        tokenizer.save_pretrained(folder)
    manifest = {
        "source": spec["source"],
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "sha256": files.sha256_of(out / "tokenizer.json"),
    }
    write_json(out / "manifest.json", manifest)
    return manifest


def _train(data: Mapping[str, Any], cache: Path, mirror: str | None) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=data["tokenizer"]["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    left = data["tokenizer"].get("training_bytes") or 2**62

    def texts() -> Iterator[str]:
        nonlocal left
        for text in documents.read(data["corpus"], cache, mirror, "train"):
            yield text
            left -= len(text.encode())
            if left <= 0:
                return

    tokenizer.train_from_iterator(texts(), trainer)
    found, wanted, limit = tokenizer.get_vocab_size(), trainer.vocab_size, data["tokenizer"].get("training_bytes")
    if found > wanted:
        raise MasaError(f"data.tokenizer.vocab_size = {wanted} is too small: bytes and {EOS} alone are {found} tokens.")
    if found < wanted:
        mend = "Raise data.tokenizer.training_bytes"
        if left > 0:
            mend = f"That is all of the training text ({data['corpus']['source']}): it is too little. Give more text"
        read = f"{(limit or 2**62) - left:,} bytes of training documents"
        raise MasaError(f"{read} give {found:,} tokens, but {VOCAB} is {wanted:,}. {mend}, or lower {VOCAB}.")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS)


def _pretrained(source: str, mirror: str | None) -> Any:
    parsed = sources.parse(source)
    if parsed.scheme == "hub":
        path = sources.snapshot(parsed, mirror, tokenizers.PATTERNS)
    elif parsed.scheme == "mirror":
        path = sources.mirror_root(mirror, source) / parsed.name
    else:
        path = Path(parsed.name)
    return load_tokenizer(path)


def tokenize(
    data: Mapping[str, Any], tokenizer_dir: Path, cache: Path, mirror: str | None, tokens: int, out: Path
) -> dict:
    """Write ``tokens`` training tokens and the held-out tokens; memory does not grow with the corpus.

    An interrupted call goes on after its last whole shard.

    Raises:
        MasaError: the corpus holds fewer tokens than asked for.
    """
    if tokens < 1:
        raise MasaError(f"The number of training tokens must be at least 1, got {tokens}.")
    corpus = data["corpus"]
    tokenizer = load_tokenizer(tokenizer_dir)
    dtype = np.dtype("<u2") if len(tokenizer) <= 2**16 else np.dtype("<u4")
    identity = {
        "corpus": dict(corpus),
        "tokenizer": files.sha256_of(tokenizer_dir / "tokenizer.json"),
        "tokens": tokens,
        "code": fingerprint("masa.data.tokenize"),
    }
    chat = template_of(tokenizer)
    held_out = documents.read(corpus, cache, mirror, "validation", chat=chat)
    validation = _write_validation(held_out, tokenizer, corpus["validation_tokens"], dtype, out)
    stream = documents.read(corpus, cache, mirror, "train", chat=chat)
    train = _write_train(stream, tokenizer, tokens, dtype, out, identity, str(corpus["source"]))
    manifest = {
        **{k: identity[k] for k in ("corpus", "tokenizer")},
        "dtype": dtype.str,
        "vocab_size": len(tokenizer),
        "train": {"tokens": sum(s["tokens"] for s in train), "shards": train},
        "validation": validation,
    }
    write_json(out / "manifest.json", manifest)
    (out / "state.json").unlink(missing_ok=True)
    return manifest


def _encode(
    texts: Iterable[str], tokenizer: Any, dtype: np.dtype, batch: int = BATCH
) -> Iterator[tuple[str, np.ndarray]]:
    """Pairs of a document and its tokens with the end-of-sequence token; a batch is encoded on all cores."""
    fast, eos = tokenizer.backend_tokenizer, tokenizer.eos_token_id
    for group in _batched(texts, batch):
        for text, encoding in zip(group, fast.encode_batch_fast(list(group), add_special_tokens=False), strict=True):
            ids = encoding.ids  # a new list at every look
            ids.append(eos)
            yield text, np.array(ids, dtype)


def _batched(texts: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    iterator = iter(texts)
    while group := tuple(itertools.islice(iterator, size)):
        yield group


def _write_validation(texts: Iterable[str], tokenizer: Any, limit: int, dtype: np.dtype, out: Path) -> dict[str, Any]:
    """Whole documents until ``limit`` tokens, with their words and bytes, which perplexities are taken over."""
    parts: list[np.ndarray] = []
    ends: list[int] = []
    words = size = 0
    for text, ids in _encode(texts, tokenizer, dtype, batch=16):
        parts.append(ids)
        ends.append(len(ids) + (ends[-1] if ends else 0))
        words, size = words + len(text.split()), size + len(text.encode())
        if ends[-1] >= limit:
            break
    record = _write_shard(out / "validation.bin", parts)
    return record | {"documents": len(ends), "words": words, "bytes": size, "document_ends": ends}


def _write_train(
    texts: Iterable[str], tokenizer: Any, tokens: int, dtype: np.dtype, out: Path, identity: dict, source: str
) -> list[dict[str, Any]]:
    state_file = out / "state.json"
    try:
        state = json.loads(state_file.read_text()) if state_file.is_file() else {}
        sums = {s["name"]: s["sha256"] for s in state.get("shards", ())}
        whole = all((out / n).is_file() and files.sha256_of(out / n) == wanted for n, wanted in sums.items())
    except (ValueError, KeyError, TypeError, AttributeError):  # damaged: what it says is made anew
        state, whole = {}, False
    if state.get("identity") != identity or not whole:
        state = {"identity": identity, "documents": 0, "rest": [], "shards": []}
    shards: list[dict[str, Any]] = state["shards"]
    rest, count = np.array(state["rest"], dtype), state["documents"]  # the last document's tokens beyond its shard
    done = sum(s["tokens"] for s in shards)
    progress = Progress("tokenize", tokens, "tokens")
    encoded = _encode(itertools.islice(texts, count, None), tokenizer, dtype)

    def take(size: int) -> Iterator[np.ndarray]:
        nonlocal rest, count, done
        while size:
            if not len(rest):
                _, rest = next(encoded, (None, None))
                if rest is None:
                    progress.close(done)
                    raise MasaError(
                        f"{source} holds only {done:,} training tokens, but the run needs {tokens:,}. Lower the "
                        "scale's training.tokens or use a larger corpus."
                    )
                count += 1
            part, rest = rest[:size], rest[size:]
            size, done = size - len(part), done + len(part)
            yield part
            progress.update(done)

    while done < tokens:
        path = out / f"train-{len(shards):05d}.bin"
        for left in out.glob(f".{path.name}.*"):  # by a process that was killed
            shutil.rmtree(left, ignore_errors=True)
        shards.append(_write_shard(path, take(min(SHARD, tokens - done))))
        write_json(state_file, state | {"documents": count, "rest": rest.tolist(), "shards": shards})
    progress.close(done)
    return shards


def _write_shard(path: Path, parts: Iterable[np.ndarray]) -> dict[str, Any]:
    """Write a file of tokens as they come, so that no shard is ever whole in memory."""
    count = 0
    with files.whole_file(path) as temporary, temporary.open("wb") as file:
        for part in parts:
            file.write(part)
            count += part.size
    return {"name": path.name, "tokens": count, "sha256": files.sha256_of(path)}
