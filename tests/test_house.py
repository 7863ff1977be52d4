"""The package is a house of rooms: imports go down one way, never round, and the core needs four packages."""

import ast
import subprocess
import sys
import tomllib
from itertools import chain

import pytest
from conftest import ROOT

FLOORS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["masa"]["house"]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "masa").rglob("*.py"))
}


def room(module):
    return [*module.split("."), "masa"][1]


def imports(module, named=False):
    """(line, module of masa) of every import in a file, those within functions and for types alone included.

    With ``named``, also of every module that is named in a string, which ``import_module`` may be given.
    """
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in names]
        elif named and isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in FILES:
            names = [node.value] if module != "masa.study.kinds" else []  # a table, which names modules above
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "masa" and name != "masa")


def test_every_room_stands_in_the_table():
    assert sorted(chain(*FLOORS)) == sorted({room(module) for module in FILES} - {"masa"})


def test_imports_go_down():
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    wrong = [
        f"masa/{FILES[module].relative_to(ROOT / 'masa')}:{line}: {room(module)} may not import {name}"
        for module in FILES
        if room(module) != "masa"
        for line, name in imports(module, named=True)
        if room(name) != room(module) and floor[room(name)] <= floor[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_imports_never_go_round():
    needs = {module: {name for _, name in imports(module)} - {module} for module in FILES}
    while leaves := {module for module, wanted in needs.items() if not wanted & set(needs)}:
        needs = {module: wanted for module, wanted in needs.items() if module not in leaves}
    on_a_circle = {m for m in needs if any(m in needs[n] for n in needs)}
    assert not on_a_circle, sorted(on_a_circle)


def test_an_import_that_goes_up_is_named(monkeypatch, tmp_path):
    (tmp_path / "x.py").write_text("\n\ndef f():\n    from masa.study import kinds\n")
    monkeypatch.setitem(FILES, "masa.sharing.x", tmp_path / "x.py")
    assert list(imports("masa.sharing.x")) == [(4, "masa.study.kinds")]


def test_sizes():
    """What a reader can hold: few files at the root, files of 400 lines, functions of 60 beside their docstring."""
    assert len(list((ROOT / "masa").glob("*.py"))) <= 4
    for module, path in FILES.items():
        text = path.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, module
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first = node.body[0]
                told = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
                assert node.end_lineno - node.lineno + 1 - told <= 60, f"{module}.{node.name}"


CORE = {"torch", "transformers", "safetensors", "numpy"}
BLOCKED = """
import importlib.metadata, sys

class Others:
    # what is blocked is not there, and whoever asks whether it is there is told so
    def __init__(self, finders):
        self.finders = finders

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in BLOCKED:
            return None
        found = (finder.find_spec(name, path, target) for finder in self.finders if hasattr(finder, "find_spec"))
        return next((spec for spec in found if spec is not None), None)

    def find_distributions(self, *args):
        return [d for finder in self.finders if hasattr(finder, "find_distributions")
                for d in finder.find_distributions(*args)]

sys.meta_path[:] = [Others(list(sys.meta_path))]
"""


def requirements(names):
    """Import names of everything in the environment that none of ``names`` needs."""
    from importlib import metadata

    from packaging.requirements import Requirement

    wanted, queue = set(), list(names)
    while queue:
        name = queue.pop().lower().replace("_", "-")
        if name in wanted:
            continue
        wanted.add(name)
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        found = [Requirement(line) for line in lines]
        queue += [r.name for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]
    provided = metadata.packages_distributions()
    return sorted(
        package
        for package, owners in provided.items()
        if not {owner.lower().replace("_", "-") for owner in owners} & (wanted | {"masa", "pip", "setuptools"})
    )


@pytest.mark.parametrize("package", ["masa.sharing", "masa.compression.methods"])
def test_the_core_needs_four_packages(package):
    blocked = requirements(CORE)
    assert {"pandas", "datasets", "snakemake", "lm_eval", "timm", "accelerate", "scipy"} <= set(blocked)
    modules = [module for module in FILES if module.startswith(package)] + ["masa.compression.api"]
    code = f"BLOCKED = set({blocked!r})\n{BLOCKED}\n" + "\n".join(f"import {module}" for module in modules)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_masa_itself_is_light():
    code = "import sys, masa; assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules), masa"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
