"""What is to be exported: a run, a compressed model or a bare checkpoint, and all that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from masa.data.tokens import TOKENIZER_FILES
from masa.errors import MasaError
from masa.evaluation.metrics import is_of
from masa.runs import run
from masa.runs.files import sha256_of, verify
from masa.sharing import description as described
from masa.study import kinds
from masa.study.experiments import unknown_run

VANILLA: dict[str, Any] = {"spec": {"method": "vanilla"}, "dense_attention": None, "sources": []}
"""Of a folder that masa did not write."""


@dataclass(frozen=True)
class Source:
    """A model on disk and what is known of it; what is not known is empty or None.

    Attributes:
        name: run id, or the folder's name.
        model: folder that :func:`masa.load` reads.
        kind: of model.
        description: of the checkpoint (:mod:`masa.sharing.description`).
        identity: of the run, which its evaluation names.
        sha256: of the checkpoint's files, by the run's manifest.
        spec, provenance: of the run.
        trained: what its training measured.
        metrics: of its evaluation.
        compression: account of the compression.
        data: manifest of what it was trained on, checked against the run.
        tokenizer: folder of the tokenizer, checked against the run.
        notes: what was looked for and not found, for the card.
    """

    name: str
    model: Path
    kind: kinds.Kind
    description: Mapping[str, Any]
    identity: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)
    spec: Mapping[str, Any] | None = None
    provenance: Mapping[str, Any] | None = None
    trained: Mapping[str, Any] | None = None
    metrics: Mapping[str, Any] | None = None
    compression: Mapping[str, Any] | None = None
    data: Mapping[str, Any] | None = None
    tokenizer: Path | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    @property
    def foreign(self) -> bool:
        """Whether masa had no part in it."""
        return self.description is VANILLA

    @property
    def method(self) -> str:
        return str(self.description["spec"]["method"])

    def load(self) -> Any:
        """The factored model, its files verified.

        Raises:
            MasaError: a file that is damaged.
        """
        from masa.sharing import checkpoint

        verify(self.model, self.sha256, "train it again with `masa pretrain` and --restart")
        return checkpoint.load(self.model)


def find(
    name: str, results: Path, tokenizer: Path | None = None, data: Path | None = None, plain: bool = False
) -> Source:
    """The source that a directory or a run id names.

    Args:
        name: directory or ``SCALE/EXPERIMENT/seedN``.
        results: where run ids are looked up, in ``runs``.
        tokenizer, data: directories, where they are not at their places below the results.
        plain: whether it may be a model that shares nothing, which is in transformers' format already.

    Raises:
        MasaError: there is no such run, it has not finished, or a tokenizer or data that are not its own.
    """
    folder = Path(name)
    if not folder.is_dir():
        folder = results / "runs" / name
        if not folder.is_dir():
            known = [str(p.parent.relative_to(results / "runs")) for p in results.glob("runs/*/*/*/spec.json")]
            raise unknown_run(f"Directory, or run in {results / 'runs'},", name, known, results)
    folder = folder.resolve()
    if folder.name == "model" and (folder.parent / "spec.json").is_file():
        folder = folder.parent
    if (folder / "spec.json").is_file():
        return _run(folder, tokenizer, data)
    if data is not None:
        raise MasaError(f"{folder} is no run, and nothing says what it was trained on: leave --data away.")
    if (folder / "metrics.json").is_file() and (folder / "model").is_dir():  # of `masa sweep`
        folder /= "model"
    return _checkpoint(folder, tokenizer, plain)


def _run(folder: Path, tokenizer: Path | None, data: Path | None) -> Source:
    spec = run.read_json(folder / "spec.json")
    kind = kinds.of(spec)
    if not (folder / "manifest.json").is_file():
        raise MasaError(
            f"{folder} has not finished: it has no manifest.json. Go on with it by `masa {kind.verb} --run "
            f"{spec.get('run')} … --out {folder}`, then export."
        )
    manifest = run.read_json(folder / "manifest.json")
    provenance = run.read_json(folder / "provenance.json")
    try:
        name, identity, sums = manifest["run"], manifest["identity"], dict(manifest["sha256"])
        trained_with = dict(provenance["inputs"])
    except (KeyError, TypeError, ValueError) as error:
        raise MasaError(f"{folder} is no finished run ({type(error).__name__}: {error}); train it again.") from error
    results, notes = folder.parent.parent.parent.parent, {}  # ``parents[3]`` is an error near the root
    default = results / "data" / kind.data / str(spec.get("data") or name.split("/")[0])
    found = _data(kind, data or default, trained_with, data is not None, notes)
    metrics = _evaluation(results / "evaluations" / name / "metrics.json", identity, notes)
    wanted = trained_with.get("tokenizer")
    if tokenizer is not None and wanted is None:
        raise MasaError(f"{name} is {kind.label}, which has no tokenizer: leave --tokenizer away.")
    return Source(
        name=name,
        model=folder / "model",
        kind=kind,
        description=_description(folder / "model"),
        identity=identity,
        sha256=sums,
        spec=spec,
        provenance=provenance,
        trained=manifest.get("training"),
        metrics=metrics,
        data=found,
        tokenizer=_tokenizer(tokenizer or results / "data" / "tokenizer", wanted) if wanted else None,
        notes=notes,
    )


def _checkpoint(folder: Path, tokenizer: Path | None, plain: bool) -> Source:
    """A folder of :func:`masa.save`, by itself or compressed, or anybody's."""
    description = _description(folder, plain)
    config = run.read_json(folder / "config.json")
    tokens = tokenizer or folder
    compression, metrics, name = None, None, folder.name
    if (folder / "compression.json").is_file():
        compression = run.read_json(folder / "compression.json")
    elif folder.name == "model" and (folder.parent / "metrics.json").is_file():
        metrics = run.read_json(folder.parent / "metrics.json")
        compression, name = metrics.get("compression"), metrics.get("run", name)
    if description is VANILLA and compression:  # and written out
        description = VANILLA | {"spec": {"method": compression["method"]}}
    if tokenizer is not None and not _has_tokenizer(tokenizer):
        raise MasaError(f"--tokenizer {tokenizer} holds no {' and no '.join(TOKENIZER_FILES)}.")
    return Source(
        name=name,
        model=folder,
        kind=kinds.of_model(config),
        description=description,
        identity=metrics.get("identity") if metrics else None,
        provenance=metrics.get("provenance") if metrics else None,
        metrics=metrics,
        compression=compression,
        tokenizer=tokens if _has_tokenizer(tokens) else None,
    )


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _description(folder: Path, plain: bool = False) -> Mapping[str, Any]:
    if (folder / "config.json").is_file():
        if (found := described.read(folder)) is None:
            if plain:
                return VANILLA
            raise MasaError(
                f"{folder} shares nothing: it is a plain model already, in transformers' own format. For llama.cpp "
                "export it with --format gguf."
            )
        return found
    inside = sorted(p.parent.name for p in folder.glob("*/spec.json"))
    hint = f" It holds the runs {', '.join(inside)}: name one of them." if inside else ""
    raise MasaError(
        f"{folder} holds no model: a run directory (with spec.json and model/) or what masa.save wrote (with "
        f"config.json) is expected.{hint}"
    )


