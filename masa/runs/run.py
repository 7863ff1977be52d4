"""Run directories: what is stored beside every result, and writing it whole or not at all."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from masa.errors import MasaError
from masa.runs import card
from masa.runs.files import whole_file
from masa.runs.hold import exclusive as exclusive

PACKAGES = ("torch", "transformers", "tokenizers", "datasets", "lm-eval", "numpy", "safetensors", "accelerate")


def write_json(path: str | Path, data: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    with whole_file(Path(path)) as temporary:
        temporary.write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path, made_by: str | None = None) -> Any:
    """Read JSON.

    Args:
        made_by: the command that writes the file, for messages.

    Raises:
        MasaError: the file is missing or not JSON.
    """
    again = f"make it anew with `{made_by}`" if made_by else "run again"
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MasaError(f"{path} does not exist{f'; {again}' if made_by else ''}.") from error
    except (ValueError, RecursionError) as error:
        raise MasaError(f"{path} is not valid JSON ({error}); delete it and {again}.") from error


def read_mapping(path: Path) -> dict[str, Any] | None:
    """The object of a JSON file; None where it is missing, being written or something else."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def read_jsonl(path: str | Path) -> Iterator[dict[str, Any]]:
    """Records of a metrics log; a line cut short by a kill or a full disk is passed over.

    Raises:
        MasaError: there is no such file.
    """
    try:
        text = Path(path).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise MasaError(
            f"{path} does not exist; the run's training (`masa pretrain`, `masa train-vit`) writes it."
        ) from error
    for line in text.split("\n"):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield record


def digest(data: Any) -> str:
    """Hash of JSON-able data, independent of key order."""
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def provenance(inputs: Mapping[str, str], packages: Sequence[str] = ()) -> dict[str, Any]:
    """What a result was made with: package versions, git revision, machine, GPU, threads, and the sha256 of its inputs.

    Args:
        packages: further packages whose versions matter.

    A package that is not installed, of an extra that the work did without, is left out.
    """
    versions = {name: _version(name) for name in (*PACKAGES, *packages)}
    return {
        "packages": {name: version for name, version in versions.items() if version is not None},
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        **card.used(),
        "threads": _threads(),
        "revision": _git_revision(),
        "inputs": dict(inputs),
    }


def _threads() -> int | None:
    """Of the CPU, as torch has them now; None where nothing imported it. Sums depend on their number."""
    torch = sys.modules.get("torch")
    return None if torch is None else torch.get_num_threads()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    """The processor: another model may round otherwise, and then nothing is equal to the bit."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    names = [facts[key] for key in ("model name", "cpu family", "model") if key in facts]
    return " / ".join(names) or platform.processor() or platform.machine()


def _git_revision() -> str | None:
    folder = Path(__file__).resolve().parent
    try:  # an installed masa may lie inside another project's checkout
        ours = ["git", "ls-files", "--error-unmatch", "--", Path(__file__).name]
        subprocess.run(ours, cwd=folder, capture_output=True, check=True)
        revision = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "."], cwd=folder, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return revision + ("+changes" if changed else "")
