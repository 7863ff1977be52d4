"""Rows of JSON, Parquet, Arrow, CSV and plain text, plain or compressed, one after the other, each with its place.

What a file is says its name, ``.gz`` and the like left aside, or its first bytes where the name does not. The parsers
are pyarrow's, ``json`` and ``csv``. ``datasets``' own json and csv loaders are not used for rows: they infer a column's
type or cast to the declared one (with ``Value("string")``, 12 becomes "12", and one such row puts the texts around it
in quotes), and cannot say in which line something was wrong. Where a data set's files lie is theirs to find
(:mod:`masa.data.hub`).

A new format is one function in :data:`FORMATS`, one line in :data:`SUFFIXES`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from masa.data.json_stream import values
from masa.errors import MasaError, unknown

Row = tuple[str, Any]
"""A place in a file ("line 3") and what stands there: of JSON any value, of plain text a document, else a mapping of
the one column that was asked for, so that an object in it is not taken for a row."""

SUFFIXES = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet", ".arrow": "arrow"}
SUFFIXES |= {".feather": "arrow", ".csv": "csv", ".tsv": "csv", ".txt": "text", ".text": "text", ".md": "text"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
HEAD = 1 << 16
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""What the libraries raise of a file that is cut short or was changed."""


@dataclass(frozen=True)
class File:
    """A file to read.

    Attributes:
        name: in messages.
        open: opens it anew, from its beginning; None of what is no file.
        mend: what to do about a damaged one.
        rows: gives the rows of what is no file, for columns.
    """

    name: str
    open: Callable[[], BinaryIO] | None
    mend: str = "get it again"
    rows: Callable[[Sequence[str]], Iterator[Row]] | None = None

    @classmethod
    def local(cls, path: Path) -> File:
        return cls(str(path), lambda: path.open("rb"))


def _zstandard(raw: BinaryIO) -> BinaryIO:
    import pyarrow

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))  # type: ignore[arg-type]


_PACKED: dict[bytes, Callable[[BinaryIO], BinaryIO]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),  # type: ignore[dict-item, return-value]
    b"\x28\xb5\x2f\xfd": _zstandard,
    b"BZh": bz2.BZ2File,  # type: ignore[dict-item]
    b"\xfd7zXZ\x00": lzma.LZMAFile,  # type: ignore[dict-item]
}
_BINARY = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_NEITHER = {
    b"PK\x03\x04": "a zip archive: unpack it",
    b"%PDF": "a PDF: extract its text",
    b"\xff\xfe\0\0": "UTF-32, not UTF-8: convert it (iconv -f UTF-32 -t UTF-8)",
    b"\xff\xfe": "UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "UTF-16, not UTF-8: convert it (iconv -f UTF-16 -t UTF-8)",
}


def opened(file: File) -> BinaryIO:
    """The bytes of a file, decompressed if its first bytes say that it is compressed, whatever it is called.

    Raises:
        MasaError: there is no such file.
    """
    try:
        raw = file.open()
        head = raw.read(8)
        raw.seek(0)
    except FileNotFoundError as error:
        raise MasaError(f"{file.name} does not exist.") from error
    except OSError as error:
        raise MasaError(f"{file.name} cannot be read ({error}).") from error
    unpack = next((unpack for mark, unpack in _PACKED.items() if head.startswith(mark)), None)
    return unpack(raw) if unpack else raw


def suffix_of(name: str) -> str:
    """The suffix that tells the format, in small letters: ".jsonl" of "C4.JSONL.gz"."""
    path = Path(name.lower())
    return Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix


def format_of(file: File) -> str:
    """A key of :data:`FORMATS`: what the bytes say where they leave no doubt, else the name, else what JSON looks like.

    Raises:
        MasaError: nothing that holds text, or not what its name says.
    """
    named = SUFFIXES.get(suffix_of(file.name))
    head = _head(file)
    for mark, kind in _BINARY.items():
        if head.startswith(mark):
            return kind
    for mark, kind in _NEITHER.items():
        if head.startswith(mark):
            raise MasaError(f"{file.name} is {kind}.")
    if named in ("parquet", "arrow"):
        what = "Parquet" if named == "parquet" else "Arrow"
        raise MasaError(f"{file.name} is corrupt or not {what}: its first bytes are {head[:6]!r}; {file.mend}.")
    if b"\0" in head:
        raise MasaError(f"{file.name} is neither text nor a format that masa reads ({', '.join(FORMATS)}).")
    return named or ("json" if _looks_like_json(head) else "text")


