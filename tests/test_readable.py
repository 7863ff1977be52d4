"""Every row of the table "what masa reads": made, read, and what is documented is what was tested."""

import re

import pytest
import readable

import masa

ALL = [(section, case) for section, cases in readable.sections().items() for case in cases]


@pytest.mark.parametrize(("section", "case"), ALL, ids=[f"{section}: {case.what}" for section, case in ALL])
def test_what_masa_reads(section, case, tmp_path, monkeypatch):
    path = case.make(tmp_path)
    if "/org/name/" in str(path):
        monkeypatch.setenv("MASA_MIRROR", str(tmp_path))
        path = "hub:org/name"
    if isinstance(case.right, re.Pattern):
        with pytest.raises(masa.MasaError, match=case.right) as refused:
            readable.sections("READ")[section](path)
        assert "\n" not in str(refused.value)
    else:
        assert readable.sections("READ")[section](path) == case.right


def test_the_page_is_made_of_the_tests():
    text = readable.PAGE.read_text(encoding="utf-8")
    assert text == readable.page(text), "python tests/readable.py makes it anew"
