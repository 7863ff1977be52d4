"""Verbs that bring data and models here and prepare them."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module
from pathlib import Path

from masa.cli.base import Verbs, add_out, keep_sources, spec_of
from masa.errors import MasaError
from masa.study import config
from masa.study.inputs import benchmarks_spec, data_spec, pretrained_spec, text_spec, vision_data_spec


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    v = verbs.add("fetch", _fetch, "get the benchmark data", "masa fetch --out results/data/benchmarks")
    v.add_argument("--spec", metavar="JSON", help="{tasks, sources, cache, mirror}; default: from the configuration")
    add_out(v)

    v = verbs.add(
        "tokenizer", _tokenizer, "train or fetch the tokenizer", "masa tokenizer --out results/data/tokenizer"
    )
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror}; default: from the configuration")
    add_out(v)

    v = verbs.add(
        "tokenize",
        _tokenize,
        "pack the corpus into token files",
        "masa tokenize --tokenizer results/data/tokenizer --tokens 1000000 --out results/data/tokens/nano",
    )
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror}; default: from the configuration")
    v.add_argument("--tokenizer", required=True, metavar="DIR")
    v.add_argument("--tokens", required=True, type=int, help="training tokens to write")
    add_out(v)

    v = verbs.add(
        "images",
        _images,
        "turn an image data set into pixel files",
        "masa images digits --out results/data/images/digits",
    )
    v.add_argument("name", nargs="?", help="images of the configuration, e.g. digits or cifar10")
    v.add_argument("--source", help="hub:ORG/NAME@COMMIT, mirror:PATH, file:PATH or pypi:NAME==VERSION")
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror} instead of the above")
    add_out(v)

    v = verbs.add(
        "boxes",
        _boxes,
        "turn a data set in COCO's format into pixel and box files",
        "masa boxes shapes --out results/data/boxes/shapes",
    )
    v.add_argument("name", nargs="?", help="boxes of the configuration, e.g. shapes (drawn) or coco")
    v.add_argument("--source", help="file:FOLDER or mirror:FOLDER in COCO's layout, or hub:ORG/NAME@COMMIT")
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror} instead of the above")
    add_out(v)

    v = verbs.add("text", _text, "prepare one small set of documents", "masa text held_out --out held_out.json")
    v.add_argument("name", help="a text of the configuration")
    v.add_argument("--spec", metavar="JSON", help="{text, cache, mirror}; default: from the configuration")
    add_out(v, "FILE", lock="beside")

    v = verbs.add(
        "pretrained",
        _pretrained,
        "fetch one pretrained model",
        "masa pretrained SmolLM2-135M --out results/pretrained/SmolLM2-135M",
    )
    v.add_argument("name", help="a pretrained model of the configuration")
    v.add_argument("--spec", metavar="JSON", help="{model, cache, mirror}; default: from the configuration")
    add_out(v)


def _fetch(given: argparse.Namespace) -> None:
    from masa.data import benchmarks

    spec = spec_of(given, benchmarks_spec, "fetch")
    benchmarks.check(spec["tasks"])
    records = benchmarks.prepare(spec["tasks"], spec["sources"], Path(spec["cache"]), spec["mirror"], Path(given.out))
    for task, record in records.items():
        print(f"{task}: {record.get('source') or 'unavailable: ' + record['unavailable']}", file=sys.stderr)


def _tokenizer(given: argparse.Namespace) -> None:
    from masa.data import tokenize

    spec = spec_of(given, data_spec, "data")
    tokenize.make_tokenizer(spec["data"], Path(spec["cache"]), spec["mirror"], Path(given.out))


def _tokenize(given: argparse.Namespace) -> None:
    from masa.data import tokenize

    spec = spec_of(given, data_spec, "data")
    cache, tokenizer = Path(spec["cache"]), Path(given.tokenizer)
    tokenize.tokenize(spec["data"], tokenizer, cache, spec["mirror"], given.tokens, Path(given.out))


def _images(given: argparse.Namespace) -> None:
    _prepare_vision(given, "images")


def _boxes(given: argparse.Namespace) -> None:
    _prepare_vision(given, "boxes")


def _prepare_vision(given: argparse.Namespace, section: str) -> None:
    if (given.name is None) == (given.spec is None):
        raise MasaError(f"masa {section} needs either the name of a data set or --spec.")
    spec = spec_of(given, lambda c: vision_data_spec(c, section, given.name), "vision_data")
    if given.source:
        spec["data"]["source"] = given.source
        spec["mirror"] = config.mirror(config.load(given.configfile))
        keep_sources(given, spec)
    module = import_module(f"masa.data.{section}")
    module.prepare(spec["data"], Path(spec["cache"]), spec["mirror"], Path(given.out))


def _text(given: argparse.Namespace) -> None:
    from masa.data import excerpts

    spec = spec_of(given, lambda c: text_spec(c, given.name), "text")
    record = excerpts.prepare(given.name, spec["text"], Path(spec["cache"]), spec["mirror"], Path(given.out))
    found = record.get("unavailable") or f"{len(record['documents']):,} documents, {record['words']:,} words"
    print(f"{given.name}: {found}", file=sys.stderr)


def _pretrained(given: argparse.Namespace) -> None:
    spec = spec_of(given, lambda c: pretrained_spec(c, given.name), "pretrained")
    from masa.models import pretrained

    found = pretrained.fetch(given.name, spec["model"], Path(spec["cache"]), spec["mirror"], Path(given.out))
    print(f"{given.name}: {found['architecture']}, {found['parameters']:,} parameters", file=sys.stderr)
