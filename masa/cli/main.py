"""The entry point: the parser of all verbs, and what becomes of an error."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import metadata
from pathlib import Path

from masa import __version__
from masa.cli import compare, compress, data, export, lm_eval, page, plan, report, status, train
from masa.cli.base import EXIT, Parser, Verbs, held
from masa.errors import Interrupted, MasaError, redact
from masa.runs import devices, faults, memory
from masa.training import launch

MODULES = (data, train, lm_eval, compress, export, report, page, compare, status, plan)
"""In the order of ``masa --help``; each has ``add(verbs)``. A new verb is one ``verbs.add`` in one of them."""

DISTRIBUTIONS = {
    "huggingface_hub": "transformers",
    "markupsafe": "jinja2",
    "PIL": "pillow",
    "psutil": "accelerate",
    "tokenizers": "transformers",
    "yaml": "pyyaml",
}
"""Requirement that brings a module, where it is called otherwise; nothing knows this of a package that is absent."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``masa``."""
    if arguments is None:  # a process of our own
        os.environ["MPLBACKEND"] = "Agg"  # figures go to files, also where there is a screen or a notebook
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? for ± and …
    parser = make_parser()
    given, left = parser.parse_known_args(arguments)
    if left:
        getattr(given, "parser", parser).reject(left)
    if not hasattr(given, "call"):
        parser.print_help(sys.stderr)
        return 2
    if not getattr(given, "bars", False):
        os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars would drown the progress lines of parallel jobs
    given.arguments = list(sys.argv[1:] if arguments is None else arguments)
    log = Path(given.log) if getattr(given, "log", None) else None
    started = time.monotonic()
    try:
        if log:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text("")
        leases = given.gpu and getattr(given, "device", "auto") == "auto"
        with held(given), devices.leased(given.gpus or 1) if leases else nullcontext():
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
        out = getattr(given, "out", None)
        if out and (fault := faults.cannot_write(error, Path(out), below=Path(out))):
            return _fail(f"masa: error: {fault}", log, 2)
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
        if isinstance(error, ModuleNotFoundError) and (command := _installs(error.name or "")):
            verb, package = given.parser.prog, (error.name or "").partition(".")[0]
            return _fail(f"masa: error: `{verb}` needs {package}, which is not installed; {command}", log, 2)
        return _fail(f"{traceback.format_exc()}masa: this is a defect; please report it with the lines above.", log, 1)
    if log:
        peak = memory.peak_bytes(resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
        _note(f"done in {time.monotonic() - started:.1f} s, peak memory {peak / 2**20:.0f} MiB", log)
    return 0


def _installs(module: str) -> str | None:
    """The command that installs a module which masa or one of its extras requires; None if none does."""
    package = module.partition(".")[0]
    if package == "masa":  # named by its own extras
        return None
    wanted = _normal(DISTRIBUTIONS.get(package, package))
    try:
        requirements = metadata.requires("masa") or []
    except metadata.PackageNotFoundError:  # a clone on the path that was never installed
        return None
    for requirement in requirements:
        found = re.match(r"[\w.-]+", requirement)
        if found and _normal(found[0]) == wanted:
            extra = re.search(r"extra == ['\"]([\w.-]+)['\"]", requirement)
            return f"pip install 'masa[{extra[1]}]'" if extra else "pip install masa"
    return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


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


def make_parser() -> Parser:
    """The parser of ``masa`` with all its verbs; the documentation is made from it, too."""
    parser = Parser(
        prog="masa",
        description="Cross-layer weight sharing in Transformers (MASA, arXiv 2508.04581). The workflow calls these "
        "verbs; each works alone, too.",
        epilog=EXIT,
    )
    parser.add_argument("--version", action="version", version=f"masa {__version__}")
    verbs = Verbs(parser)
    for module in MODULES:
        module.add(verbs)
    return parser
