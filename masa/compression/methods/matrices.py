"""One matrix with its statistics in float64, and what an approximation of it costs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from masa.compression.base import Problem
from masa.errors import unknown

COSTS = ("weights", "whitened", "loss", "loss-diagonal")
"""How approximations of different matrices compare, see :meth:`Matrix.cost`."""


@dataclass
class Matrix:
    """One projection of one layer.

    Attributes:
        letter, layer: which.
        weight: W (out, in).
        inputs: E[x x^T] (in, in), or None for methods blind to data.
        outputs: E[g g^T] (out, out) of the loss's gradients, or None where the loss is not asked.
        idle: it is zero, nothing enters it, or the loss minds nothing of what leaves it: it need not be stored.
    """

    letter: str
    layer: int
    weight: Tensor
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    idle: bool = False

    @classmethod
    def of(cls, problem: Problem, letter: str, layer: int, loss: bool = False, damping: float = 0.01) -> Matrix:
        """Read a matrix and its statistics.

        Args:
            loss: read the gradients' moments, too.
            damping: added to their diagonal, relative to its mean.
        """
        weight = problem.weight(letter, layer).double().contiguous()
        inputs, outputs, found = None, None, problem.calibration
        if found is not None:
            inputs = problem.gram(letter, layer) / (found.samples * found.length)
        if loss:
            assert found is not None
            outputs = found.gradient_gram(letter, layer).to(weight.device)
            outputs.diagonal().add_(damping * outputs.diagonal().mean())
        idle = not bool(weight.any())
        for metric in (inputs, outputs):
            if metric is not None and not bool(metric.any()):
                metric.fill_diagonal_(1.0)  # any will do
                idle = True
        return cls(letter, layer, weight, inputs, outputs, idle)

    @property
    def member(self) -> tuple[str, int]:
        return self.letter, self.layer

    @property
    def name(self) -> str:
        return f"{self.letter} of layer {self.layer}"

    @property
    def energies(self) -> Tensor:
        """E[x_j^2] (in,)."""
        return torch.ones_like(self.weight[0]) if self.inputs is None else self.inputs.diagonal()

    @property
    def importance(self) -> Tensor:
        """E[g_i^2] (out,): how much the loss minds each output."""
        return torch.ones_like(self.weight[:, 0]) if self.outputs is None else self.outputs.diagonal()

    def cost(self, rule: str, approximation: Tensor) -> float:
        """What it costs to have ``approximation`` (out, in) in the place of W.

        Args:
            rule: "weights": ``||W - V|| / ||W||``, ROCKET's (arXiv 2602.11008). "whitened": the squared error of the
                outputs over the outputs' own. "loss": the loss's second-order increase ``tr(G D H D^T) / 2``, in nats a
                token. "loss-diagonal": the same with the diagonal of G alone, for which less is computed.
        """
        return self.error_cost(rule, self.weight - approximation.double())

    def error_cost(self, rule: str, error: Tensor) -> float:
        """The same of ``error = W - V``, relative to W where the rule is relative."""
        if rule == "weights":
            return float(error.norm() / self.weight.norm().clamp_min(1e-300))
        if self.idle:
            return 0.0
        spread = error if self.inputs is None else error @ self.inputs
        if rule == "whitened":
            return float((spread * error).sum()) / max(self.energy(), 1e-300)
        assert self.outputs is not None
        if rule == "loss-diagonal":
            return float(((spread * error).sum(1) * self.importance).sum()) / 2
        return max(0.0, float((spread * (self.outputs @ error)).sum())) / 2

    def energy(self) -> float:
        """tr(W H W^T), the outputs' own mean square."""
        weight = self.weight
        return float(((weight if self.inputs is None else weight @ self.inputs) * weight).sum())

    def entries(self, rule: str) -> Tensor:
        """What it costs to set each entry of W to zero by itself (out, in); squared for "weights"."""
        squares = self.weight.square()
        if rule == "weights":
            return squares / squares.sum().clamp_min(1e-300)
        if self.idle:
            return torch.zeros_like(squares)
        if rule == "whitened":
            return squares * self.energies / max(self.energy(), 1e-300)
        return squares * self.energies * self.importance[:, None] / 2


def check_cost(rule: str) -> str:
    """One of :data:`COSTS`.

    Raises:
        MasaError: another.
    """
    if rule not in COSTS:
        raise unknown("cost", rule, COSTS)
    return rule
