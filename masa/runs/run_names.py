"""The error for a run that is not there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from masa.errors import MasaError, did_you_mean, unknown

MANY = 24
"""Names that a message still lists; of more it says how many there are."""


def unknown_run(what: str, name: str, known: Sequence[str], results: Path) -> MasaError:
    """Build the error for a run that does not exist: the nearest ones, or that there are no results to look in.

    Args:
        what: is named so, as in "Run".
        name: what was asked for.
        known: all that could have been named.
        results: where they were looked for.
    """
    if not known:
        why = "holds no runs yet" if results.is_dir() else "does not exist here"
        return MasaError(
            f"{what} {name!r} does not exist: the directory of results, {results}, {why}. Call masa in the directory "
            "of the project, name the results by --results DIR, or make them with `snakemake --cores all`."
        )
    if len(known) <= MANY:
        return unknown(what, name, known)
    hint = did_you_mean(name, sorted(known))
    return MasaError(
        f"{what} {name!r} does not exist.{hint} There are {len(known)}; `masa status` lists those of trainings."
    )
