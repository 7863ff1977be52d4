"""The configuration: read, merge and check. Needs neither torch nor Snakemake."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from masa.errors import MasaError
from masa.runs.files import PROJECT
from masa.settings import alternatives, read, resolved, schema_of, typed
from masa.study import checks, experiments
from masa.study.sections.root import Configuration

BASE = tuple(f"config/{name}.yaml" for name in ("config", "experiments", "vision", "compression", "artefacts"))
SCHEMA = PROJECT / "workflow" / "schemas" / "config.schema.yaml"
"""What :func:`schema` says, for editors and the workflow catalogue."""

TITLE = "A file of masa's configuration"

Config = experiments.Config


def load(overlays: Iterable[str | Path] = (), root: Path = PROJECT) -> Config:
    """Read the base files and the overlays, later ones winning key by key, and check the result.

    Raises:
        MasaError: a file that is missing or not YAML, or a key that the schema does not know.
    """
    config: Config = {}
    for path in [*(root / name for name in BASE), *map(Path, overlays)]:
        try:
            _merge(config, _read_yaml(path))
        except RecursionError as error:
            raise MasaError(f"{path} nests too deeply, or an anchor of it stands within itself.") from error
    check(config)
    say_left_out(config)
    return config


_said: set[str] = set()


def say_left_out(config: Config) -> None:
    """Say on stderr which runs cannot exist at their scales, each once a process."""
    for sentence in experiments.left_out(config):
        if sentence not in _said:
            _said.add(sentence)
            print(sentence, file=sys.stderr)


def _read_yaml(path: Path) -> Config:
    if not path.is_file():
        if path == PROJECT / BASE[0]:
            raise MasaError(
                f"{path} does not exist: this verb belongs to the study, which runs in a clone of the project. Call it "
                "there; `masa calibrate`, `compress` and `export` work anywhere."
            )
        raise MasaError(f"Configuration file {path} does not exist.")
    try:
        data = _yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise MasaError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise MasaError(f"{path} must hold a mapping of keys, found {type(data).__name__}.")
    return data


def _yaml(text: str) -> Any:
    """Read by libyaml where PyYAML was built with it: ten times as fast, and Snakemake has it done at every call."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    try:
        return loader(text).get_single_data()
    except yaml.YAMLError:
        return yaml.safe_load(text)  # whose message shows the line


def _merge(base: Config, over: Mapping[str, Any]) -> None:
    """Snakemake's own rule for --configfile: mappings merge, everything else is replaced."""
    for key, value in over.items():
        if isinstance(value, Mapping):
            if not isinstance(base.get(key), dict):
                base[key] = {}  # its own: a mapping that YAML names in several places is changed in one of them
            _merge(base[key], value)
        else:
            base[key] = value


def check(config: Config) -> None:
    """Check a merged configuration: its keys, then every run and artefact that it asks for.

    Raises:
        MasaError: the first problem found, naming the key, what was expected and the nearest name that exists.
    """
    read(Configuration, config)
    checks.check(config)


def override(config: Config, given: Mapping[str, Any]) -> None:
    """Merge what Snakemake's ``--config`` gave, whose nested values arrive as text, by the types of their keys."""
    _merge(config, typed(Configuration, given))


def schema() -> dict[str, Any]:
    """The JSON schema of a file of the configuration, for editors: an overlay need not have every key."""

    def open_(node: Any) -> Any:
        if isinstance(node, list):
            return [open_(item) for item in node]
        if not isinstance(node, dict):
            return node
        names = {"oneOf": "anyOf"}  # of two kinds of model both may fit what is left
        dropped = ("required", "discriminator", "$comment")
        return {names.get(k, k): open_(v) for k, v in node.items() if k not in dropped}

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": TITLE} | open_(schema_of(Configuration))


def mirror(config: Config) -> str | None:
    """The mirror directory, from the configuration or from MASA_MIRROR."""
    return config["data"]["mirror"] or os.environ.get("MASA_MIRROR") or None


def describe() -> str:
    """Markdown table of every configuration key: type, default and effect (the content of config/README.md)."""
    base: Config = {}
    for name in BASE:
        _merge(base, _read_yaml(PROJECT / name))
    rows = ["| key | type | default | effect |", "|---|---|---|---|"]

    known = schema_of(Configuration)

    def visit(prefix: str, node: Mapping[str, Any], default: Any, required: bool = True, above: Any = ()) -> None:
        node = resolved(node, known)
        several = list(alternatives(node, known))
        if prefix and "description" in node:
            default = node.get("default") if default is None and not required else default
            shown = "" if default is None or isinstance(default, dict) else f"`{json.dumps(default)}`"
            rows.append(f"| `{prefix}` | {_kinds(several)} | {shown} | {node['description']} |")
        defaults = default if isinstance(default, dict) else {}
        shown_here: dict[str, Any] = {}
        for k, child in (item for one in several for item in one.get("properties", {}).items()):
            same = shown_here.get(k, child) == child
            shown_here[k] = child if same else {n: v for n, v in child.items() if n not in ("default", "const")}
        for key, child in shown_here.items():
            if key in above and above[key].get("description") == child.get("description"):
                continue  # a section that changes keys of the one above it
            needed = any(key in one.get("required", ()) for one in several)
            visit(f"{prefix}.{key}" if prefix else key, child, defaults.get(key), needed, shown_here)
        for one in several:
            further = next(iter(one.get("patternProperties", {}).values()), one.get("additionalProperties")) or {}
            inner = [n for n in alternatives(further, known) if "properties" in n] if further is not True else []
            if inner:
                visit(f"{prefix}.NAME", {k: v for k, v in inner[0].items() if k != "description"}, None, True, above)

    visit("", known, base)
    return "\n".join(rows) + "\n"


def _kinds(several: Iterable[Mapping[str, Any]]) -> str:
    """Types of a key, in short: "integer or null"."""
    said = [f"one of {', '.join(map(str, n['enum']))}" if "enum" in n else n.get("type", "anything") for n in several]
    return " or ".join(dict.fromkeys(said))
