"""One method on one pretrained model at several reductions, each scored: what the workflow's tables are made of.

Every reduction is a directory with ``metrics.json`` in the form that :mod:`masa.evaluation.language` writes, so that
tables read both alike. It appears when the reduction is done, and an interrupted sweep goes on with the next.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from masa.compression.api import compress
from masa.compression.base import make_compressor
from masa.compression.calibration.calibrate import Progress
from masa.compression.calibration.statistics import Calibration
from masa.compression.calibration.texts import load_tokens
from masa.compression.healing.heal import heal
from masa.compression.names import ORIGINAL, modules
from masa.compression.scoring import perplexity
from masa.compression.storage import converted, stored
from masa.compression.terminal import terminal
from masa.data import excerpts, task_data
from masa.errors import MasaError
from masa.evaluation import answers, language
from masa.models.beside import hand_on
from masa.models.pretrained import load_pretrained, locate
from masa.runs import run
from masa.runs.adopted import adopted
from masa.runs.files import sha256_of, whole_folder
from masa.runs.fingerprint import fingerprint
from masa.sharing import checkpoint
from masa.sharing.fold import fold
from masa.sharing.parameters import cast
from masa.sharing.share import count_parameters


def sweep(
    model_dir: Path,
    spec: Mapping[str, Any],
    calibration_dir: Path | None,
    texts: Mapping[str, Path],
    tasks: Mapping[str, Any],
    out: Path,
    calibration_text: Path | None = None,
    wait: bool = True,
) -> dict[str, Any]:
    """Compress and score at every reduction of ``spec``; write ``out/PERCENT/metrics.json`` and ``out/manifest.json``.

    Args:
        model_dir: with the manifest of :func:`masa.models.pretrained.fetch`.
        spec: of the method, its reductions and how they are scored (``masa sweep --spec``).
        calibration_dir: what ``masa calibrate`` wrote; None where the method needs none.
        texts: name -> file of :func:`masa.data.excerpts.prepare`; the first is the held-out text.
        tasks: manifest of :func:`masa.data.benchmarks.prepare`.
        out: of this method.
        calibration_text: what the statistics are to be of.
        wait: for another process that writes ``out``.

    Raises:
        MasaError: see :func:`masa.compression.compress`; a held-out text that is unavailable; statistics of other
            samples, tokens or text than ``spec["calibration"]`` and ``calibration_text`` say.
    """
    torch.set_num_threads(spec["threads"])
    pretrained = run.read_json(model_dir / "manifest.json")
    weights = locate(model_dir)  # verified once, and loaded for each reduction
    documents = {name: excerpts.load(path) for name, path in texts.items()}
    if "unavailable" in next(iter(documents.values())):
        raise MasaError(f"The held-out text is unavailable: {next(iter(documents.values()))['unavailable']}")
    calibration = _calibration(calibration_dir, spec, calibration_text)
    inputs = {
        "model": run.digest(pretrained["sha256"]),
        "calibration": calibration.digest() if calibration else None,
        "texts": run.digest([r.get("sha256") for r in documents.values()]),
    }
    told = inputs | {"calibration": calibration.made_of() if calibration else None}  # the same on every machine
    compressor = None if spec["method"] == ORIGINAL else make_compressor(spec["method"], **spec["options"])
    code, records = fingerprint(*modules(spec["method"])), {}
    tasks = task_data.current({t: tasks[t] for t in spec["evaluation"]["tasks"] if t in tasks})
    with run.exclusive(out, wait):  # what another process has finished by then is not done again
        run.write_json(out / "spec.json", {k: v for k, v in spec.items() if k != "cache"})  # which is this machine's
        for percent in spec["reductions"]:
            chosen = {k: v for k, v in spec.items() if k not in ("reductions", "tasks_at", "calibration", "cache")}
            chosen["tasks"] = [t for t in spec["evaluation"]["tasks"] if percent in spec["tasks_at"]]
            data = {t: task_data.public(tasks[t]) if t in tasks else None for t in chosen["tasks"]}
            asked = run.digest([chosen, percent, told, data])
            identity = run.digest([chosen, percent, inputs, code, data])
            file = out / f"{percent:g}" / "metrics.json"
            known = run.read_json(file) if file.is_file() else {}
            if known.get("identity") != identity and not adopted(known, asked):
                wanted = {t: tasks[t] for t in chosen["tasks"] if t in tasks}
                try:
                    record = _one(weights, spec, compressor, percent, calibration, documents, wanted, file.parent)
                except MasaError as error:
                    raise MasaError(f"{spec['run']} at {percent:g} %: {error}") from error
                made = {"calibration": calibration.made_of()} if calibration else {}
                made |= {"handed_on": record.pop("handed_on")} if "handed_on" in record else {}
                record |= {"asked": asked, "identity": identity, "provenance": run.provenance(inputs) | made}
                run.write_json(file, record)
                if not spec["keep_models"]:  # of the record that this one replaces
                    shutil.rmtree(file.parent / "model", ignore_errors=True)
                known = record
            records[f"{percent:g}"] = known["identity"]
        for old in out.iterdir():  # what an earlier configuration asked for, and nothing else
            if old.name not in records and re.fullmatch(r"[0-9.]+", old.name) and (old / "metrics.json").is_file():
                shutil.rmtree(old)
        run.write_json(out / "manifest.json", {"run": spec["run"], "records": records})
    return records


def _calibration(directory: Path | None, spec: Mapping[str, Any], text: Path | None) -> Calibration | None:
    """The statistics, which are what the spec asks for and of the tokens beside them."""
    if directory is None:
        return None
    found = Calibration.load(directory)
    found.expect(spec.get("calibration") or {}, "calibration.")
    if text is not None:
        found.expect({"text_sha256": sha256_of(text)}, "calibration.")
    if (tokens := load_tokens(directory)) is not None:
        found.check_tokens(tokens)
    return found


def _compressed(
    model: Any,
    weights: Path,
    spec: Mapping[str, Any],
    compressor: Any,
    percent: float,
    calibration: Calibration | None,
    tokens: torch.Tensor | None,
    state: Path,
    show: Progress,
) -> tuple[Any, dict[str, Any] | None, dict[str, Any] | None]:
    """The model compressed, and healed if asked, with what both say; as it was for the original.

    Args:
        state: file that an interrupted healing goes on from.
    """
    report, healing = None, None
    if compressor is not None:
        needed = compressor.needs_calibration or compressor.needs_tokens
        model, found = compress(
            model,
            compressor,
            calibration if needed else None,
            percent / 100,
            tokens=tokens,
            projections=spec["projections"],
            progress=show,
        )
        report = found.to_dict()
    if spec.get("heal"):
        teacher, _ = load_pretrained(weights, device="auto")
        known = calibration if calibration is not None and calibration.gradient_samples else None
        how = {"teacher": teacher, "calibration": known, "state": state, "progress": show}
        healing = heal(model, tokens, **how, **spec["heal"])
    return model, report, healing


def _perplexities(
    model: Any, tokenizer: Any, documents: Mapping[str, Any], window: int, show: Progress
) -> dict[str, dict[str, Any]]:
    """Of every text that there is."""
    return {
        name: perplexity(model, tokenizer, record["documents"], window=window, progress=show).to_dict()
        for name, record in documents.items()
        if "documents" in record
    }


def _of_tasks(
    model: Any, tokenizer: Any, tasks: Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What lm-eval gives, and the parts of a metrics file; every answer's score is kept beside it."""
    if not tasks:
        return (raw := {"results": {}, "examples": {}}), language.scored(raw, tasks)
    raw = language.harness(model, tokenizer, tasks, settings, model.device.type)
    scored = language.scored(raw, tasks)
    answers.write(raw.pop("answers"), folder / "answers.jsonl.gz")
    return raw, scored


