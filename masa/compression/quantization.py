"""quantize(): what a shared or compressed model stores, with 8 or 4 bits a number."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import singledispatch

import torch
from torch import Tensor, nn

from masa.compression.calibration.statistics import Calibration
from masa.compression.methods.fits import Fit, assembled, dense_fit
from masa.compression.methods.matrices import Matrix
from masa.compression.methods.rounding import Rounding
from masa.errors import MasaError
from masa.sharing import compressed_sources as compressed
from masa.sharing import weight_sources as trained
from masa.sharing.embeddings import round_embeddings
from masa.sharing.grouped import BITS
from masa.sharing.packed import unpack_bits
from masa.sharing.part_sources import Parts
from masa.sharing.projections import bank_of
from masa.sharing.weight_sources import WeightSource, call

Progress = Callable[[str, int, int], None]


@torch.inference_mode(False)
@torch.no_grad()
def quantize(
    model: nn.Module,
    bits: int = 8,
    calibration: Calibration | None = None,
    *,
    embeddings: int | None = None,
    progress: Progress = lambda what, done, of: None,
) -> nn.Module:
    """Store the numbers of shared matrices with few bits, in place: atoms, factors, dictionaries, values that stayed.

    What the model stored as it was is rounded so that outputs change least: of two factors the second is solved for
    again beside the first, and columns of a matrix make up for those before it. Coefficients, biases, norms and, unless
    they are asked for, embeddings keep their dtype.

    Args:
        model: what :func:`masa.share` (trained), :func:`masa.compress` or :func:`masa.load` returned.
        bits: 8 or 4 (8.25 and 5 with what groups of numbers have in common).
        calibration: statistics of the model that was compressed, or of this one folded: errors then count as the
            inputs make them count, else all alike.
        embeddings: bits of the embeddings and of the head, None to leave them.
        progress: called with ("rounding", done, of).

    Returns:
        ``model`` itself.

    Raises:
        MasaError: nothing is shared, other bits, heads that layers share or embeddings that do more than look up, which
            have no form with few bits.
    """
    for name, asked in (("bits", bits), ("embeddings", BITS[0] if embeddings is None else embeddings)):
        if asked not in BITS or isinstance(asked, bool):
            raise MasaError(f"{name} is one of {', '.join(map(str, BITS))}, got {asked!r}.")
    shared = bank_of(model)
    if shared is None:
        raise MasaError("This model shares nothing and stores no factors. Compress it with option bits instead.")
    names, log = list(shared), dict[str, float]()
    for done, name in enumerate(names):
        progress("rounding", done, len(names))
        source = shared.source(name[0]).freeze_coefficients()
        shared[name] = _rounded(source, bits, calibration, shared.layers, log)
    progress("rounding", len(names), len(names))
    if embeddings is not None:
        round_embeddings(model, embeddings)
    return model


def _rounded(
    source: WeightSource,
    bits: int,
    calibration: Calibration | None,
    layers: dict[str, tuple[int, ...]],
    log: dict[str, float],
) -> WeightSource:
    """The same source with few bits."""
    fits = list(fits_of(source))
    shapes = source.shapes if isinstance(source, Parts) else dict.fromkeys(source.projections, source.shape)
    like = next(p for p in source.parameters())
    matrices = []
    for letter, place in dict.fromkeys(member for fit in fits for member in fit.members):
        weight = source.layer_weight(letter, place).double()
        layer = layers[letter][place] if letter in layers else place
        inputs = None
        if calibration is not None:
            inputs = calibration.gram(letter, layer).to(weight.device) / (calibration.samples * calibration.length)
            inputs = inputs if bool(inputs.any()) else None
        matrices.append(Matrix(letter, place, weight, inputs))
    few = [fit for fit in fits if fit.config["kind"] != "nothing"]
    rounded = iter(Rounding(matrices, bits, log).fits(few))
    done = [fit if fit.config["kind"] == "nothing" else next(rounded) for fit in fits]
    place = {member: member for fit in done for member in fit.members}
    made = assembled(source.projections, source.num_layers, shapes, done, place, like)
    return made.requires_grad_(False)


@singledispatch
def fits_of(source: WeightSource) -> Iterator[Fit]:
    """What a source stores, as parts of the matrices (letter, place among the layers that have it)."""
    raise MasaError(
        f"{type(source).__name__} of {source.projections!r} has no form with few bits. Fold the model first."
    )
    yield


def _members(source: WeightSource, layers: Sequence[int] | None = None) -> tuple[tuple[str, int], ...]:
    chosen = range(source.num_layers) if layers is None else layers
    return tuple((letter, layer) for letter in source.projections for layer in chosen)


@fits_of.register
def _(source: trained.Atoms) -> Iterator[Fit]:
    coefficients = torch.cat([source.coefficients(letter) for letter in source.projections])
    yield _mixture(_members(source), source.atoms, coefficients)


def _mixture(members: tuple[tuple[str, int], ...], atoms: Tensor, coefficients: Tensor) -> Fit:
    config = {"kind": "mixture", "atoms": len(atoms)}
    return Fit(config, members, {"atoms": atoms, "coefficients": coefficients})


def _low_rank(members: tuple[tuple[str, int], ...], left: Tensor, right: Tensor) -> Fit:
    """Of B (n, out, r) and A (r, in)."""
    stored = left.mT if len(members) > 1 else left.mT[0]
    return Fit({"kind": "low-rank", "rank": len(right)}, members, {"left": stored, "right": right.T})


@fits_of.register
def _(source: trained.LowRank) -> Iterator[Fit]:
    for layer, (left, right) in enumerate(zip(source.left, source.right, strict=True)):
        yield _low_rank(_members(source, [layer]), left[None], right)


@fits_of.register
def _(source: trained.Assigned) -> Iterator[Fit]:
    for index, weight in enumerate(source.sets):
        layers = [layer for layer in range(source.num_layers) if source.set_of(layer) == index]
        if layers:
            yield Fit({"kind": "dense"}, _members(source, layers), {"weight": weight})


@fits_of.register
def _(source: compressed.Factored) -> Iterator[Fit]:
    for (layers, _), part in zip(source.atom_groups, source.mixed, strict=True):
        yield _mixture(_members(source, layers), part.atoms, part.coefficients)
    for (layers, _), part in zip(source.factor_groups, source.factors, strict=True):
        pairs = [part.pair(row) for row in range(len(layers))]
        yield _low_rank(_members(source, layers), torch.stack([left for left, _ in pairs]), pairs[0][1])
    for layer, part in zip(source.dense_layers, source.stored, strict=True):
        yield dense_fit((source.projections, layer), part.weight)
    reached = {layer for layers, _ in source.atom_groups + source.factor_groups for layer in layers}
    for layer in sorted(set(range(source.num_layers)) - reached - set(source.dense_layers)):
        yield Fit({"kind": "nothing"}, ((source.projections, layer),))


@fits_of.register
def _(source: Parts) -> Iterator[Fit]:
    for part, members in zip(source.parts, source.members, strict=True):
        if part.bits is not None:
            raise MasaError(f"The matrices of {source.projections!r} have few bits already.")
        fit = Fit({"kind": part.kind, **part.config()}, tuple(members))
        for name, tensor in part.named_parameters(recurse=False):
            if tensor.numel():
                fit.tensors[name] = tensor
        for name, module in part.named_modules():
            if hasattr(module, "positions"):
                mask = unpack_bits(module.positions, module.rows * module.columns)
                fit.packed[name] = call(module), mask.view(module.rows, module.columns)
        yield fit
