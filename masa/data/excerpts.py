"""Small sets of documents, for calibration and for perplexity, as one JSON file each."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa.data import documents
from masa.errors import MasaError
from masa.runs import run

BUFFER = 20000
"""Documents that are shuffled together."""


def prepare(name: str, spec: Mapping[str, Any], cache: Path, mirror: str | None, out: Path) -> dict[str, Any]:
    """Read the documents that ``spec`` asks for and write ``{"name", "source", "documents", "words", …}``.

    Args:
        name: of the text, a key of the configuration's ``texts``.
        spec: that entry: a source as in ``data.corpus``; ``split`` ("train", "validation" or "all"); ``documents``, how
            many are taken after shuffling (None: all), and ``characters``, how much of each (None: the whole).
        cache, mirror: where downloads and the mirror are.
        out: the JSON file.

    Raises:
        MasaError: the source cannot be had and ``optional`` is not set; else the reason is written as "unavailable".
    """
    record: dict[str, Any] = {"name": name, "source": spec["source"]}
    try:
        corpus, column = {"shuffle_buffer": BUFFER, **spec}, f"texts.{name}.column"
        stream = documents.read(corpus, cache, mirror, spec["split"], option=column)
        texts = [text[: spec.get("characters")] for text in itertools.islice(stream, spec.get("documents"))]
    except MasaError as error:
        if not spec.get("optional"):
            raise MasaError(f"texts.{name}: {error}") from error
        record |= {"unavailable": str(error)}
    else:
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        record |= {"words": sum(len(t.split()) for t in texts), "sha256": digest, "documents": texts}
    run.write_json(out, record)
    return record


def load(path: Path) -> dict[str, Any]:
    """Read a file of :func:`prepare`; "unavailable" stands in for "documents" where there are none.

    Raises:
        MasaError: missing, not JSON, or another kind of file.
    """
    record = run.read_json(path)
    if not isinstance(record, dict) or not {"documents", "unavailable"} & set(record):
        raise MasaError(f"{path} is no text file of masa (a JSON object with 'documents'); make it with `masa text`.")
    return record
