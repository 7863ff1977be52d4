"""Attention blocks written differently: transformations of q, k, v and o that leave the model's function as it is.

Attention does not change when key/value heads are permuted together with the query heads that they serve, nor when
these are permuted among themselves, nor when

* the rows of v of one key/value head are rotated, and the columns of o of the heads that it serves with them;
* a pair of rows that RoPE rotates together (i and i + head_dim / 2 in Hugging Face's layout) is rotated in q and k, or
  scaled in k and by the inverse in q: a rotation of the plane commutes with RoPE's.

:func:`align` uses this freedom to bring a layer's weights as near to another's as they come, before both are written
with common atoms (ours; neurons are matched in this way by Ainsworth et al. 2022, arXiv 2209.04836).

Dimensions: d hidden, K key/value heads, G query heads that each of them serves, H = K G, h the size of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from masa.compression.base import Problem
from masa.compression.calibration.calls import PROBE, Calls
from masa.compression.calibration.statistics import Calibration
from masa.errors import MasaError
from masa.sharing.spec import ATTENTION, ModelShape

Block = dict[str, Tensor]
"""The weights of one block by letter: q (H h, d), k and v (K h, d), o (d, H h)."""

ROUNDS = 10


@dataclass(frozen=True)
class Transform:
    """One way to write a block.

    Attributes:
        heads: (H,) old query head of every new one; each run of G serves one key/value head, whose order it implies.
        angle: (K, h / 2) by which the pairs of q and k are rotated, by new key/value head.
        scale: (K, h / 2) by which the pairs of k are multiplied and those of q divided.
        rotation: (K, h, h) orthogonal, applied to v by new key/value head.
    """

    heads: Tensor
    angle: Tensor
    scale: Tensor
    rotation: Tensor

    @classmethod
    def identity(cls, heads: int, groups: int, size: int) -> Transform:
        """What changes nothing: H query heads, K key/value heads of ``size`` rows."""
        flat = torch.zeros(groups, size // 2, dtype=torch.float64)
        rotation = torch.eye(size, dtype=torch.float64).repeat(groups, 1, 1)
        return cls(torch.arange(heads), flat, flat + 1, rotation)

    @property
    def groups(self) -> Tensor:
        """(K,) old key/value head of every new one."""
        return self.heads[:: self.served] // self.served

    @property
    def served(self) -> int:
        """G."""
        return len(self.heads) // len(self.angle)

    def apply(self, letter: str, weight: Tensor) -> Tensor:
        """The weight (out, in) of one projection, written this way, in its own dtype."""
        if letter == "o":
            return self._rows(letter, weight.double().T, inverse=True).T.to(weight.dtype)
        return self._rows(letter, weight.double()).to(weight.dtype)

    def input_gram(self, letter: str, gram: Tensor) -> Tensor:
        """H (in, in) of a projection's input; only o's changes."""
        return self._rows(letter, self._rows(letter, gram).T) if letter == "o" else gram

    def gradient_gram(self, letter: str, gram: Tensor) -> Tensor:
        """G (out, out) of the gradients at a projection's output; o's stays."""
        if letter == "o":
            return gram
        return self._rows(letter, self._rows(letter, gram, inverse=True).T, inverse=True)

    def _rows(self, letter: str, matrix: Tensor, inverse: bool = False) -> Tensor:
        """T times ``matrix`` (n, any), where outputs y of q, k or v and inputs of o become T y; or T^-T times it."""
        blocks = self.rotation if letter in "vo" else self._turn(self.scale if letter == "k" else 1 / self.scale)
        order = self.groups
        if letter in "qo":
            blocks, order = blocks.repeat_interleave(self.served, 0), self.heads
        if inverse:
            blocks = torch.linalg.inv(blocks).mT
        return (blocks.to(matrix) @ matrix.unflatten(0, (len(order), -1))[order.to(matrix.device)]).flatten(0, 1)

    def _turn(self, scale: Tensor) -> Tensor:
        """(K, h, h): the rotation of every pair, times ``scale``."""
        cos, sin = torch.diag_embed(scale * self.angle.cos()), torch.diag_embed(scale * self.angle.sin())
        return torch.cat([torch.cat([cos, -sin], -1), torch.cat([sin, cos], -1)], -2)


def align(block: Block, reference: Block, groups: int, served: int) -> Transform:
    """The way to write ``block`` that makes it most similar to ``reference``.

    Maximises the sum of the cosines of q, k, v and o. For given query heads, the rotations have a closed form (the
    phase of a complex inner product for a pair of q and k, orthogonal Procrustes for v and o); for given rotations, the
    query heads are a linear assignment; both in turn, from two starts. Key/value heads are a linear assignment over
    what is reached so. The result is never less similar than the block as it is.

    Args:
        block, reference: weights of two layers.
        groups, served: K and G.

    Returns:
        A transform without scales.
    """
    own, other = (_normalised(b, groups, served) for b in (block, reference))
    found = [[_align_group(_group(own, j), _group(other, i)) for j in range(groups)] for i in range(groups)]
    gains = torch.tensor([[pair[0] for pair in row] for row in found])
    order = _assign(gains)
    chosen = [found[i][j] for i, j in enumerate(order)]
    heads = torch.cat([j * served + pair[1] for j, pair in zip(order, chosen, strict=True)])
    angle, rotation = torch.stack([p[2] for p in chosen]).cpu(), torch.stack([p[3] for p in chosen]).cpu()
    return Transform(heads, angle, torch.ones_like(angle), rotation)


def check_alignable(problem: Problem) -> None:
    """Refuse a model whose attention has more in it than four matrices and RoPE over whole heads.

    Raises:
        MasaError: a projection is missing or has a bias, or the model does not stay what it is when heads are turned:
            it normalises queries and keys, RoPE turns part of a head or other pairs, heads have biases of their own.
    """
    if set(problem.projections) != set(ATTENTION):
        raise MasaError(f"Aligned heads need all of q, k, v and o in projections, got {problem.projections!r}.")
    family = problem.family
    for layer in problem.same_layers(ATTENTION, "Aligning heads"):
        block = family.blocks[layer]
        for letter in ATTENTION:
            if family.layer(block, layer, letter).bias is not None:
                raise MasaError(
                    f"Projection {letter!r} of layer {layer} has a bias, and biases stay as they are while the heads "
                    "are turned. Use matrix-pca, which aligns nothing."
                )
    heads, groups, size = _sizes(problem.shape)
    rows = {p: problem.shape.shapes[p][p == "o"] for p in ATTENTION}
    wanted = {p: (heads if p in "qo" else groups) * size for p in ATTENTION}
    if rows != wanted or size % 2 or heads % groups:
        raise MasaError(
            f"The attention of this model is not made of {heads} heads of {size} rows for {groups} heads of keys and "
            f"values ({', '.join(f'{p}: {n}' for p, n in rows.items())}). Use matrix-pca, which aligns nothing."
        )
    if apart := _changes(problem, _any_transform(heads, groups, size)):
        raise MasaError(
            f"The attention of this model does not stay what it is when its heads are turned (off by {apart:.1g}): "
            "normalised queries and keys, RoPE on a part of every head and ALiBi do not commute with turning them. Use "
            "matrix-pca."
        )


def _sizes(shape: ModelShape) -> tuple[int, int, int]:
    """H, K and h."""
    return shape.num_attention_heads, shape.num_key_value_heads, shape.shapes["k"][0] // shape.num_key_value_heads


def _any_transform(heads: int, groups: int, size: int) -> Transform:
    """One that uses all of the freedom."""
    generator = torch.Generator().manual_seed(0)
    served = heads // groups
    order = torch.arange(heads).view(groups, served).flip(0, 1).flatten()
    angle = torch.rand(groups, size // 2, dtype=torch.float64, generator=generator) * 6
    turned = torch.linalg.qr(torch.randn(groups, size, size, dtype=torch.float64, generator=generator))[0]
    return Transform(order, angle, 1 + angle / 6, turned)


@torch.no_grad()
def _changes(problem: Problem, transform: Transform) -> float:
    """By how much the first block with attention answers otherwise when it is written in another way; 0 is rounding.

    Its matrices are drawn at random, so that attention is neither flat nor a single token's, whatever the model's are.
    """
    embeddings = problem.model.get_input_embeddings()
    device = embeddings.weight.device
    calls = Calls(problem.model, torch.arange(PROBE, device=device)[None] % embeddings.num_embeddings)
    hidden, given = calls.enter(calls.probe)
    layer = problem.layers_of("q")[0]
    exact = copy.deepcopy(calls.blocks[layer]).float()
    other, generator = copy.deepcopy(exact), torch.Generator().manual_seed(0)
    for letter in ATTENTION:
        out, inp = problem.shape.shapes[letter]
        weight = (torch.randn(out, inp, dtype=torch.float64, generator=generator) / inp**0.5).to(device)
        problem.family.write(exact, layer, letter, weight)
        problem.family.write(other, layer, letter, transform.apply(letter, weight))
    found = [given[layer].run(block, hidden.float(), torch.float32) for block in (exact, other)]
    before = found[0] - hidden.float()
    apart = float((found[1] - found[0]).norm() / before.norm().clamp_min(1e-300))
    return apart if apart > 1e-4 else 0.0


def transforms_of(problem: Problem, groups: list[list[int]]) -> dict[int, Transform]:
    """For every layer its alignment to the mean of the layers before it in its group; the first stays as it is."""
    found = dict[int, Transform]()
    heads, count, size = _sizes(problem.shape)
    for group in groups:
        mean: Block = {}
        for layer in group:
            problem.progress("aligning", layer, len(problem.layers))
            block = {letter: problem.weight(letter, layer).double() for letter in ATTENTION}
            transform = Transform.identity(heads, count, size)
            if mean:
                transform = align(block, mean, count, heads // count)
            found[layer] = transform
            for letter, weight in block.items():  # of unit norm, so that every layer counts alike
                turned = transform.apply(letter, weight)
                mean[letter] = mean.get(letter, 0) + turned / turned.norm().clamp_min(1e-300)
    return found


@dataclass
class AlignedProblem(Problem):
    """A problem whose layers are written in other ways; :attr:`calibration` has to be :class:`AlignedCalibration`."""

    transforms: dict[int, Transform] = field(default_factory=dict)

    @classmethod
    def of(cls, problem: Problem, transforms: dict[int, Transform]) -> AlignedProblem:
        fields = dict(vars(problem))
        assert problem.calibration is not None
        fields["calibration"] = AlignedCalibration.of(problem.calibration, transforms)
        return cls(**fields, transforms=transforms)

    def weight(self, letter: str, layer: int) -> Tensor:
        return self.transforms[layer].apply(letter, super().weight(letter, layer))


@dataclass
class AlignedCalibration(Calibration):
    """The statistics of the layers written in other ways, made of the plain ones when asked for."""

    transforms: dict[int, Transform] = field(default_factory=dict)

    @classmethod
    def of(cls, calibration: Calibration, transforms: dict[int, Transform]) -> AlignedCalibration:
        return cls(**vars(calibration), transforms=transforms)

    def gram(self, letter: str, layer: int) -> Tensor:
        return self.transforms[layer].input_gram(letter, super().gram(letter, layer))

    def gradient_gram(self, letter: str, layer: int) -> Tensor:
        return self.transforms[layer].gradient_gram(letter, super().gradient_gram(letter, layer))


def mean_cosine(problem: Problem, groups: list[list[int]]) -> dict[str, float]:
    """Mean over all pairs of layers of a group of \\|cos(W_i, W_j)\\|, by letter; 1 without any pair."""
    found = {}
    for letter in problem.projections:
        values = []
        for group in groups:
            flat = torch.stack([problem.weight(letter, layer).double().flatten() for layer in group])
            cosines = nn.functional.normalize(flat, dim=1)
            cosines = (cosines @ cosines.T).abs()
            values += cosines[torch.triu_indices(len(group), len(group), 1).unbind()].tolist()
        found[letter] = sum(values) / len(values) if values else 1.0
    return found


def _normalised(block: Block, groups: int, served: int) -> Block:
    """Of norm 1 each, by head: q (K, G, h, d), k and v (K, h, d), o (K, G, h, d), transposed."""
    unit = {letter: w.double() / w.double().norm().clamp_min(1e-300) for letter, w in block.items()}
    return {
        "q": unit["q"].unflatten(0, (groups, served, -1)),
        "k": unit["k"].unflatten(0, (groups, -1)),
        "v": unit["v"].unflatten(0, (groups, -1)),
        "o": unit["o"].T.unflatten(0, (groups, served, -1)),
    }


def _group(block: Block, group: int) -> Block:
    return {letter: weight[group] for letter, weight in block.items()}


def _assign(gains: Tensor) -> list[int]:
    """Column of every row with the largest sum."""
    from scipy.optimize import linear_sum_assignment

    return linear_sum_assignment(gains.cpu().numpy(), maximize=True)[1].tolist()


def _align_group(own: Block, other: Block) -> tuple[float, Tensor, Tensor, Tensor]:
    """One key/value head with its query heads onto another.

    Returns:
        gain, query heads (G,), angle (h / 2,), rotation (h, h).
    """
    served = len(own["q"])
    # z[a, b]: what turning own head b by the phase of its conjugate gains for head a; (G, G, h / 2)
    pairs_q = torch.einsum("apd,bpd->abp", _complex(other["q"]), _complex(own["q"]).conj())
    pairs_k = (_complex(other["k"]) * _complex(own["k"]).conj()).sum(-1)
    products_o = torch.einsum("axd,byd->abxy", other["o"], own["o"])  # (G, G, h, h)
    products_v = other["v"] @ own["v"].T

    def best_turns(order: Tensor) -> tuple[float, Tensor, Tensor]:
        rows = torch.arange(served)
        z = pairs_k + pairs_q[rows, order].sum(0)
        u, s, vh = torch.linalg.svd(products_v + products_o[rows, order].sum(0))
        return float(z.abs().sum() + s.sum()), z.angle(), u @ vh

    def best_order(angle: Tensor, rotation: Tensor) -> Tensor:
        gains = (pairs_q * torch.polar(torch.ones_like(angle), -angle)).real.sum(-1)
        return torch.tensor(_assign(gains + torch.einsum("abxy,xy->ab", products_o, rotation)))

    free = pairs_q.abs().sum(-1) + torch.linalg.matrix_norm(products_o, "nuc")
    best: tuple[float, Tensor, Tensor, Tensor] | None = None
    for order in (torch.arange(served), torch.tensor(_assign(free))):
        gain, angle, rotation = best_turns(order)
        for _ in range(ROUNDS):
            candidate = best_order(angle, rotation)
            if torch.equal(candidate, order):
                break
            order = candidate
            gain, angle, rotation = best_turns(order)
        if best is None or gain > best[0]:
            best = gain, order, angle, rotation
    assert best is not None
    return best


def _complex(rows: Tensor) -> Tensor:
    """Rows (..., h, d) that RoPE pairs, as complex numbers (..., h / 2, d)."""
    first, second = rows.chunk(2, dim=-2)
    return torch.complex(first, second)
