"""How a model is stored when it is as small as it shall be: its dtype, bits of its embeddings, or llama.cpp's file.

Bytes are those of files, and resident memory that of a process which loads such a folder and runs it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from masa.compression.calibration.collect import DTYPES
from masa.compression.calibration.statistics import Calibration, model_sha256
from masa.errors import BEYOND, MasaError
from masa.models import gguf_writing, llama_types
from masa.models.beside import hand_on
from masa.models.pretrained import convert_gguf, load_pretrained, save_plain
from masa.models.reading import not_finite
from masa.sharing.checkpoint import save
from masa.sharing.embeddings import round_embeddings
from masa.sharing.parameters import cast

_MEASURE = """
import ctypes, gc, sys
import torch
import masa

torch.set_num_threads(1)


def memory():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/status") as lines:
        found = dict(line.split(":", 1) for line in lines)
    return sum(1024 * int(found[name].split()[0]) for name in ("RssAnon", "RssFile", "RssShmem"))


def run():
    model = masa.load(sys.argv[1], runtime="factored")
    with torch.no_grad():
        model(input_ids=torch.arange(3, 11)[None], use_cache=False)
    return model


run()  # what is imported on the way stays
before = memory()
model = run()
print(memory() - before)
"""


def converted(model: nn.Module, dtype: str | None, statistics: Calibration | None) -> Calibration | None:
    """Convert a model, in place, that was seen to be the one that statistics belong to.

    Returns:
        The statistics of the converted model.

    Raises:
        MasaError: they belong to another, or the dtype cannot hold a number.
    """
    if dtype is None:
        return statistics
    if statistics is not None:
        statistics.check(model, None)
    for name, parameter in cast(model, DTYPES[dtype]).named_parameters():
        if not_finite(parameter):
            raise MasaError(f"{name} has numbers that {dtype} cannot hold; {BEYOND}.")
    return None if statistics is None else dataclasses.replace(statistics, model_sha256=model_sha256(model))


def stored(
    model: nn.Module, original: Path, storage: Mapping[str, Any], cache: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Store a model, and count.

    Args:
        model: compressed or not, in its dtype.
        original: folder with its tokenizer.
        storage: ``embeddings``: bits of embeddings and head, or None; ``gguf``: one of llama.cpp's types
            (:data:`masa.models.llama_types.TYPES`) for the folded model, or None.
        cache: where llama.cpp's converter and library are kept.

    Returns:
        (the model as it is read again, ``file_bytes``, ``resident_bytes`` or None, ``types`` of a GGUF file's tensors).

    Raises:
        MasaError: embeddings that do more than look up; llama.cpp cannot make the file.
    """
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temporary:
        folder = Path(temporary)
        if storage.get("gguf"):
            return _as_gguf(model, original, storage["gguf"], cache, folder)
        if storage.get("embeddings"):
            round_embeddings(model, storage["embeddings"])
        save(model, folder / "model")
        size = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
        return model, {"file_bytes": size, "resident_bytes": resident_bytes(folder / "model"), "types": None}


def _as_gguf(
    model: nn.Module, original: Path, name: str, cache: Path, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    converter, quantizer = gguf_writing.converter(None, cache), llama_types.quantizer(cache)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    save_plain(model, folder / "plain")
    hand_on(original, folder / "plain")
    gguf_writing.convert(folder / "plain", folder / "whole.gguf", dtype, converter)
    types = llama_types.quantize(folder / "whole.gguf", folder / "few.gguf", name, quantizer)
    read, _ = load_pretrained(convert_gguf(folder / "few.gguf", folder / "read"))
    size = (folder / "few.gguf").stat().st_size
    return read, {"file_bytes": size, "resident_bytes": None, "types": types}


def resident_bytes(folder: Path) -> int | None:
    """Bytes of memory that a model folder takes once it is loaded and has run on eight tokens.

    None where the system does not tell (Linux with glibc does).
    """
    if not Path("/proc/self/status").is_file() or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return None
    done = subprocess.run([sys.executable, "-c", _MEASURE, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise MasaError(f"{folder} cannot be loaded again: {said[-1] if said else 'it said nothing'}.")
    return int(done.stdout)