def _one(
    weights: Path,
    spec: Mapping[str, Any],
    compressor: Any,
    percent: float,
    calibration: Calibration | None,
    documents: Mapping[str, Any],
    tasks: Mapping[str, Any],
    folder: Path,
) -> dict[str, Any]:
    """One reduction: compress, heal if asked, store, count, fold, score."""
    model, tokenizer = load_pretrained(weights, device="auto")
    if tokenizer is None:
        raise MasaError(f"{weights} holds no tokenizer, which perplexity needs.")
    storage = spec.get("storage")
    calibration = converted(model, storage["dtype"], calibration) if storage else calibration
    tokens = load_tokens(calibration.directory) if calibration and calibration.directory else None
    if spec.get("heal") and tokens is None:
        raise MasaError("Healing needs the calibration's tokens, which are missing; calibrate again.")
    with terminal() as progress:

        def show(what: str, done: int, of: int) -> None:
            progress(f"{spec['run']} {percent:g} %: {what}", done, of)

        state = folder.with_name(f"{folder.name}.healing")
        state.parent.mkdir(parents=True, exist_ok=True)
        given = (model, weights, spec, compressor, percent, calibration, tokens)
        model, report, healing = _compressed(*given, state, show)
        counts, beside = count_parameters(model).to_dict(), {}
        if storage:
            model, beside["storage"] = stored(model, weights, storage, Path(spec["cache"]))
        if spec["keep_models"]:
            with whole_folder(folder / "model") as kept:
                checkpoint.save(model, kept)
                beside["handed_on"] = hand_on(weights, kept)
        settings = spec["evaluation"]
        model = cast(fold(model), getattr(torch, settings["dtype"]))
        scores = _perplexities(model, tokenizer, documents, settings["window"], show)
    state.unlink(missing_ok=True)
    held_out = scores[next(iter(documents))]
    raw, scored = _of_tasks(model, tokenizer, tasks, settings, folder)
    return {
        "run": f"{spec['run']}/{percent:g}",
        "requested_pct": percent,
        "parameters": counts,
        "compression": report,
        "healing": healing,
        "drift": calibration.drift if calibration else None,
        "corpus": {"loss": held_out["nll"] / held_out["tokens"], **held_out},
        "texts": scores,
        "text_data": {n: {k: v for k, v in r.items() if k != "documents"} for n, r in documents.items()},
        **scored,
        **beside,
        "lm_eval": json.loads(json.dumps(raw, default=str)),
        "settings": dict(settings),
        "start_token": raw.get("start_token"),
    }
