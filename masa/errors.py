"""One exception for everything a user can mend, and the did-you-mean that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MasaError(Exception):
    """Bad input: the message says which key or file, what was expected and how to mend it.

    The command line prints it without a traceback and exits with status 2.
    """


class Interrupted(MasaError):
    """A signal stopped the work where it can go on; the command line exits with status 75."""


def unknown(what: str, name: str, options: Iterable[str]) -> MasaError:
    """Build the error for a name that does not exist, with the nearest ones that do."""
    options = sorted(str(option) for option in options)
    near = difflib.get_close_matches(str(name), options, n=3, cutoff=0.6)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return MasaError(f"{what} {name!r} does not exist.{hint} Available: {', '.join(options) or 'none'}.")
