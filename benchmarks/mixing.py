"""What making MASA's matrices costs beside using them: the forward pass of all projections, dense = 1.

    python benchmarks/mixing.py

Three ways to run all Q, K, V and O of L = 12 layers, d = 768, on T tokens: dense matrices; matrices mixed from S = 4
atoms in this very pass, as in a training step; and the atoms' outputs mixed instead of the atoms. They are timed in
turn. The cost model says 1 + S / T for the second and at least S for the third.
"""

from __future__ import annotations

import sys

import torch
from harness import Row, in_turn, parser, save
from torch import Tensor
from torch.nn.functional import linear

from masa.sharing.weight_sources import Atoms

LAYERS, WIDTH, ATOMS, PROJECTIONS = 12, 768, 4, "qkvo"
ROUNDS = {1: 40, 256: 8, 4096: 2}
"""Tokens -> how often all three are timed."""


@torch.no_grad()
def main() -> int:
    given = parser(__doc__).parse_args()
    torch.set_num_threads(1)
    width = 96 if given.quick else WIDTH
    sources = {p: Atoms(p, LAYERS, (width, width), ATOMS) for p in PROJECTIONS}
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
                torch.einsum("s,tso->to", coefficients[layer], linear(x, atoms).unflatten(1, (ATOMS, width)))

    rows = []
    for tokens, rounds in ROUNDS.items():
        x = torch.randn(tokens, width)
        ways = {
            "dense": lambda x=x: use(dense, x),
            "atoms mixed": lambda x=x: use({p: source.weights()[p] for p, source in sources.items()}, x),
            "outputs mixed": lambda x=x: mix_outputs(x),
        }
        timed = in_turn(f"{tokens} tokens", ways, 2 if given.quick else rounds)
        for name in list(ways)[1:]:
            times = timed.median(name) / timed.median("dense")
            rows.append(Row(f"projections' forward pass, {name}, {tokens} tokens", times, "times dense"))
    return save("mixing", rows, {"layers": LAYERS, "width": width, "atoms": ATOMS, "threads": 1}, given.out)


if __name__ == "__main__":
    sys.exit(main())
