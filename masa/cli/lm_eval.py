"""The verb that is lm-eval's own command line, in a process where masa is imported: it reads factored folders."""

from __future__ import annotations

import argparse
import sys
import traceback

from masa.cli.base import Verbs
from masa.errors import MasaError, redact


def add(verbs: Verbs) -> None:
    """Add the verb."""
    verbs.pass_on(
        "lm-eval",
        _lm_eval,
        "run lm-eval's own command line, which reads factored folders here",
        "masa lm-eval run --model hf --model_args pretrained=smaller --tasks piqa --batch_size 8",
        "handed to lm-eval as they are (`run`, `ls`, `validate`), `--help` too; its exit status is ours. A model "
        "argument `runtime=folded` writes all matrices out when the folder is read",
    )


def _lm_eval(given: argparse.Namespace) -> None:
    """Run lm-eval; what it raises is its own matter, unless masa raised it or the reader of its output has left.

    Raises:
        SystemExit: lm-eval's, or 1 after the traceback of an error in it, as Python itself would end.
    """
    from lm_eval.__main__ import cli_evaluate

    ours = sys.argv
    sys.argv = ["lm-eval", *given.words]
    try:
        cli_evaluate()
    except (MasaError, BrokenPipeError):
        raise
    except Exception:
        print(redact(traceback.format_exc()), end="", file=sys.stderr)
        raise SystemExit(1) from None
    finally:
        sys.argv = ours
