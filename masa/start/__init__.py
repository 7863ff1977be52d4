"""How the program begins: in a process of its own, or forked from one that a workflow keeps ready."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Entry point of ``masa``."""
    from masa.start import client

    if client.VARIABLE in os.environ and (status := client.ask(sys.argv[1:])) is not None:
        return status
    from masa.cli import main

    return main()
