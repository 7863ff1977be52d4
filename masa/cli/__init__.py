"""The command line: one verb a workflow rule, and each of them works alone."""

from masa.cli.main import main, make_parser

__all__ = ["main", "make_parser"]
