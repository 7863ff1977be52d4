"""Least squares layer by layer: what a compressed model stores, solved for again on the inputs that it really sees.

A matrix W' of a layer is to give what the original W would on the same inputs X', which the compressed layers before
leave, in the metric G of the outputs: ``min tr(G (W' - W) X'^T X' (W' - W)^T)``. (What W gives on the original's own
inputs is the worse aim: the answer shrinks to what X' can predict, and the model gets worse.) Every kind of storage is
linear in each of its tensors, so that conjugate gradients find the minimum over one tensor with nothing but its
gradient; tensors take turns. What several layers read (atoms, dictionaries in common) stays as it is.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from masa.compression.calibration.calibrate import Progress
from masa.compression.calibration.statistics import INPUT_OF, Calibration
from masa.compression.calibration.stream import BlockStream, GramHooks
from masa.sharing.projections import Family, SharedProjections, family_of
from masa.sharing.weight_sources import WeightSource

SEED = 0
"""Of the random directions in which it is seen which layers read a number."""
EXACT = 1e-9
"""Of a matrix's own size: an error below it is none."""
DAMPING = 0.01
"""Added to the metric of the outputs, relative to its mean diagonal, as the methods do."""


@dataclass
class Matrix:
    """One matrix of a source, and what is asked of it.

    Attributes:
        letter, place: which it is.
        target: W (out, in) of the original.
        inputs: H = X'^T X' (in, in).
        outputs: G (out, out), how errors of outputs count; None for the identity.
    """

    letter: str
    place: int
    target: Tensor
    inputs: Tensor
    outputs: Tensor | None = None

    def gradient(self, change: Tensor) -> Tensor:
        """``G dW H`` of a dW (out, in)."""
        found = change @ self.inputs
        return found if self.outputs is None else self.outputs @ found

    def error(self, weight: Tensor) -> float:
        """``tr(G (W' - W) H (W' - W)^T)`` of W' = ``weight``."""
        return float(((weight - self.target) * self.gradient(weight - self.target)).sum(dtype=torch.float64))


def solve_layers(
    model: nn.Module,
    teacher: nn.Module,
    shared: SharedProjections,
    tokens: Tensor,
    *,
    calibration: Calibration | None = None,
    batch_size: int = 4,
    iterations: int = 6,
    progress: Progress = lambda what, done, of: None,
) -> list[float]:
    """Refit the sources of a compressed model, in place.

    Args:
        model: compressed.
        teacher: the dense original, on the device of ``model``.
        shared: the sources of ``model``.
        tokens: (N, T) ids.
        calibration: statistics of the original; where they have gradients, errors count by what they cost the loss.
        batch_size: sequences at once.
        iterations: conjugate-gradient steps for a tensor.
        progress: called with ("solving layers", done, of).

    Returns:
        By layer, the squared error of what its matrices give, relative to that before; at most 1.

    Raises:
        MasaError: see :class:`~masa.compression.calibration.stream.BlockStream`.
    """
    wanted, family = family_of(teacher), family_of(model)
    stream = BlockStream(model, tokens, batch_size)
    exact = {name: copy.deepcopy(shared.source(name[0])).float().requires_grad_(True) for name in shared}
    readers = {name: only_readers(source) for name, source in exact.items()}
    metric = partial(_metric, calibration, next(model.parameters()).device)
    found, count = [], len(stream.blocks)
    for layer in range(count):
        progress("solving layers", layer, count)
        places = {p: at for p in shared.projections if (at := _place(shared, p, layer)) is not None}
        grams = _grams(family, stream, layer, "".join(places))
        before = after = 0.0
        for name, source in exact.items():
            own = [
                Matrix(p, places[p], wanted.at(layer, p).weight.detach().float(), grams[INPUT_OF[p]], metric(p, layer))
                for p in name
                if p in places
            ]
            if own:
                errors, touched = solve(source, own, readers[name], iterations)
                before, after = before + errors[0], after + errors[1]
                _write(source, shared.source(name[0]), touched)
        stream.run(layer, stream.blocks[layer])
        found.append(round(after / before, 6) if before > 0 else 1.0)
    progress("solving layers", count, count)
    return found


def _place(shared: SharedProjections, letter: str, layer: int) -> int | None:
    """Which of its layers this is to a source, or None if it does not serve it."""
    layers = shared.layers.get(letter)
    if layers is None:
        return layer
    return layers.index(layer) if layer in layers else None


def _write(exact: WeightSource, source: WeightSource, names: Sequence[str]) -> None:
    wanted, stored = dict(exact.named_parameters()), dict(source.named_parameters())
    with torch.no_grad():
        for name in names:
            stored[name].copy_(wanted[name])


