"""What to do to a model that shall have a given size: the kind of storage that lost least at those bytes.

The rule is read off ``table_whole`` and what few bits cost (docs/results.md): sixteen bits cost nothing that can be
measured, eight bits for the embeddings next to nothing; of what is left, each matrix takes what costs the loss least
for its bytes, with 16, 8 or 4 bits, dense or pruned in place. Low rank and dictionaries lose more at the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from masa.compression.calibration.collect import DTYPES
from masa.compression.calibration.statistics import Calibration
from masa.compression.sizes import ALL, letters, wanted_bytes
from masa.errors import MasaError
from masa.sharing.embeddings import group_of

BITS = (16, 8, 4)


@dataclass
class Choice:
    """What is done, and why.

    Attributes:
        method, options, projections: as of :func:`masa.compression.run_compress`.
        dtype: to convert to first; None for the stored one.
        embeddings: bits of embeddings and head, or None.
        size: that the model may have before its embeddings are rounded.
        why: a sentence for each.
    """

    method: str
    projections: str
    dtype: str | None
    embeddings: int | None
    size: Any
    options: dict[str, Any] = field(default_factory=lambda: {"bits": list(BITS)})
    why: list[str] = field(default_factory=list)

    def said(self) -> dict[str, Any]:
        """For an account; nothing where a user chose."""
        if not self.why:
            return {}
        return {"chosen": {"dtype": self.dtype, "embeddings": self.embeddings, "why": self.why}}


def choose(
    model: nn.Module,
    size: Any,
    statistics: Calibration | None,
    projections: str | None = None,
    dtype: str | None = None,
) -> Choice:
    """The choice for a size of the whole model.

    Args:
        model: dense.
        size: bytes, or a text such as "110MiB".
        statistics: of the model; with gradients, errors count by what they cost the loss.
        projections: letters that may be compressed; None for all linear layers.
        dtype: that the user asked for; None to choose it.

    Raises:
        MasaError: a size that the model has without compression.
    """
    wanted, numbers = wanted_bytes(size), sum(p.numel() for p in model.parameters())
    width = next(model.parameters()).element_size()
    why = []
    if dtype is not None:
        width = DTYPES[dtype].itemsize
    elif width > 2 and wanted < numbers * width:
        dtype, width = "float16", 2
        why.append("float16: half the bytes, and no loss that can be measured")
    if wanted >= numbers * width:
        how = f"in {dtype} " if dtype else ""
        raise MasaError(
            f"The model has {numbers * width:,} bytes {how}already, and {wanted:,} are asked for: there is nothing to "
            f"compress. {f'`masa export --dtype {dtype}` writes it.' if dtype else 'Ask for less.'}"
        )
    embeddings, saved = _embeddings(model, width)
    if embeddings:
        why.append(f"embeddings with {embeddings} bits: {saved:,} bytes less, next to no loss")
    gradients = statistics is not None and bool(statistics.gradient_samples)
    chosen = Choice(
        method="sparse-fisher" if gradients else "sparse-wanda" if statistics is not None else "sparse-magnitude",
        projections=letters(model, projections or ALL),
        dtype=dtype,
        embeddings=embeddings,
        size=wanted + saved,
    )
    measure = "what it costs the loss" if gradients else "the error of its outputs" if statistics else "its own error"
    why.append(
        f"{chosen.method} with {', '.join(map(str, BITS))} bits: each matrix dense or pruned in place by {measure}, "
        "which lost least at equal bytes"
    )
    if not gradients:
        why.append("statistics with gradients (masa calibrate --gradient-samples 32) would choose better")
    chosen.why = why
    return chosen


def _embeddings(model: nn.Module, width: int) -> tuple[int | None, int]:
    """Bits that embeddings and head can have, and the bytes that this saves."""
    few, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(few) is not nn.Embedding or type(head) not in (nn.Linear, type(None)):
        return None, 0
    tables = {id(m.weight): m.weight for m in (few, head) if m is not None}
    if any(t.shape[1] % 2 for t in tables.values()):
        return None, 0
    saved = 0
    for table in tables.values():
        groups = table.shape[1] // group_of(table.shape[1], 8)
        saved += table.numel() * (width - 1) - table.shape[0] * groups * 2
    return (8, saved) if saved > 0 else (None, 0)
