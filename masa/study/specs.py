"""What ``--spec`` and files from outside must hold, verb by verb. They are made of the configuration's own sections.

Data from outside is checked before anything is done with it; further keys are left alone.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field

from masa.evaluation.metrics import METRICS
from masa.settings import Amount, Letters, Name, Open, Positive, RelativePath, RunId, Section, key
from masa.study import kinds
from masa.study.sections import data, evaluation, training
from masa.study.sections.artefacts import PaperNumbers


class _Places(Open):
    cache: str
    mirror: str | None


class _Tasks(_Places):
    tasks: list[str]
    sources: list[str]


class _DataOf(Open):
    corpus: data.Corpus
    tokenizer: data.Tokenizer


class _Data(_Places):
    data: _DataOf


class _VisionDataOf(Open):
    name: str | None = None
    source: str | None = None


class _VisionData(_Places):
    data: _VisionDataOf


class _Text(_Places):
    text: data.Text


class _Pretrained(_Places):
    model: data.Pretrained


_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_Sizes = pydantic.create_model("_Sizes", __base__=Open, **dict.fromkeys(_SIZES, (Positive, ...)))
_AMOUNTS = ("learning_rate", "min_learning_rate_ratio", "warmup_fraction", "weight_decay", "max_grad_norm")
_Recipe = pydantic.create_model(
    "_Recipe",
    __base__=Open,
    **dict.fromkeys(("batch_size", "micro_batch_size", "context", "threads", "evaluations", "steps"), (Positive, ...)),
    **dict.fromkeys((*_AMOUNTS, "checkpoint_minutes", "coefficients_learning_rate_ratio"), (Amount, ...)),
    **{
        name: (field.annotation, field)
        for name, field in training.Training.model_fields.items()
        if name in ("dtype", "adam_betas", "nodes", "processes_per_node", "parallel")
    },
)


class _AnyRun(Open):
    run: RunId
    seed: int = Field(ge=0)
    sharing: dict[str, Any]


class _Run(_AnyRun):
    model: _Sizes  # type: ignore[valid-type]
    training: _Recipe  # type: ignore[valid-type]


class _VisionRun(_AnyRun):
    model: training.VisionModel  # type: ignore[valid-type]
    training: training.VisionTraining  # type: ignore[valid-type]


class _Counted(_AnyRun):
    model: dict[str, Any]


class _Timing(Open):
    repeats: Positive
    batch_size: Positive
    context: Positive


class _Throughput(Open):
    runs: Annotated[list[_Run], Field(min_length=1)]
    settings: _Timing
    threads: Positive


class _Row(Open):
    scale: Name
    experiment: Name
    label: str
    records: Annotated[list[RelativePath], Field(min_length=1)]
    runs: Annotated[list[RunId], Field(min_length=1)] = key("", None)
    model: dict[str, Any] = key("", None)
    sharing: dict[str, Any] = key("", None)
    paper: dict[str, Any] = key("", None)


class _Artefact(Open):
    name: Name
    title: str
    rows: Annotated[list[_Row], Field(min_length=1)]
    kind: str = key("", None)
    caption: str = key("", None)
    columns: list[str] = key("", None)
    tolerance: float = key("", None)
    judged: str = key("", None)
    paper: PaperNumbers = key("", None)


Records = dict[str, Annotated[list[RelativePath], Field(min_length=1)]]


class _Claim(Open):
    name: Name
    claim: str
    source: str
    scale: str
    contrast: str
    metric: Literal[tuple(metric.name for metric in METRICS if metric.better)]  # type: ignore[valid-type]
    margin: Amount
    trained: bool
    weights: Annotated[dict[str, float], Field(min_length=2)]
    records: Records | None
    noise: Records


class _ScaleTable(Open):
    scales: list[Name]
    labels: dict[str, str]


class _LabelTable(Open):
    labels: dict[str, str]


class _SweepEvaluation(Open):
    window: Positive
    dtype: str
    tasks: list[str]


class _Sweep(Open):
    run: RelativePath
    method: str
    options: dict[str, Any]
    threads: Positive
    reductions: Annotated[list[Annotated[float, Field(ge=0, lt=100)]], Field(min_length=1)]
    evaluation: _SweepEvaluation
    tasks_at: list[float]
    keep_models: bool
    projections: Letters
    heal: dict[str, Any] | None = None


class _Benchmark(Open):
    unavailable: str = key("", None)
    source: str = key("", None)
    path: str | None = key("", None)

    @pydantic.model_validator(mode="after")
    def _one_of_two(self) -> _Benchmark:
        if ("unavailable" in self.model_fields_set) == ({"source", "path"} <= self.model_fields_set):
            raise ValueError("must have either unavailable, or source and path")
        return self


SPECS: dict[str, Any] = {
    "fetch": _Tasks,
    "data": _Data,
    "vision_data": _VisionData,
    "run": _Run,
    "vision run": _VisionRun,
    "evaluation": evaluation.Evaluation,
    "vision_evaluation": evaluation.VisionEvaluation.partly(),
    "benchmarks": dict[str, _Benchmark],
    "text": _Text,
    "pretrained": _Pretrained,
    "throughput": _Throughput,
    "parameters": list[_Counted],
    "table runs": list[RunId],
    "table metrics": list[RunId],
    "table throughput": _ScaleTable,
    "table parameters": _LabelTable,
    "table claims": list[_Claim],
    "artefact": _Artefact,
    "sweep": _Sweep,
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
    form = SPECS[what]
    if isinstance(form, type) and issubclass(form, Section):
        form.read(spec, f"{where}: ", where)
    else:
        pydantic.create_model("Wrapped", __base__=Section, spec=(form, ...)).read({"spec": spec}, f"{where}: ", where)
