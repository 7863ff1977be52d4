"""Sections of what comes out: grids, experiments, tables, figures, claims."""

from __future__ import annotations

import dataclasses
import inspect
import re
from typing import Annotated, Any, get_type_hints

import pydantic
from pydantic import Field

from masa.settings import Amount, Name, Reductions, Section, Seeds, key
from masa.sharing.spec import SharingSpec


def _of_dataclass(cls: type, name: str) -> type[Section]:
    """A section whose keys are a dataclass's fields, and whose sentences are those of its docstring's ``Args``."""
    arguments = inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2]
    said = {m[1]: " ".join(m[2].split()) for m in re.finditer(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.M)}
    hints, fields = get_type_hints(cls), {}
    for field in dataclasses.fields(cls):
        default = ... if field.default is dataclasses.MISSING else field.default
        fields[field.name] = (_lists(hints[field.name]), key(_plain(said[field.name]), default))
    return pydantic.create_model(name, __base__=Section, **fields)


def _lists(hint: Any) -> Any:
    """YAML has lists where Python has tuples."""
    return list[str] | None if hint == tuple[str, ...] | None else hint


def _plain(sentence: str) -> str:
    plain = re.sub(r":\w+:`~?(?:[\w.]+\.)?([\w]+)`", r"\1", sentence).replace("``", "")
    return plain[0].upper() + plain[1:]


Sharing = _of_dataclass(SharingSpec, "Sharing")
"""The fields of :class:`masa.SharingSpec`, as keys."""


class Grid(Section):
    """What an artefact is made for: scales and seeds, or pretrained models and reductions."""

    pretrained: list[Name] = key("Pretrained models to compress; an empty list leaves the grid's artefacts out.", None)
    reductions: Reductions = key("Attention reductions in percent.", None)
    scales: list[Name] = key(
        "Scales (of scales or vision_scales); an empty list leaves the grid's artefacts out.", None
    )
    seeds: Seeds = key("Seeds of initialisation and data order.", None)

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> Grid:
        trained, compressed = (
            {*pair} <= self.model_fields_set for pair in (("scales", "seeds"), ("pretrained", "reductions"))
        )
        if trained == compressed:
            raise ValueError("must have either scales and seeds, or pretrained and reductions")
        return self


Experiment = Sharing.changed(
    "Experiment",
    label=(str, key("Name in tables and figures.")),
    paper=(dict[str, Any], key("Which row of the paper's table this run corresponds to.", None)),
    only=(list[Name], key("Scales that this run is made at; by default all of a grid.", None)),
    per_scale=(dict[str, Sharing.partly()], key("Fields of the spec that differ at one scale.", None)),  # type: ignore[misc]
)


class PaperNumbers(Section):
    """The paper's numbers beside ours."""

    file: str = key("CSV of published numbers.")
    match: list[str] = key("Columns that identify a row: scale or model, and keys of an experiment's `paper` entry.")


Caption = Annotated[str, Field(min_length=1)]
_CAPTION = "What it shows and what to look at, in a sentence or two, for the report and the gallery."


class Table(Section):
    """A table."""

    title: str = key("Heading of the table.")
    caption: Caption = key(_CAPTION, None)
    grid: str = key("Name of a grid.")
    experiments: list[Name] = key("Rows, in order.")
    tasks: list[Name] = key("Rows of a compression table that lm-eval scores; the others have perplexities only.", [])
    columns: list[str] = key("Metrics shown in the table for people (default: all); the CSV has every one.", None)
    tolerance: float = key("Points within which a row agrees with the paper.", 1.0, gt=0)
    judged: str = key("Metric that the verdict goes by: the average accuracy, or another.", "avg_pct")
    paper: PaperNumbers = key("The paper's numbers beside ours.", None)


class Figure(Section):
    """A figure."""

    title: str = key("Heading of the figure.")
    caption: Caption = key(_CAPTION, None)
    kind: str = key(
        "curves, gap, quality, effective_rank or coefficients; of vision: accuracy_parameters, confusion, per_class, "
        "predictions or detections; of compression: perplexity_reduction, perplexity_bytes, ranks or drift."
    )
    paper: PaperNumbers = key("As of a table; only accuracy_parameters draws it.", None)
    grid: str = key("Name of a grid.")
    experiments: list[Name] = key("What is drawn, in order.")


class Claim(Section):
    """A claim of the paper, judged in the table claims by one rule."""

    claim: str = key("The claim in words.")
    source: str = key("Where in the paper it stands.")
    grid: str = key("Name of a grid: its scales and seeds, or its pretrained models and reductions.")
    metric: str = key("Column that it is judged by; held_out_ppl by its logarithm.")
    contrast: Annotated[dict[str, float], Field(min_length=2)] = key(
        "Experiment (or compression) -> weight; they add up to 0. The claim is that the weighted sum is on the better "
        "side: {ours: 1, theirs: -1} says that ours is better."
    )
    margin: Amount = key('How much worse still counts, in the metric\'s unit; for claims of "at least as good".', 0)
    equal_within: Amount = key(
        "How far from zero, both ways, the difference may be for a verdict of equality, in the unit of the weighted "
        "sum; 0: it is not asked.",
        0,
    )
