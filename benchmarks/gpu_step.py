"""Training steps on one GPU: Hugging Face's model and Trainer as `masa pretrain` uses them, beside a minimal GPT.

    python benchmarks/gpu_step.py [--scales S L] [--methods vanilla masa-qkvo] [--modes eager compiled] [--profile]

Scales are the paper's, with packed sequences of 1,024 random tokens in the micro-batches of config/config.yaml and no
accumulation. Each model trains through :func:`masa.training.trainer.train`, with everything that a run does beside its
steps but scores; the clock runs from the end of the warm-up to the last step, with the GPU's queue empty at both. The
minimal GPT is nanoGPT's shape: learned positions, one matrix for q, k and v, autocast to bfloat16, fused AdamW.

A share is that of the matrix rate that the card itself reached in this run (bfloat16, 8,192 cubed, random numbers), by
6 FLOPs a parameter and token plus attention's 12 L T d; MASA is counted as the model that it stands for.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from minimal_gpt import MinimalGPT
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from masa.models import language
from masa.training import trainer
from masa.training.attention import without_mask

SCALES = {  # layers, width, heads, sequences a step: config/config.yaml
    "S": (12, 768, 12, 64),
    "M": (24, 1024, 16, 32),
    "L": (24, 1536, 12, 16),
    "tiny": (2, 64, 2, 1),
}
VOCABULARY, CONTEXT = 32000, 1024
RECIPE = {
    "steps": 10**4,
    "learning_rate": 6e-4,
    "min_learning_rate_ratio": 0.1,
    "warmup_fraction": 0.05,
    "weight_decay": 0.1,
    "adam_betas": [0.9, 0.95],
    "max_grad_norm": 1.0,
    "coefficients_learning_rate_ratio": 1.0,
    "context": CONTEXT,
    "dtype": "auto",
    "evaluations": 1,
    "checkpoint_minutes": 60,
    "threads": 8,
}
"""``training`` of a run spec, less batch_size, micro_batch_size and compile."""


def sharing(method: str, layers: int, width: int, heads: int) -> dict[str, Any]:
    """The paper's settings of each method at two thirds fewer attention parameters (GQA: 41.7 %)."""
    third = layers // 3
    return {
        "vanilla": {"method": "vanilla"},
        "gqa": {"method": "gqa", "num_key_value_heads": max(1, heads // 6)},
        "low-rank": {"method": "low-rank", "projections": "qkvo", "rank": width // 6},
        "sequential": {"method": "sequential", "projections": "qkvo", "sets": max(1, third)},
        "repeat-all-over": {"method": "repeat-all-over", "projections": "qkvo", "sets": max(1, third)},
        "masa-qkv": {"method": "masa", "projections": "qkv", "atoms": max(1, third)},
        "masa-qkvo": {"method": "masa", "projections": "qkvo", "atoms": max(1, third)},
    }[method]


METHODS = ("vanilla", "gqa", "low-rank", "sequential", "repeat-all-over", "masa-qkv", "masa-qkvo")


class Done(Exception):
    """Enough steps were timed."""


class Clock(TrainerCallback):
    """Time and memory of the steps after the warm-up; a profile of some where it is asked for."""

    def __init__(self, warm_up: int, steps: int, profile: bool) -> None:
        self.warm_up, self.steps = warm_up, steps
        self.started = self.first = time.perf_counter()
        self.profiler: Any = None
        self.profiled = profile

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step = state.global_step
        if step == 1:
            synchronize()
            self.first = time.perf_counter() - self.started
        if step == self.warm_up:
            synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            self.counters = counters()
            self.started = time.perf_counter()
        if step == self.warm_up + self.steps:
            synchronize()
            self.seconds = (time.perf_counter() - self.started) / self.steps
            self.again = {name: n - self.counters.get(name, 0) for name, n in counters().items()}
            if not self.profiled:
                raise Done
            self.profiler = torch.profiler.profile()
            self.profiler.start()
        if step == self.warm_up + self.steps + 3:
            synchronize()
            self.profiler.stop()
            raise Done


def counters() -> dict[str, int]:
    """What dynamo has counted so far in this process: graphs, breaks, recompilations."""
    from torch._dynamo.utils import counters as all_of

    return {
        "graphs": all_of["stats"].get("unique_graphs", 0),
        "breaks": sum(all_of["graph_break"].values()),
        "frames": all_of["frames"].get("ok", 0),
    }


def ours(scale: str, method: str, compiled: bool, steps: int, profile: bool = False, before: bool = False) -> dict:
    """One of our models, trained as a run of the study is.

    Args:
        before: with autocast, and with the mask that transformers makes.
    """
    layers, width, heads, batch = SCALES[scale]
    model = {"num_layers": layers, "hidden_size": width, "intermediate_size": 4 * width, "vocab_size": VOCABULARY}
    model["num_attention_heads"] = heads
    clock = Clock(5 if compiled else 3, steps, profile)
    spec = {"run": f"{scale}/{method}/seed0", "seed": 0}
    spec["training"] = RECIPE | {"batch_size": batch, "micro_batch_size": batch, "compile": compiled}
    trainer.set_up(spec)

    def build() -> nn.Module:
        made = language.build(model, sharing(method, layers, width, heads), CONTEXT)
        return made if before else without_mask(made)

    task = trainer.Task(
        build=build,
        data=Tokens(batch * 1000),
        score=lambda model: {"validation_loss": 0.0},
        unit="tokens",
        units_per_step=batch * CONTEXT,
        inputs={},
        identity="benchmark",
        callbacks=[clock],
        casts_once=not before,
    )
    with tempfile.TemporaryDirectory() as folder, reset():
        with suppress(Done):
            trainer.train(spec, task, Path(folder) / "run")
        return found(scale, method, compiled, clock.seconds, batch, clock.first) | {
            "again": clock.again,
            "dynamo": counters(),
            "profile": by_kind(clock.profiler) if profile else None,
        }


class Tokens(torch.utils.data.Dataset):
    """Random ids; an item is what the study's packed tokens are."""

    def __init__(self, count: int, vocabulary: int = VOCABULARY) -> None:
        self.count, self.ids = count, torch.randint(0, vocabulary, (256, CONTEXT))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = self.ids[index % len(self.ids)]
        return {"input_ids": ids, "labels": ids}


def minimal(scale: str, compiled: bool, steps: int, profile: bool = False, deterministic: bool = False) -> dict:
    """The minimal GPT in the plainest loop."""
    layers, width, heads, batch = SCALES[scale]
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.manual_seed(0)
    with reset():
        model = MinimalGPT(layers, width, heads, VOCABULARY, CONTEXT).to(device())
        nn.init.normal_(model.tokens.weight, std=0.02)
        optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, weight_decay=0.1, fused=True)
        called = torch.compile(model, dynamic=False) if compiled else model
        batches = [torch.randint(0, VOCABULARY, (batch, CONTEXT), device=device()) for _ in range(8)]

        def step(ids: Tensor) -> None:
            with torch.autocast(device(), dtype=torch.bfloat16):
                loss = called(ids)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        started = time.perf_counter()
        step(batches[0])
        synchronize()
        first = time.perf_counter() - started
        for _ in range(3):
            step(batches[1])
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        for i in range(steps):
            step(batches[i % 8])
        synchronize()
        seconds = (time.perf_counter() - started) / steps
        result = found(scale, "minimal GPT", compiled, seconds, batch, first)
        if profile:
            with torch.profiler.profile() as profiler:
                for i in range(3):
                    step(batches[i])
                synchronize()
            result["profile"] = by_kind(profiler)
        return result


@contextmanager
def reset() -> Iterator[None]:
    """Nothing compiled and no memory from before, nor after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def found(scale: str, method: str, compiled: bool, seconds: float, batch: int, first: float) -> dict[str, Any]:
    """What is written of one model."""
    layers, width, _, _ = SCALES[scale]
    weights = 12 * layers * width**2 + VOCABULARY * width
    flops = 6 * weights + 12 * layers * CONTEXT * width
    tokens = batch * CONTEXT / seconds
    peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    return {
        "scale": scale,
        "method": method,
        "mode": "compiled" if compiled else "eager",
        "tokens_per_second": tokens,
        "tflops": tokens * flops / 1e12,
        "peak_memory_gib": peak,
        "first_step_seconds": first,
    }


KINDS = {  # the first that a kernel's name holds
    "fused by the compiler": ("triton",),
    "loss, fused": ("liger_cross_entropy", "element_mul_kernel"),
    "attention": ("flash", "fmha", "attention", "softmax_warp"),
    "linears": ("gemm", "cutlass", "nvjet", "cublas", "sm90_xmma", "splitk", "wgmma"),
    "optimiser and clipping": ("multi_tensor", "adam", "lpnorm", "norm_kernel"),
    "norms": ("layer_norm", "gammabeta", "layernorm"),
    "loss": ("softmax", "nll", "cross_entropy"),
    "RoPE": ("rope",),
    "copies and casts": ("copy", "memcpy", "memset", "fill"),
}


def by_kind(profiler: Any, steps: int = 3) -> dict[str, float]:
    """Milliseconds a step of the GPU by kind of kernel, and those between them in which it had nothing to do."""
    sums: dict[str, float] = defaultdict(float)
    spans: list[tuple[float, float]] = []
    for event in profiler.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            name = event.name.lower()
            kind = next((kind for kind, parts in KINDS.items() if any(p in name for p in parts)), "other elementwise")
            sums[kind] += (event.time_range.end - event.time_range.start) / 1e3 / steps
            spans.append((event.time_range.start, event.time_range.end))
    if spans:
        spans.sort()
        busy, end = 0.0, spans[0][0]
        for start, stop in spans:
            busy += max(0.0, stop - max(start, end))
            end = max(end, stop)
        sums["idle"] = (end - spans[0][0] - busy) / 1e3 / steps
    return {kind: round(value, 3) for kind, value in sorted(sums.items(), key=lambda item: -item[1])}


def matrix_rate(size: int = 8192) -> float:
    """TFLOP/s of one bfloat16 matrix product."""
    a, b = (torch.randn(size, size, device=device(), dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / seconds_of(lambda: a @ b) / 1e12


def bandwidth(numbers: int = 2**30) -> float:
    """GB/s of a copy, bytes read and written."""
    a = torch.ones(numbers, device=device(), dtype=torch.bfloat16)
    b = torch.empty_like(a)
    return 2 * a.nbytes / seconds_of(lambda: b.copy_(a)) / 1e9


def seconds_of(work: Callable[[], Any], times: int = 10) -> float:
    for _ in range(3):
        work()
    synchronize()
    started = time.perf_counter()
    for _ in range(times):
        work()
    synchronize()
    return (time.perf_counter() - started) / times


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    made.add_argument("--scales", nargs="+", choices=list(SCALES), default=["S"])
    made.add_argument("--methods", nargs="+", default=["vanilla", "masa-qkvo"])
    made.add_argument("--modes", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    made.add_argument("--steps", type=int, default=10)
    made.add_argument("--profile", action="store_true", help="also where the GPU's time goes")
    made.add_argument("--out", type=Path, help="a JSON file, rewritten after every model")
    given = made.parse_args()
    logging.set_verbosity_error()
    quick = not torch.cuda.is_available()
    size = 256 if quick else 8192
    result: dict[str, Any] = {"matrix_tflops": matrix_rate(size), "bandwidth_gbs": bandwidth(size**2), "steps": []}
    for scale in given.scales:
        for mode in given.modes:
            for method in ["minimal GPT", *given.methods]:
                arguments: Mapping[str, Any] = {"profile": given.profile}
                one = one_of(scale, method, mode == "compiled", given.steps, **arguments)
                result["steps"].append(one)
                print(json.dumps(one), file=sys.stderr, flush=True)
                if given.out:
                    given.out.write_text(json.dumps(result, indent=1))
    print(json.dumps({k: v for k, v in result.items() if k != "steps"}))
    return 0


def one_of(scale: str, method: str, compiled: bool, steps: int, **options: Any) -> dict[str, Any]:
    """One model's numbers, or what went wrong with it."""
    try:
        if method == "minimal GPT":
            return minimal(scale, compiled, steps, **options)
        return ours(scale, method, compiled, steps, **options)
    except Exception as error:  # the next one is to be measured all the same
        return {
            "scale": scale,
            "method": method,
            "mode": "compiled" if compiled else "eager",
            "error": repr(error)[:500],
        }


if __name__ == "__main__":
    sys.exit(main())
