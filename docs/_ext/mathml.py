"""Mathematics as MathML, made when the site is built: no script and no network, and a screen reader can read it.

Its font is STIX Two Math, which the package ziamath ships; it is copied into the site, so that every browser shows the
same.
"""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import ziamath
from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.writers.html5 import HTML5Translator

FONT = Path(ziamath.__file__).with_name("fonts") / "STIXTwoMath-Regular.ttf"
DELIMITERS = re.compile(r"<mo(?: class=\"\w+\")?>([⟨⟩‖⌊⌋])</mo>")

logger = logging.getLogger(__name__)


def _mathml(node: nodes.math | nodes.math_block, block: bool) -> str:
    try:
        made = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logger.warning("%s: %s", error, node.astext(), location=node, type="math")
        return f"<code>{html.escape(node.astext())}</code>"
    # browsers stretch these; TeX only where \left and \right say so
    return made if r"\left" in node.astext() else DELIMITERS.sub(r'<mo stretchy="false">\1</mo>', made)


def inline(self: HTML5Translator, node: nodes.math) -> None:
    """Write mathematics within a line."""
    self.body.append(f'<span class="math">{_mathml(node, block=False)}</span>')
    raise nodes.SkipNode


def display(self: HTML5Translator, node: nodes.math_block) -> None:
    """Write a displayed equation, with its number and a link to it if it has a label."""
    self.body.append(self.starttag(node, "div", CLASS="math math-display"))
    self.body.append(_mathml(node, block=True))
    if number := node.get("number"):
        self.body.append(f'<span class="eqno">({number})')
        self.add_permalink_ref(node, "Link to this equation")
        self.body.append("</span>")
    self.body.append("</div>\n")
    raise nodes.SkipNode


def copy_font(app: Sphinx, error: Exception | None) -> None:
    """Put the font beside the style sheets."""
    if error is None and app.builder.format == "html":
        shutil.copyfile(FONT, Path(app.outdir) / "_static" / FONT.name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the renderer ``mathml``."""
    app.add_html_math_renderer("mathml", (inline, None), (display, None))
    app.connect("build-finished", copy_font)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
