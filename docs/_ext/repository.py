"""What lies in the repository but outside docs/: Markdown files are linked as files, notebooks become pages.

MyST takes a link to any other file for a download already, and one to Markdown for a page, which README.md is not.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util.osutil import relative_uri

ROOT = Path(__file__).resolve().parents[2]
FILES = "_files"


class LinkMarkdown(SphinxPostTransform):
    """Resolve links to Markdown files of the repository, by copies of them in the site."""

    default_priority = 8  # before MyST's, which knows pages alone

    def run(self, **_: Any) -> None:
        """Replace them in one page."""
        for node in list(self.document.findall(pending_xref)):
            if node.get("refdomain") != "doc" or node["reftarget"] in self.env.all_docs:
                continue
            file = (Path(self.app.srcdir) / f"{node['reftarget']}.md").resolve()
            if not (file.is_file() and file.is_relative_to(ROOT)):
                continue
            name = f"{FILES}/{file.relative_to(ROOT)}"
            copy = Path(self.app.outdir) / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            link = relative_uri(self.app.builder.get_target_uri(self.env.docname), name)
            node.replace_self(nodes.reference("", "", *node.children, refuri=link, internal=True))


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
