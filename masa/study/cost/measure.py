"""What this machine does, from real training steps of small models and at most ten seconds.

As many processes measure at once as a run would use: two jobs on two hyper-threaded cores are slower than one alone.
Seconds are of the processor, not of the clock, so that what else runs now does not count; on a machine of its own, a
job of one thread has both alike.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

from masa.errors import MasaError
from masa.study.cost import transformer
from masa.study.cost.devices import DEVICES, Device
from masa.study.cost.sizes import of_run

SHAPES = (
    # (layers, width, heads, FFN, vocabulary, tokens of a sequence, sequences): mostly activations, mostly products,
    # mostly launches
    (6, 48, 6, 192, 2048, 128, 8),
    (2, 384, 6, 1536, 512, 128, 4),
    (8, 16, 2, 32, 64, 16, 1),
)

PRODUCT = (256, 576, 1536)
"""Rows, inner and outer width of one matrix product, in float32 and bfloat16."""

LAPACK = (576, 192)
"""Widths of the symmetric matrices that are diagonalised."""


def calibrate(threads: int = 1, seconds: float = 10.0, processes: int | None = None) -> Device:
    """The device "cpu" with this machine's own numbers.

    Args:
        threads: that one job computes with.
        seconds: to spend, about; most of it is the import of the libraries, which is measured, too.
        processes: that measure at once; by default one for every ``threads`` cores.

    Raises:
        MasaError: a measuring process failed.
    """
    cores = os.cpu_count() or 1
    count = max(1, min(processes or cores, cores) // threads)
    command = [sys.executable, "-m", "masa.study.cost.measure", str(threads), str(seconds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    running = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(count)
    ]
    found = []
    for process in running:
        out, error = process.communicate()
        if process.returncode:
            raise MasaError(f"The measurement of this machine failed: {error.strip().splitlines()[-1:]}")
        found.append(json.loads(out.splitlines()[-1]))
    measured = {key: statistics.mean(one[key] for one in found) for key in found[0] if key != "steps"}
    steps = [statistics.mean(one["steps"][i] for one in found) for i in range(len(SHAPES))]
    return solve(steps, measured, threads)


def solve(steps: list[float], measured: dict[str, float], threads: int) -> Device:
    """The device whose rates explain the seconds of one step of each shape best, none of them negative."""
    import numpy as np
    from scipy.optimize import nnls

    rows = []
    for shape in SHAPES:
        sizes = of_run(_spec(shape))
        work = transformer.training_pass(sizes, shape[-1]) + transformer.optimiser_step(sizes)
        rows.append([work.flops, work.elements + work.scores, work.launches - transformer.STEP_OPERATORS])
    m, k, n = PRODUCT
    rows.append([2.0 * m * k * n, 0.0, 0.0])  # a product by itself ties the first column down
    matrix, target = np.array(rows), np.array([*steps, measured["product"]])
    scale = np.array([1e-11, 1e-9, 1e-6])  # seconds of a FLOP, an element, a launch: orders of magnitude
    found, _ = nnls(matrix * scale / target[:, None], np.ones(len(target)))  # errors relative to each step
    flop, element, launch = map(float, found * scale)
    default = DEVICES["cpu"]
    rate = 1 / flop if flop > 0 else 4 * default.rate("float32")
    return dataclasses.replace(
        default,
        matmul_flops={"float32": rate, "bfloat16": rate * measured["bfloat16"]},
        element_seconds=element,
        launch_seconds=launch or 1e-7,
        startup_seconds=measured["startup"],
        lapack_flops=measured["lapack"],
        memory_bytes=float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
        threads=threads,
    )


def _spec(shape: tuple[int, ...]) -> dict[str, Any]:
    layers, width, heads, ffn, vocabulary, context, batch = shape
    model = {"num_layers": layers, "hidden_size": width, "num_attention_heads": heads, "intermediate_size": ffn}
    model |= {"vocab_size": vocabulary}
    training = {"context": context, "batch_size": batch, "micro_batch_size": batch}
    return {"model": model, "sharing": {"method": "vanilla"}, "training": training}


def _measure(threads: int, seconds: float) -> dict[str, Any]:
    """The body of one measuring process."""
    import torch
    from transformers import Starcoder2ForCausalLM  # noqa: F401 (what a training imports late)

    import masa.training  # noqa: F401
    from masa.models import language
    from masa.runs import memory

    memory.keep_freed()
    torch.set_num_threads(threads)
    began = time.process_time()  # since the process began: interpreter and imports
    steps = []
    for shape in SHAPES:
        spec = _spec(shape)
        model = language.build(spec["model"], spec["sharing"], shape[5]).train()
        optimiser = torch.optim.AdamW(model.parameters(), fused=True)
        ids = torch.randint(0, shape[4], (shape[6], shape[5]))

        def step(model: Any = model, optimiser: Any = optimiser, ids: Any = ids) -> None:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)

        if not steps:  # the first step of all loads what is loaded late
            step()
            startup = time.process_time()
        steps.append(_median(step, threads, seconds / 12))
    budget = seconds / 40
    rows, inner, outer = PRODUCT
    a, b = torch.randn(rows, inner), torch.randn(outer, inner)
    single = _median(lambda: torch.nn.functional.linear(a, b), threads, budget)
    half, other = a.bfloat16(), b.bfloat16()
    double = _median(lambda: torch.nn.functional.linear(half, other), threads, budget)
    lapack = []
    for n in LAPACK:
        square = torch.randn(n, n, dtype=torch.float64)
        gram = square @ square.T
        lapack.append(_median(lambda gram=gram: torch.linalg.eigh(gram), threads, budget))
    return {
        "startup": startup,
        "imports": began,
        "steps": steps,
        "product": single,
        "bfloat16": single / double,
        "lapack": sum(9.0 * n**3 for n in LAPACK) / sum(lapack),
    }


def _median(work: Callable[[], Any], threads: int, seconds: float) -> float:
    """Median seconds of one call, after one that warms up."""
    work()
    clock = time.process_time if threads == 1 else time.perf_counter
    taken, end = [], time.perf_counter() + seconds
    while len(taken) < 2 or time.perf_counter() < end:
        start = clock()
        work()
        taken.append(clock() - start)
    return statistics.median(taken)


if __name__ == "__main__":
    print(json.dumps(_measure(int(sys.argv[1]), float(sys.argv[2]))))
