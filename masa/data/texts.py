"""The texts of files, folders and data sets on the hub, one after the other: the one reader that everything uses.

The text column is text and nothing else: a row without one (null) is passed over and counted, a number or an object in
it is refused with file and line. A column of chat messages becomes text by the tokenizer's own template.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

from masa.data import hub, sources
from masa.data.formats import File, format_of, lines, rows
from masa.errors import MasaError, did_you_mean, unknown

Chat = Callable[[Sequence[dict[str, Any]]], str]
COLUMNS = ("text", "content", "page", "messages")
"""Where the text is looked for if nothing says where it is; the last are chats."""
OPTION = "--column"
"""What says where it is."""


def texts(
    files: Iterable[File],
    columns: Sequence[str] = COLUMNS,
    *,
    kind: str | None = None,
    chat: Chat | None = None,
    option: str = OPTION,
) -> Iterator[str]:
    """The texts of files, in their order.

    Args:
        files: to read.
        columns: names of which a row's first holds its text.
        kind: of all files, a key of :data:`masa.data.formats.FORMATS`; by default what each one is.
        chat: what makes text of a list of messages.
        option: what sets the column, for messages.

    Raises:
        MasaError: a row without such a column, with something else in it than text, or with text that UTF-8 cannot
            hold; the message names file, line or row, what was expected and the mend.
    """
    for file in files:
        with _Skipped(file.name) as skipped:
            for place, row in rows(file, columns, kind):
                skipped.of += 1
                for value, column in _of_row(row, columns, f"{file.name}, {place}", option):
                    if value is None:
                        skipped.count += 1
                    else:
                        yield _text(value, f"{file.name}, {place}: {column!r}", chat, option)


def _of_row(row: Any, columns: Sequence[str], where: str, option: str) -> Iterable[tuple[Any, str]]:
    """(value, column) of a row; of masa's own file of texts all of its documents."""
    if not isinstance(row, dict):
        return [(row, columns[0])]
    found = next((column for column in columns if column in row), None)
    if found is not None:
        return [(row[found], found)]
    if isinstance(row.get("documents"), list):
        return [(document, "documents") for document in row["documents"]]
    if "unavailable" in row and "source" in row:
        raise MasaError(f"{where}: holds no documents: {row['unavailable']}")
    error = unknown(f"{where}: no column {' or '.join(map(repr, columns))} here; column", columns[0], row)
    raise MasaError(f"{error} Set {option}.")


