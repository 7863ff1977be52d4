"""What a model folder has beside its weights: what is fetched of it, and what goes along, unchanged, on every way out.

A tokenizer, how a model generates, chat templates, licences and processors hold for a compressed model as for the
original. Weights in other formats, their indices, code and the records of a training do not.
"""

from __future__ import annotations

import fnmatch
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from masa.runs.files import sha256_of

TEMPLATES = "additional_chat_templates"
"""transformers' folder of further chat templates."""

LICENCES = ("licen[sc]e*", "*_licen[sc]e*", "notice*", "copying*", "use_policy*", "*acceptable_use*", "terms*")
"""What goes along with weights in whatever format."""

WANTED = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", f"{TEMPLATES}/*.jinja", *LICENCES)
"""What belongs to a model beside its weights, in small letters."""

CODE = "code, which is not trusted"
NO_MEANING = "has no meaning in this format"

_OTHERS = {
    "config.json": "written anew",
    "*.index.json": "an index of weights",
    "params.json": "of weights in another format",
    "quant*config.json": "of quantised weights",
    "hf_quant_config.json": "of quantised weights",
    "adapter_config.json": "of an adapter",
    "trainer_state.json": "of a training",
    "*results.json": "of a training",
    "requirements*.txt": "of code",
    "compression.json": "masa's own account",
    "export.json": "masa's own account",
    "manifest.json": "masa's own account",
    "spec.json": "masa's own account",
    "provenance.json": "masa's own account",
    "metrics.json": "masa's own account",
    "masa.json": "masa's own account",
}
"""What looks as if it were wanted and is not -> why."""

_FORMATS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".ggml", ".onnx", ".onnx_data", ".h5", ".msgpack")
_FORMATS += (".npz", ".npy", ".tflite", ".pb", ".mlmodel", ".mlpackage", ".nemo", ".pkl", ".pickle")

PATTERNS = ["*.json", "model*.safetensors", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm", "tokenizer*"]
PATTERNS += ["[Ll][Ii][Cc][Ee][Nn][SsCc][Ee]*", "[Nn][Oo][Tt][Ii][Cc][Ee]*", "USE_POLICY*", "Use_Policy*", "COPYING*"]
"""What is fetched of a hub model: the above, and one copy of the weights; some have a second one under another name."""


def reason_to_leave(name: str) -> str | None:
    """Why a file of a model folder does not go along; None if it does.

    Args:
        name: below the folder, with ``/``.

    Example:
        >>> reason_to_leave("consolidated.safetensors"), reason_to_leave("generation_config.json")
        ('weights', None)
    """
    small = name.lower()
    if why := next((why for pattern, why in _OTHERS.items() if fnmatch.fnmatch(Path(small).name, pattern)), None):
        return why
    if small.endswith(_FORMATS):
        return "weights"
    if small.endswith((".py", ".ipynb", ".sh", ".so")):
        return CODE
    wanted = any(fnmatch.fnmatch(small, pattern) for pattern in WANTED)
    return (
        None if wanted and ("/" not in name or small.startswith(f"{TEMPLATES}/")) else "not known to belong to a model"
    )


def hand_on(source: Path, out: Path, only: Iterable[str] = ("*",), code: bool = False) -> dict[str, Any]:
    """Copy what goes along, byte for byte, over what is there; a link is followed.

    Args:
        source: the model folder.
        out: the new one.
        only: patterns in small letters, where not all of it has a meaning.
        code: Python goes along, too: the model cannot be read without it.

    Returns:
        ``files``: name -> sha256, and ``left``: name -> reason.
    """
    files, left = {}, {}
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if any(part.startswith(".") for part in Path(name).parts) or not path.is_file():
            continue
        why = reason_to_leave(name)
        if code and why == CODE and name.endswith(".py"):
            why = None
        if why is None and not any(fnmatch.fnmatch(name.lower(), pattern) for pattern in only):
            why = NO_MEANING
        if why is not None:
            left[name] = why
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, out / name)
        files[name] = sha256_of(path)
    return {"files": files, "left": left}
