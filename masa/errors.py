"""One exception for everything a user can mend, and the did-you-mean that goes with it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable

PLAIN = r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]*"
"""A name that may become a file, a wildcard of the workflow or a word on a command line (the schema's ``name``)."""

BEYOND = "if it is beyond float16, compute in another dtype: --dtype bfloat16 or float32 (dtype=)"
"""The mend of numbers that a dtype cannot hold, for messages."""

_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?|API_?KEY|ACCESS_?KEY)(_|$)", re.I)
_IN_A_URL = re.compile(r"(?<=://)[^/\s@'\"]+@")


def is_plain(name: object) -> bool:
    """Whether a name is one path component of harmless characters, as names of runs and artefacts are."""
    return isinstance(name, str) and re.fullmatch(PLAIN, name) is not None


def redact(text: str) -> str:
    """``text`` without passwords in URLs and without the values of environment variables that hold secrets."""
    text = _IN_A_URL.sub("****@", text)
    secrets = {value for name, value in os.environ.items() if len(value) >= 8 and _SECRET_NAME.search(name)}
    for value in sorted(secrets, key=len, reverse=True):
        text = text.replace(value, "****")
    return text


class MasaError(Exception):
    """Bad input: the message says which key or file, what was expected and how to mend it.

    The command line prints it without a traceback and exits with status 2. Messages quote what other programs said,
    and may be stored in a manifest, so secrets are taken out here.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(redact(str(message)))


class Interrupted(MasaError):
    """A signal stopped the work where it can go on; the command line exits with status 75."""


def did_you_mean(name: str, options: Iterable[str], count: int = 3) -> str:
    """The nearest names that exist as a sentence with a space before it; empty where none is near."""
    near = difflib.get_close_matches(str(name), list(options), n=count, cutoff=0.6)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def unknown(what: str, name: str, options: Iterable[str]) -> MasaError:
    """Build the error for a name that does not exist, with the nearest ones that do."""
    options = sorted(str(option) for option in options)
    return MasaError(
        f"{what} {name!r} does not exist.{did_you_mean(name, options)} Available: {', '.join(options) or 'none'}."
    )