def _tokenizer(folder: Path, wanted: str) -> Path:
    """The folder, if its tokenizer is the one that a run was trained with."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise MasaError(
            f"{file} does not exist; it is the tokenizer that the run was trained with (sha256 {wanted}). Say where it "
            "is with --tokenizer DIR, or make it anew with `masa tokenizer` and the run's configuration."
        )
    if (actual := sha256_of(file)) != wanted:
        raise MasaError(
            f"{file} is not the tokenizer that the run was trained with: its sha256 is {actual}, the run's "
            f"provenance.json says {wanted}. The model would read other words; give the right one with --tokenizer DIR."
        )
    return folder


def _data(
    kind: kinds.Kind, folder: Path, trained_with: Mapping[str, str], asked: bool, notes: dict[str, str]
) -> Mapping[str, Any] | None:
    """The manifest of a run's data; only one that was asked for by name must be there and fit."""
    path = folder / "manifest.json"
    if not path.is_file() and not asked:
        notes["data"] = "The data's manifest was not found beside the run."
        return None
    manifest = run.read_json(path, f"masa {'tokenize' if kind is kinds.LANGUAGE else kind.data}")
    try:
        digest = import_module(kind.export).data_digest(manifest)
    except (KeyError, TypeError) as error:
        raise MasaError(f"{path} is not one of {kind.data}; say where the run's are with --data DIR.") from error
    if digest == trained_with.get(kind.data):
        return manifest
    if asked:
        raise MasaError(f"{folder} is not what the run was trained on: its {kind.data} have another checksum.")
    notes["data"] = "The data found beside the run are others than it was trained on, and are not described here."
    return None


def _evaluation(path: Path, identity: str, notes: dict[str, str]) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    metrics = run.read_json(path, "masa evaluate")
    if is_of(metrics, identity):
        return metrics
    notes["metrics"] = "The evaluation found beside the run is of another training, and is not shown here."
    return None
