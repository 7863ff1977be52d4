"""The picture of the house on the page on the design: the rooms of masa, floor by floor.

``python docs/_ext/house.py`` draws it anew; a test sees that this has been done.
"""

from __future__ import annotations

import textwrap
import tomllib
from html import escape
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "_static" / "house.svg"

WIDTH, HEIGHT, GAP, EDGE = 960, 62, 22, 44
LETTER = 6.3
"""Width of an average letter of a sentence, in pixels."""

STYLE = """
  text { font-family: "Helvetica Neue", Helvetica, Arial, "Liberation Sans", sans-serif; fill: #222; }
  .room { font-size: 17px; font-weight: bold; }
  .what { font-size: 12.5px; }
  .said { font-size: 13px; fill: #666; }
  rect { fill: #eef3f8; stroke: #5b7a99; }
  path { fill: none; stroke: #5b7a99; stroke-width: 1.5; }
"""


def floors() -> list[list[str]]:
    """The rooms, upper floors first: the table that ``tests/test_house.py`` holds imports to."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["masa"]["house"]


def sentence(room: str) -> str:
    """The first line of a room's docstring."""
    return (import_module(f"masa.{room}").__doc__ or "").splitlines()[0].removesuffix("::").strip().rstrip(".")


def svg() -> str:
    """The whole picture: a box a room, arrows from each floor to the one below, and one beside them all."""
    found, parts = floors(), []
    for number, rooms in enumerate(found):
        top, inner = number * (HEIGHT + GAP) + 1, WIDTH - EDGE
        width = (inner - GAP * (len(rooms) - 1)) / len(rooms)
        for i, room in enumerate(rooms):
            left = EDGE + i * (width + GAP)
            parts += _room(room, left, top, width - 1)
            if number + 1 < len(found):
                middle, bottom = left + width / 2, top + HEIGHT
                parts.append(f'<path d="M{middle:g} {bottom} v{GAP - 4}" marker-end="url(#tip)"/>')
    height = len(found) * (HEIGHT + GAP) - GAP + 2
    beside = (
        f'<path d="M20 4 V{height - 8}" marker-end="url(#tip)"/>'
        f'<text class="said" text-anchor="middle" transform="translate(13 {height / 2:g}) rotate(-90)">'
        "imports go down, to any floor below; never up, never to the room beside</text>"
    )
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
            f"<title>The rooms of masa: {escape(' > '.join(', '.join(rooms) for rooms in found))}</title>",
            f"<style>{STYLE}</style>",
            '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            '<path d="M0 0 L8 4 L0 8 z" style="fill: #5b7a99; stroke: none"/></marker>',
            '<rect width="100%" height="100%" style="fill: white; stroke: none"/>',
            beside,
            *parts,
            "</svg>\n",
        ]
    )


def _room(name: str, left: float, top: float, width: float) -> list[str]:
    lines = textwrap.wrap(sentence(name), int((width - 24) / LETTER))
    assert len(lines) <= 2, f"the first line of masa.{name}'s docstring does not fit into its room"
    return [
        f'<rect x="{left:g}" y="{top}" width="{width:g}" height="{HEIGHT}" rx="4"/>',
        f'<text class="room" x="{left + 12:g}" y="{top + 21}">{name}</text>',
        *(
            f'<text class="what" x="{left + 12:g}" y="{top + 39 + 16 * i}">{escape(line)}</text>'
            for i, line in enumerate(lines)
        ),
    ]


if __name__ == "__main__":
    PICTURE.write_text(svg(), encoding="utf-8")
