"""What all verbs have in common: the parser that says what was meant, and how ``--spec`` is read."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

from masa.errors import MasaError, did_you_mean
from masa.runs.hold import exclusive
from masa.runs.outputs import tried
from masa.study import config
from masa.study.specs import check as check_spec

EXIT = """\
exit status: 0 done; 1 a defect of masa (please report it); 2 bad input, the message says what; 75 interrupted by a
signal after a checkpoint, run the same command again to go on; 130 interrupted by Ctrl-C."""

Call = Callable[[argparse.Namespace], None]


class Help(argparse.RawDescriptionHelpFormatter):
    """Texts as they are written, and names of verbs in one column."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30)

    def add_argument(self, action: argparse.Action) -> None:
        """Python forgets the indentation of verbs when it measures their names."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += self._indent_increment


class Parser(argparse.ArgumentParser):
    """An argument parser that says what was probably meant."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**({"formatter_class": Help} | more))

    def error(self, message: str) -> NoReturn:
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction) and "invalid choice" in message:
                verb = message.split("'")[1]
                hint = did_you_mean(verb, action.choices, 1)
                message = f"there is no verb {verb!r}.{hint} Verbs: {', '.join(action.choices)}."
        verb = self.prog.removeprefix("masa").strip() or "VERB"
        print(f"masa: error: {message}\nTry 'masa --help' or 'masa {verb} --help'.", file=sys.stderr)
        raise SystemExit(2)

    def reject(self, words: list[str]) -> NoReturn:
        """Arguments that are left over: an option that does not exist, or one word too many."""
        options = [name for action in self._actions for name in action.option_strings]
        word = next((w for w in words if w.startswith("-")), words[0])
        what = "option" if word.startswith("-") else "argument"
        self.error(f"{self.prog} takes no {what} {word!r}.{did_you_mean(word.partition('=')[0], options, 1)}")


class Verbs:
    """The verbs of the command line; a module of :mod:`masa.cli` adds its own with :meth:`add` or :meth:`pass_on`."""

    def __init__(self, parser: Parser) -> None:
        self._parsers = parser.add_subparsers(title="verbs", metavar="VERB")

    def add(self, name: str, call: Call, summary: str, example: str, gpu: bool = False) -> argparse.ArgumentParser:
        """Add a verb.

        Args:
            call: does the work.
            summary: one line, for ``masa --help``; also what ``masa NAME --help`` begins with.
            example: a command line that works.
            gpu: a GPU, or the share of one that ``--gpus`` says, is leased for it where there is one.
        """
        sub = self._parsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}\n\n{EXIT}",
        )
        sub.set_defaults(call=call, gpu=gpu, parser=sub)
        sub.add_argument("--configfile", nargs="+", default=[], metavar="YAML", help="overlays over config/*.yaml")
        sub.add_argument("--log", metavar="FILE", help="write an error here, or seconds and peak memory")
        if gpu:
            add_gpus(sub, "one")
        return sub

    def pass_on(self, name: str, call: Call, summary: str, example: str, arguments: str) -> None:
        """Add a verb that is another program: all that follows it, ``--help`` too, is in ``given.words`` as it was.

        Args:
            call: runs the program.
            summary: one line, for ``masa --help``.
            example: a command line that works.
            arguments: what they are, for the reference; at the command line the program's own ``--help`` answers.
        """
        sub = self._parsers.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            epilog=f"example:\n  {example}",
            prefix_chars="\0",  # which no argument begins with: none is an option of ours
            add_help=False,
        )
        sub.set_defaults(call=call, gpu=False, parser=sub, bars=True, configfile=[], log=None)
        sub.add_argument("words", nargs=argparse.REMAINDER, metavar="ARGS…", help=arguments)


