"""Matrix PCA of layers whose attention heads were aligned first (ours)."""

from __future__ import annotations

from typing import Any

from masa.compression.base import Problem, register
from masa.compression.methods.alignment import AlignedProblem, Transform, check_alignable, mean_cosine, transforms_of
from masa.compression.methods.matrix_pca import MatrixPCA, Prepared
from masa.sharing.weight_sources import WeightSource


@register("matrix-pca-aligned")
class MatrixPCAAligned(MatrixPCA):
    """Matrix PCA after every layer of a group is written as similarly to the layers before it as its function allows.

    Heads are permuted and turned (:mod:`masa.compression.methods.alignment`); the sources yield the weights so
    written, and nothing else is stored. Arguments of :class:`MatrixPCA`. Needs all of q, k, v and o, without biases.
    """

    def prepare(self, problem: Problem) -> tuple[dict[int, Transform], Prepared, dict[str, Any]]:
        check_alignable(problem)
        assert problem.calibration is not None
        groups = self.groups(problem, "q")
        transforms = transforms_of(problem, groups)
        aligned = AlignedProblem.of(problem, transforms)
        cosines = {"before": mean_cosine(problem, groups), "after": mean_cosine(aligned, groups)}
        return transforms, super().prepare(aligned), cosines

    def solve(
        self, problem: Problem, prepared: tuple[dict[int, Transform], Prepared, dict[str, Any]]
    ) -> list[WeightSource]:
        transforms, inner, cosines = prepared
        self.cosine_ = {when: dict(values) for when, values in cosines.items()}
        return super().solve(AlignedProblem.of(problem, transforms), inner)
