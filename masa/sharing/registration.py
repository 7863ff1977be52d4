"""Register masa with transformers as soon as its loaders are imported, which ``import masa`` does not do."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_WHERE, _WHAT = "transformers.quantizers.auto", "masa.sharing.quantizer"


class _Finder(MetaPathFinder):
    """Finds one module, as Python does, and registers with it once it has run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _WHERE:
            return None
        sys.meta_path.remove(self)
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, own: Loader) -> None:
        self.own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.own.exec_module(module)
        import_module(_WHAT)


def register() -> None:
    """Now if transformers' loaders are there already, else when they come."""
    if _WHERE in sys.modules:
        import_module(_WHAT)
    else:
        sys.meta_path.insert(0, _Finder())
