"""Tokens per second of training and of folded inference, as ratios to vanilla taken in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.models import language
from masa.runs import memory, run
from masa.runs.progress import Progress
from masa.sharing.fold import fold
from masa.training import optimizers
from masa.training.attention import without_mask
from masa.training.precision import CastOnce, uses_bfloat16


def measure(runs: Sequence[Mapping[str, Any]], settings: Mapping[str, Any], threads: int, out: Path) -> dict:
    """Time one optimiser step and one folded forward pass of every method, alternately, ``repeats`` rounds.

    Args:
        runs: resolved runs, one a method; the first is the reference of all ratios.
        settings: the configuration's ``throughput``.
        threads: CPU threads.
        out: JSON file.

    The ratio of a method is the median over rounds of (reference's seconds / its seconds in the same round), so that a
    machine that slows down for a while slows both.
    """
    memory.keep_freed()
    torch.set_num_threads(threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (settings["batch_size"], settings["context"])
    specs = {spec["run"].split("/")[1]: spec for spec in runs}
    reference, bf16 = next(iter(specs)), uses_bfloat16(runs[0]["training"])

    def precision() -> AbstractContextManager:
        return torch.autocast(device.type, dtype=torch.bfloat16) if bf16 else nullcontext()

    trained, folded = {}, {}
    for name, spec in specs.items():
        torch.manual_seed(0)
        model = language.build(spec["model"], spec["sharing"], settings["context"]).to(device).train()
        folded[name] = fold(model)
        around = CastOnce(model) if bf16 and device.type == "cuda" else precision  # as masa.training.trainer
        trained[name] = (without_mask(model), optimizers.build(model, spec["training"]), around)
    vocabulary = runs[0]["model"]["vocab_size"]
    ids = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)
    seconds: dict[str, dict[str, list[float]]] = {"training": {}, "inference": {}}
    progress = Progress("throughput", settings["repeats"] + 1, "rounds")
    for round_ in range(settings["repeats"] + 1):
        for name in specs:
            took = {
                "training": _time(_step, *trained[name], ids),
                "inference": _time(_forward, folded[name], ids, precision),
            }
            if round_:  # the first warms up
                for kind, value in took.items():
                    seconds[kind].setdefault(name, []).append(value)
        progress.update(round_ + 1)
    result: dict[str, Any] = {
        "settings": dict(settings),
        "reference": reference,
        "threads": threads,
        "device": _device_name(device),
        "dtype": "bfloat16" if bf16 else "float32",
    }
    for kind, times in seconds.items():
        result[kind] = {
            name: {
                "tokens_per_second": ids.numel() / statistics.median(values),
                "ratio": statistics.median(r / v for r, v in zip(times[reference], values, strict=True)),
            }
            for name, values in times.items()
        }
    result["provenance"] = run.provenance({})
    run.write_json(out, result)
    return result


def _time(work: Any, *arguments: Any) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, around: Any, ids: torch.Tensor) -> None:
    with around():
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss  # as the Trainer does
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def _forward(model: nn.Module, ids: torch.Tensor, precision: Any) -> None:
    with precision():
        model(input_ids=ids, use_cache=False)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