def _head(file: File) -> bytes:
    """The first bytes, as many as are whole."""
    head = b""
    with opened(file) as stream, suppress(*DAMAGED):
        while len(head) < HEAD and (more := getattr(stream, "read1", stream.read)(HEAD)):
            head += more
    return head


def _looks_like_json(head: bytes) -> bool:
    first = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if first[:1] == b"{":
        line = first.split(b"\n", 1)[0]
        try:
            return isinstance(json.loads(line), dict)
        except ValueError:
            return len(first) >= HEAD - 3 or first[1:].lstrip()[:1] == b'"'  # a long line, or one value on many
    return first[:1] == b"[" and first[1:].lstrip()[:1] in (b"{", b'"')


def rows(file: File, columns: Sequence[str], kind: str | None = None) -> Iterator[Row]:
    """Rows of a file with the memory of a few of them.

    Args:
        columns: names of which the first that exists holds the text; of no meaning to JSON, whose rows come whole,
            and plain text.
        kind: a key of :data:`FORMATS`; by default what the file is.

    Raises:
        MasaError: damaged, of another format, or without such a column; the message names file and line or row.
    """
    if file.rows:
        return file.rows(columns)
    found = format_of(file)
    if kind and found not in (kind, "text"):
        raise MasaError(f"{file.name} is {found}, not {kind}: set the reader to {found}, or to files, which looks.")
    return FORMATS[kind or found](file, columns)


def lines(file: File) -> Iterator[tuple[int, str]]:
    """Numbered lines of a UTF-8 file, without its byte order mark, with errors that name the file and line."""
    number = 0
    try:
        with opened(file) as stream:
            for number, raw in enumerate(stream, 1):
                yield number, (raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw).decode("utf-8")
    except UnicodeDecodeError as error:
        raise MasaError(f"{file.name}, line {number}: not UTF-8 ({error.reason} at byte {error.start}).") from error
    except DAMAGED as error:
        raise MasaError(f"{file.name} is corrupt or truncated after line {number} ({error}).") from error


# -------------------------------------------------------------------------------------------------------- formats


def _json(file: File, _: Sequence[str]) -> Iterator[Row]:
    """JSON lines; or one array, whose elements are the rows; or values on several lines each."""
    numbered = ((number, line) for number, line in lines(file) if line.strip())
    whole = next(numbered, None)
    first = whole[1] if whole else ""
    if first.lstrip()[:1] == "[" or _goes_on(first):
        with opened(file) as stream, io.TextIOWrapper(stream, encoding="utf-8-sig") as text:
            at = 1
            try:
                for at, value in values(text):
                    yield f"line {at}", value
            except UnicodeDecodeError as error:
                raise MasaError(f"{file.name}, after line {at}: not UTF-8 ({error.reason}).") from error
            except (ValueError, RecursionError) as error:
                raise MasaError(f"{file.name}: not valid JSON ({error}).") from error
            except DAMAGED as error:
                raise MasaError(f"{file.name} is corrupt or truncated after line {at} ({error}).") from error
        return
    for number, line in itertools.chain([whole] if whole else [], numbered):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MasaError(f"{file.name}, line {number}: not valid JSON ({error}).") from error
        yield f"line {number}", value


