"""Jobs beside training, evaluation and compression: data, counting, timing, tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from masa.study import experiments
from masa.study.cost import data
from masa.study.cost.devices import Device
from masa.study.cost.sizes import Sizes, of_run
from masa.study.cost.transformer import forward, optimiser_step, training_bytes, training_pass


class Plan(Protocol):
    """What is asked here of :class:`masa.study.cost.jobs.Plan`, which stands above and asks this module."""

    config: Mapping[str, Any]
    device: Device
    mirrored: bool

    def pretrained(self, name: str) -> tuple[Sizes | None, str]: ...


TABLE, FIGURE = 0.12, 0.2
"""Start-up of a table or figure, which load no model, in start-ups of a training."""

PASSAGE_TOKENS = 1.7
"""Tokens of one document of the configuration's texts in hundreds, where it is not cut: a passage of Wikipedia."""


def cost(plan: Plan, rule: str, name: str) -> tuple[float, float]:
    """Seconds and bytes written of a job without a model."""
    config, slow = plan.config, plan.device.startup_seconds / data.REFERENCE_STARTUP
    unit = plan.device.startup_seconds
    if plan.device.gpu:
        slow, unit = 0.5, 0.5 * data.REFERENCE_STARTUP  # its host, not the GPU
    if rule in ("table", "figure"):
        return (TABLE if rule == "table" else FIGURE) * unit + 0.1, 1e5
    if rule == "count_parameters":
        chosen = config["parameters"]
        names = {
            s: experiments.experiments_at(config, chosen["experiments"], s, possible=True) for s in chosen["scales"]
        }
        layers = sum(len(found) * experiments.sizes(config)[s]["model"]["num_layers"] for s, found in names.items())
        return 0.9 * unit + 0.012 * slow * layers, 1e4
    if rule == "benchmarks":
        return 0.4 * unit + data.WHEEL / data.NETWORK, 5e7
    if rule == "tokenizer":
        tokenizer = config["data"]["tokenizer"]
        if tokenizer["source"] != "train":
            return unit + 10, 5e6
        read = tokenizer["training_bytes"] or 2.4e7
        return 0.5 * unit + 6 * slow + data.BPE * slow * read, 2e6
    if rule == "tokenize":
        tokens = experiments.tokens_needed(config, name)
        text = data.corpus_bytes(config, tokens + config["data"]["corpus"]["validation_tokens"])
        seconds = 0.4 * unit + 1.5 * slow + data.TOKENIZE * slow * text
        if data.is_remote(config["data"]["corpus"]["source"]) and text > 1e8:
            seconds += text / data.NETWORK
        return seconds, 2.0 * tokens
    if rule == "text":
        return 0.2 * unit + (1.0 if data.is_remote(config["texts"][name]["source"]) else 0.0), 2e6
    if rule == "pretrained":
        return _pretrained(plan, name, unit, slow)
    return _vision_data(plan, rule, name, unit, slow)


def copies(config: Mapping[str, Any], rule: str, name: str) -> int:
    """How often a job holds what it writes: a GGUF file is read, built and stored, other models are mapped."""
    return 3 if rule == "pretrained" and _is_gguf(config["pretrained"][name]) else 1


def _is_gguf(entry: Mapping[str, Any]) -> bool:
    return str(entry.get("member") or entry["source"]).endswith(".gguf")


def _pretrained(plan: Plan, name: str, unit: float, slow: float) -> tuple[float, float]:
    sizes, stored = plan.pretrained(name)
    entry = plan.config["pretrained"][name]
    if sizes is None:
        return unit, 0.0
    file = sizes.parameters * (4.0 if stored == "float32" else 2.0)
    seconds = 0.8 * unit + 2 * file / 1.5e9
    if _is_gguf(entry):  # dequantised, tensor by tensor in NumPy
        seconds += sizes.parameters * (1.6e-7 * slow + 0.7 / data.NETWORK * data.is_remote(entry["source"]))
    elif data.is_remote(entry["source"]):
        seconds += file / data.NETWORK
    return seconds, file


def _vision_data(plan: Plan, section: str, name: str, unit: float, slow: float) -> tuple[float, float]:
    entry = plan.config[section][name]
    model = next(
        (s["model"] for s in plan.config["vision_scales"].values() if s and s["data"] == name),
        {"image_size": entry.get("image_size", 32), "channels": 3},
    )
    training, test = data.images_of(section, entry)
    each = 1e-4 + 2.5e-8 * model["image_size"] ** 2 * (1 if section == "images" else 4)
    size = data.pixel_bytes(section, entry, model)
    download = data.IMAGES.get(entry["dataset"], (0, 0, 0.0))[2] * 1e6 / data.NETWORK
    return 0.5 * unit + (training + test) * each * slow * (4 if section == "boxes" else 1) + download, size


def text_tokens(plan: Plan, names: Iterable[str]) -> float:
    """Tokens of the texts whose perplexity is taken and that can be had."""
    total = 0.0
    for name in names:
        text = plan.config["texts"][name]
        if text["source"].startswith("mirror:") and not plan.mirrored:
            continue
        documents, characters = text.get("documents"), text.get("characters")
        if documents is None:
            total += 2.9e5  # WikiText-2's test or validation split
        else:
            total += documents * (characters / 4.2 if characters else 100 * PASSAGE_TOKENS)
    return total


def throughput(plan: Plan, scale: str) -> tuple[float, float, float]:
    """Seconds, FLOPs and peak bytes of timing all methods at one scale."""
    settings = plan.config["throughput"]
    seconds, flops, memory = plan.device.startup_seconds, 0.0, 0.0
    for name in experiments.experiments_at(plan.config, settings["methods"], scale, possible=True):
        spec = experiments.run_spec(plan.config, scale, name, 0)
        spec["training"] = spec["training"] | {"context": settings["context"]}
        sizes, dtype = of_run(spec), plan.device.dtype(spec["training"]["dtype"])
        work = training_pass(sizes, settings["batch_size"]) + optimiser_step(sizes)
        work += forward(sizes, settings["batch_size"])
        work *= settings["repeats"] + 1
        seconds += work.seconds(plan.device, dtype, spec["training"]["threads"])
        flops += work.flops
        memory += 20.0 * sizes.parameters
        largest = training_bytes(sizes, settings["batch_size"], dtype) - 16 * sizes.parameters
    return seconds, flops, memory + largest
