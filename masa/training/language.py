"""Pretraining of language models: the same recipe and batches for every method (loop: :mod:`masa.training.trainer`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from masa.data.tokens import PackedTokens, read_manifest, validation_tokens
from masa.errors import MasaError
from masa.evaluation.perplexity import held_out_loss
from masa.models import language
from masa.runs import run
from masa.runs.fingerprint import fingerprint
from masa.training import averaging, trainer
from masa.training.attention import without_mask
from masa.training.peak import Peak


def pretrain(spec: Mapping[str, Any], tokens: Path, out: Path, peak: Peak | None = None, **how: Any) -> dict[str, Any]:
    """Train one language model, or go on with a run that was interrupted.

    Args:
        spec: from :func:`masa.study.experiments.run_spec`.
        tokens: token directory (:func:`masa.data.tokenize.tokenize`).
        out: run directory.
        peak: what the progress lines say that speed is a share of.
        **how: ``wait``, ``restart`` and ``extend`` of :func:`masa.training.trainer.train`.

    Returns:
        The manifest.

    Raises:
        MasaError: token data that does not fit the spec, and what :func:`masa.training.trainer.train` raises.
    """
    recipe = spec["training"]
    trainer.set_up(spec)
    manifest = read_manifest(tokens)
    if manifest["vocab_size"] != spec["model"]["vocab_size"]:
        raise MasaError(
            f"{tokens} was made with a vocabulary of {manifest['vocab_size']}, but the model of {spec['run']} has "
            f"{spec['model']['vocab_size']} (data.tokenizer.vocab_size). Tokenize again."
        )
    held_out, _ = validation_tokens(tokens)

    average = averaging.of(recipe)

    def final(model: nn.Module) -> nn.Module:
        return average.final(model) if average else model

    def score(model: nn.Module) -> dict[str, float]:
        loss = held_out_loss(model, held_out, recipe["context"]).mean
        if not (average and average.whole):
            return {"validation_loss": loss}
        averaged = held_out_loss(average.final(model), held_out, recipe["context"]).mean
        return {"validation_loss": averaged, "validation_loss_last_weights": loss}

    code = fingerprint("masa.training.language")
    order = spec["seed"] if recipe.get("data_seed") is None else recipe["data_seed"]
    task = trainer.Task(
        build=lambda: without_mask(language.build(spec["model"], spec["sharing"], recipe["context"])),
        data=PackedTokens(tokens, recipe["context"], recipe["steps"] * recipe["batch_size"], order),
        score=score,
        unit="tokens",
        units_per_step=recipe["batch_size"] * recipe["context"],
        inputs={"tokens": run.digest(manifest["train"]), "tokenizer": manifest["tokenizer"]},
        code=code,
        identity=run.digest([spec, manifest["train"], manifest["tokenizer"], code]),
        peak=peak,
        callbacks=[average] if average else (),
        final=final,
    )
    return trainer.train(spec, task, out, **how)