def _goes_on(line: str) -> bool:
    """Whether a line is the beginning of a JSON value that the next lines end."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return line[:1] in "{[" and error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):
        pass
    return False


def _text(file: File, _: Sequence[str]) -> Iterator[Row]:
    """Documents, which two blank lines separate."""
    document: list[str] = []
    blank = start = 0
    for number, line in lines(file):
        blank = 0 if line.strip() else blank + 1
        if blank == 2 and document:
            yield f"line {start}", "".join(document).strip()
            document = []
        else:
            start = start if document else number
            document.append(line)
    yield f"line {start}", "".join(document).strip()


def _csv(file: File, columns: Sequence[str]) -> Iterator[Row]:
    """A header and rows, separated by comma, tab, semicolon or bar: whichever gives such a column."""
    csv.field_size_limit(2**31 - 1)
    texts = (line for _, line in lines(file))
    first, passed = next(texts, ""), 0
    try:
        headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in ",\t;|"}
        mark = next((mark for mark, names in headers.items() if set(columns) & set(names)), None)
        if mark is None and not first:
            raise MasaError(f"{file.name} is empty, without even a header.")
        if mark is None:
            raise unknown(f"{file.name}: column", columns[0], max(headers.values(), key=len))
        at = headers[mark].index(next(column for column in columns if column in headers[mark]))
        reader = csv.reader(texts, delimiter=mark, strict=True)
        for row in reader:
            passed = reader.line_num
            if row and at >= len(row):
                few = f"{len(row)} fields, but the header has {len(headers[mark])}"
                raise MasaError(f"{file.name}, line {passed + 1}: {few}.")
            if any(row[len(headers[mark]) :]):
                raise MasaError(
                    f"{file.name}, line {passed + 1}: {len(row)} fields, but the header has {len(headers[mark])}. Put "
                    "a text with the separator in it in quotes."
                )
            if row:
                yield f"line {passed + 1}", {headers[mark][at]: row[at]}
    except csv.Error as error:
        raise MasaError(f"{file.name}, after line {passed + 1}: not valid CSV ({error}).") from error


def _parquet(file: File, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    row = group = 0
    try:
        with (
            _seekable(file) as stream,
            pyarrow.parquet.ParquetFile(
                stream, page_checksum_verification=True, pre_buffer=False, buffer_size=1 << 20
            ) as parquet,
        ):
            column, value = _column(file, parquet.schema_arrow, columns)
            for group in range(parquet.metadata.num_row_groups):
                for batch in parquet.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                    for found in batch.column(0).to_pylist():
                        row += 1
                        yield f"row {row}", {column: value(found)}
    except (pyarrow.ArrowException, *DAMAGED, UnicodeDecodeError) as error:
        raise MasaError(
            f"{file.name} is corrupt or not Parquet, after row {row} in row group {group} ({error}); {file.mend}."
        ) from error


def _seekable(file: File) -> BinaryIO:
    stream = opened(file)
    if not stream.seekable():
        raise MasaError(f"{file.name} is Parquet, which is read from its end, and compressed as a whole: unpack it.")
    return stream


def _arrow(file: File, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow

    row = number = 0
    try:
        with opened(file) as stream, _record_batches(stream) as (schema, batches):
            column, value = _column(file, schema, columns)
            for batch in batches:
                number += 1
                for found in batch.column(column).to_pylist():
                    row += 1
                    yield f"row {row}", {column: value(found)}
    except (pyarrow.ArrowException, *DAMAGED, UnicodeDecodeError) as error:
        raise MasaError(
            f"{file.name} is corrupt or no Arrow stream, after row {row} in batch {number} ({error}); {file.mend}."
        ) from error


class _record_batches:
    """The schema and batches of an Arrow file or stream, which are read as they are asked for."""

    def __init__(self, stream: BinaryIO) -> None:
        import pyarrow

        head = stream.read(6)
        stream.seek(0)
        self.reader = (pyarrow.ipc.open_file if head == b"ARROW1" else pyarrow.ipc.open_stream)(stream)

    def __enter__(self) -> tuple[Any, Iterable[Any]]:
        file = hasattr(self.reader, "num_record_batches")
        batches = map(self.reader.get_batch, range(self.reader.num_record_batches)) if file else self.reader
        return self.reader.schema, batches

    def __exit__(self, *_: object) -> None:
        self.reader.close() if hasattr(self.reader, "close") else None


def _column(file: File, schema: Any, columns: Sequence[str]) -> tuple[str, Callable[[Any], Any]]:
    """The column that holds the text, and what makes a row's value of what is stored (JSON in a ``Json`` column)."""
    column = next((name for name in columns if name in schema.names), None)
    if column is None:
        raise unknown(f"{file.name}: column", columns[0], schema.names)
    said = (schema.metadata or {}).get(b"huggingface", b"{}")
    feature = json.loads(said).get("info", {}).get("features", {}).get(column, {})
    kept_as_json = getattr(schema.field(column).type, "extension_name", "") == "arrow.json"
    if kept_as_json or (isinstance(feature, dict) and feature.get("_type") == "Json"):
        return column, lambda found: found if found is None else json.loads(found)
    return column, lambda found: found


FORMATS: dict[str, Callable[[File, Sequence[str]], Iterator[Row]]] = {
    "json": _json,
    "parquet": _parquet,
    "arrow": _arrow,
    "csv": _csv,
    "text": _text,
}
