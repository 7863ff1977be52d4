"""What masa reads: one row for every kind of input, of which the test makes one and the documentation's table is made.

A file ``readable_NAME.py`` beside this one holds sections of ``docs/reference/files.md``: ``CASES``, section -> rows,
each a :class:`Case`, and ``READ``, section -> what reads a path and gives what is compared. ``test_readable.py`` makes
and reads every case. ``python tests/readable.py`` writes the tables anew, between ``<!-- SECTION -->`` and
``<!-- end -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE.parent / "docs" / "reference" / "files.md"


@dataclass(frozen=True)
class Case:
    """One kind of input.

    Attributes:
        what: it is, for the table.
        then: what masa makes of it, for the table.
        make: writes it into an empty folder and returns what is to be read.
        right: what reading gives; a pattern (``re.compile``) is that of the message that refuses it.
        because: the library, its version and the public source, where one is the cause of what masa does.
    """

    what: str
    then: str
    make: Callable[[Path], Path]
    right: Any
    because: str = ""


def file(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def files(*made: Callable[[Path], Path], of: str = "") -> Callable[[Path], Path]:
    """Several files; what is read is the folder, or what ``of`` names in it."""

    def make(folder: Path) -> Path:
        for one in made:
            one(folder)
        return folder / of

    return make


def sections(what: str = "CASES") -> dict[str, Any]:
    """``CASES`` or ``READ`` of all files."""
    found: dict[str, Any] = {}
    for path in sorted(HERE.glob("readable_*.py")):
        found |= getattr(import_module(path.stem), what)
    return found


def table(section: str) -> str:
    """Markdown."""
    cases = sections()[section]
    because = any(case.because for case in cases)
    head = ["what", "what masa makes of it", *(["because of"] if because else [])]
    rows = [head, ["---"] * len(head)]
    rows += [[case.what, case.then, *([case.because] if because else [])] for case in cases]
    return "".join("| " + " | ".join(row) + " |\n" for row in rows)


def page(text: str) -> str:
    """The page with its tables made anew."""
    for section in sections():
        marks = rf"(<!-- {section} -->\n).*?(\n<!-- end -->)"
        text, count = re.subn(marks, lambda m: m[1] + "\n" + table(m[1][5:-5]) + m[2], text, flags=re.S)
        assert count == 1, f"{PAGE.name} has no place for {section}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
