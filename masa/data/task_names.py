"""The names that lm-eval's task files define, read off their text: half a second, without importing lm-eval."""

from __future__ import annotations

import functools
import importlib.util
import re
from importlib import metadata
from pathlib import Path

from masa.errors import MasaError, did_you_mean

_NO_TASK_FILES = frozenset((".py", ".pyc", ".md", ".json", ".jsonl", ".txt", ".csv", ".tsv", ".png", ".sh", ".parquet"))
_DEFINED = re.compile(r"^[\"']?(task|group|tag)[\"']?[ \t]*:[ \t]*(.*(?:\n[ \t]*-.*)*)", re.M)
_WORD = re.compile(r"(?:^|[-,\[])[ \t]*[\"']?([^\s\"'#,\[\]-][^\s\"'#,\[\]]*)", re.M)


def folder() -> Path | None:
    """lm-eval's folder of tasks, or None where it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    places = list(found.submodule_search_locations or ()) if found else []
    return Path(places[0]) / "tasks" if places else None


@functools.cache
def defined() -> dict[str, frozenset[Path]]:
    """Name of a task, group or tag -> the files that have it in the key of that name.

    A superset of what lm-eval knows: a template that several task files include names none of its own.
    """
    root, found = folder(), {}
    for path in sorted(root.rglob("*")) if root else ():
        if path.suffix in _NO_TASK_FILES or not path.is_file():
            continue
        for match in _DEFINED.finditer(path.read_text(encoding="utf-8", errors="replace")):
            for name in _WORD.findall(match[2]):
                found.setdefault(name, set()).add(path)
    return {name: frozenset(paths) for name, paths in found.items()}


def only_file(name: str) -> Path | None:
    """The task file that alone has this name, as that of a single task; None of a group, a tag or an unknown name."""
    paths = defined().get(name, frozenset())
    path = next(iter(paths)) if len(paths) == 1 else None
    if path is None or path.suffix != ".yaml":
        return None
    alone = rf"^task:[ \t]*[\"']?{re.escape(name)}[\"']?[ \t]*(#.*)?$"
    return path if re.search(alone, path.read_text(encoding="utf-8", errors="replace"), re.M) else None


def data_sets(name: str) -> list[str]:
    """Folders of a mirror that may hold the data set which a single task names in its own file."""
    path = only_file(name)
    text = path.read_text(encoding="utf-8", errors="replace") if path else ""
    return [
        place for found in re.findall(r"^dataset_path:[ \t]*[\"']?([^\s\"'#]+)", text, re.M) for place in folders(found)
    ]


def folders(data_set: str) -> list[str]:
    """Where a mirror in the hub's layout may hold a data set: ``ORG/NAME``, else ``lm_eval/NAME``."""
    return [data_set, f"lm_eval/{data_set.rpartition('/')[2]}"]


def no_task(name: str, where: str = "evaluation.tasks") -> MasaError:
    """Build the error for a task that lm-eval does not have, with the nearest ones that it has."""
    return MasaError(
        f"{where}: lm-eval {metadata.version('lm-eval')} has no task {name!r}.{did_you_mean(name, sorted(defined()))} "
        "`masa lm-eval ls tasks` lists them all."
    )