def add_out(
    verb: argparse.ArgumentParser,
    metavar: str = "DIR",
    help: str | None = None,
    *,
    lock: Literal["inside", "beside"] | None = "inside",
    required: bool = True,
    aliases: Sequence[str] = (),
) -> None:
    """The option that says where a verb writes, which is tried before its work begins and held while it goes on.

    Args:
        metavar: "DIR" or "FILE": what is written.
        lock: where :func:`held` puts the lock: in the folder, or beside a file or a folder that is replaced as a whole;
            None where the verb's own work takes it.
    """
    verb.add_argument("--out", *aliases, required=required, metavar=metavar, help=help)
    verb.set_defaults(out_is_folder=metavar == "DIR", out_lock=lock)
    verb.add_argument(
        "--no-wait", action="store_true", help=f"stop where another process writes {metavar}, which is else waited for"
    )


READ = ("model", "text", "texts", "evaluate", "calibration", "tokens", "tokenizer", "images", "boxes", "benchmarks")
READ += ("directory", "data", "spec", "configfile", "extend", "calibration_text")
"""Options and arguments that name files or folders which a verb reads."""


@contextmanager
def held(given: argparse.Namespace) -> Iterator[None]:
    """Try a verb's ``--out`` before its work begins, and hold it while that goes on.

    ``given.out`` becomes what a link leads to.

    Raises:
        MasaError: see :func:`masa.runs.outputs.tried`; it is also what is read; or, with ``--no-wait``, another process
            writes it.
    """
    if getattr(given, "out", None) is None or not hasattr(given, "out_lock"):
        yield
        return
    out = tried(Path(given.out), given.out_is_folder)
    for name in READ:
        value = getattr(given, name, None)
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and _is_there(word) and out.exists() and out.samefile(word):
                raise MasaError(f"--out {given.out} is what is read ({name}): it would be overwritten. Choose another.")
            replaced = given.out_is_folder and given.out_lock == "beside"
            if replaced and isinstance(word, str) and _is_there(word) and out.resolve() in Path(word).resolve().parents:
                raise MasaError(f"--out {given.out} is replaced as a whole, and {word} ({name}) lies in it.")
    given.out = str(out)
    if given.out_lock is None:
        yield
        return
    with exclusive(out, wait=not given.no_wait, beside=given.out_lock == "beside", keep=False):
        yield


def _is_there(word: str) -> bool:
    try:
        return Path(word).exists()
    except (OSError, ValueError):  # JSON, too long for a name
        return False


def add_gpus(verb: argparse.ArgumentParser, default: str) -> None:
    """The option that says how many GPUs a verb leases.

    Args:
        default: what it leases without the option, in words.
    """
    verb.add_argument(
        "--gpus",
        type=_gpus,
        metavar="COUNT",
        help=f"GPUs of this machine that it takes: 0.25 or 25%% shares one ({default})",
    )


def _gpus(text: str) -> float:
    """0.25, 25% or 2."""
    try:
        count = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        count = 0.0
    if not 0 < count < 1 and count not in range(1, 1025):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, or a share below one as 0.25 or 25%")
    return count


def spec_of(given: argparse.Namespace, default: Callable[[config.Config], Any], what: str) -> Any:
    """``--spec`` as JSON text or file, else what the configuration says.

    Raises:
        MasaError: it is not JSON, or not of the form ``what`` (a key of :data:`masa.study.specs.SPECS`); or --out is
            one of its sources.
    """
    if given.spec is None:
        spec = default(config.load(given.configfile))
    else:
        spec = read_spec(given.spec)
        check_spec(what, spec)
    keep_sources(given, spec)
    return spec


def keep_sources(given: argparse.Namespace, spec: Any) -> None:
    """Raise :class:`MasaError` if ``--out`` is one of the sources of a spec, which it would overwrite."""
    if isinstance(spec, dict) and getattr(given, "out", None):
        from masa.data.sources import check_apart

        check_apart(spec, Path(given.out), spec.get("mirror"))


def read_spec(text: str) -> Any:
    """JSON text, or a file of it.

    Raises:
        MasaError: it is not JSON, or there is no such file.
    """
    inline = text.lstrip()[:1] in ("{", "[")
    try:
        text = text if inline else Path(text).read_text(encoding="utf-8")
        return json.loads(text, parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise MasaError(f"--spec is not valid JSON ({error}); give JSON text or a file of it.") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
