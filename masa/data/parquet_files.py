"""Parquet files in the hub's layouts: which are a split's, whether all are there, and what their schema names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa.errors import MasaError

ALIASES = {"valid": ("validation", "val"), "val": ("validation", "valid")}
"""Other names of a split, which are looked for where there is no file of its own."""


def parquet_files(root: Path, split: str) -> list[Path]:
    """The files of a split, sorted: ``train.parquet``, ``data/train-00000-of-00002.parquet``, or, as the hub converts
    data sets, ``default/train/0000.parquet``.

    Raises:
        MasaError: one of several is missing, as after a download that was cut short, or a split is there twice, in two
            folders.
    """
    for name in (split, *ALIASES.get(split, ())):
        if found := _files_of(root, name):
            return found
    return []


def _files_of(root: Path, split: str) -> list[Path]:
    form = rf"{re.escape(split)}(-(\d+)-of-(\d+).*)?\.parquet"
    by_name = {p: match for p in root.rglob("*.parquet") if (match := re.fullmatch(form, p.name))}
    by_folder = [p for p in root.rglob("*.parquet") if p.parent.name == split and p not in by_name]
    if len(homes := sorted({p.parent for p in by_name} | {p.parent.parent for p in by_folder})) > 1:
        raise MasaError(
            f"{root}: the {split} split is there twice, in {homes[0]} and in {homes[1]}. Name the one that is meant as "
            "source."
        )
    parts: dict[tuple[Path, str], set[int]] = {}  # folder and which files -> the numbers that are missing
    for p, match in by_name.items():
        if match[1]:
            parts.setdefault(
                (p.parent, f"{int(match[3])} files {split}-*-of-{match[3]}"), set(range(int(match[3])))
            ).discard(int(match[2]))
    numbers = {int(p.stem) for p in by_folder if p.stem.isdigit()}
    if numbers:
        parts[by_folder[0].parent, f"files 0000 to {max(numbers):04d}"] = set(range(max(numbers))) - numbers
    for (folder, which), missing in parts.items():
        if missing:
            raise MasaError(
                f"{folder}: of the {which} number {min(missing)} is missing ({len(missing)} in all). Fetch the data "
                "set again."
            )
    return sorted([*by_name, *by_folder])


def open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
    except (pyarrow.ArrowException, OSError) as error:
        raise MasaError(f"{path} is corrupt or not Parquet ({error}); fetch it again.") from error


def count_rows(path: Path) -> int:
    with open_parquet(path) as file:
        return file.metadata.num_rows


def same_classes(named: Mapping[Path, list[str]]) -> list[str]:
    """The class names that all files agree on, in the order of the labels.

    Raises:
        MasaError: two files name or order them differently, so that one label would mean two classes.
    """
    (first, names), *others = named.items()
    for path, other in others:
        if other != names:
            where = next((i for i, (a, b) in enumerate(zip(names, other, strict=False)) if a != b), "beyond the last")
            raise MasaError(f"{path} names its classes otherwise than {first}: they differ at label {where}.")
    return names
