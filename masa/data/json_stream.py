"""Arrays of a large JSON object, element by element, so that a file of any size costs the memory of one element."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, TextIO

from masa.errors import MasaError

CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_ENDS = tuple(",:]} \t\r\n")
_DECODER = json.JSONDecoder()


def members(path: Path, arrays: Collection[str]) -> Iterator[tuple[str, Any]]:
    """(key, element) of the named arrays at the top of a JSON object, one element in memory at a time.

    Raises:
        MasaError: the file is missing or not such an object.
    """
    try:
        with path.open(encoding="utf-8") as file:
            yield from _members(_Stream(file), arrays)
    except FileNotFoundError as error:
        raise MasaError(f"{path} does not exist; COCO's layout has it.") from error
    except (OSError, ValueError) as error:
        raise MasaError(f"{path} is corrupt or no JSON object of COCO's layout ({error}).") from error


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

    def more(self) -> None:
        """Forget what is behind and read as much as lies ahead again, so that a long value costs linear time."""
        ahead = self.text[self.at :]
        chunk = self.file.read(max(CHUNK, len(ahead)))
        self.text, self.at, self.ended = ahead + chunk, 0, not chunk

    def peek(self) -> str:
        """The next character that is no space."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if self.ended:
                raise ValueError("it ends too early")
            self.more()

    def take(self, character: str) -> None:
        """Pass over a character."""
        if (found := self.peek()) != character:
            raise ValueError(f"expected {character!r}, found {found!r}")
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
            except json.JSONDecodeError:
                if self.ended:
                    raise
            if self.ended:
                raise ValueError(f"found {self.text[end : end + 1]!r} after a value")
            self.more()
