"""The forms of what ``--spec`` takes: data from outside is checked before anything is done with it. Needs no torch.

Where a spec is a part of the configuration, its form is that of the configuration's schema.
"""

from __future__ import annotations

import functools
from typing import Any

from masa.errors import PLAIN, MasaError
from masa.evaluation.metrics import METRICS
from masa.study import config, kinds

_TEXT, _OBJECT = {"type": "string"}, {"type": "object"}
_POSITIVE, _AMOUNT = {"type": "integer", "minimum": 1}, {"type": "number", "minimum": 0}
_NAME = {"type": "string", "pattern": f"^{PLAIN}(?![\\s\\S])"}
_PATH = {"type": "string", "pattern": f"^{PLAIN}(/{PLAIN})*(?![\\s\\S])"}
_RUN_ID = {"type": "string", "pattern": f"^{PLAIN}/{PLAIN}/seed[0-9]+(?![\\s\\S])"}


def _object(required: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | more}


def _list(items: dict[str, Any], least: int = 0) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": least}


_PLACES = {"cache": _TEXT, "mirror": {"type": ["string", "null"]}}
_NUMBERS = {"type": "object", "additionalProperties": {"type": ["integer", "null"], "minimum": 1}}
_RECIPE = {
    **dict.fromkeys(("batch_size", "micro_batch_size", "context", "threads", "evaluations"), _POSITIVE),
    "steps": {"type": ["integer", "null"], "minimum": 1},
    "epochs": {"type": ["number", "null"], "exclusiveMinimum": 0},
    **dict.fromkeys(("learning_rate", "min_learning_rate_ratio", "warmup_fraction", "weight_decay"), _AMOUNT),
    "max_grad_norm": _AMOUNT,
    "checkpoint_minutes": _AMOUNT,
    "coefficients_learning_rate_ratio": _AMOUNT,
    "dtype": {"enum": ["auto", "float32", "bfloat16"]},
    "adam_betas": {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2},
}
_LAYOUT = {"nodes": _POSITIVE, "processes_per_node": _POSITIVE, "parallel": {"enum": ["ddp", "fsdp"]}}
_OF_LANGUAGE = [key for key in _RECIPE if key != "epochs"]
_SIZES = ("vocab_size", "num_layers", "hidden_size", "num_attention_heads", "intermediate_size")
_RUN = _object(
    {
        "run": _RUN_ID,
        "seed": {"type": "integer", "minimum": 0},
        "model": {"type": "object", "properties": {"family": _TEXT} | dict.fromkeys(_SIZES, _POSITIVE)},
        "sharing": _OBJECT,
        "training": {
            "type": "object",
            "properties": _RECIPE | _LAYOUT | {"micro_batch_size": {"type": ["integer", "null"]}},
        },
    }
) | {
    "if": {"properties": {"model": {"not": {"required": ["family"]}}}},
    "then": {
        "properties": {
            "model": {"required": list(_SIZES)},
            "training": {"required": _OF_LANGUAGE, "properties": _RECIPE},
        }
    },
}
_ROW = _object(
    {"scale": _NAME, "experiment": _NAME, "label": _TEXT, "records": _list(_PATH, 1)},
    runs=_list(_RUN_ID, 1),
    model=_OBJECT,
    sharing=_OBJECT,
    paper=_OBJECT,
)
_LABELS = {"type": "object", "additionalProperties": _TEXT}
_VISION_DATA = {"name": _TEXT, "source": {"type": ["string", "null"]}}

_RECORDS = {"type": ["object", "null"], "additionalProperties": _list(_PATH, 1)}
_CLAIM = _object(
    {
        "name": _NAME,
        **dict.fromkeys(("claim", "source", "scale", "contrast"), _TEXT),
        "metric": {"enum": [metric.name for metric in METRICS if metric.better]},
        "margin": _AMOUNT,
        "trained": {"type": "boolean"},
        "weights": {"type": "object", "minProperties": 2, "additionalProperties": {"type": "number"}},
        "records": _RECORDS,
        "noise": _RECORDS | {"type": "object"},
    }
)

