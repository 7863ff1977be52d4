"""Evaluate a run: held-out perplexity of the corpus and lm-eval's tasks, on the model as its folder is read."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from masa.data import benchmarks, task_data, tokenizers
from masa.data.tokens import load_tokenizer, validation_tokens
from masa.errors import MasaError
from masa.evaluation import analysis, answers, shared_context
from masa.evaluation.metrics import ANSWER_BITS
from masa.evaluation.perplexity import held_out_loss, tokens_by_document
from masa.runs import memory, run
from masa.runs.progress import Progress


def evaluate(
    run_dir: Path, tokens: Path, tokenizer_dir: Path, tasks: Mapping[str, Any], settings: Mapping[str, Any], out: Path
) -> dict[str, Any]:
    """Write ``metrics.json``, ``lm_eval.json`` (the harness's own output), ``weights.json`` and ``answers.jsonl.gz``.

    Args:
        run_dir: a finished run (:func:`masa.training.language.pretrain`).
        tokens, tokenizer_dir: what it was trained with.
        tasks: manifest of :func:`masa.data.benchmarks.prepare`.
        settings: the configuration's ``evaluation``.

    Raises:
        MasaError: an incomplete run, or a task that lm-eval does not know.
    """
    manifest = run.read_json(run_dir / "manifest.json")
    spec = run.read_json(run_dir / "spec.json")
    memory.keep_freed()
    torch.set_num_threads(spec["training"]["threads"])
    model = analysis.read_run(run_dir, manifest, out)
    ids, record = validation_tokens(tokens)
    loss = held_out_loss(model, ids, spec["training"]["context"])
    analysis.check_finite(loss.nll, f"{run_dir / 'model'}: losses of held-out tokens")
    corpus = {
        "loss": loss.mean,
        "word_perplexity": loss.perplexity(record["words"]),
        "byte_perplexity": loss.perplexity(record["bytes"]),
        "loss_by_document": [round(x, 6) for x in loss.by_document(record["document_ends"])],
        "tokens_by_document": tokens_by_document(record["document_ends"]),
    }
    tokenizer = load_tokenizer(tokenizer_dir)
    tasks = task_data.current(tasks)
    raw = harness(model, tokenizer, tasks, settings, model.device.type, start=False)
    answers.write(raw["answers"], out / "answers.jsonl.gz")
    run.write_json(out / "lm_eval.json", {key: value for key, value in raw.items() if key != "answers"})
    metrics = {
        "run": spec["run"],
        "parameters": manifest["parameters"],
        "training": manifest["training"],
        "corpus": corpus,
        **scored(raw, tasks),
        "settings": dict(settings),
        "start_token": raw["start_token"],
        "provenance": run.provenance({"run": manifest["identity"]}),
    }
    run.write_json(out / "metrics.json", metrics)
    return metrics


def scored(raw: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """The parts ``tasks``, ``task_data`` and ``examples`` of a metrics file.

    Of a tag, and of a group that has no score of its own, the scores are those of its tasks, by their names.

    Args:
        raw: of :func:`harness`; empty where no task was to be scored.
        tasks: records of :func:`masa.data.task_data.current`.
    """
    results, members = raw.get("results", {}), raw.get("members", {})
    found: dict[str, dict[str, float]] = {}
    for task in tasks:
        of_task = scores(results.get(task, {}))
        for name in [task] if of_task else members.get(task, ()):
            found[name] = of_task or scores(results.get(name, {}))
            if examples := [x for part in members.get(name, [name]) for x in raw.get("answers", {}).get(part, ())]:
                found[name][ANSWER_BITS] = answers.bits_per_byte(examples)
    return {
        "tasks": found,
        "task_data": {task: task_data.public(record) for task, record in tasks.items()},
        "examples": {task: raw["examples"][task] for task in found if task in raw.get("examples", {})},
    }


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Mapping[str, Any],
    settings: Mapping[str, Any],
    device: str,
    start: bool = True,
) -> dict:
    """Run lm-eval zero-shot on a model in memory; tasks with the same limit are batched together.

    The numbers are those of lm-eval's own command line for the same model, data, ``batch_size`` and ``max_length``; of
    a model in 16 bits, with ``softmax_dtype=float32`` among its model arguments, since log-likelihoods are added in
    single precision here. Of a model in 32 bits a question with several answers is read once
    (:mod:`masa.evaluation.shared_context`), which moves log-likelihoods by rounding alone. Rolling likelihoods
    (WikiText) differ where a tokenizer puts a start token before every text: lm-eval puts another one before that and
    scores the tokenizer's; here no start token is scored, as in :func:`masa.compression.perplexity` and as lm-eval does
    with ``add_bos_token=False``.

    Args:
        start: whether the model knows start tokens. One that ``masa pretrain`` trained does not: the end token
            separates its documents, and is what a first token is predicted from.

    Returns:
        lm-eval's ``results``, ``versions``, ``n-shot`` and ``configs``, ``examples`` scored a task, ``answers``
        (:func:`masa.evaluation.answers.compact`), ``members``, the tasks of each group or tag that was asked for, and
        ``start_token``, ``{"contexts", "rolling"}``: what stands
        before the contexts of choices, and before documents.

    Raises:
        MasaError: ``max_length`` is too small, data that cannot be read, or a model whose scores are not finite.
    """
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    loaded, manager = benchmarks.load_tasks(tasks)
    lm = language_model(model, tokenizer, settings, device, start)
    members = task_data.members([task for task in tasks if "unavailable" not in tasks[task]], loaded, manager)
    asked = {name: task for task, names in members.items() for name in [task, *names]}
    limits = {name: settings["limit_per_task"].get(asked[name], settings["limit"]) for name in loaded}
    merged: dict[str, Any] = {"results": {}, "versions": {}, "n-shot": {}, "configs": {}, "examples": {}}
    merged["answers"] = {}
    merged["start_token"] = _start_token(tokenizer, start)
    progress = Progress("lm-eval", len(loaded), "tasks")
    for limit in dict.fromkeys(limits.values()):
        chosen = [task for task in loaded if limits[task] == limit]
        output = simple_evaluate(
            lm,
            tasks=[loaded[task] for task in chosen],
            task_manager=manager,  # without it, the harness would index thousands of task files a call
            num_fewshot=0,
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
        )
        merged["answers"] |= answers.compact(output["samples"])
        for key in ("results", "versions", "n-shot", "configs"):
            merged[key] |= json.loads(json.dumps(output[key], default=str))
        for task, counts in output["n-samples"].items():
            merged["examples"][task] = counts["effective"]
        progress.update(sum(task in merged["results"] for task in loaded), ", ".join(chosen))
    progress.close(len(loaded))
    _without_paths(merged["configs"], tasks)
    for task, names in members.items():  # a group: the sum over its tasks
        if task not in merged["examples"]:
            merged["examples"][task] = sum(merged["examples"].get(name, 0) for name in names)
    return merged | {"members": {task: names for task, names in members.items() if names != [task]}}


def language_model(model: Any, tokenizer: Any, settings: Mapping[str, Any], device: str, start: bool = True) -> Any:
    """lm-eval's model of a causal language model in memory; it adds log-likelihoods in single precision or better.

    Args:
        start: as for :func:`harness`.
    """
    from lm_eval.models.huggingface import HFLM

    class Quiet(HFLM):
        """Without a progress bar a request type and task, which would drown the lines of parallel jobs; and with an
        error instead of a score of a model that gives no numbers."""

        def _loglikelihood_tokens(self, requests: Any, *more: Any, **named: Any) -> Any:
            longest = max((len(continuation) for _, _, continuation in requests), default=0)
            if longest > self.max_length:  # the harness has an assertion here that says nothing
                raise MasaError(
                    f"evaluation.max_length = {self.max_length} is too small: a continuation that is scored has "
                    f"{longest} tokens. Set it to {longest} or more (evaluation, or compression.evaluation)."
                )

            def each(chosen: Any) -> Any:
                return HFLM._loglikelihood_tokens(self, chosen, *more, **{**named, "disable_tqdm": True})

            found = shared_context.scored(self, requests, each)
            analysis.check_finite(torch.tensor([score for score, _ in found]), "the model's log-likelihoods")
            return found

        def _model_generate(self, *given: Any, **named: Any) -> Any:
            return super()._model_generate(*given, logits_processor=[_finite_logits], **named)

        def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = True) -> Any:
            added, self.add_bos_token = self.add_bos_token, False  # the prefix is it already
            try:
                return super().loglikelihood_rolling(requests, disable_tqdm=True)
            finally:
                self.add_bos_token = added

        def generate_until(self, requests: Any, disable_tqdm: bool = True) -> Any:
            return super().generate_until(requests, disable_tqdm=True)

    precise = torch.promote_types(model.dtype, torch.float32)  # lm-eval's own is the model's, whose noise decides ties
    return Quiet(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=settings["batch_size"],
        max_length=settings["max_length"],
        device=device,
        softmax_dtype=precise,
        add_bos_token=None if start else False,
        prefix_token_id=None if start else tokenizer.eos_token_id,
    )


def _finite_logits(_: Any, logits: torch.Tensor) -> torch.Tensor:
    """What ``generate`` calls before it chooses a token; minus infinity forbids a word, NaN is no number."""
    analysis.check_finite(logits.amax(-1), "the model's logits")
    return logits


def _start_token(tokenizer: Any, start: bool) -> dict[str, str | None]:
    ids = {"contexts": tokenizers.start_of(tokenizer) if start else None}
    known = [tokenizer.bos_token_id] if start and tokenizer.bos_token_id is not None else []
    ids["rolling"] = [*known, tokenizer.eos_token_id][0]
    return {what: None if token is None else tokenizer.convert_ids_to_tokens(token) for what, token in ids.items()}


def _without_paths(configs: Mapping[str, Any], tasks: Mapping[str, Any]) -> None:
    """Where the data came from instead of where this machine keeps it: results are shown to others."""
    known = task_data.places(tasks)
    for config in configs.values():
        metadata = config.get("metadata") if isinstance(config, dict) else None
        if isinstance(metadata, dict) and (
            file := metadata.get("config_source")
        ):  # of the task: lm-eval's, or a user's
            _, package, inside = str(file).rpartition("lm_eval/tasks/")
            metadata["config_source"] = package + inside if package else Path(file).name
        if not isinstance(config, dict) or not (path := config.get("dataset_path")):
            continue
        if found := known.get(path) or known.get(str(Path(path).parent)):
            config["dataset_path"] = found
            options = {k: v for k, v in (config.pop("dataset_kwargs", None) or {}).items() if k != "cache_dir"}
            config |= {"dataset_kwargs": options} if options else {}


def scores(results: Mapping[str, Any]) -> dict[str, float]:
    """``{"acc,none": 0.5, "exact_match,strict-match": 0.2}`` as ``{"acc": 0.5, "exact_match,strict-match": 0.2}``.

    Every number of every filter; the name of the filter ``none``, which nothing has passed, is left out.
    """
    return {
        name.removesuffix(",none"): value
        for name, value in results.items()
        if "," in name and isinstance(value, int | float) and not isinstance(value, bool)
    }
