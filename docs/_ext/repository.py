"""What lies in the repository but outside docs/: Markdown files are linked as files, notebooks become pages.

MyST takes a link to any other file for a download already, and one to Markdown for a page, which README.md is not.
"""

from __future__ import annotations

import shutil
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.osutil import relative_uri

ROOT = Path(__file__).resolve().parents[2]
FILES = "_files"


class LinkMarkdown(SphinxPostTransform):
    """Resolve links to Markdown files and folders of the repository, by copies of them in the site."""

    default_priority = 8  # before MyST's, which knows pages alone

    def run(self, **_: Any) -> None:
        """Replace them in one page."""
        here = Path(self.env.doc2path(self.env.docname)).parent
        for node in list(self.document.findall(pending_xref)):
            if node.get("refdomain") == "doc" and node["reftarget"] not in self.env.all_docs:
                file = (Path(self.app.srcdir) / f"{node['reftarget']}.md").resolve()
            elif node.get("reftype") == "myst" and "/" in node["reftarget"]:
                file = (here / node["reftarget"]).resolve()
            else:
                continue
            if not (file.is_relative_to(ROOT) and (file.is_dir() or file.is_file())):
                continue
            link = relative_uri(self.app.builder.get_target_uri(self.env.docname), self._copied(file))
            node.replace_self(nodes.reference("", "", *node.children, refuri=link, internal=True))

    def _copied(self, file: Path) -> str:
        """A copy of a file, or of the files of a folder with a list of them."""
        name = f"{FILES}/{file.relative_to(ROOT)}"
        copy = Path(self.app.outdir) / name
        if file.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            return name
        inside = sorted(f for f in file.iterdir() if f.is_file())
        for one in inside:
            self._copied(one)
        items = "".join(f'<li><a href="{quote(f.name)}">{escape(f.name)}</a></li>' for f in inside)
        title = escape(str(file.relative_to(ROOT)))
        copy.mkdir(parents=True, exist_ok=True)
        page = f'<!doctype html><meta charset="utf-8"><title>{title}</title><h1>{title}</h1><ul>{items}</ul>'
        (copy / "index.html").write_text(page, encoding="utf-8")
        return f"{name}/index.html"


def copy_notebooks(app: Sphinx) -> None:
    """Copies of the notebooks are pages: git ignores them."""
    pages = Path(app.srcdir) / "notebooks"
    pages.mkdir(exist_ok=True)
    for old in pages.glob("*.ipynb"):
        if not (ROOT / "notebooks" / old.name).is_file():
            old.unlink()
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        if not (copy := pages / notebook.name).is_file() or copy.read_bytes() != notebook.read_bytes():
            shutil.copyfile(notebook, copy)


def setup(app: Sphinx) -> dict[str, bool]:
    """Connect both."""
    app.connect("builder-inited", copy_notebooks)
    app.add_post_transform(LinkMarkdown)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
