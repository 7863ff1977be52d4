"""What ``--spec`` and files from outside must hold, verb by verb. They are made of the configuration's own sections.

Data from outside is checked before anything is done with it. Further keys are left alone, but not those of a section.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from masa.evaluation.metrics import METRICS
from masa.settings import Amount, Letters, Name, Open, Positive, RelativePath, RunId, read
from masa.study import kinds
from masa.study.sections import data, evaluation, training
from masa.study.sections.artefacts import PaperNumbers, Sharing


def _form(_may: dict[str, Any] | None = None, **must: Any) -> type[Open]:
    """Keys with their types: those that must be there, and those that may."""
    fields = {name: field if isinstance(field, tuple) else (field, ...) for name, field in must.items()}
    return pydantic.create_model("Form", __base__=Open, **fields, **{k: (v, None) for k, v in (_may or {}).items()})


def _some(items: Any) -> Any:
    return Annotated[list[items], Field(min_length=1)]


_PLACES = {"cache": str, "mirror": str | None}
_TEXT, _ANY = str | None, dict[str, Any]
_SIZES = dict.fromkeys(
    ("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "intermediate_size"), Positive
)
_COUNTS = ("batch_size", "micro_batch_size", "context", "threads", "evaluations", "steps")
_AMOUNTS = ("learning_rate", "min_learning_rate_ratio", "warmup_fraction", "weight_decay", "max_grad_norm")
_AMOUNTS += ("checkpoint_minutes", "coefficients_learning_rate_ratio")
_OTHERS = ("dtype", "optimizer", "adam_betas", "nodes", "processes_per_node", "parallel", "compile")
_RECIPE = dict.fromkeys(_COUNTS, Positive) | dict.fromkeys(_AMOUNTS, Amount)
_RECIPE |= {
    name: (field.annotation, field) for name, field in training.Training.model_fields.items() if name in _OTHERS
}

_RUN: dict[str, Any] = {"run": RunId, "seed": Annotated[int, Field(ge=0)], "sharing": Sharing}
_LANGUAGE_RUN = _form(**_RUN, model=_form(**_SIZES), training=_form(**_RECIPE))
_ROW = _form(
    {"runs": _some(RunId), "model": _ANY, "sharing": _ANY, "paper": _ANY},
    **{"scale": Name, "experiment": Name, "label": str, "records": _some(RelativePath)},
)
_RECORDS = dict[str, _some(RelativePath)]


class _Benchmark(Open):
    unavailable: str = ""
    source: str = ""
    path: str | None = None

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> _Benchmark:
        if ("unavailable" in self.model_fields_set) == ({"source", "path"} <= self.model_fields_set):
            raise ValueError("must have either unavailable, or source and path")
        return self


SPECS: dict[str, Any] = {
    "fetch": _form(**_PLACES, tasks=list[str], sources=list[str]),
    "data": _form(**_PLACES, data=_form(corpus=data.Corpus, tokenizer=data.Tokenizer)),
    "vision_data": _form(**_PLACES, data=_form({"name": _TEXT, "source": _TEXT})),
    "run": _LANGUAGE_RUN,
    "vision run": _form(**_RUN, model=training.VisionModel, training=training.VisionTraining),
    "evaluation": evaluation.Evaluation,
    "vision_evaluation": evaluation.VisionEvaluation.partly(),
    "benchmarks": dict[str, _Benchmark],
    "text": _form(**_PLACES, text=data.Text),
    "pretrained": _form(**_PLACES, model=data.Pretrained),
    "throughput": _form(
        runs=_some(_LANGUAGE_RUN),
        settings=_form(repeats=Positive, batch_size=Positive, context=Positive),
        threads=Positive,
    ),
    "parameters": list[_form(**_RUN, model=_ANY, training=_ANY)],
    "table runs": list[RunId],
    "table metrics": list[RunId],
    "table throughput": _form(scales=list[Name], labels=dict[str, str]),
    "table parameters": _form(labels=dict[str, str]),
    "table claims": list[
        _form(
            **{"name": Name, **dict.fromkeys(("claim", "source", "scale", "contrast"), str)},
            metric=Literal[tuple(metric.name for metric in METRICS if metric.better)],
            margin=Amount,
            equal_within=Amount,
            trained=bool,
            weights=Annotated[dict[str, float], Field(min_length=2)],
            records=_RECORDS | None,
            noise=_RECORDS,
        )
    ],
    "table power": list[_form(scale=Name, runs=dict[str, list[RunId]], labels=dict[str, str])],
    "artefact": _form(
        {"kind": str, "caption": str, "columns": list[str], "tolerance": float, "judged": str, "paper": PaperNumbers}
        | {"left_out": list[str]},
        **{"name": Name, "title": str, "rows": _some(_ROW)},
    ),
    "sweep": _form(
        {"heal": _ANY | None, "calibration": _ANY | None, "storage": _ANY | None},
        run=RelativePath,
        method=str,
        projections=Letters,
        options=_ANY,
        threads=Positive,
        reductions=_some(Annotated[float, Field(ge=0, lt=100)]),
        evaluation=_form(window=Positive, dtype=str, tasks=list[str]),
        tasks_at=list[float],
        keep_models=bool,
        cache=str,
    ),
}
"""What is checked -> its form."""


def check(what: str, spec: Any, where: str = "--spec") -> None:
    """See that data from outside has the form that a verb needs.

    Args:
        what: a key of :data:`SPECS`.
        where: the file or option, for messages.

    Raises:
        MasaError: the first place that has not.
    """
    if what == "run" and kinds.of(spec) is not kinds.LANGUAGE:  # also says more of what is no run at all
        what = "vision run"
    read(SPECS[what], spec, f"{where}: ", where)
    for i, run in enumerate(spec if what == "parameters" else ()):
        check("run", run, f"{where}: {i}")