FORMS: dict[str, dict[str, Any]] = {
    "fetch": _object({"tasks": _list(_TEXT), "sources": _list(_TEXT), **_PLACES}),
    "data": _object(
        {"data": _object({"corpus": {"$ref": "#/corpus"}, "tokenizer": {"$ref": "#/tokenizer"}}), **_PLACES}
    ),
    "vision_data": _object({"data": _OBJECT | {"properties": _VISION_DATA}, **_PLACES}),
    "run": _RUN,
    "evaluation": {"$ref": "#/evaluation"},
    "vision_evaluation": {"$ref": "#/vision_evaluation"},
    "benchmarks": {
        "type": "object",
        "additionalProperties": {
            "type": "object",
            "oneOf": [{"required": ["unavailable"]}, {"required": ["source", "path"]}],
            "properties": {"unavailable": _TEXT, "source": _TEXT, "path": {"type": ["string", "null"]}},
        },
    },
    "text": _object({"text": {"$ref": "#/text"}, **_PLACES}),
    "pretrained": _object({"model": {"$ref": "#/pretrained"}, **_PLACES}),
    "throughput": _object(
        {
            "runs": _list(_RUN, 1),
            "settings": _object(dict.fromkeys(("repeats", "batch_size", "context"), _POSITIVE)),
            "threads": _POSITIVE,
        }
    ),
    "parameters": _list(_object({key: _RUN["properties"][key] for key in ("run", "seed", "model", "sharing")})),
    "table runs": _list(_RUN_ID),
    "table metrics": _list(_RUN_ID),
    "table throughput": _object({"scales": _list(_NAME), "labels": _LABELS}),
    "table parameters": _object({"labels": _LABELS}),
    "table claims": _list(_CLAIM),
    "artefact": _object(
        {"name": _NAME, "title": _TEXT, "rows": _list(_ROW, 1)},
        kind=_TEXT,
        caption=_TEXT,
        columns=_list(_TEXT),
        tolerance={"type": "number"},
        judged=_TEXT,
        paper=_object({"file": _TEXT, "match": _list(_TEXT)}),
    ),
    "sweep": _object(
        {
            "run": _PATH,
            "method": _TEXT,
            "options": _OBJECT,
            "threads": _POSITIVE,
            "reductions": _list({"type": "number", "minimum": 0, "exclusiveMaximum": 100}, 1),
            "evaluation": _object({"window": _POSITIVE, "dtype": _TEXT, "tasks": _list(_TEXT)}),
            "tasks_at": _list({"type": "number"}),
            "keep_models": {"type": "boolean"},
            "projections": _TEXT,
        },
        heal={"type": ["object", "null"]},
    ),
}
"""What is checked -> JSON Schema; a reference is to :func:`_parts`."""


@functools.cache
def _parts() -> dict[str, Any]:
    """Parts of the configuration's schema under short names."""
    known = config.schema()
    sections = known["properties"]
    text = {key: value for key, value in sections["texts"]["additionalProperties"].items() if key != "description"}
    return {
        "$defs": known["$defs"],
        "corpus": sections["data"]["properties"]["corpus"],
        "tokenizer": sections["data"]["properties"]["tokenizer"],
        "evaluation": sections["evaluation"],
        "vision_evaluation": {k: v for k, v in sections["vision_evaluation"].items() if k != "required"},
        "text": text,
        "pretrained": sections["pretrained"]["additionalProperties"],
    }


@functools.cache
def _validator(what: str) -> Any:
    """As of JSON Schema, but 4.0 is no integer: what is counted here is handed on to code that wants one."""
    import jsonschema

    base = jsonschema.Draft202012Validator
    types = base.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
    return jsonschema.validators.extend(base, type_checker=types)(FORMS[what] | _parts())


def check(what: str, spec: Any, where: str = "--spec") -> None:
    """See that data from outside has the form that a verb needs.

    Args:
        what: a key of :data:`FORMS`.
        where: the file or option, for messages.

    Raises:
        MasaError: the first place that has not.
    """
    if what == "run":
        kinds.of(spec)  # says more of what is no run at all
    errors = _validator(what).iter_errors(spec)
    if first := min(errors, key=lambda e: len(e.absolute_path), default=None):
        path = ".".join(map(str, first.absolute_path))
        message = first.message if len(first.message) < 400 else f"{first.message[:400]} …"
        raise MasaError(f"{where}{f', {path}' if path else ''}: {message}.")
