"""Verbs of training-free compression."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from masa.cli.base import Verbs, add_out, spec_of
from masa.cli.train import benchmarks_of
from masa.compression.names import GRADIENT_SAMPLES, METHODS, needs_gradients
from masa.errors import MasaError
from masa.study import compressions

TEXTS = "a file, folder or glob of JSON, Parquet, Arrow, CSV or plain text (.gz, .zst too), or hub:ORG/NAME[@COMMIT]"


def _add_where(v: argparse.ArgumentParser) -> None:
    v.add_argument("--column", metavar="NAME", help="that holds the text (default: text, content, page or messages)")
    v.add_argument("--subset", metavar="NAME", help="of a data set on the hub")
    v.add_argument("--split", metavar="NAME", help="of a data set on the hub (default train), or of a folder")


def add(verbs: Verbs) -> None:
    """Add the verbs of this module."""
    _add_calibrate(verbs)
    _add_compress(verbs)
    _add_quantize(verbs)
    _add_heal(verbs)
    _add_sweep(verbs)


def _add_calibrate(verbs: Verbs) -> None:
    v = verbs.add(
        "calibrate",
        _calibrate,
        "collect the statistics that compression needs",
        "masa calibrate MODEL --text documents.jsonl --out statistics",
        gpu=True,
    )
    v.add_argument("model", metavar="MODEL", help="folder, GGUF file, or ORG/NAME on the hub with --revision")
    v.add_argument("--text", required=True, metavar="FILE", help=f"to calibrate on: {TEXTS}")
    _add_where(v)
    v.add_argument("--samples", type=int, default=64, help="sequences (default 64; the paper's size is 256)")
    v.add_argument("--length", type=int, help="tokens a sequence (default 512, at most all positions; paper: 2048)")
    v.add_argument("--gradient-samples", type=int, default=0, help="sequences for the *-fisher methods (default 0)")
    v.add_argument("--projections", default="qkvo", help="letters to measure, or all (default qkvo)")
    v.add_argument("--batch-size", type=int, default=4, help="sequences at once (default 4)")
    v.add_argument("--seed", type=_seed, default=0)
    v.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, …")
    v.add_argument("--threads", type=_count, help="CPU threads (default: all)")
    v.add_argument(
        "--dtype", metavar="NAME", help="of the computation: float32, bfloat16 or float16 (default: as it is stored)"
    )
    v.add_argument("--trust-remote-code", action="store_true", help="run Python that the model's folder brings")
    v.add_argument("--revision", metavar="COMMIT", help="of a model on the hub")
    add_out(v, aliases=("--output",), lock=None)


def _add_compress(verbs: Verbs) -> None:
    v = verbs.add(
        "compress",
        _compress,
        "compress a pretrained language model without training",
        "masa compress MODEL --method svd-global --reduction 0.2 --text documents.jsonl --output smaller",
        gpu=True,
    )
    v.add_argument("model", metavar="MODEL", help="folder, GGUF file, or ORG/NAME on the hub with --revision")
    v.add_argument(
        "--method", help=f"{', '.join(METHODS)} (default svd-global; with --size what loses least at those bytes)"
    )
    small = v.add_mutually_exclusive_group()
    small.add_argument("--reduction", type=float, help="fraction of the projections to save (default 0.2)")
    small.add_argument("--size", metavar="BYTES", help="of the whole model instead: 110MiB, 900MB")
    data = v.add_mutually_exclusive_group()
    data.add_argument("--calibration", metavar="DIR", help="what `masa calibrate` wrote")
    data.add_argument("--text", metavar="FILE", help="calibrate on it in passing (64 x 512 tokens); as for calibrate")
    v.add_argument("--projections", help="letters to compress, or all (default qkvo; all with --size alone)")
    v.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method: ranks=global")
    v.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, …")
    v.add_argument("--json", action="store_true", help="print the whole account as JSON")
    v.add_argument("--plain", action="store_true", help="write an ordinary Hugging Face folder instead of factors")
    v.add_argument(
        "--heal-minutes", type=_minutes, metavar="M", help="then train what is left for M minutes, as `masa heal` does"
    )
    v.add_argument("--evaluate", metavar="FILE", help="documents for the perplexity before and after; as --text")
    _add_where(v)
    v.add_argument("--threads", type=_count, help="CPU threads (default: all)")
    v.add_argument(
        "--dtype",
        metavar="NAME",
        help="of computation and result: float32, bfloat16 or float16 (default: as it is stored)",
    )
    v.add_argument("--trust-remote-code", action="store_true", help="run Python that the model's folder brings")
    v.add_argument("--revision", metavar="COMMIT", help="of a model on the hub")
    add_out(v, aliases=("--output",), lock="beside")


def _add_quantize(verbs: Verbs) -> None:
    v = verbs.add(
        "quantize",
        _quantize,
        "store shared matrices or factors with 8 or 4 bits a number",
        "masa quantize smaller --bits 8 --calibration statistics --out smaller-int8",
    )
    v.add_argument("model", metavar="DIR", help="folder of masa compress, or model/ of a training")
    v.add_argument("--bits", type=int, default=8, help="8 (the default) or 4")
    v.add_argument("--embeddings", type=int, metavar="BITS", help="of embeddings and head, too (default: as they are)")
    v.add_argument(
        "--calibration", metavar="DIR", help="what `masa calibrate` wrote of the model before it was smaller"
    )
    v.add_argument("--threads", type=_count, help="CPU threads (default: all)")
    v.add_argument("--json", action="store_true", help="print the account as JSON")
    add_out(v, aliases=("--output",), lock="beside")


def _add_heal(verbs: Verbs) -> None:
    v = verbs.add(
        "heal",
        _heal,
        "train what a compressed model stores for some minutes, with the original as teacher",
        "masa heal smaller --original MODEL --text documents.jsonl --minutes 10 --out healed",
        gpu=True,
    )
    v.add_argument("model", metavar="DIR", help="folder of masa compress, masa quantize, or model/ of a training")
    v.add_argument("--original", required=True, metavar="MODEL", help="folder, GGUF file or hub id of the dense model")
    v.add_argument("--text", metavar="FILE", help=f"to train on: {TEXTS}")
    _add_where(v)
    v.add_argument(
        "--calibration", metavar="DIR", help="what `masa calibrate` wrote of the original: its tokens without a --text"
    )
    long = v.add_mutually_exclusive_group()
    long.add_argument("--minutes", type=_minutes, help="how long (default 10)")
    long.add_argument("--steps", type=_count, help="or how many steps, which are the same ones on every machine")
    v.add_argument("--layer-samples", type=int, default=8, help="sequences to solve every layer on first (default 8)")
    v.add_argument("--lr", type=float, default=3e-4, help="peak, as a fraction of each tensor's size (default 3e-4)")
    v.add_argument("--length", type=_count, help="tokens of a window (default 128)")
    v.add_argument("--batch-size", type=_count, default=4, help="windows a step (default 4)")
    v.add_argument("--seed", type=_seed, default=0)
    v.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, …")
    v.add_argument("--threads", type=_count, help="CPU threads (default: all)")
    v.add_argument("--json", action="store_true", help="print the account as JSON")
    add_out(v, aliases=("--output",), lock="beside")


def _add_sweep(verbs: Verbs) -> None:
    v = verbs.add(
        "sweep",
        _sweep,
        "compress a model by one method at several reductions and score each",
        "masa sweep SmolLM2-135M/svd-llm --model results/pretrained/SmolLM2-135M --calibration statistics "
        "--texts held_out.json --benchmarks results/data/benchmarks --out results/compression/SmolLM2-135M/svd-llm",
        gpu=True,
    )
    v.add_argument("run", metavar="MODEL/NAME", help="a pretrained model and a compression of the configuration")
    v.add_argument("--spec", metavar="JSON", help="the run as data; default: from the configuration")
    v.add_argument("--model", required=True, metavar="DIR", help="what `masa pretrained` wrote")
    v.add_argument("--calibration", metavar="DIR", help="what `masa calibrate` wrote")
    v.add_argument("--calibration-text", metavar="FILE", help="see that the statistics are of this very text")
    v.add_argument("--texts", nargs="+", required=True, metavar="FILE", help="of `masa text`; held-out text first")
    v.add_argument("--benchmarks", required=True, metavar="DIR", help="what `masa fetch` wrote")
    add_out(v, lock=None)


def _calibrate(given: argparse.Namespace) -> None:
    from masa.compression import run_calibrate

    summary = run_calibrate(
        given.model,
        given.out,
        given.text,
        samples=given.samples,
        length=given.length,
        **_where(given),
        seed=given.seed,
        revision=given.revision,
        projections=given.projections,
        batch_size=given.batch_size,
        gradient_samples=given.gradient_samples,
        threads=given.threads,
        device=given.device,
        wait=not given.no_wait,
        dtype=given.dtype,
        trust_remote_code=given.trust_remote_code,
    )
    print(json.dumps(summary, indent=1, default=str))


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number of at least 1, not {text!r}")
    return int(text)


def _minutes(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not 0 < found < math.inf:
        raise argparse.ArgumentTypeError(f"a number of minutes above 0, not {text!r}")
    return found


def _seed(text: str) -> int:
    """What torch takes."""
    if not text.removeprefix("-").isdecimal() or not -(2**63) <= int(text) < 2**63:
        raise argparse.ArgumentTypeError(f"a whole number of 64 bits, not {text!r}")
    return int(text)


def _option(text: str) -> tuple[str, Any]:
    """Name and value of a hyperparameter.

    Raises:
        MasaError: it has no value, or one that is no YAML.
    """
    import yaml

    key, sign, value = text.partition("=")
    try:
        found = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise MasaError(f"--option {text!r}: {value!r} is no value: {' '.join(str(error).split())[:200]}.") from error
    if not sign or not key or found is None:
        raise MasaError(f"--option is KEY=VALUE, such as ranks=global, not {text!r}.")
    return key, found


def _where(given: argparse.Namespace) -> dict[str, Any]:
    """Where in a source of texts the texts are."""
    return {"column": given.column, "subset": given.subset, "split": given.split}


def _compress(given: argparse.Namespace) -> None:
    import tempfile

    from masa.compression import run_calibrate, run_compress

    options = dict(map(_option, given.option))
    chooses = given.method is None and given.size is not None
    shared = {"projections": given.projections, "threads": given.threads, "device": given.device}
    shared |= {"revision": given.revision, "dtype": given.dtype, "trust_remote_code": given.trust_remote_code}
    shared |= _where(given)
    with tempfile.TemporaryDirectory() as folder:
        if given.text:
            gradients = GRADIENT_SAMPLES if chooses or needs_gradients(given.method or "") else 0
            measured = shared | {"projections": given.projections or ("all" if chooses else "qkvo")}
            run_calibrate(given.model, folder, given.text, gradient_samples=gradients, **measured)
        summary = run_compress(
            given.model,
            given.out,
            given.method,
            given.reduction,
            folder if given.text else given.calibration,
            size=int(given.size) if given.size and given.size.isdigit() else given.size,
            options=options,
            plain=given.plain,
            heal_minutes=given.heal_minutes,
            evaluate=given.evaluate,
            **shared,
        )
    print(json.dumps(summary, indent=1, default=str) if given.json else _account(summary))


def _quantize(given: argparse.Namespace) -> None:
    from masa.compression import run_quantize

    summary = run_quantize(
        given.model, given.out, given.bits, given.calibration, embeddings=given.embeddings, threads=given.threads
    )
    before, after = summary["bytes_before"], summary["bytes_after"]
    lines = [
        f"{summary['bits']} bits a number: shared matrices {before:,} -> {after:,} bytes ({after / before:.3f})",
        f"time: {summary['seconds']:.1f} s",
        f"written: {summary['output']} (all of it in compression.json)",
    ]
    print(json.dumps(summary, indent=1, default=str) if given.json else "\n".join(lines))


def _heal(given: argparse.Namespace) -> None:
    from masa.compression import run_heal

    same = ("calibration", "text", "minutes", "steps", "layer_samples", "length", "batch_size", "lr", "seed")
    chosen = {name: getattr(given, name) for name in (*same, "device", "threads")}
    summary = run_heal(given.model, given.out, given.original, **chosen, **_where(given))
    lines = [*_healing(summary), f"written: {summary['output']} (all of it in compression.json)"]
    print(json.dumps(summary, indent=1, default=str) if given.json else "\n".join(lines))


def _healing(healing: dict[str, Any]) -> list[str]:
    """What a healing did, for people."""
    losses, few = healing["losses"], max(1, len(healing["losses"]) // 10)
    first, last = (sum(part) / few for part in (losses[:few], losses[-few:]))
    lines = []
    if layers := healing["layers"]:
        lines.append(f"layers solved for: {100 * (1 - sum(layers) / len(layers)):.1f} % of their squared error gone")
    lines.append(
        f"healed: {healing['steps']} steps on {healing['tokens']:,} tokens, {healing['trained']:,} numbers trained, "
        f"divergence from the original {first:.4f} -> {last:.4f} nats a token"
    )
    return [*lines, f"time and memory: {healing['seconds']:.1f} s, peak {healing['peak_rss_bytes'] / 2**30:.2f} GiB"]


def _account(summary: dict[str, Any]) -> str:
    """The closing lines of a compression, for people."""
    lines = [f"chosen: {line}" for line in summary.get("chosen", {}).get("why", ())]
    lines += [
        f"{summary['method']}: {100 * summary['reduction_achieved']:.2f} % of {summary['projections']} saved "
        f"(asked for {100 * summary['reduction_requested']:g} %), {100 * summary['model_reduction']:.2f} % of all",
        f"parameters: {summary['parameters_before']:,} -> {summary['parameters_after']:,}",
        f"bytes of {summary['projections']}: {summary['dense_bytes']:,} -> {summary['stored_bytes']:,}, all counted",
    ]
    if "perplexity_after" in summary:
        before, after = summary["perplexity_before"], summary["perplexity_after"]
        lines.append(
            f"perplexity: {before['token_perplexity']:.3f} -> {after['token_perplexity']:.3f} a token, "
            f"{before['word_perplexity']:.2f} -> {after['word_perplexity']:.2f} a word ({after['tokens']:,} tokens)"
        )
    if summary["regularisation"]:
        worst = max(summary["regularisation"].values())
        lines.append(
            f"regularised: {len(summary['regularisation'])} matrices, by at most {worst:g} of the mean diagonal"
        )
    lines.append(f"time and memory: {summary['seconds']:.1f} s, peak {summary['peak_rss_bytes'] / 2**30:.2f} GiB")
    if "healing" in summary:
        lines += _healing(summary["healing"])
    if handed := summary.get("handed_on", {}).get("files"):
        lines.append(f"handed on unchanged: {', '.join(handed)}")
    lines.append(f"written: {summary['output']} (all of the above and ranks in compression.json)")
    return "\n".join(lines)


def _sweep(given: argparse.Namespace) -> None:
    spec = spec_of(given, lambda c: compressions.run_spec(c, *compressions.parse_run(given.run)), "sweep")
    from masa.compression.sweep import sweep

    tasks = benchmarks_of(Path(given.benchmarks))
    texts = {Path(file).stem: Path(file) for file in given.texts}
    calibration = Path(given.calibration) if given.calibration else None
    text = Path(given.calibration_text) if given.calibration_text else None
    sweep(Path(given.model), spec, calibration, texts, tasks, Path(given.out), text, wait=not given.no_wait)
