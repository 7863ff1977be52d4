"""Task data by content: the hash of a folder, its own cache, and lm-eval's task files made to read it.

``datasets`` caches a local folder by its name and the words of its card, so that changed files are not read again. Here
the cache of a folder is named by the hash of its files, in a folder of masa's own, and the hash stands beside the
scores.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from masa.data import task_names
from masa.errors import MasaError
from masa.runs import files

CARD = ".huggingface.yaml"
"""The hidden file that is read; what else is hidden (downloads' own notes, a checkout's history) is no data."""

PRIVATE = ("path", "cache")
"""Keys of a record that say where this machine keeps the data, not what it is."""

Record = Mapping[str, Any]


def content_hash(folder: Path) -> str:
    """sha256 over the names and bytes of the files in a folder, whatever the folder is called.

    Raises:
        MasaError: there is no such folder, nothing in it, or a file that cannot be read.
    """
    total = hashlib.sha256()
    try:
        for path in files_of(folder):
            total.update(f"{path.relative_to(folder).as_posix()}\0{files.sha256_of(path)}\n".encode())
    except OSError as error:
        raise MasaError(f"{folder}: {error.filename or 'a file'} cannot be read ({error.strerror}).") from error
    if not folder.is_dir():
        raise MasaError(f"{folder} does not exist; make it anew with `masa fetch`.")
    return total.hexdigest()


def files_of(folder: Path) -> list[Path]:
    """The files of a folder that may be data, sorted; none where there is no folder."""
    return sorted(p for p in folder.rglob("*") if _is_data(p.relative_to(folder)) and p.is_file())


def _is_data(path: Path) -> bool:
    return not any(part.startswith(".") and part != CARD for part in path.parts)


def parts(record: Record) -> dict[str | None, dict[str, Any]]:
    """Data set that task files name -> where it is: ``path`` or ``revision``. None stands for all that they name."""
    if "data" in record:
        return dict(record["data"])
    return {None: {k: record[k] for k in ("path", "revision", "sha256") if record.get(k)}}


def current(records: Mapping[str, Record]) -> dict[str, dict[str, Any]]:
    """The records with the hash that their data has now; what has changed since ``masa fetch`` is said on stderr."""
    known: dict[str, str] = {}

    def hashed(name: str, part: Mapping[str, Any]) -> dict[str, Any]:
        if not part.get("path"):
            return dict(part)
        path = str(part["path"])
        if path not in known:
            known[path] = content_hash(Path(path))
        if part.get("sha256") not in (None, known[path]):
            print(f"task {name}: {path} has changed since `masa fetch`; it is read as it is now", file=sys.stderr)
        return {**part, "sha256": known[path]}

    found = {}
    for name, record in records.items():
        found[name] = hashed(name, record)
        if "data" in record:
            found[name]["data"] = {of: hashed(name, part) for of, part in record["data"].items()}
    return found


def public(record: Record) -> dict[str, Any]:
    """A record without the places of this machine: what stands in results, and what a result depends on."""
    kept = {k: v for k, v in record.items() if k not in PRIVATE}
    if "data" in record:
        kept["data"] = {of: public(part) for of, part in record["data"].items()}
    return kept


def places(records: Mapping[str, Record]) -> dict[str, str]:
    """Path on this machine -> what it is of, for results that are shown to others."""
    return {
        str(part["path"]): (record["source"] if of is None else of)
        for record in records.values()
        for of, part in parts(record).items()
        if part.get("path")
    }


def _place_of(path: str, name: str | None) -> str:
    """The folder of a configuration with a card of its own, as :mod:`masa.data.benchmarks` writes them, else of all.

    Where a card describes 57 configurations, ``datasets`` parses it anew for each.
    """
    own = Path(path, name or "default")
    return str(own) if (own / CARD).is_file() else path


def place(config: Any, record: Record) -> Any:
    """A task's or group's configuration in which every data set is read from where ``record`` has it."""
    if not isinstance(config, dict):
        return config
    config, known = dict(config), parts(record)
    if isinstance(config.get("task"), list):  # the members of a group may have data sets of their own
        config["task"] = [place(member, record) for member in config["task"]]
    if not (named := config.get("dataset_path")):
        return config
    part = known.get(named, known.get(None, {}))
    options = dict(config.get("dataset_kwargs") or {})
    if path := part.get("path"):
        config["dataset_path"] = _place_of(str(path), config.get("dataset_name"))
        options = {k: v for k, v in options.items() if k not in ("data_files", "data_dir", "revision")}
        options["cache_dir"] = str(_cache(record) / (part.get("sha256") or content_hash(Path(path)))[:32])
    elif revision := part.get("revision"):
        options["revision"] = revision
    if options:
        config["dataset_kwargs"] = options
    return config


def _cache(record: Record) -> Path:
    """Folder of the caches: that of the downloads; without one, ours beside those of ``datasets``."""
    if record.get("cache"):
        return Path(record["cache"])
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "masa"


def load(records: Mapping[str, Record], definitions: Mapping[str, str]) -> tuple[dict[str, Any], Any]:
    """lm-eval's task and group objects, and the manager that knows them.

    Args:
        records: of available data (:func:`current`).
        definitions: task -> folder of its definition below ``lm_eval/tasks``, where it is known.

    Raises:
        MasaError: lm-eval has no task of that name, two names that mean the same task, or data that cannot be read.
    """
    manager, tasks = manager_of(records, definitions), {}
    owner: dict[str, str] = {}
    for name, record in records.items():
        for part in _built(name, record, manager):
            for leaf in leaves(part):
                if owner.setdefault(leaf, name) != name:
                    raise MasaError(
                        f"evaluation.tasks: {leaf} is meant twice, by {owner[leaf]} and by {name}. Leave one of them "
                        "out."
                    )
            tasks[part.task_name if hasattr(part, "task_name") else part.name] = part
    return tasks, manager


def leaves(task: Any) -> list[str]:
    """Names of the tasks in a group; of a task, its own."""
    return [t.task_name for t in task.get_all_tasks()] if hasattr(task, "get_all_tasks") else [task.task_name]


def members(names: Iterable[str], loaded: Mapping[str, Any], manager: Any) -> dict[str, list[str]]:
    """Name that was asked for -> its tasks: of a task itself, of a group or a tag all that it stands for."""
    index = manager.task_index
    return {
        name: leaves(loaded[name]) if name in loaded else [tag for tag in sorted(index[name].tags) if tag in loaded]
        for name in names
    }


def manager_of(names: Iterable[str], definitions: Mapping[str, str]) -> Any:
    """A manager that knows these tasks: of the few folders that define them where that is enough, else of all.

    Raises:
        MasaError: lm-eval has no task of some name.
    """
    from lm_eval.tasks import TaskManager

    root, names = task_names.folder(), list(names)
    for name in names:
        if name not in task_names.defined():
            raise task_names.no_task(name)
    found = {name: root / definitions[name] if name in definitions else task_names.only_file(name) for name in names}
    if all(found.values()):  # reading a few folders instead of thousands of files
        folders = sorted({path.parent if path.is_file() else path for path in found.values()})
        manager = TaskManager(include_defaults=False, include_path=folders)
        if all(name in manager.task_index for name in names):
            return manager
    manager = _everything()
    for name in names:
        if name not in manager.task_index:
            raise task_names.no_task(name)
    return manager


@functools.cache
def _everything() -> Any:
    """Thousands of files: seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def data_sets(name: str, manager: Any) -> list[str]:
    """The data sets that a task, a group or a tag names in its files, each once."""
    index, found, seen = manager.task_index, [], set()

    def visit(config: Any) -> None:
        if isinstance(config, dict):
            if path := config.get("dataset_path"):
                found.append(path)
            members, members_of = config.get("task"), config.get("group")
            if isinstance(members, list):
                for member in members:
                    visit(member)
            elif isinstance(members or members_of, str) and (members or members_of) in index:
                visit(members or members_of)
        elif isinstance(config, str) and config in index and config not in seen:
            seen.add(config)
            entry = index[config]
            for member in sorted(entry.tags) if entry.kind.name == "TAG" else ():
                visit(member)
            if entry.kind.name != "TAG":
                visit({**(entry.cfg or {}), "group": None} if entry.kind.name == "GROUP" else entry.cfg or {})

    visit(name)
    return list(dict.fromkeys(found))


def _built(name: str, record: Record, manager: Any) -> Iterator[Any]:
    """The task or group of a name; of a tag, its tasks."""
    from lm_eval.tasks._factory import TaskFactory

    class Placed(TaskFactory):
        """Reads task files as lm-eval does, and puts the data's place into them."""

        def _load_full_config(self, entry: Any, overrides: dict[str, Any] | None = None) -> dict[str, Any]:
            return place(super()._load_full_config(entry, overrides), record)

    where = ", ".join(str(part.get("path") or of or "the hub") for of, part in parts(record).items())
    try:
        found = Placed().build(manager.task_index[name], registry=manager.task_index)
    except MasaError:
        raise
    except ImportError as error:
        raise MasaError(f"Task {name} needs a package that is not installed: {error}") from error
    except Exception as error:  # of the network, of the format, or code in the data set, which is never run
        said = str(error).strip().replace(os.linesep, " ")
        raise MasaError(
            f"Task {name}: its data could not be read from {where} ({type(error).__name__}: {said}); make it anew with "
            "`masa fetch`."
        ) from error
    yield from found if isinstance(found, list) else [found]