@torch.no_grad()
def _grams(family: Family, stream: BlockStream, layer: int, letters: str) -> dict[str, Tensor]:
    """H of the inputs of a block's projections, of mean diagonal 1: conjugate gradients run in float32."""
    if not letters:
        return {}
    hooks, block = GramHooks(family, layer, letters, stop=True), stream.blocks[layer]
    with hooks.attached(block):
        stream.run_hooked(layer, block)
    scales = {
        name: gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny) for name, gram in hooks.grams.items()
    }
    return {name: (gram / scales[name]).float() for name, gram in hooks.grams.items()}


def _metric(calibration: Calibration | None, device: torch.device, letter: str, layer: int) -> Tensor | None:
    """E[g g^T] of a projection's outputs, of mean diagonal 1 and damped, where the statistics have gradients."""
    if calibration is None or not calibration.gradient_samples:
        return None
    found = calibration.gradient_gram(letter, layer)
    mean = found.diagonal().mean()
    if not mean > 0:
        return None
    return (found / mean + DAMPING * torch.eye(len(found), dtype=found.dtype)).to(device, torch.float32)


def only_readers(source: WeightSource) -> dict[str, Tensor]:
    """Name of a parameter -> for each of its numbers the one layer (place) that reads it; -1 where not just one does.

    Seen from gradients, whatever the kind of storage is. A source that makes its coefficients has none.
    """
    if source.freeze_coefficients() is not source:
        return {}
    parameters = {name: p for name, p in source.named_parameters() if p.numel()}
    owner = {name: torch.full_like(p, -1, dtype=torch.int16) for name, p in parameters.items()}
    many = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in parameters.items()}
    for place in range(source.num_layers):
        with torch.enable_grad():
            weights = [source.layer_weight(p, place) for p in source.projections]
        weights = [w for w in weights if w.requires_grad]
        if not weights or not parameters:
            continue
        generator = torch.Generator().manual_seed(SEED)
        directions = [torch.randn(w.shape, generator=generator).to(w) for w in weights]
        gradients = torch.autograd.grad(weights, list(parameters.values()), directions, allow_unused=True)
        for name, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                reached = gradient != 0
                many[name] |= reached & (owner[name] >= 0)
                owner[name][reached] = place
    for name, several in many.items():
        owner[name][several] = -1
    return owner


def solve(
    source: WeightSource, matrices: Sequence[Matrix], readers: dict[str, Tensor], iterations: int
) -> tuple[tuple[float, float], list[str]]:
    """The least squares of one layer's matrices of a source over what that layer alone reads, in place.

    Returns:
        The squared error before and after, and the names of the parameters that were solved for.
    """
    place = matrices[0].place
    lost = [m for m in matrices if m.error(_weight(source, m)) > EXACT * m.error(torch.zeros_like(m.target))]
    if not lost:  # stored as it was
        return (0.0, 0.0), []
    masks = {name: mask for name, owner in readers.items() if bool((mask := owner == place).any())}
    parameters = dict(source.named_parameters())

    def error() -> float:
        return sum(m.error(_weight(source, m)) for m in matrices)

    before = now = error()
    for name, mask in masks.items():
        parameter = parameters[name]
        kept = parameter.detach().clone()
        _conjugate_gradients(source, matrices, parameter, mask, iterations)
        after = error()
        if not after <= now:  # by rounding, close to the minimum
            parameter.data.copy_(kept)
        else:
            now = after
    return (before, now), list(masks)


def _weight(source: WeightSource, matrix: Matrix) -> Tensor:
    with torch.no_grad():
        return source.layer_weight(matrix.letter, matrix.place).detach()


def _conjugate_gradients(
    source: WeightSource, matrices: Sequence[Matrix], parameter: nn.Parameter, mask: Tensor, iterations: int
) -> None:
    def weights() -> list[Tensor]:
        with torch.enable_grad():
            return [source.layer_weight(m.letter, m.place) for m in matrices]

    def back(made: list[Tensor], outputs: list[Tensor]) -> Tensor:
        (found,) = torch.autograd.grad(made, [parameter], outputs)
        return found * mask

    start = parameter.detach().clone()
    made = weights()
    base = [w.detach() for w in made]
    residual = -back(made, [m.gradient(w - m.target) for w, m in zip(base, matrices, strict=True)])
    direction, squared = residual.clone(), residual.square().sum()
    moved = torch.zeros_like(start)
    size = float((start * mask).norm()) or 1.0
    for _ in range(iterations):
        length = float(direction.norm())
        if not squared > 0 or not length > 0:
            break
        step = size / length  # of the size of the numbers themselves, so that the difference keeps its digits
        parameter.data.copy_(start + step * direction)
        made = weights()
        changes = [(w.detach() - b) / step for w, b in zip(made, base, strict=True)]
        curved = back(made, [m.gradient(c) for c, m in zip(changes, matrices, strict=True)])
        curvature = (direction * curved).sum()
        if not curvature > 0:
            break
        alpha = squared / curvature
        moved += alpha * direction
        residual -= alpha * curved
        new = residual.square().sum()
        direction = residual + (new / squared) * direction
        squared = new
    parameter.data.copy_(start + moved)
