"""The verb that exports a model."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from masa.cli.base import Verbs, add_out
from masa.runs.files import PROJECT
from masa.study import config


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    v = verbs.add(
        "export",
        _export,
        "write a model for transformers, timm or llama.cpp, folded and with a card",
        "masa export nano/masa-qkvo/seed0 --out plain",
    )
    v.add_argument("run", metavar="RUN", help="run directory, SCALE/EXPERIMENT/seedN, or a model's folder")
    v.add_argument("--format", default="hf", metavar="NAME", help="hf (a folder; the default) or gguf (for llama.cpp)")
    v.add_argument("--dtype", metavar="NAME", help="float32, float16 or bfloat16 (default: as it is stored)")
    v.add_argument(
        "--type", metavar="NAME", help="gguf: q8_0, q6_k, q5_k_m, q4_k_m, q4_0, iq4_xs, … (default: --dtype)"
    )
    v.add_argument("--tokenizer", metavar="DIR", help="the run's, where it is not in results/data/tokenizer")
    v.add_argument("--data", metavar="DIR", help="the run's tokens, images or boxes, where not in results/data")
    v.add_argument("--results", metavar="DIR", help="where run ids are looked up; default: from the configuration")
    v.add_argument("--license", default="unknown", metavar="ID", help="for the card; the data decide it")
    v.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="read the result back with llama.cpp, transformers or timm and compare logits (default: of gguf)",
    )
    v.add_argument("--converter", metavar="PATH", help="gguf: a checkout of llama.cpp instead of the pinned converter")
    v.add_argument("--json", action="store_true", help="print the account of all files as JSON")
    add_out(v, lock="beside")


def _export(given: argparse.Namespace) -> None:
    c = {"results": "results", "cache": "cache"}
    if given.configfile or (PROJECT / "config").is_dir() or not Path(given.run).is_dir():
        c = config.load(given.configfile)  # an installed masa has none, and a folder needs none
    from masa.export import Options, export

    options = Options(
        dtype=given.dtype,
        converter=Path(given.converter) if given.converter else None,
        cache=Path(c["cache"]),
        check=given.check,
        license=given.license,
        type=given.type,
    )
    account = export(
        given.run,
        given.out,
        given.format,
        results=given.results or c["results"],
        tokenizer=given.tokenizer,
        data=given.data,
        options=options,
    )
    print(json.dumps(account, indent=1, ensure_ascii=False) if given.json else _summary(account, given.out))


QUIET = ("weights", "written anew", "masa's own account", "an index of weights")
"""What nobody misses."""


def _checked(check: dict[str, Any]) -> str:
    if check["program"] != "llama.cpp":
        return f"read back by {check['program']}: logits within {check['largest_logit_difference']:.2g}"
    return (
        f"llama.cpp: {check['tokens']} greedy tokens equal transformers', {len(check['ties'])} near-ties, "
        f"log-probabilities within {check['largest_logprob_difference']:.2g} nats"
    )


def _summary(account: dict[str, Any], out: str) -> str:
    """The closing lines, for people."""
    from masa.models.llama_types import told

    count = account["parameters"]
    lines = [
        f"{account['run']}: {account['method']}, {count['total']:,} parameters, folded {count['folded']:,} "
        f"({account['dtype']})"
    ]
    if tokenizer := account["tokenizer"]:
        state = "the run's" if tokenizer["verified"] else "the folder's"
        lines.append(f"tokenizer: {state}, {tokenizer['vocab_size']:,} tokens, sha256 {tokenizer['sha256'][:12]}…")
    if check := account.get("check"):
        lines.append(_checked(check) + (", before it had few bits" if account.get("types") else ""))
    if types := account.get("types"):
        lines.append(f"tensors: {told(types)}")
    if handed := account.get("handed_on"):
        lines.append(f"handed on unchanged: {', '.join(handed['files']) or 'nothing'}")
        lines += [f"left: {name} ({why})" for name, why in handed["left"].items() if why not in QUIET]
    if account.get("transformers"):
        lines.append(f"read by transformers {account['transformers']}")
    lines += [f"{size['bytes']:>14,}  {name}" for name, size in account["files"].items()]
    return "\n".join([*lines, f"written: {out}"])
