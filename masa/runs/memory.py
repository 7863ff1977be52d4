"""Running out of memory, as a message: where, how much was used, and what to lower."""

from __future__ import annotations

import ctypes
import errno
import resource
import sys
from collections.abc import Mapping
from typing import Any

from masa.errors import MasaError

WORDS = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc", "Cannot allocate memory")


MMAP_MAX, TRIM_THRESHOLD, TOP_PAD = -4, -1, -2
"""Parameters of glibc's ``mallopt``."""


def keep_freed() -> bool:
    """Let this process keep what it frees, for what it allocates next; False where the C library is not glibc.

    Every training step frees and takes the same hundreds of megabytes. By default each large tensor is fresh memory of
    the kernel's, which clears it page by page: 8 to 15 % of a small model's step on a CPU. The peak stays what it was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(
        mallopt(parameter, value) for parameter, value in ((MMAP_MAX, 0), (TRIM_THRESHOLD, 2**31 - 1), (TOP_PAD, 2**26))
    )


def give_back() -> bool:
    """Give the kernel what this process has freed and glibc keeps; False where nothing was, or the library is another.

    Tensors below 32 MiB leave holes in the heap when they go, which a stage with tensors of other sizes does not fill.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    return trim is not None and bool(trim(0))


def is_exhausted(error: BaseException) -> bool:
    """Whether an exception says that there is no memory left, on the CPU or on a GPU."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    if any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
        return True
    return isinstance(error, RuntimeError | OSError) and any(words in str(error) for words in WORDS)


def peak_bytes(*whose: int) -> int:
    """Largest resident memory so far: this process's, or the largest of ``resource.RUSAGE_SELF`` and the like."""
    largest = max(resource.getrusage(who).ru_maxrss for who in whose or (resource.RUSAGE_SELF,))
    return largest if sys.platform == "darwin" else largest * 2**10  # macOS counts in bytes, Linux in KiB


def peak() -> str:
    """This process's largest memory so far, and the GPU's where one was used."""
    used = f"{peak_bytes() / 2**30:.2f} GiB"
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        used += f", {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB on the GPU"
    return used


class OutOfMemory(MasaError):
    """A run ran out of memory; who knows what it should have needed may say so."""


def exhausted(spec: Mapping[str, Any], stage: str, then: str) -> OutOfMemory:
    """The message of a run that ran out of memory.

    Args:
        spec: of the run.
        stage: what it was doing.
        then: what running the same command again will do.
    """
    size = spec["training"]["micro_batch_size"]
    lower = (
        f"Lower training.micro_batch_size (now {size}; the batch stays what it is) and add --restart"
        if size > 1
        else ""
    )
    lower = lower or "training.micro_batch_size is 1 already, so lower the size of the model or of its inputs"
    return OutOfMemory(
        f"{spec['run']} ran out of memory while {stage}. Its peak was {peak()}. {lower}, run fewer jobs at once, or "
        f"give it more memory. The same command will {then}."
    )
