"""What the jobs of the workflow read, as data: the part of the configuration that each of them needs. No torch."""

from __future__ import annotations

from typing import Any

from masa.data.image_sets import spec_of
from masa.errors import unknown
from masa.study import config, experiments


def data_spec(c: config.Config) -> dict[str, Any]:
    """What the tokenizer and tokens depend on; the mirror only where a source may be read from it."""
    data = {k: c["data"][k] for k in ("corpus", "tokenizer")}
    sources = (data["corpus"]["source"], data["corpus"].get("validation_source") or "", data["tokenizer"]["source"])
    return {"data": data} | _places(c, *sources)


def _places(c: config.Config, *sources: str) -> dict[str, Any]:
    """Where downloads are kept, and the mirror if any of the sources may be read from it."""
    mirrored = any(source.startswith(("hub:", "mirror:")) for source in sources)
    return {"cache": c["cache"], "mirror": config.mirror(c) if mirrored else None}


def benchmarks_spec(c: config.Config) -> dict[str, Any]:
    """What the benchmark data depends on."""
    spec = {k: c["evaluation"][k] for k in ("tasks", "sources")}
    return spec | {"cache": c["cache"], "mirror": config.mirror(c) if "mirror" in spec["sources"] else None}


def throughput_spec(c: config.Config, scale: str) -> dict[str, Any]:
    """The runs that are timed at one scale, and how."""
    settings = {k: c["throughput"][k] for k in ("repeats", "batch_size", "context")}
    names = experiments.experiments_at(c, c["throughput"]["methods"], scale, possible=True)
    runs = [experiments.run_spec(c, scale, name, 0) for name in names]
    return {"runs": runs, "settings": settings, "threads": runs[0]["training"]["threads"]}


def parameters_spec(c: config.Config) -> list[dict[str, Any]]:
    """The runs whose parameters are counted."""
    chosen = c["parameters"]
    return [
        experiments.run_spec(c, scale, name, 0)
        for scale in chosen["scales"]
        for name in experiments.experiments_at(c, chosen["experiments"], scale, possible=True)
    ]


def text_spec(c: config.Config, name: str) -> dict[str, Any]:
    """One text and what it depends on."""
    if name not in c["texts"]:
        raise unknown("Text", name, c["texts"])
    text = c["texts"][name]
    return {"text": text} | _places(c, text["source"])


def vision_data_spec(c: config.Config, section: str, name: str) -> dict[str, Any]:
    """One data set of vision (section ``images`` or ``boxes``) and what it depends on."""
    if name not in c[section]:
        raise unknown(f"{section.capitalize()}: data set", name, c[section])
    entry = c[section][name]
    return {"data": spec_of(entry)} | _places(c, entry.get("source") or "")


def pretrained_spec(c: config.Config, name: str) -> dict[str, Any]:
    """One pretrained model and what it depends on."""
    if not c["pretrained"].get(name):
        raise unknown("Pretrained model", name, [n for n, entry in c["pretrained"].items() if entry])
    model = {k: v for k, v in c["pretrained"][name].items() if k != "compare_with"}
    return {"model": model} | _places(c, model["source"])
