"""What code means, as a hash: the workflow reruns a job when the code that it runs changes, and not for a comment.

What was found of a module is kept beside the package's bytecode, in ``__pycache__``, for as long as its text stays the
same: without it Snakemake would parse a hundred modules whenever it is called.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from masa.errors import MasaError

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def fingerprint(*modules: str) -> str:
    """Hash of what the given masa modules and those that they import mean.

    Taken over the syntax tree without docstrings, so that a comment or a reformatting retrains nothing and
    ``x + 1 -> x + 2`` retrains everything that depends on it. Where a module lies and what it is called does not count:
    in the trees that import it, its own hash stands for its name.
    """
    meanings = sorted(_meaning(_module_path(name)) for name in _reachable(modules))
    _kept(_store()).write()
    return hashlib.sha256("\n".join(meanings).encode()).hexdigest()[:16]


def _module_path(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _reachable(modules: Iterable[str]) -> set[str]:
    found: set[str] = set()
    queue = list(modules)
    while queue:
        name = queue.pop()
        if name in found:
            continue
        if not _module_path(name).is_file():
            raise MasaError(f"Module {name} does not exist; a rule asks for its fingerprint.")
        found.add(name)
        queue += _imports(_module_path(name))
    return found


def _imports(path: Path) -> list[str]:
    """masa's modules that a module imports when it runs, anywhere in it."""
    _, _, names, taken = _kept(_store()).of(path)
    named = [*names, *(part for name, _ in taken for part in (name.rpartition(".")[0], name))]
    return [name for name in named if name != "masa" and _module_path(name).is_file()]


@functools.cache
def _meaning(path: Path) -> str:
    """Hash of a module, in which the hash of each module that it names stands for the name."""
    own, used, _, taken = _kept(_store()).of(path)
    handed_on = sorted([_standing_for(name), alias] for name, alias in taken if not _module_path(name).is_file())
    return hashlib.sha256(json.dumps([own, [_standing_for(name) for name in used], handed_on]).encode()).hexdigest()


@functools.cache
def _standing_for(name: str) -> list[str]:
    """What a dotted name means, whatever the module is called: its module's own hash, and the name in it."""
    module, _, attribute = name.rpartition(".")
    if _module_path(name).is_file():
        return [_kept(_store()).of(_module_path(name))[0]]
    if module != "masa" and _module_path(module).is_file():
        return [_kept(_store()).of(_module_path(module))[0], attribute]
    return [name]


def _parse(source: bytes) -> list[Any]:
    """What one module is made of.

    Returns:
        The hash of its tree, with one mark for every name that comes from masa; what these marks stand for, in order;
        modules below masa that it imports; and ``[name, alias]`` of all that it takes by ``from masa`` when it runs.
    """
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    for_types = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names, taken = [], []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names if alias.name.startswith("masa.")]
        elif isinstance(node, ast.ImportFrom) and _is_ours(node.module) and id(node) not in for_types:
            taken += [[f"{node.module}.{alias.name}", alias.asname or alias.name] for alias in node.names]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        ):
            node.body = node.body[1:]
    marks = _Marks({alias: name for name, alias in taken})
    text = ast.dump(marks.visit(tree))
    return [hashlib.sha256(text.encode()).hexdigest(), marks.used, names, taken]


def _is_ours(module: str | None) -> bool:
    return module is not None and (module == "masa" or module.startswith("masa."))


class _Marks(ast.NodeTransformer):
    """Takes masa's imports out, and puts one mark in the place of every name that they gave."""

    def __init__(self, imported: Mapping[str, str]) -> None:
        self._imported = imported
        self.used: list[str] = []

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST | None:
        return None if _is_ours(node.module) else node

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return self._mark(self._imported[node.id]) if node.id in self._imported else node

    def visit_Constant(self, node: ast.Constant) -> ast.AST:
        dotted = isinstance(node.value, str) and re.fullmatch(r"masa(\.[a-z_]+)+", node.value)
        return self._mark(node.value) if dotted else node

    def _mark(self, name: str) -> ast.AST:
        self.used.append(name)
        return ast.Name("masa", ast.Load())


def _store() -> Path:
    """Beside the bytecode, and of one version of Python as that is: what ``ast.dump`` says differs between them."""
    return Path(importlib.util.cache_from_source(str(ROOT / "masa" / "meaning.py"))).with_suffix(".json")


@functools.cache
def _kept(file: Path) -> _Kept:
    return _Kept(file)


class _Kept:
    """What :func:`_parse` found, module by module, each with the hash of the text that it was found in."""

    def __init__(self, file: Path) -> None:
        self._file, self._changed, self._found = file, False, {}
        with suppress(OSError, ValueError, AttributeError, TypeError):  # not there yet, or damaged
            kept = json.loads(file.read_text(encoding="utf-8"))
            self._found = {
                name: [text, own, list(used), list(names), [(n, alias) for n, alias in taken]]
                for name, (text, own, used, names, taken) in kept.items()
            }

    def of(self, path: Path) -> list[Any]:
        source, name = path.read_bytes(), str(path.relative_to(ROOT))
        text = hashlib.sha256(_OURS + source).hexdigest()
        known = self._found.get(name)
        if not known or known[0] != text:
            known = self._found[name] = [text, *_parse(source)]
            self._changed = True
        return known[1:]

    def write(self) -> None:
        """Nothing is lost where it cannot be written: the next call parses again."""
        if not self._changed or sys.dont_write_bytecode:
            return
        self._changed = False
        temporary = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        with suppress(OSError):
            self._file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._found), encoding="utf-8")
            temporary.replace(self._file)


_OURS = Path(__file__).read_bytes()
"""What is kept is forgotten when this file changes."""
