"""The files that are inlined into the page: templates, styles, scripts and uPlot, which draws the curves. Cheap."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
STYLES = ("vendor/uPlot.min.css", "templates/page.css", "templates/parts.css")
SCRIPTS = (
    "vendor/uPlot.iife.min.js",
    "templates/page.js",
    "templates/tables.js",
    "templates/smooth.js",
    "templates/chart.js",
    "templates/curves.js",
)
"""In the order in which they run. ``vendor/`` is uPlot 1.6.32 of npm as it came, with its licence (MIT)."""


def styles() -> str:
    return _joined(STYLES)


def scripts() -> str:
    return _joined(SCRIPTS)


def policy(style: str, script: str) -> str:
    """Content-Security-Policy: nothing is loaded from anywhere, and nothing runs but these very texts."""
    return (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def digest() -> str:
    """Hash of all files that go into the page beside code, so that the workflow notices when one changes."""
    files = sorted([*FOLDER.glob("templates/*"), *FOLDER.glob("vendor/*")])
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


def _joined(names: tuple[str, ...]) -> str:
    return "\n".join((FOLDER / name).read_text(encoding="utf-8").strip() for name in names)
