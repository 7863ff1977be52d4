"""What code means, as a hash: the workflow reruns a job when the code that it runs changes, and not for a comment."""

from __future__ import annotations

import ast
import functools
import hashlib
from collections.abc import Iterable
from pathlib import Path

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
        digest.update(f"{name}\n{_meaning(_module_path(name))}\n".encode())
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
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and id(node) not in for_types:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return [n for n in names if n.split(".")[0] == "masa" and n != "masa" and _module_path(n).is_file()]


@functools.cache
def _meaning(path: Path) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
        ):
            node.body = node.body[1:]
    return ast.dump(tree)