def _text(value: Any, where: str, chat: Chat | None, option: str) -> str:
    if is_chat(value):
        if chat is None:
            raise MasaError(
                f"{where} is a chat, and there is no tokenizer yet whose template makes text of it: use a tokenizer "
                f"that has one (data.tokenizer.source), or set {option} to a column of text."
            )
        try:
            value = chat(value)
        except MasaError as error:
            raise MasaError(f"{where}: {error}") from error
    if not isinstance(value, str):
        raise MasaError(
            f"{where} is {type(value).__name__}, expected text. Mend the row, or set {option} to the column of text."
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise MasaError(
            f"{where} holds a lone surrogate (\\u{code:04x} at character {error.start}), half of a character, which "
            "UTF-8 cannot write. Mend or remove the row."
        ) from error
    return value


def is_chat(value: Any) -> bool:
    """Whether a value is a list of messages, each with a role and a content."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and {"role", "content"} <= set(m) for m in value)
    )


def template_of(tokenizer: Any) -> Chat:
    """What makes text of a chat: the tokenizer's template.

    Raises:
        MasaError: (when called) the tokenizer has none, or it refuses the chat.
    """

    def chat(messages: Sequence[dict[str, Any]]) -> str:
        if not getattr(tokenizer, "chat_template", None):
            raise MasaError(
                "A column of messages needs a tokenizer with a chat template, and this one has none: set the column to "
                "one of text, or use the tokenizer of a chat model."
            )
        try:
            return tokenizer.apply_chat_template(list(messages), tokenize=False)
        except Exception as error:  # of the template, which is the tokenizer's own program
            raise MasaError(f"The tokenizer's chat template refuses a row of messages ({error}).") from error

    return chat


class _Skipped:
    """Counts rows without text, and says so once no more are asked for."""

    def __init__(self, name: str) -> None:
        self.name, self.count, self.of = name, 0, 0

    def __enter__(self) -> _Skipped:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.count and (kind is None or kind is GeneratorExit):
            said = f"{self.name}: {self.count:,} of {self.of:,} rows hold no text (null); they are passed over"
            print(said, file=sys.stderr, flush=True)


def find(
    given: str | Path, *, subset: str | None = None, split: str | None = None, mirror: str | None = None
) -> list[File]:
    """The files that a user names: a file, a folder, a glob, or ``hub:ORG/NAME[@COMMIT]``.

    Args:
        given: that.
        subset, split: of a data set on the hub or of a folder in the hub's layout.
        mirror: a directory that stands in for the hub.

    Raises:
        MasaError: nothing there; or a folder whose texts are of several kinds or splits, of which one must be named.
    """
    if str(given).startswith("hub:"):
        return hub.files(sources.parse(str(given), pinned=False), mirror, subset, split)
    path = Path(given)
    if path.is_dir() and (subset or hub.has_layout(path)):
        return hub.in_layout(str(path), None, str(path), subset, split)
    if path.is_dir():
        return [File.local(p) for p in sources.folder(path, split)]
    if split:
        raise MasaError(
            f"A split ({split}) belongs to a folder or a data set on the hub, but {path} is none. Remove it."
        )
    found = sources.expand(path)
    if not found:
        if os.path.lexists(path):
            what = "a link to what does not exist" if path.is_symlink() and not path.exists() else "no regular file"
            raise MasaError(f"{path} is {what}. Texts are read more than once: give a file.")
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*")]) if path.parent.is_dir() else ""
        raise MasaError(f"Text file {path} does not exist.{near} A data set on the hub is written hub:ORG/NAME.")
    return [File.local(p) for p in found]


class Documents:
    """The texts that a user gives, read anew at every pass, so that a file of any size costs the memory of a few rows.

    A plain text file is one document, a row of every other format is one.

    Args:
        source: what :func:`find` takes, or a list of texts (or of chats).
        column: that holds the text; by default the first of :data:`COLUMNS` that a row has.
        subset, split: of a data set on the hub, or of a folder.
        tokenizer: whose template makes text of chats.
        mirror: a directory that stands in for the hub; by default the environment variable MASA_MIRROR.

    Raises:
        MasaError: there is no such source; and while it is read, see :func:`texts`.
    """

    def __init__(
        self,
        source: str | Path | Iterable[Any],
        column: str | None = None,
        *,
        subset: str | None = None,
        split: str | None = None,
        tokenizer: Any = None,
        mirror: str | None = None,
    ) -> None:
        self.columns = [column] if column else list(COLUMNS)
        self.chat = template_of(tokenizer)
        self.given: list[Any] | None = None
        self.files: list[File] = []
        if isinstance(source, str | Path):
            self.files = find(source, subset=subset, split=split, mirror=mirror or os.environ.get("MASA_MIRROR"))
        else:
            self.given = list(source)

    def __iter__(self) -> Iterator[str]:
        return self._texts(self.chat)

    def _texts(self, chat: Chat) -> Iterator[str]:
        if self.given is not None:
            yield from listed(self.given, chat)
        for file in self.files:
            if not file.rows and format_of(file) == "text":
                yield "".join(line for _, line in lines(file))
            else:
                yield from texts([file], self.columns, chat=chat)

    def check(self) -> Documents:
        """Read everything once, but chats not by the template and nothing from a network; itself.

        Raises:
            MasaError: what every later pass would raise, or no text at all.
        """
        if any("://" in file.name or file.rows for file in self.files):
            return self
        with redirect_stderr(StringIO()):  # what is passed over is said by the pass that counts
            some = sum(bool(text.strip()) for text in self._texts(lambda messages: "a chat"))
        if not some:
            names = ", ".join(file.name for file in self.files[:3])
            raise MasaError(f"{names or 'The list of documents'} holds no text at all. Give a file with some.")
        return self


def listed(given: Iterable[Any], chat: Chat, name: str = "the list, document") -> Iterator[str]:
    """The texts of a list, or of a column of a data set in memory."""
    with _Skipped(name.rpartition(",")[0]) as skipped:
        for skipped.of, value in enumerate(given, 1):
            if value is None:
                skipped.count += 1
            else:
                yield _text(value, f"{name} {skipped.of}", chat, "column=")
