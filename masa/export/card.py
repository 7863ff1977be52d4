"""The model card: what the model is, how it is loaded, and what it was made of, all from the run's own files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from masa import __version__
from masa.errors import redact
from masa.evaluation.metrics import METRICS, every_score, flatten, standard_errors
from masa.export.card_template import TEMPLATE
from masa.export.source import Source
from masa.models.llama_types import told
from masa.study.sections.compression import Heal

_ABSOLUTE = re.compile(r"(?:(?<![\w:/.*~-])|(?<=file:))(?:~|[A-Za-z]:)?[/\\](?=[^\s/\\])(?:[^/\\\s,\"']+[/\\])*")
"""The folders of an absolute path, or of one in the home directory."""

_GGUF = {
    "converter": "converter",
    "sha256": "sha256 of the converter",
    "architecture": "architecture in llama.cpp",
    "pre_tokenizer": "text is split as llama.cpp's",
}


def write(source: Source, kind: Any, usage: str, account: Mapping[str, Any], license: str, out: Path) -> None:
    """Write the card.

    Args:
        source: what was exported.
        kind: module of its kind.
        usage: Python that runs in the exported folder.
        account: of the export.
        license: for the front matter.
        out: ``README.md``.
    """
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    scores = list(_scores(source))
    results = [
        EvalResult(
            task_type=kind.TASK,
            dataset_type=re.sub(r"[^A-Za-z0-9._/-]+", "-", row["data"]).strip("-"),
            dataset_name=row["data"],
            metric_type=row["name"],
            metric_name=row["label"],
            metric_value=row["number"],
        )
        for row in scores
    ]
    fact = account["parameters"]
    gguf = account["format"] == "gguf"
    ours, paper = ([], []) if source.foreign else (["masa", "weight-sharing", source.method], ["arxiv:2508.04581"])
    card_data = ModelCardData(
        license=license,
        library_name="llama.cpp" if gguf else kind.LIBRARY,
        pipeline_tag=kind.TASK,
        tags=[*ours, *(["gguf"] if gguf else []), *paper],
        datasets=_hub_names((source.data or {}).get("corpus", {}).get("source")),
        model_name=source.name if results else None,
        eval_results=results or None,
    )
    config = json.loads((source.model / "config.json").read_text(encoding="utf-8"))
    ModelCard.from_template(
        card_data,
        template_str=TEMPLATE,
        name=source.name,
        summary=_summary(source, fact),
        facts=_table(_facts(source, account)),
        usage=usage,
        data=_table(kind.describe_data(source) or _calibration(source)),
        data_notes=_data_notes(source),
        recipe=_table(_recipe(source)),
        scores=scores,
        evaluated_on=_evaluated_on(source),
        measured=_measured(source, account),
        trained=_table(source.trained or {}),
        metric_notes=_notes(source, "metrics"),
        provenance=_table(_provenance(source)),
        handed_on=_handed_on(account),
        version=__version__,
        revision=account["provenance"]["revision"] or "unknown",
        limits=[*kind.limits(source, config), *_limits(source, account)],
        compressed=source.compression is not None,
        license=license,
    ).save(out)


def _facts(source: Source, account: Mapping[str, Any]) -> dict[str, Any]:
    """The method, its hyperparameters and the sizes."""
    fact, spec = account["parameters"], source.description["spec"]
    return (
        {"method": source.method}
        | {k: v for k, v in spec.items() if k != "method" and v is not None}
        | {
            "attention reduction": f"{fact['attention_reduction']:.2%}",
            "parameters, factored": fact["total"],
            "parameters in this folder, folded": fact["folded"],
            "weights": account["dtype"],
        }
        | {_GGUF[key]: value for key, value in account.get("gguf", {}).items()}
        | ({"tensors, by llama.cpp's types": told(types)} if (types := account.get("types")) else {})
    )


def _summary(source: Source, count: Mapping[str, Any]) -> str:
    what = f"{source.kind.label[0].upper()}{source.kind.label[1:]}"
    fewer = f"{count['attention_reduction']:.1%} fewer numbers in Q, K, V and O"
    if source.compression:
        origin = Path(str(source.compression.get("model") or source.name.split("/")[0])).name
        how = "and healed by a short training" if _healing(source) else "without training"
        return (
            f"{origin}, its attention compressed by `{source.method}` {how}: {fewer}. Here the matrices are written "
            "out again, so it is as large as its origin."
        )
    if count["folded"] != count["total"]:
        return (
            f"{what} whose matrices are made of fewer numbers (`{source.method}`): trained with {fewer}. Here every "
            "matrix is written out, so that the model is an ordinary one, and as large as one that shares nothing."
        )
    if source.foreign:
        return f"{what} as it was, converted: masa changed no weight of it."
    if count["attention"] == count["attention_dense"]:
        return f"{what}, trained without sharing weights (`{source.method}`)."
    return f"{what}, trained with {fewer} (`{source.method}`). Nothing had to be written out: it is as small here."


def _scores(source: Source) -> Iterator[dict[str, Any]]:
    """One row a metric of the evaluation."""
    for when in ("before", "after"):
        if found := (source.compression or {}).get(f"perplexity_{when}"):
            for name in ("token_perplexity", "word_perplexity"):
                yield {
                    "data": "text given to masa compress",
                    "name": f"{name}_{when}",
                    "label": f"{name.replace('_', ' ')}, {when} compression",
                    "number": found[name],
                    "value": f"{found[name]:,.2f}",
                }
    if source.metrics is None:
        return
    metrics = source.metrics
    errors = standard_errors(metrics)
    flat = flatten({k: v for k, v in metrics.items() if k != "tasks"})
    held_out, texts = _data_name(source), metrics.get("texts", {})
    for metric in METRICS:
        if metric.better and metric.name in flat:
            number, error = flat[metric.name], errors.get(f"{metric.name}_se")
            yield {
                "data": next((name for name in texts if metric.name == f"{name}_token_ppl"), held_out),
                "name": metric.name,
                "label": metric.label,
                "number": number,
                "value": f"{number:,.{metric.digits}f}",
                "error": None if error is None else f"{error:.{metric.digits}f}",
            }
    for name, number in every_score(metrics).items():
        task, _, label = name.partition("/")
        note = metrics["task_data"].get(task, {}).get("note")
        yield {
            "data": task,
            "name": label,
            "label": label + (f" ({note})" if note else ""),
            "number": number,
            "value": f"{number:,.4g}",
            "examples": metrics["examples"].get(task),
        }


def _data_name(source: Source) -> str:
    metrics = source.metrics or {}
    if "dataset" in metrics:
        return f"{metrics['dataset']} ({metrics['settings']['split']})"
    return "held-out text"


def _evaluated_on(source: Source) -> str:
    metrics = source.metrics or {}
    settings = metrics.get("settings", {})
    limit = settings.get("limit")
    if metrics.get("tasks") and any((limit, *settings.get("limit_per_task", {}).values())):
        return "Tasks are scored on the first of their examples alone; the last column says on how many."
    return f"Scored on at most {limit} images, not on all of them." if limit and "dataset" in metrics else ""


def _measured(source: Source, account: Mapping[str, Any]) -> str:
    """In which arithmetic the scores were computed: the evaluation's own, else that of the stored weights."""
    dtype = (source.metrics or {}).get("settings", {}).get("dtype", account["dtype_stored"])
    other = f"; the weights here are {account['dtype']}" if dtype != account["dtype"] else ""
    return f"Measured before the export, in {dtype}{other}."


