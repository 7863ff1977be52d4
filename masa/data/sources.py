"""Where data comes from: ``pypi:``, ``hub:``, ``file:`` and ``mirror:`` sources, pinned and checked.

::

    pypi:botocore==1.43.11          one wheel, downloaded by pip (any index, proxy or cache that pip is set up for)
    hub:ORG/NAME@COMMIT             a Hugging Face repository at one commit; read from the mirror where that has it
    file:PATH or GLOB               local files, or those of a folder
    mirror:PATH or GLOB             files below the mirror directory
"""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from masa.data.formats import SUFFIXES, suffix_of
from masa.errors import MasaError, did_you_mean, unknown
from masa.runs.files import sha256_of

SCHEMES = ("pypi", "hub", "file", "mirror")

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"


@dataclass(frozen=True)
class Source:
    """A parsed source: ``name`` is a package, repository or path; ``version`` its release or commit."""

    scheme: str
    name: str
    version: str | None = None

    def __str__(self) -> str:
        mark = {"pypi": "==", "hub": "@"}.get(self.scheme, "")
        return f"{self.scheme}:{self.name}{mark}{self.version}" if self.version else f"{self.scheme}:{self.name}"


def parse(text: str, pinned: bool = True) -> Source:
    """Parse a source.

    Args:
        pinned: whether what is on the hub must name its commit.

    Raises:
        MasaError: an unknown scheme, or a source that is not pinned.
    """
    scheme, _, rest = text.partition(":")
    if scheme not in SCHEMES:
        raise unknown(f"Source {text!r}: scheme", scheme, SCHEMES)
    if scheme == "pypi":
        if not (match := re.fullmatch(rf"({_NAME})==([A-Za-z0-9.+!_-]+)", rest)):
            raise MasaError(f"Source {text!r} must pin a release: pypi:NAME==VERSION.")
        return Source(scheme, match[1], match[2])
    if scheme == "hub":
        if not pinned and (match := re.fullmatch(rf"({_NAME}/{_NAME})(?:@([A-Za-z0-9._/-]+))?", rest)):
            return Source(scheme, match[1], match[2])
        if not (match := re.fullmatch(rf"({_NAME}/{_NAME})@([0-9a-f]{{40}})", rest)):
            must = (
                "must pin a commit of 40 hex digits: hub:ORG/NAME@COMMIT" if pinned else "is not hub:ORG/NAME[@COMMIT]"
            )
            raise MasaError(f"Source {text!r} {must}.")
        return Source(scheme, match[1], match[2])
    if not rest or not rest.isprintable():
        raise MasaError(f"Source {text!r} needs a path: {scheme}:PATH.")
    return Source(scheme, rest)


def check_reader(source: Source, reader: str) -> None:
    """See that a reader of documents reads sources of this scheme.

    Raises:
        MasaError: it does not; the one that does is named.
    """
    wanted = {"hub": ("hub",), "pypi": ("botocore", "arrow")}.get(source.scheme)
    if wanted and reader not in wanted:
        raise MasaError(f"{source} is not read by the reader {reader}: set the reader to {' or '.join(wanted)}.")
    if not wanted and reader in ("hub", "botocore"):
        scheme = "hub:ORG/NAME@COMMIT" if reader == "hub" else "pypi:botocore==VERSION"
        raise MasaError(f"{source} is not read by the reader {reader}, which reads {scheme}: set the reader to files.")


def fetch_wheel(source: Source, sha256: str | None, cache: Path) -> Path:
    """Download one wheel with pip unless the cache has it, and check it.

    Raises:
        MasaError: pip could not get it, or its checksum differs, or it is cut short or damaged; a wrong file is
            removed, never kept.
    """
    folder = cache / "pypi" / f"{source.name}-{source.version}"
    found = sorted(folder.glob("*.whl"))
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            command += ["--disable-pip-version-check", "--dest", temporary, f"{source.name}=={source.version}"]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            wheels = sorted(Path(temporary).glob("*.whl"))
            if result.returncode or not wheels:
                raise MasaError(
                    f"{source} could not be downloaded with pip: {_reason(result.stderr)}. Check the network and pip's "
                    "index, then run again; nothing was kept."
                )
            found = [Path(shutil.move(wheels[0], folder / wheels[0].name))]
    _check_wheel(found[0], sha256, source)
    return found[0]


