"""What a user asks for, in words: which projections, and how many bytes."""

from __future__ import annotations

import logging
import re
from typing import Any

from torch import nn

from masa.errors import MasaError
from masa.sharing.projections import family_of
from masa.sharing.spec import ModelShape

ALL = "all"
"""In the place of letters: every linear layer that the model's blocks have."""

_log = logging.getLogger("masa")
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def letters(model: nn.Module, projections: str) -> str:
    """The letters of :data:`ALL`, or those that were given.

    A projection whose matrices differ in shape between layers is left out, and a line in the log says so.

    Raises:
        MasaError: no projection is left.
    """
    if projections != ALL:
        return projections
    family = family_of(model)
    alike = [p for p in family.paths if len(family.shapes(p)) == 1]
    if several := [p for p in family.paths if p not in alike]:
        _log.warning("masa: %s of %s has several shapes and is left out.", ", ".join(several), family.name)
    if not alike:
        raise MasaError(f"{family.name} has no projection that is alike in all layers, so that 'all' is none.")
    return "".join(alike)


def wanted_bytes(size: Any) -> int:
    """A number of bytes, or a text such as "900MB" or "1.5GiB".

    Raises:
        MasaError: something else.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        return size
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMG]?i?B)\s*", str(size), re.IGNORECASE)
    if not found:
        raise MasaError(f"size is a number of bytes or a text such as '900MB' or '1.5GiB', got {size!r}.")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def budget_of_size(model: nn.Module, shape: ModelShape, projections: str, size: Any) -> int:
    """Numbers that the projections may store so that the whole model has at most ``size`` bytes.

    Args:
        projections: letters.
        size: see :func:`wanted_bytes`.

    Raises:
        MasaError: out of reach; the message says what is in reach.
    """
    wanted = wanted_bytes(size)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    width = next(model.parameters()).element_size()
    dense = shape.numbers(projections)
    budget = (wanted - (whole - dense * width)) // width
    if not 0 < budget < dense:
        least = whole - dense * width
        raise MasaError(
            f"size = {size!r} is out of reach: the model has {whole:,} bytes, of which {dense * width:,} are in "
            f"{projections}. Give a size between {least:,} and {whole:,} bytes, or more projections."
        )
    return budget
