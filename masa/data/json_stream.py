"""Arrays of large JSON files, element by element, so that a file of any size costs the memory of one element."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from masa.errors import MasaError

CHUNK = 1 << 20
TAIL = 16
"""Characters at the end of what was read in which something may look wrong only because the rest is missing."""
_SPACE = re.compile(r"[ \t\r\n]*")
_ENDS = tuple(",:]} \t\r\n")
_DECODER = json.JSONDecoder()


def members(path: Path, arrays: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(key, element) of the named arrays at the top of a JSON object, one element in memory at a time.

    Raises:
        MasaError: the file is missing or not such an object.
    """
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from _members(_Stream(file), arrays)
    except FileNotFoundError as error:
        raise MasaError(f"{path} does not exist; COCO's layout has it.") from error
    except (OSError, ValueError) as error:
        raise MasaError(f"{path} is corrupt or no JSON object of COCO's layout ({error}).") from error


def values(file: TextIO) -> Iterator[tuple[int, Any]]:
    """(line, element) of a JSON array, or (line, value) of the values that stand one after the other.

    Raises:
        ValueError: not such JSON; the message names the line.
    """
    stream = _Stream(file)
    if stream.next() == "[":
        stream.take("[")
        while stream.peek() != "]":
            yield stream.line(), stream.value()
            if stream.peek() != "]":
                stream.take(",")
                if stream.peek() == "]":
                    raise stream.wrong("a comma before the end of the array")
        stream.take("]")
        if stream.next():
            raise stream.wrong(f"found {stream.next()!r} after the array")
    while stream.next():
        yield stream.line(), stream.value()


def _members(stream: _Stream, arrays: Collection[str]) -> Iterator[tuple[str, Any]]:
    stream.take("{")
    while stream.peek() != "}":
        key = stream.value()
        stream.take(":")
        if key not in arrays:
            stream.value()
        else:
            stream.take("[")
            while stream.peek() != "]":
                yield key, stream.value()
                if stream.peek() != "]":
                    stream.take(",")
            stream.take("]")
        if stream.peek() != "}":
            stream.take(",")


class _Stream:
    """JSON values one after the other out of a text file."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.at, self.ended = file, "", 0, False
        self.lines, self.counted = 1, 0

    def line(self) -> int:
        """The number of the line that it stands in."""
        self.lines += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.lines

    def wrong(self, why: str, at: int | None = None) -> ValueError:
        """The error for what stands here, or at another place ahead."""
        ahead = self.text.count("\n", self.at, at) if at else 0
        return ValueError(f"line {self.line() + ahead}: {why}")

    def more(self) -> None:
        """Forget what is behind and read as much as lies ahead again, so that a long value costs linear time."""
        self.line()
        ahead = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(ahead)))
        self.text, self.at, self.counted, self.ended = ahead + chunk, 0, 0, not chunk

    def peek(self) -> str:
        """The next character that is no space."""
        if not (found := self.next()):
            raise self.wrong("it ends too early")
        return found

    def next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                return ""
            self.more()

    def take(self, character: str) -> None:
        """Pass over a character."""
        if (found := self.peek()) != character:
            raise self.wrong(f"expected {character!r}, found {found!r}")
        self.at += 1

    def value(self) -> Any:
        """Any JSON value; it counts once a character follows that ends it ("-12" may become "-12.5")."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if self.text[end : end + 1] in _ENDS or (self.ended and end == len(self.text)):
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - TAIL
                if self.ended or not cut:  # otherwise the rest of it lies ahead
                    raise self.wrong(error.msg, error.pos) from error
            if self.ended:
                raise self.wrong(f"found {self.text[end : end + 1]!r} after a value", end)
            self.more()
