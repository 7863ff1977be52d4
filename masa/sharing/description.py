"""What a model folder's ``config.json`` says of how its matrices are shared: plain data, read without torch.

A folder whose matrices come from shared sources has it as ``quantization_config`` with our ``quant_method``, which
leads transformers' loaders here once masa is imported; one whose matrices are all stored (vanilla, grouped-query
attention) is anybody's, and has it as ``masa``. Folders of format 1 have a file ``masa.json`` instead.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.sharing.compression_spec import CompressionSpec
from masa.sharing.spec import SharingSpec

FORMATS = (1, 2, 3, 4)
"""1 has a file of its own (:data:`EARLIER`); 3 says which blocks share what
where not all do, and which stack of blocks where there are several; 4 has
embeddings with few bits."""
METHOD = "masa--import-masa-before-you-load-it-or-run-masa-export"
"""``quant_method`` of a factored folder. Tools that do not know it print it, so that it says the two ways on."""
PLAIN = "masa"
"""Key of ``config.json`` where every matrix is stored."""
EARLIER = "masa.json"
ELSEWHERE = f"factored-by-{METHOD}.safetensors"
"""Where ``config.json`` says that the weights are, a file that does not exist: a loader that does not know masa stops
with its name, which is the message, before it draws a weight. Else all attention would be random, and the exit 0."""


def read(folder: Path) -> dict[str, Any] | None:
    """The description of a folder, or None if it is an ordinary model.

    Returns:
        ``spec``, ``dense_attention``, ``sources``, and from format 3 on ``layers`` or ``stack``, in 4 ``embeddings``.

    Raises:
        MasaError: it cannot be read; the message names the file.
    """
    if (folder / EARLIER).is_file():
        return check(_json(folder / EARLIER), folder / EARLIER)
    return of_config(_json(folder / "config.json"), folder / "config.json")


def of_config(config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """As :func:`read`, from a ``config.json`` that has been read."""
    if not isinstance(config, Mapping):
        raise MasaError(f"{path} is not a model configuration: it holds a {type(config).__name__}.")
    quantization = config.get("quantization_config")
    if isinstance(quantization, Mapping) and quantization.get("quant_method") == METHOD:
        return check({k: v for k, v in quantization.items() if k != "quant_method"}, path)
    if PLAIN in config:
        return check(config[PLAIN], path)
    return None


def check(description: Any, path: Path | str) -> dict[str, Any]:
    """A description that this version reads.

    Raises:
        MasaError: another format, or a part is missing.
    """
    if not isinstance(description, Mapping) or description.get("format") not in FORMATS:
        found = description.get("format") if isinstance(description, Mapping) else type(description).__name__
        raise MasaError(f"{path} has format {found!r}; this version of masa reads 1 to {FORMATS[-1]}.")
    if missing := {"spec", "dense_attention", "sources"} - set(description):
        raise MasaError(f"{path} lacks {', '.join(sorted(missing))}.")
    return dict(description)


def read_spec(data: Mapping[str, Any], path: Path | str) -> SharingSpec | CompressionSpec:
    """A compressed model's spec has a reduction, a shared one's has not.

    Raises:
        MasaError: an unknown method or key.
    """
    if "reduction" not in data:
        return SharingSpec.coerce(data)
    try:
        return CompressionSpec(**data)
    except TypeError as error:
        raise MasaError(f"{path}: {error}.") from error


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise MasaError(f"{path} is missing: a model folder has config.json and safetensors files.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise MasaError(f"{path} is not valid JSON: {error}") from error
