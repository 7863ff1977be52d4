"""TensorBoard's event files, made from metrics logs beside the training and never in it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from masa.errors import MasaError, is_plain
from masa.runs.faults import writing
from masa.study.status.numbers import is_number
from masa.study.status.runs import Status
from masa.study.status.tail import Growing

SUFFIX = ".masa"
"""How the names of our event files end; others in the same folder are left alone."""

TAGS = {"loss": "train/loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
UNITS = ("tokens", "images")


class Events:
    """Writes event files, one folder a run, and goes on with them as the logs grow.

    Scalars are ``train/loss``, ``learning_rate``, ``grad_norm``, ``tokens_per_second`` or ``images_per_second`` (of the
    steps between two lines of training), ``validation/loss`` and the other held-out scores, all by step. A log has no
    times but the seconds of its steps, so the wall time of an event is that of the log's last change less the seconds
    of the steps since then: TensorBoard's relative time is the time of the steps.

    Args:
        out: folder for ``tensorboard --logdir``.

    Raises:
        MasaError: the package tensorboard is not installed.
    """

    def __init__(self, out: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MasaError(
                f"masa tensorboard needs the package tensorboard ({error}). Install it with `pip install tensorboard`, "
                "or, in a clone of masa, the version that was tested: `pip install --editable '.[tensorboard]'`."
            ) from error
        self.out, self._writer_class = out, SummaryWriter
        self._runs: dict[Path, _Written] = {}

    @property
    def count(self) -> int:
        """Runs written so far."""
        return len(self._runs)

    def update(self, runs: Iterable[Status]) -> None:
        """Write what is new.

        Raises:
            MasaError: a folder that cannot be written, or two directories that would be written into the same one.
        """
        for run in runs:
            directory = Path(run.directory)
            name = _folder_name(run.run)
            known = self._runs.get(name)
            if known is None:
                known = self._runs[name] = _Written(self.out / name, directory, self._writer_class)
            elif known.directory != directory:
                raise MasaError(
                    f"{known.directory} and {directory} are both {name}; write them into different folders (--out)."
                )
            known.update()

    def close(self) -> None:
        """Write all to the disk."""
        for written in self._runs.values():
            written.close()


class _Written:
    """The event file of one run."""

    def __init__(self, folder: Path, directory: Path, writer_class: Any) -> None:
        self.folder, self.directory, self._writer_class = folder, directory, writer_class
        self._log = Growing(directory / "metrics.jsonl")
        self._writer: Any = None
        self._before: Mapping[str, Any] = {}
        self._start = 0.0

    def update(self) -> None:
        try:
            changed = self._log.path.stat().st_mtime
            anew, records = self._log.read()
        except FileNotFoundError:
            return
        if anew:
            self.close()
        if not records:
            return
        with writing(self.folder, below=self.folder):
            if self._writer is None:
                self._begin(changed, records)
            for record in records:
                for tag, value in _scalars(record, self._before):
                    seconds = record.get("training_seconds")
                    wall = self._start + (seconds if is_number(seconds) else 0.0)
                    self._writer.add_scalar(tag, value, record["step"], walltime=wall)
                if "loss" in record:
                    self._before = record
            self._writer.flush()

    def _begin(self, changed: float, records: list[dict[str, Any]]) -> None:
        for old in self.folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            old.unlink()
        self._writer = self._writer_class(str(self.folder), filename_suffix=SUFFIX, purge_step=0)
        seconds = records[-1].get("training_seconds")
        self._start = changed - (seconds if is_number(seconds) else 0.0)
        self._before = {}
        _add_spec(
            self._writer,
            self.directory / "spec.json",
            {"validation/loss"} | {tag for r in records for tag, _ in _scalars(r, {})},
        )

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _scalars(record: Mapping[str, Any], before: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Tags and values of one line."""
    if not is_number(record.get("step")):
        return
    for key, value in record.items():
        if is_number(value) and key.startswith("validation_"):
            yield f"validation/{key.removeprefix('validation_')}", value
        elif is_number(value) and key in TAGS:
            yield TAGS[key], value
    if "loss" not in record:
        return
    for unit in UNITS:
        pair = [(r.get(unit), r.get("training_seconds")) for r in (before, record)]
        if all(is_number(v) for one in pair for v in one) and pair[1][1] > pair[0][1]:
            yield f"{unit}_per_second", (pair[1][0] - pair[0][0]) / (pair[1][1] - pair[0][1])


def _add_spec(writer: Any, path: Path, tags: Iterable[str]) -> None:
    """The run's spec: as text, and as hyperparameters beside the metrics of the same run."""
    from torch.utils.tensorboard.summary import hparams

    try:
        spec = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    if not isinstance(spec, dict):
        return
    text = json.dumps(spec, indent=1, ensure_ascii=False)
    writer.add_text("spec", "\n".join(f"    {line}" for line in text.splitlines()))
    for summary in hparams(dict(_flat(spec)), dict.fromkeys(sorted(tags), 0.0)):
        writer.file_writer.add_summary(summary)


def _flat(data: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value if isinstance(value, bool | int | float | str) else json.dumps(value)


def _folder_name(run: str) -> Path:
    """A run's id as a path below the folder of all; of a run that has none, the last parts of its directory."""
    parts = run.split("/")
    return Path(*parts) if all(map(is_plain, parts)) else Path("directories", Path(run).resolve().name)
