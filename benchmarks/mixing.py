"""What making MASA's matrices costs beside using them: the forward pass of all projections, dense = 1.

    python benchmarks/mixing.py

Three ways to run all Q, K, V and O of L = 12 layers, d = 768, on T tokens: dense matrices; matrices mixed from S = 4
atoms in this very pass, as in a training step; and the atoms' outputs mixed instead of the atoms. They are timed in
turn, and the best of each is taken. The cost model says 1 + S / T for the second and at least S for the third.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import linear

from masa.weight_sources import Atoms

LAYERS, WIDTH, ATOMS, PROJECTIONS = 12, 768, 4, "qkvo"
ROUNDS = {1: 40, 256: 8, 4096: 2}
"""Tokens -> how often all three are timed."""


def best(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Seconds of each, the least of all rounds after one that is not counted."""
    seconds = dict.fromkeys(ways, float("inf"))
    for i in range(rounds + 1):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            if i:
                seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds


@torch.no_grad()
def main() -> None:
    sources = {p: Atoms(p, LAYERS, (WIDTH, WIDTH), ATOMS) for p in PROJECTIONS}
    for source in sources.values():
        source.reset_parameters(0.02)
    dense = {p: [w.clone() for w in source.weights()[p]] for p, source in sources.items()}

    def use(weights: dict[str, list[Tensor]], x: Tensor) -> None:
        for of_layers in weights.values():
            for weight in of_layers:
                linear(x, weight)

    def mix_outputs(x: Tensor) -> None:
        for p, source in sources.items():
            coefficients, atoms = source.coefficients(p), source.atoms.flatten(0, 1)
            for layer in range(LAYERS):
                torch.einsum("s,tso->to", coefficients[layer], linear(x, atoms).unflatten(1, (ATOMS, WIDTH)))

    for tokens, rounds in ROUNDS.items():
        x = torch.randn(tokens, WIDTH)
        ways = {
            "dense": lambda x=x: use(dense, x),
            "atoms mixed": lambda x=x: use({p: source.weights()[p] for p, source in sources.items()}, x),
            "outputs mixed": lambda x=x: mix_outputs(x),
        }
        seconds = best(ways, rounds)
        ratios = ", ".join(f"{name} {seconds[name] / seconds['dense']:.2f}" for name in list(ways)[1:])
        print(f"{tokens:>5} tokens: dense {1000 * seconds['dense']:.1f} ms; {ratios}")


if __name__ == "__main__":
    main()
