"""CIFAR's own files, ``cifar-10-batches-py`` and ``cifar-100-python``, read without running what a pickle asks for.

A pickle is a program. The one of a CIFAR batch makes a dictionary of lists and one array; here its few words get
stand-ins that only keep what they are given, and every other word is refused.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from masa.errors import MasaError


class _Array:
    """What is kept of an array: (version, shape, type, whether columns come first, bytes)."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state


class _Type:
    """What is kept of an array's type: its name."""

    def __init__(self, name: Any = None, *_: Any) -> None:
        self.name = name

    def __setstate__(self, _: Any) -> None: ...


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any = "C") -> _Array:
    array = _Array()
    array.state = (1, shape, kind, order == "F", bytes(data))
    return array


def _encode(text: str, _: str = "latin1") -> bytes:
    return text.encode("latin1")


_WORDS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Type,
    ("_codecs", "encode"): _encode,
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    **{(f"numpy.{core}.numeric", "_frombuffer"): _from_buffer for core in ("core", "_core")},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _WORDS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no batch of CIFAR needs")
        return _WORDS[module, name]


def read(path: Path) -> dict[str, Any]:
    """The dictionary of one file; arrays of bytes come back as NumPy's, (rows, columns) uint8.

    Raises:
        MasaError: it is damaged, or anything else than a dictionary of lists, texts, numbers and arrays of bytes.
    """
    try:
        with path.open("rb") as file:
            found = _Reader(file, encoding="latin1").load()
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return {_text(key): _array(value) if isinstance(value, _Array) else value for key, value in found.items()}
    except OSError as error:
        raise MasaError(f"{path} cannot be read ({error.strerror}).") from error
    except Exception as error:  # a damaged pickle may stumble over anything; nothing of it was run
        raise MasaError(f"{path} is no batch of CIFAR ({type(error).__name__}: {error}); fetch it again.") from error


def _text(key: Any) -> str:
    return key.decode("latin1") if isinstance(key, bytes) else str(key)


def _array(kept: _Array) -> np.ndarray:
    _, shape, kind, columns_first, data = kept.state
    if kind.name not in ("u1", "|u1", "uint8"):
        raise ValueError(f"its array is of type {kind.name}, not bytes")
    data = data.encode("latin1") if isinstance(data, str) else bytes(data)
    return np.frombuffer(data, np.uint8).reshape(shape, order="F" if columns_first else "C")
