"""What code means, as a hash: what it follows, and what it leaves alone."""

import re
import shutil
import sys

import pytest
from conftest import ROOT

from masa.runs import fingerprint
from masa.study import kinds


def test_fingerprint_follows_every_form_of_import():
    found = fingerprint._reachable(["masa.evaluation.language"])
    assert found >= {
        "masa.evaluation.analysis",
        "masa.data.benchmarks",
        "masa.sharing.weight_sources",
        "masa.data.sources",
        "masa.runs.run",
    }
    assert not found & {"masa.study.config", "masa.data.documents", "masa.compression.api"}
    assert "masa.evaluation.language" not in fingerprint._reachable(["masa.training.language"])
    assert "masa.evaluation.metrics" in fingerprint._reachable(["masa.report.tables"])


CACHED = (fingerprint.fingerprint, fingerprint._meaning, fingerprint._standing_for)


def test_fingerprint_follows_meaning(tmp_path, monkeypatch):
    package = tmp_path / "masa"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "b.py").write_text("def g(x):\n    return x + 1\n")
    source = package / "a.py"

    def now(text):
        source.write_text(text)
        for cached in CACHED:
            cached.cache_clear()
        return fingerprint.fingerprint("masa.a")

    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    first = now("from masa.b import g\ndef f(x):\n    return g(x)\n")
    assert now('"""Doc."""\nfrom masa.b import g\n\ndef f(x):  # why\n    """Doc."""\n    return g(x)\n') == first
    assert now("from masa.b import g\ndef f(x):\n    return g(x) + 1\n") != first
    (package / "b.py").write_text("def g(x):\n    return x + 2\n")
    assert now("from masa.b import g\ndef f(x):\n    return g(x)\n") != first
    types_only = (
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from masa.b import g\ndef f(x):\n    return 1\n"
    )
    unused = now(types_only)
    (package / "b.py").write_text("def g(x):\n    return x + 3\n")
    assert now(types_only) == unused
    monkeypatch.undo()
    for cached in CACHED:
        cached.cache_clear()


def test_a_moved_or_renamed_file_changes_no_fingerprint(tmp_path, monkeypatch):
    """What a file means is what it says and what its names stand for, not where it lies: nothing is trained again."""

    def house(files):
        shutil.rmtree(tmp_path, ignore_errors=True)
        for path, text in {"__init__.py": "", **files}.items():
            (tmp_path / "masa" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "masa" / path).write_text(text)
        for cached in (*CACHED, fingerprint._kept):
            cached.cache_clear()

    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    numbers, words = "ONE = 1\ndef f(x):\n    return x\n", "ONE = 'one'\ndef f(x):\n    return str(x)\n"
    use = "from masa import numbers, words\nfrom masa.numbers import ONE\n"
    use += "def g(x):\n    return numbers.f(words.f(ONE + x))\n"
    house({"numbers.py": numbers, "words.py": words, "train.py": use + "NAME = 'masa.train'\n"})
    first = fingerprint.fingerprint("masa.train")
    moved = (
        "from masa.deep import strings\nfrom masa.runs import figures\nfrom masa.runs.figures import ONE\n"
        + "def g(x):\n    return figures.f(strings.f(ONE + x))\nNAME = 'masa.training.language'\n"
    )
    house({"runs/figures.py": numbers, "deep/strings.py": words, "training/language.py": moved})
    assert fingerprint.fingerprint("masa.training.language") == first
    swapped = moved.replace("figures.f(strings.f(", "strings.f(figures.f(")
    house({"runs/figures.py": numbers, "deep/strings.py": words, "training/language.py": swapped})
    assert fingerprint.fingerprint("masa.training.language") != first, "the names stand for other modules"
    house({"runs/figures.py": numbers.replace("1", "2"), "deep/strings.py": words, "training/language.py": moved})
    assert fingerprint.fingerprint("masa.training.language") != first
    monkeypatch.undo()
    for cached in (*CACHED, fingerprint._kept):
        cached.cache_clear()


def test_a_moved_file_of_masa_itself_asks_for_no_training(tmp_path, monkeypatch):
    """The real package with three files moved, two of them renamed, and imports rewritten."""
    trainings = [kind.training for kind in (kinds.LANGUAGE, *kinds.VISION.values())]
    before = {name: fingerprint.fingerprint(name) for name in trainings}
    shutil.copytree(ROOT / "masa", tmp_path / "masa", ignore=shutil.ignore_patterns("__pycache__"))
    for old, new in (
        ("masa.training.watch", "masa.runs.watch"),
        ("masa.sharing.weight_sources", "masa.sharing.origins"),
        ("masa.runs.memory", "masa.runs.storage"),
    ):
        source, target = (tmp_path.joinpath(*name.split(".")).with_suffix(".py") for name in (old, new))
        source.rename(target)
        package, _, leaf = old.rpartition(".")
        other, _, name = new.rpartition(".")
        for path in (tmp_path / "masa").rglob("*.py"):
            text = path.read_text().replace(f"from {old} import", f"from {new} import")
            if found := re.search(rf"^( *from {package} import )(.*\b{leaf}\b.*)$", text, re.M):
                names = [n.strip() for n in found[2].split(",") if n.strip() != leaf]
                lines = [found[1] + ", ".join(names)] if names else []
                text = text.replace(found[0], "\n".join([*lines, f"from {other} import {name}"]))
                text = re.sub(rf"(?<![\w.\"'/]){leaf}\.(?=\w)", f"{name}.", text)
            path.write_text(text)
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    for cached in (*CACHED, fingerprint._kept):
        cached.cache_clear()
    after = {name: fingerprint.fingerprint(name) for name in trainings}
    changed = tmp_path / "masa" / "sharing" / "origins.py"
    changed.write_text(changed.read_text() + "\nX = 1\n")
    for cached in CACHED:
        cached.cache_clear()
    last = {name: fingerprint.fingerprint(name) for name in trainings}
    monkeypatch.undo()
    for cached in (*CACHED, fingerprint._kept):
        cached.cache_clear()
    assert after == before
    assert all(last[name] != before[name] for name in trainings)


def test_what_is_kept_of_a_module_changes_no_fingerprint(tmp_path, monkeypatch):
    """Cold, kept, damaged, of another form, and where nothing can be kept: the same hash, and an edit is seen."""
    (tmp_path / "masa").mkdir()
    (tmp_path / "masa" / "__init__.py").write_text("")
    source = tmp_path / "masa" / "a.py"
    source.write_text("def f(x):\n    return x\n")
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", False)

    def forget():
        for cached in (*CACHED, fingerprint._kept):
            cached.cache_clear()

    def now():
        forget()
        return fingerprint.fingerprint("masa.a")

    kept = fingerprint._store()
    first = now()
    assert kept.is_file() and now() == first
    with monkeypatch.context() as without:
        without.setattr(fingerprint, "_parse", lambda source: pytest.fail("parsed again"))
        assert now() == first
    for damaged in ("", "[]", '{"masa/a.py": 3}', '{"masa/a.py": ["x"]}', kept.read_text()[:-9]):
        kept.write_text(damaged)
        assert now() == first, damaged
    source.write_text("def f(x):\n    return x + 1\n")
    assert now() != first
    source.write_text("def f(x):  # the same\n    return x\n")
    assert now() == first
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    kept.unlink()
    assert now() == first and not kept.exists()
    monkeypatch.undo()
    forget()
