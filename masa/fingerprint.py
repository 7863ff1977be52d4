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
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from masa.errors import MasaError

ROOT = Path(__file__).resolve().parents[1]


@functools.cache
def fingerprint(*modules: str) -> str:
    """Hash of what the given masa modules and those that they import mean.

    Taken over the syntax tree without docstrings, so that a comment or a reformatting retrains nothing and
    ``x + 1 -> x + 2`` retrains everything that depends on it.
    """
    digest = hashlib.sha256()
    for name in sorted(_reachable(modules)):
        digest.update(f"{name} {_meaning(_module_path(name))}\n".encode())
    _kept(_store()).write()
    return digest.hexdigest()[:16]


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


@functools.cache
def _imports(path: Path) -> list[str]:
    """masa's modules that a module imports when it runs, anywhere in it."""
    return [name for name in _kept(_store()).of(path)[0] if _module_path(name).is_file()]


@functools.cache
def _meaning(path: Path) -> str:
    """Hash of a module by itself."""
    return _kept(_store()).of(path)[1]


def _parse(source: bytes) -> list[Any]:
    """Names below masa that a module imports when it runs, some of which are modules; and the hash of its meaning."""
    tree = ast.parse(source)
    nodes = list(ast.walk(tree))
    for_types = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        ):
            node.body = node.body[1:]
    return [[n for n in names if n.startswith("masa.")], hashlib.sha256(ast.dump(tree).encode()).hexdigest()]


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
            self._found = {name: [text, list(names), mark] for name, (text, names, mark) in kept.items()}

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