def _reason(said: str) -> str:
    """The line in which pip says why."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["no wheel came"])[-1].rstrip(".")


def _check_wheel(path: Path, sha256: str | None, source: Source) -> None:
    """Its checksum, or, where none is known, those that every zip file has of its members."""
    if sha256:
        if (actual := sha256_of(path)) == sha256:
            return
        state = "" if zipfile.is_zipfile(path) else " and is no whole zip file"
        path.unlink()
        raise MasaError(
            f"{source}: {path} has sha256 {actual}, expected {sha256}{state}. The file was removed; run again to "
            "download it anew, or correct the checksum if the source really changed."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        reason = f"{damaged} in it is damaged" if damaged else None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError) as error:
        reason = str(error)
    if reason:
        path.unlink()
        raise MasaError(
            f"{source}: {path} is cut short or corrupt ({reason}). It was removed; run again to download it anew."
        )


def local_files(source: Source, mirror: str | None, sha256: str | None = None) -> list[Path]:
    """The files that a ``file:`` or ``mirror:`` source names, sorted; of a folder, all that hold text.

    Args:
        sha256: of the file; of several files, the sha256 of their hexadecimal sha256s put together.

    Raises:
        MasaError: no mirror is set, nothing matches, or the checksum differs.
    """
    path = Path(source.name)
    if source.scheme == "mirror":
        path = mirror_root(mirror, str(source)) / path.relative_to(path.anchor)
    paths = folder(path) if path.is_dir() else expand(path)
    if not paths:
        raise MasaError(f"{source}: no file matches {path}.{_near(path)}")
    if sha256:
        digests = [sha256_of(path) for path in paths]
        actual = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        if actual != sha256:
            raise MasaError(
                f"{source}: sha256 is {actual}, expected {sha256} (data.corpus.sha256). Get the "
                f"file{'s' * (len(paths) > 1)} again ({paths[0]}{', …' * (len(paths) > 1)}), or correct the checksum."
            )
    return paths


def check_apart(spec: Any, out: Path, mirror: str | None = None) -> None:
    """See that an output is none of the files or folders that the sources in a spec name, which it would overwrite.

    Args:
        spec: mappings in which keys ``source`` and ``validation_source`` are sources.

    Raises:
        MasaError: it is one of them.
    """
    for key, value in spec.items() if isinstance(spec, Mapping) else ():
        check_apart(value, out, mirror)
        if key not in ("source", "validation_source") or not isinstance(value, str):
            continue
        scheme, _, name = value.partition(":")
        if scheme not in ("file", "mirror") or not name.isprintable() or not out.exists():
            continue
        path = Path(name) if scheme == "file" else Path(mirror or "") / Path(name).relative_to(Path(name).anchor)
        read = [path, *path.rglob("*")] if path.is_dir() and out.is_file() else [path, *expand(path)]
        if any(one.exists() and out.samefile(one) for one in read):
            raise MasaError(f"--out {out} is what is read ({value}): it would be overwritten. Choose another.")


def local_folder(source: Source, mirror: str | None) -> Path:
    """The folder that a ``file:`` or ``mirror:`` source names.

    Raises:
        MasaError: no mirror is set, or there is no such folder.
    """
    root = mirror_root(mirror, str(source)) / source.name if source.scheme == "mirror" else Path(source.name)
    if not root.is_dir():
        raise MasaError(f"{source}: {root} is not a folder.")
    return root


def _near(path: Path) -> str:
    return did_you_mean(path.name, [p.name for p in path.parent.iterdir()]) if path.parent.is_dir() else ""


def expand(path: Path) -> list[Path]:
    """The files that a path names, sorted: as it is written as far as that exists, the rest as a glob.

    So ``my[v1].jsonl`` is the file of that name where there is one.
    """
    base, parts = Path(path.anchor or "."), list(path.parts[bool(path.anchor) :])
    while parts and (base / parts[0]).exists():
        base /= parts.pop(0)
    if not parts:
        return [base] if base.is_file() else []
    return sorted(p for p in base.glob("/".join(parts)) if p.is_file())


NO_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "README", "LICENSE")
"""What lies beside the data in a folder."""
SPLITS = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SPLITS |= {"validation": "validation", "valid": "validation", "val": "validation", "dev": "validation"}
"""Words in the names of files and folders that tell a split, as the hub reads them."""


def folder(path: Path, split: str | None = None) -> list[Path]:
    """The files of a folder that hold text, sorted by their paths.

    Args:
        split: "train", "validation" or "test", where the names tell it; by default all, if they are of one.

    Raises:
        MasaError: none, or of several formats or splits, so that one must be named.
    """
    inside = sorted(p for p in path.rglob("*") if p.is_file() and not _hidden(p.relative_to(path)))
    inside = [p for p in inside if not p.name.startswith(NO_DATA)]
    found = [p for p in inside if suffix_of(p.name) in SUFFIXES] or [p for p in inside if not suffix_of(p.name)]
    kinds = Counter(SUFFIXES.get(suffix_of(p.name), "no suffix") for p in found)
    if not found:
        raise MasaError(f"The folder {path} holds no file of text ({', '.join(SUFFIXES)}, or those compressed).")
    if len(kinds) > 1:
        several = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
        raise MasaError(
            f"The folder {path} holds files of several formats ({several}): name some, such as '{path}/*.X'."
        )
    splits = {p: _split_of(p.relative_to(path)) for p in found}
    named = sorted({s for s in splits.values() if s})
    if split and split not in named:
        raise unknown(f"The folder {path}: split", split, named)
    if split:
        return [p for p in found if splits[p] == split]
    if len(named) > 1:
        raise MasaError(
            f"The folder {path} holds the splits {' and '.join(named)}: say which one (--split), or name its files."
        )
    return found


def _hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _split_of(path: Path) -> str | None:
    """The split that the name of a file, or of a folder above it, tells."""
    words = [re.split(r"[-._ 0-9]+", part.lower()) for part in reversed(path.parts)]
    return next((SPLITS[word] for part in words for word in part if word in SPLITS), None)


def mirror_root(mirror: str | None, wanted_by: str) -> Path:
    """The mirror directory.

    Raises:
        MasaError: none is set, or it does not exist.
    """
    if not mirror:
        raise MasaError(f"{wanted_by} needs a mirror: set data.mirror or the environment variable MASA_MIRROR.")
    root = Path(mirror)
    if not root.is_dir():
        raise MasaError(f"The mirror {mirror} is not a directory (data.mirror or MASA_MIRROR).")
    return root


def snapshot(source: Source, mirror: str | None, patterns: list[str] | None = None, kind: str = "model") -> Path:
    """A local copy of a hub repository at its commit: ``MIRROR/ORG/NAME`` if it exists, else the hub's own cache.

    Args:
        patterns: files that are needed; by default all.
        kind: "model" or "dataset"; the hub keeps them apart.

    Raises:
        MasaError: the hub cannot be reached or refuses (gated models need ``hf auth login``).
    """
    if mirror and (path := mirror_root(mirror, str(source)) / source.name).is_dir():
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source.name, revision=source.version, allow_patterns=patterns, repo_type=kind))
    except Exception as error:
        raise MasaError(
            f"{source} could not be fetched ({type(error).__name__}: {error}). On a machine without network set "
            "MASA_MIRROR to a directory that holds it; gated repositories need `hf auth login`."
        ) from error
