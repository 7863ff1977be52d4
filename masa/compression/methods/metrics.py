"""How the error of a matrix is measured: by its weights, by its outputs on the data, or by what it costs the model.

Each metric is ``tr(G dW H dW^T)`` with its own G (out, out) and H (in, in), solved in closed form by
:func:`~masa.compression.methods.algebra.truncation`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from masa.compression.base import Problem
from masa.compression.methods.algebra import Truncation, cholesky, nothing, truncation
from masa.errors import MasaError, unknown


class WeightMetric:
    """G = H = identity: the distance of the weights, blind to the data."""

    def gram(self, problem: Problem, letter: str, layer: int) -> Tensor | None:
        """H of one projection, or None for the identity."""
        return None

    def root(self, problem: Problem, letter: str, layer: int) -> Callable[[], Tensor] | None:
        """What makes R, lower triangular, with G = R R^T, or None for the identity."""
        return None

    def idle(self, problem: Problem, letter: str, layer: int) -> bool:
        """Whether one projection does nothing as far as this metric sees, so that it may be left out."""
        return not bool(problem.weight(letter, layer).any())

    def truncate(self, problem: Problem, letter: str, layer: int, matrix: Tensor | None = None) -> Truncation:
        """The best approximations of one weight at every rank.

        Args:
            matrix: what is left of the weight, if not all of it; errors still count relative to the whole weight.
        """
        weight = problem.weight(letter, layer)
        if matrix is None and self.idle(problem, letter, layer):
            return nothing(weight)
        gram = self.gram(problem, letter, layer)
        make_root = self.root(problem, letter, layer)
        found = truncation(weight if matrix is None else matrix, gram, make_root)
        if matrix is not None:
            whole = weight.double() if make_root is None else make_root().T @ weight.double()
            found.total = float(((whole if gram is None else whole @ gram) * whole).sum())
        return found

    def scale(self, truncations: Mapping[Any, Truncation]) -> None:
        """Set the ``total`` by which errors are divided when matrices compete; by default each by its own."""


class DataMetric(WeightMetric):
    """G = identity, H = X^T X: the squared error of the output on the data, relative to the output itself."""

    def gram(self, problem: Problem, letter: str, layer: int) -> Tensor:
        return problem.gram(letter, layer)

    def idle(self, problem: Problem, letter: str, layer: int) -> bool:
        """Its weights are zero, or its inputs are."""
        return super().idle(problem, letter, layer) or not bool(self.gram(problem, letter, layer).any())


class FisherMetric(DataMetric):
    """G = E[g g^T], H = X^T X: the loss's second-order increase (:mod:`masa.compression.calibration.gradients`); ours.

    All errors are in nats, so that matrices compete by what they cost the model and not by fractions of their outputs.

    Args:
        damping: added to G's diagonal, relative to its mean: directions without measured gradient still count a little.
    """

    def __init__(self, damping: float = 0.01) -> None:
        if not damping >= 0:
            raise MasaError(f"damping must not be negative, got {damping}.")
        self.damping = damping

    def idle(self, problem: Problem, letter: str, layer: int) -> bool:
        """Its weights, its inputs or the gradients at its outputs are zero.

        Raises:
            MasaError: the calibration's sequences are of one token, in which q and k never do anything.
        """
        assert problem.calibration is not None
        if letter in "qk" and problem.calibration.length < 2:
            raise MasaError(
                f"The calibration's sequences have one token, in which {letter} does nothing in any model, so that its "
                "gradients say nothing. Calibrate on longer ones (length)."
            )
        if super().idle(problem, letter, layer):
            return True
        return not bool(problem.calibration.gradient_gram(letter, layer).any())

    def root(self, problem: Problem, letter: str, layer: int) -> Callable[[], Tensor]:
        assert problem.calibration is not None
        # make() is kept with the truncation: it must not hold the problem, whose model it would pin
        calibration, log, device = problem.calibration, problem.regularisation, problem.weight(letter, layer).device

        def make() -> Tensor:
            metric = calibration.gradient_gram(letter, layer).to(device)
            eye = torch.eye(len(metric), dtype=metric.dtype, device=device)
            metric = metric + self.damping * metric.diagonal().mean() * eye
            return cholesky(metric, f"gradients of {letter} of layer {layer}", log)

        return make

    def scale(self, truncations: Mapping[Any, Truncation]) -> None:
        total = sum(found.total for found in truncations.values())
        for found in truncations.values():
            found.total = total


METRICS: dict[str, Any] = {"weights": WeightMetric, "data": DataMetric, "fisher": FisherMetric}


def check_some_gradient(problem: Problem, idle: Collection[Any]) -> None:
    """Refuse gradients that are all zero though neither weights nor inputs are: those of no model.

    Args:
        idle: keys of the matrices that do nothing in the metric asked for.

    Raises:
        MasaError: such statistics.
    """
    everything = [(p, layer) for p in problem.projections for layer in problem.layers_of(p)]
    if len(idle) == len(everything) and not any(DataMetric().idle(problem, p, layer) for p, layer in everything):
        raise MasaError(
            f"The gradients of all matrices of {problem.projections} are zero on the calibration's tokens, though "
            "weights and inputs are not. Calibrate anew: on other text, longer sequences and more of them, in float32."
        )


def make_metric(rule: str | Mapping[str, Any]) -> WeightMetric:
    """Build a metric from its name, or from ``{"rule": name, ...arguments}``."""
    arguments = {"rule": rule} if isinstance(rule, str) else dict(rule)
    name = arguments.pop("rule", None)
    if name not in METRICS:
        raise unknown("Metric", name, METRICS)
    try:
        return METRICS[name](**arguments)
    except TypeError as error:
        raise MasaError(f"Metric {name!r}: {error}") from error
