"""A board that others extend: one JSON a method and setting, and a page that sorts all that lie under a folder.

An entry holds what its runs' files say and no number typed by hand: losses of every seed, bits per byte, parameters,
bytes, speed, versions and commit. Entries are compared where text, tokenizer, tokens and sizes are the same, and kept
where they are worse.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masa.errors import MasaError
from masa.report.runs import Run
from masa.runs import run
from masa.runs.files import whole_file
from masa.study.cost import logs

FORMAT = 1
KIND = "board"
"""The key that an entry begins with: other JSON files under the folder are passed over."""

NEEDED: dict[str, type | tuple[type, ...]] = {
    "method": str,
    "label": str,
    "spec": dict,
    "on": dict,
    "seeds": list,
    "loss": list,
    "parameters": dict,
    "versions": dict,
}
"""Keys that every entry has; others may be null or absent."""


def entry(found: Sequence[Run], label: str | None = None, note: str = "") -> dict[str, Any]:
    """One method's entry.

    Args:
        found: its finished runs, which differ in their seeds alone (:func:`masa.report.runs.seeds_of`).
        label: how the page calls it; by default the experiment's name.
        note: a sentence for the page, such as what was tried and did not help.

    Raises:
        MasaError: a run that is not finished, has no held-out loss, or differs in more than its seed.
    """
    for r in found:
        if not r.done or not {"validation_loss", "tokens"} <= set(r.training):
            raise MasaError(f"{r.name} is not finished, or is no language model: there is no held-out loss of it.")
    settings = [_setting(r) for r in found]
    specs = [{key: value for key, value in r.spec.items() if key != "seed"} for r in found]
    for r, setting, spec in zip(found, settings, specs, strict=True):
        if (setting, spec) != (settings[0], specs[0]):
            raise MasaError(f"{r.name} differs from {found[0].name} in more than its seed; make an entry of each.")
    first = found[0]
    bits = [math.log2(r.scores["byte_ppl"]) if r.scores.get("byte_ppl") else None for r in found]
    return {
        KIND: FORMAT,
        "method": first.group.rpartition("/")[2],
        "label": label or first.group.rpartition("/")[2],
        "note": note,
        "spec": first.spec["sharing"],
        "on": settings[0],
        "training": first.spec["training"],
        "seeds": [r.seed for r in found],
        "loss": [r.training["validation_loss"] for r in found],
        "bits_per_byte": None if None in bits else bits,
        "parameters": first.parameters,
        "bytes": _bytes(first),
        "peak_mib": max((peak for r in found if (peak := _peak(r))), default=None),
        "tokens_per_second": statistics.median(r.training["tokens_per_second"] for r in found),
        "versions": first.provenance.get("packages", {}),
        "commits": sorted({str(r.provenance.get("revision")) for r in found}),
        "devices": sorted({str(r.provenance.get("gpu") or r.provenance.get("cpu")) for r in found}),
        "dtype": first.provenance.get("dtype"),
    }


def _setting(r: Run) -> dict[str, Any]:
    """What has to be the same for losses to be compared."""
    inputs = r.provenance.get("inputs", {})
    data = {"tokens": r.training["tokens"], "text": inputs.get("tokens"), "tokenizer": inputs.get("tokenizer")}
    return data | dict(r.spec["model"])


def _bytes(r: Run) -> int | None:
    """Of the model's files; None where it did not come with its metrics."""
    files = list((r.directory / "model").glob("*.safetensors"))
    return sum(file.stat().st_size for file in files) or None


def _peak(r: Run) -> float | None:
    """MiB of memory that training took at most, by the log of its job; None where that is not there."""
    parts = r.directory.resolve().parts
    took = logs.read(Path(*parts[:-4], "logs", "pretrain", *parts[-3:-1], f"{parts[-1]}.log"))
    return took[1] / 2**20 if took else None


