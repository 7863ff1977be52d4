"""The page docs/gallery.md, written anew by ``python docs/make_gallery.py``: every figure with its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from masa.report.style import COLUMN, TEXT
from masa.runs.files import PROJECT
from masa.study import compressions, config, experiments

RUNS = {
    "laptop": ("the default run", [], "snakemake --cores all {name}"),
    "mirror": (
        "the mirror's run (`config/mirror.yaml`)",
        ["config/mirror.yaml"],
        "MASA_MIRROR=/path/to/mirror snakemake --cores all {name} --configfile config/mirror.yaml",
    ),
    "evidence": (
        "the evidence (`config/evidence.yaml`)",
        ["config/evidence.yaml"],
        "MASA_MIRROR=/path/to/mirror snakemake --cores all {name} --configfile config/evidence.yaml",
    ),
    "whole": (
        "all linear layers (`config/whole.yaml`)",
        ["config/mirror.yaml", "config/whole.yaml"],
        "MASA_MIRROR=/path/to/mirror snakemake --cores all {name} --configfile config/mirror.yaml config/whole.yaml",
    ),
    "bytes": (
        "bytes of whole files (`config/bytes.yaml`)",
        ["config/mirror.yaml", "config/bytes.yaml"],
        "MASA_MIRROR=/path/to/mirror snakemake --cores all {name} --configfile config/mirror.yaml config/bytes.yaml",
    ),
}
"""Directory below results/reference -> what it is of, its overlays, the command that makes one figure of it."""

SECTIONS = {
    "tokens": "Language models",
    "images": "Vision Transformers",
    "boxes": "Detectors",
    "pretrained": "Training-free compression",
}

_INTRO = """\
# Gallery

<!-- Made by `python docs/make_gallery.py` from config/artefacts.yaml and results/reference. Do not edit. -->

Every figure, as the reference runs drew it. PNG (300 dots an inch) and PDF (fonts embedded) are in print size: 3.25
inches for one column, 6.75 for the whole width of a two-column page, no text below 6 points. A method has the same
colour, line and marker everywhere. The line below each figure says what its error bars or bands are.

`masa figures NAME --out figures` draws one again from finished results, in seconds; the commands below also make every
run that is missing.
"""


def page(root: Path = PROJECT) -> str:
    """The text of docs/gallery.md.

    Args:
        root: of the repository; pictures are looked for below its ``results/reference``.
    """
    known = {run: config.load([root / overlay for overlay in overlays]) for run, (_, overlays, _) in RUNS.items()}
    sections: dict[str, list[str]] = {models: [] for models in SECTIONS}
    found = {run: experiments.active(c, "figures") for run, c in known.items()}
    for name in dict.fromkeys(name for figures in found.values() for name in figures):
        active = [run for run, figures in found.items() if name in figures]
        figure = found[active[0]][name]
        sections[_models(known[active[0]], figure)].append(_entry(root, name, figure, active))
    parts = [_INTRO]
    for models, entries in sections.items():
        parts += [f"## {SECTIONS[models]}\n", *entries] if entries else []
    return "\n".join(parts)


def _models(c: config.Config, figure: dict[str, Any]) -> str:
    """What a figure is about: a key of :data:`SECTIONS`."""
    if compressions.is_compression(c, figure):
        return "pretrained"
    return experiments.kind_of(c, c["grids"][figure["grid"]]["scales"][0]).data


def _entry(root: Path, name: str, figure: dict[str, Any], active: list[str]) -> str:
    """One figure: a picture of the first run that has one, and the commands and files of all."""
    lines = [f"### {figure['title']}\n"]
    drawn = [run for run in active if (root / _file(run, name, "png")).is_file()]
    if drawn:
        lines.append(f"![{figure['title']}](../{_file(drawn[0], name, 'png')})\n")
    lines.append(f"{figure.get('caption', '').strip()}\n")
    for run in drawn or active[:1]:
        what, _, command = RUNS[run]
        kept = [suffix for suffix in ("png", "pdf") if (root / _file(run, name, suffix)).is_file()]
        files = [f"[{suffix.upper()}](../{_file(run, name, suffix)})" for suffix in kept] or ["no picture is kept"]
        if "png" in kept and _pixels(root / _file(run, name, "png")) not in _WIDTHS:
            files.append("drawn by an earlier version in another style and size")
        lines.append(f"- {what}: {', '.join(files)}; `{command.format(name=name)}`")
    return "\n".join(lines) + "\n"


_WIDTHS = {round(300 * width) for width in (COLUMN, TEXT)}


def _pixels(png: Path) -> int:
    """Width of a picture, from its header."""
    return int.from_bytes(png.read_bytes()[16:20], "big")


def _file(run: str, name: str, suffix: str) -> str:
    return f"results/reference/{run}/figures/{name}.{suffix}"


if __name__ == "__main__":
    (PROJECT / "docs" / "gallery.md").write_text(page(), encoding="utf-8")