def _healing(source: Source) -> dict[str, Any]:
    """How a compressed model was trained a little after its compression; empty if it was not."""
    found = (source.metrics or {}).get("healing") or {}
    return {f"healing {key}": found[key] for key in Heal.model_fields if key in found}


def _data_notes(source: Source) -> list[str]:
    if source.compression:
        return [
            "What the original was trained on is not known here."
            + " Compression read no data." * (not _calibration(source))
        ]
    return _notes(source, "data", "Not known.") if source.data is None else []


def _calibration(source: Source) -> dict[str, Any]:
    """What a compression was calibrated on."""
    found = (source.compression or {}).get("calibration") or {}
    return {f"calibration {key}": value for key, value in found.items()}


def _recipe(source: Source) -> dict[str, Any]:
    """All that decided the weights, beside the data and the sharing."""
    if source.spec is not None:
        rows = {"seed": source.spec["seed"]} | source.spec["model"] | source.spec["training"]
        return {key: "none" if value is None else value for key, value in rows.items()}
    keys = ("method", "options", "projections", "reduction_requested", "reduction_achieved", "seconds")
    found = source.compression or {}
    return {key.replace("_", " "): found[key] for key in keys if key in found} | _healing(source)


def _provenance(source: Source) -> dict[str, Any]:
    found = source.provenance or {}
    keys = ("revision", "python", "platform", "cpu", "gpu", "driver", "cuda", "dtype", "processes")
    rows = {key: found[key] for key in keys if key in found}
    rows |= {"packages": ", ".join(f"{n} {v}" for n, v in found.get("packages", {}).items())} if found else {}
    rows |= {f"checksum of the {name} in provenance.json": digest for name, digest in found.get("inputs", {}).items()}
    return rows | ({"run identity": source.identity} if source.identity else {})