def read(folder: Path) -> list[dict[str, Any]]:
    """All entries below a folder, in the order of their paths.

    Raises:
        MasaError: none, or one that is damaged; file and key are named.
    """
    found = []
    for path in sorted(folder.rglob("*.json")):
        data = run.read_json(path)
        if not isinstance(data, dict) or KIND not in data:
            continue
        if data[KIND] != FORMAT:
            raise MasaError(f"{path}: {KIND} = {data[KIND]!r}; this version of masa reads format {FORMAT}.")
        for key, kind in NEEDED.items():
            if not isinstance(data.get(key), kind):
                raise MasaError(f"{path}: {key} is missing or of another type; make the file anew (`masa board --of`).")
        numbers = [x for x in data["loss"] if isinstance(x, int | float) and math.isfinite(x)]
        if not numbers or len(numbers) != len(data["seeds"]) or len(numbers) != len(data["loss"]):
            raise MasaError(f"{path}: loss must have one finite number for each of its {len(data['seeds'])} seeds.")
        found.append(data | {"file": path.relative_to(folder).as_posix()})
    if not found:
        raise MasaError(
            f"No entry of a board below {folder}. Make one: masa board --of nano/masa-qkvo --out {folder}/mine.json"
        )
    return found


def page(entries: Sequence[Mapping[str, Any]], title: str = "Board") -> str:
    """Markdown: a table for each setting, the lowest mean loss first; the least tokens first among settings."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for item in entries:
        groups.setdefault(run.digest(item["on"]), []).append(item)
    blocks = [f"# {title}\n\n{_NOTE}"]
    for group in sorted(groups.values(), key=lambda g: (g[0]["on"].get("tokens") or 0, run.digest(g[0]["on"]))):
        ordered = sorted(group, key=lambda item: (statistics.fmean(item["loss"]), item["file"]))
        table = pd.DataFrame([_row(item) for item in ordered]).to_markdown(index=False, disable_numparse=True)
        blocks.append(f"## {_heading(group[0]['on'])}\n\n{table}")
    return "\n\n".join(blocks) + "\n"


_NOTE = (
    "Made by `masa board` from the entries' files; no number is typed. Loss: held-out, nats a token, mean ± sample "
    "standard deviation over seeds. Rows of one table were trained on the same tokens of the same text; differences "
    "smaller than a few standard deviations say nothing. What did not help stays."
)


def write(entries: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The page as a file."""
    with whole_file(out) as path:
        path.write_text(page(entries), encoding="utf-8")


def _heading(on: Mapping[str, Any]) -> str:
    sizes = {
        "num_layers": "layers",
        "hidden_size": "wide",
        "num_attention_heads": "heads",
        "vocab_size": "tokens known",
    }
    said = [f"{on[key]:,} {name}" for key, name in sizes.items() if isinstance(on.get(key), int)]
    return f"{', '.join(said)}; {on.get('tokens') or 0:,} tokens of text {str(on.get('text'))[:8]}"


def _row(item: Mapping[str, Any]) -> dict[str, str]:
    parameters, bits = item["parameters"], item.get("bits_per_byte")
    reduction = parameters.get("attention_reduction")
    size, speed, peak = item.get("bytes"), item.get("tokens_per_second"), item.get("peak_mib")
    return {
        "Method": f"[{item['label']}]({item['file']})",
        "Loss": _mean(item["loss"], 4),
        "Bits per byte": _mean(bits, 4) if bits else "",
        "Parameters": f"{parameters.get('total', 0):,}",
        "Attention reduction": "" if reduction is None else f"{100 * reduction:.1f} %",
        "Size": f"{size / 1e6:.2f} MB" if size else "",
        "Memory": f"{peak:,.0f} MiB" if peak else "",
        "Training": f"{speed:,.0f} tokens/s" if speed else "",
        "Seeds": str(len(item["seeds"])),
        "Commit": ", ".join(str(c)[:8] for c in item.get("commits") or []),
        "Note": str(item.get("note") or "").replace("|", "\\|").replace("\n", " "),
    }


def _mean(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
