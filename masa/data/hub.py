"""Where the files of one split of a data set lie, on the hub or in a folder in its layout: ``datasets`` finds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from masa.data.formats import File, Row
from masa.data.sources import Source
from masa.errors import MasaError, unknown

SPLIT = "train"
OURS = ("json", "parquet", "arrow", "csv")
"""Loaders of ``datasets`` whose files :mod:`masa.data.formats` reads; rows of others come from the loader itself."""


def files(source: Source, mirror: str | None, subset: str | None = None, split: str | None = None) -> list[File]:
    """The files of one split, which are streamed and never downloaded whole, or of its copy below the mirror.

    Raises:
        MasaError: it cannot be had, a folder here has its name, or there is no such subset or split.
    """
    local = Path(mirror) / source.name if mirror else None
    if local is not None and local.is_dir():
        return in_layout(str(local), None, str(source), subset, split)
    if Path(source.name).exists():
        raise MasaError(f"{source}: the folder {source.name} here would be read in its place. Move or rename it.")
    return in_layout(source.name, source.version, str(source), subset, split)


def has_layout(folder: Path) -> bool:
    """Whether a folder says itself which files are which split."""
    card = folder / "README.md"
    told = card.is_file() and card.read_text(encoding="utf-8", errors="replace").startswith("---")
    return told or (folder / ".huggingface.yaml").is_file()


def in_layout(place: str, revision: str | None, name: str, subset: str | None, split: str | None) -> list[File]:
    """The files of one split of what ``datasets`` finds at a place, an id or a folder."""
    import datasets

    with said_plainly(name):
        builder = datasets.load_dataset_builder(place, subset, revision=revision)
        found: dict[str, Any] = builder.config.data_files or {}
        chosen = split or (SPLIT if SPLIT in found or not found else next(iter(found)))
        if found and chosen not in found:
            raise unknown(f"{name}: split", chosen, found)
        if found and split is None and chosen != SPLIT and len(found) > 1:
            raise MasaError(f"{name} has the splits {', '.join(found)}: say which one (--split, or hub_split).")
        kind, config = type(builder).__module__.rpartition(".")[2], builder.config
        plain = not getattr(config, "field", None) and not getattr(config, "names", None)
        if found and kind in OURS and plain and not any(".zip" in f or ".tar" in f for f in found[chosen]):
            return [_file(path, name) for path in found[chosen]]
    return [File(name, None, rows=lambda columns: _loaded(place, revision, name, subset, chosen, columns))]


def _file(path: str, name: str) -> File:
    if "://" not in path:
        return File.local(Path(path))

    def opened() -> BinaryIO:
        from datasets.utils.file_utils import xopen

        with said_plainly(name):
            return xopen(path, "rb")

    return File(path, opened)


def _loaded(
    place: str, revision: str | None, name: str, subset: str | None, split: str, columns: Sequence[str]
) -> Iterator[Row]:
    """Rows as the loader of a data set gives them."""
    import datasets

    with said_plainly(name):
        stream = datasets.load_dataset(place, subset, revision=revision, split=split, streaming=True)
        for number, row in enumerate(stream, 1):
            yield f"row {number}", row


@contextmanager
def said_plainly(name: str) -> Iterator[None]:
    """What the hub and its readers raise, in one line with the mend."""
    try:
        yield
    except MasaError:
        raise
    except Exception as error:  # of the network, of the format, or code in the data set, which is never run
        if isinstance(error, ValueError) and "onfig" in str(error):  # BuilderConfig not found, Config name is missing
            said = " ".join(str(error).split())
            raise MasaError(f"{name}: {said}. Name one of its subsets (--subset, or subset).") from error
        held = name.partition(":")[2].partition("@")[0] or name
        raise MasaError(
            f"{name} could not be read ({type(error).__name__}: {error}). On a machine without network set "
            f"MASA_MIRROR to a directory that holds {held}; gated data sets need `hf auth login`."
        ) from error
