"""Write docs/gallery.md anew, after a change of captions or pictures: ``python docs/make_gallery.py``."""

from masa.report import gallery
from masa.runs.files import PROJECT

(PROJECT / "docs" / "gallery.md").write_text(gallery.page(), encoding="utf-8")
