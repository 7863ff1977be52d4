"""What the notebooks need to find finished runs, and to show their figures in little space."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from masa.errors import MasaError
from masa.runs.files import PROJECT
from masa.study import config

if TYPE_CHECKING:
    from IPython.display import Image

QUICK = os.environ.get("MASA_NOTEBOOK_QUICK", "") not in ("", "0")
"""Whether notebooks that train or compress take a few steps only, as the tests have it."""

CANDIDATES = ("results", "results/smoke")
"""Folders of the project that are looked at, in this order, unless MASA_RESULTS names one."""


def quiet() -> None:
    """No progress bars and no hints of libraries in the outputs; before transformers is imported."""
    os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", message="IProgress not found")


def finished_scales(results: Path, *experiments: str) -> list[str]:
    """Scales at which every one of some experiments has a finished seed; the one with the most experiments first."""
    found: dict[str, set[str]] = {}
    for manifest in sorted(results.glob("runs/*/*/seed*/manifest.json")):
        scale, experiment = manifest.parts[-4:-2]
        found.setdefault(scale, set()).add(experiment)
    complete = [scale for scale, names in found.items() if set(experiments) <= names]
    return sorted(complete, key=lambda scale: -len(found[scale]))


def find_results(*experiments: str) -> Path:
    """The folder of results that a notebook reads: MASA_RESULTS, else ``results``, else ``results/smoke``.

    Args:
        experiments: those of which a finished seed is needed, at one scale; none: any finished run.

    Raises:
        MasaError: there is none; the message says which command makes it.
    """
    wanted = os.environ.get("MASA_RESULTS")
    names = (wanted,) if wanted else CANDIDATES
    folder = next((PROJECT / name for name in names if finished_scales(PROJECT / name, *experiments)), None)
    if folder is None:
        what = f"runs of {' and '.join(experiments)} at one scale" if experiments else "runs"
        raise MasaError(
            f"No finished {what} in {' or '.join(names)}{' (MASA_RESULTS)' if wanted else ''}. `make results` makes "
            "them, in about 35 minutes on two cores; `snakemake --cores all --configfile config/smoke.yaml`, in three "
            "minutes, makes small ones whose numbers mean nothing."
        )
    if not wanted and folder != PROJECT / names[0]:
        print(
            f"No finished runs in {names[0]} yet: this reads {folder.relative_to(PROJECT)}, whose numbers mean nothing."
        )
    return folder


def configuration(results: Path) -> dict[str, Any]:
    """The configuration that a folder of results was made with: ``results/NAME`` with ``config/NAME.yaml``."""
    overlay = PROJECT / "config" / f"{results.name}.yaml"
    return config.load([overlay] if overlay.is_file() else [])


def finished_rows(spec: Mapping[str, Any], results: Path) -> dict[str, Any]:
    """A table's or figure's spec with what is evaluated already: of its rows, and of their seeds.

    Rows of trainings keep the seeds that all of them have, so that differences between rows are paired; one that has no
    seed in common with those before it is left out.
    """

    def only(row: Mapping[str, Any], wanted: Callable[[str], bool]) -> dict[str, Any]:
        kept = [i for i, record in enumerate(row["records"]) if wanted(record)]
        return dict(row) | {key: [row[key][i] for i in kept] for key in ("records", "runs") if key in row}

    rows, common = [], None
    for row in (only(row, lambda record: (results / record / "metrics.json").is_file()) for row in spec["rows"]):
        seeds = {_seed(record) for record in row["records"]} if "runs" in row else set()
        if "runs" in row and common is not None:
            seeds &= common
        if row["records"] and (seeds or "runs" not in row):
            common = seeds or common
            rows.append(row)
    return dict(spec) | {
        "rows": [only(row, lambda record: _seed(record) in (common or ())) if "runs" in row else row for row in rows]
    }


def _seed(record: str) -> str:
    """The last part of a run's or its evaluation's path."""
    return record.rpartition("/")[2]


def picture(path: Path, dots: float = 100, colours: int = 32) -> Image:
    """A PNG for a notebook's output, scaled down and with few colours: about 15 kB instead of 100.

    Args:
        path: of the PNG; how large it is in inches, it says itself.
        dots: an inch.
        colours: of its palette.

    Raises:
        MasaError: the file is missing.
    """
    import PIL.Image
    from IPython.display import Image

    if not path.is_file():
        raise MasaError(f"{path} does not exist; make it with `masa figures {path.stem} --out {path.parent}`.")
    with PIL.Image.open(path) as opened:
        scale = min(1, dots / opened.info.get("dpi", (dots, dots))[0])
        whole = opened.convert("RGB")
    size = (round(scale * whole.width), round(scale * whole.height))
    small = whole.resize(size, PIL.Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.quantize(colours, dither=PIL.Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return Image(buffer.getvalue())