def _handed_on(account: Mapping[str, Any]) -> list[str]:
    """What came along from the model's folder, and what did not."""
    handed = account.get("handed_on")
    if not handed:
        return []
    lines = [f"Unchanged from the model's folder: {', '.join(handed['files']) or 'nothing'}."]
    left = ", ".join(f"{name} ({why})" for name, why in handed["left"].items())
    return [*lines, f"Left behind: {left}."] if left else lines


def _limits(source: Source, account: Mapping[str, Any]) -> list[str]:
    lines = []
    if source.spec:
        lines.append("One run of one seed; it was made to compare ways of sharing weights, not to be used.")
    if account["format"] == "gguf" and account["gguf"]["architecture"] == "starcoder2":
        lines.append(
            "llama.cpp computes GELU by its tanh approximation (on a CPU from a table in half precision), this model "
            "was trained with the exact one: probabilities differ a little, and near-ties may be decided otherwise."
        )
    check = account.get("check", {})
    if "texts" in check:
        lines.append(
            f"Compared with transformers: {check['texts']} texts are split alike and {check['tokens']} greedy tokens "
            f"are equal ({len(check['ties'])} near-ties decided otherwise); log-probabilities differ by at most "
            f"{check['largest_logprob_difference']:.2g} nats."
        )
    elif check:
        difference = f"{check['largest_logit_difference']:.2g}"
        lines.append(f"Read back by {check['program']} without masa: logits differ by at most {difference}.")
    if versions := account.get("transformers"):
        lines.append(f"Its configuration is read by transformers {versions}.")
    return lines


def _notes(source: Source, key: str, default: str | None = None) -> list[str]:
    note = source.notes.get(key, default)
    return [note] if note else []


def _hub_names(text: str | None) -> list[str] | None:
    """The data set's name, if it is one of the hub's."""
    found = re.fullmatch(r"hub:([^@]+)@.*", text or "")
    return [found[1]] if found else None


def _table(rows: Mapping[str, Any]) -> dict[str, str]:
    """Values as text that a table of Markdown can hold, without secrets and without where this machine keeps things."""
    return {key.replace("_", " "): _cell(value) for key, value in rows.items() if value is not None}


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return public(text).replace("|", "\\|").replace("\n", " ")


def public(text: str) -> str:
    """``text`` without secrets, and with the last part only of every absolute path.

    Example:
        >>> public("file:/home/me/texts/*.jsonl, https://example.org/a/b")
        'file:*.jsonl, https://example.org/a/b'
    """
    return _ABSOLUTE.sub("", redact(text))
