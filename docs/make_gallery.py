"""Write docs/gallery.md anew, after a change of captions or pictures: ``python docs/make_gallery.py``."""

from masa.fingerprint import ROOT
from masa.report import gallery

(ROOT / "docs" / "gallery.md").write_text(gallery.page(), encoding="utf-8")
