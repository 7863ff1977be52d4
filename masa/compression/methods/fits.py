"""From what a method solved for to weight sources: parts, filled and counted to the byte."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.allocation.bytes import Member
from masa.compression.base import Problem
from masa.compression.methods.coding import normalised
from masa.sharing.grouped import put
from masa.sharing.part_sources import Parts
from masa.sharing.parts import Part, make_part
from masa.sharing.weight_sources import WeightSource


@dataclass
class Fit:
    """One part, solved for.

    Attributes:
        config: its kind and arguments.
        members: the matrices that read it.
        tensors: parameter's name -> value.
        packed: name of a packed matrix -> (matrix, mask of what stays).
        grids: name of either -> scales and least values of its groups, where numbers have few bits.
    """

    config: dict[str, Any]
    members: tuple[Member, ...]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    packed: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    grids: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rounded(self, dtype: torch.dtype) -> Fit:
        """The same in the dtype of the weights, as all are held at once; exact where they have few bits."""
        if self.grids:
            dtype = torch.float32
        self.tensors = {name: t.to(dtype) for name, t in self.tensors.items()}
        self.packed = {name: (t.to(dtype), mask) for name, (t, mask) in self.packed.items()}
        return self


def part_bytes(config: Mapping[str, Any], shapes: Sequence[tuple[int, int]], width: int) -> int:
    """Bytes of a part whose values have ``width`` bytes: of the tensors that it will be stored as."""
    with torch.device("meta"):
        tensors = make_part(config, shapes).state_dict().values()
    return sum(t.numel() * (width if t.is_floating_point() else t.element_size()) for t in tensors)


def dense_fit(member: Member, weight: Tensor) -> Fit:
    """A matrix as it is."""
    return Fit({"kind": "dense"}, (member,), {"weight": weight})


def low_rank_fit(member: Member, left: Tensor, right: Tensor) -> Fit:
    """B (out, r) and A (r, in), balanced so that multiplying by one after the other loses no digits."""
    q, r = torch.linalg.qr(right.double().mT)
    tensors = {"left": (left.double() @ r.mT).mT, "right": q}
    return Fit({"kind": "low-rank", "rank": len(right)}, (member,), tensors)


def sparse_fit(member: Member, matrix: Tensor, mask: Tensor) -> Fit:
    """A matrix (out, in) where ``mask`` is true."""
    return Fit({"kind": "sparse", "count": int(mask.sum())}, (member,), packed={"packed": (matrix, mask)})


def dictionary_fit(
    members: Sequence[Member], atoms: Tensor, codes: Sequence[Tensor], masks: Sequence[Tensor], side: str
) -> Fit:
    """D (width, k), its atoms of norm 1, and a C (k, ·) for each member, with the masks of what stays."""
    atoms, codes = normalised(atoms, list(codes))
    counts = [int(mask.sum()) for mask in masks]
    packed = {
        f"codes.{i}": (code.mT, mask.mT) if side == "in" else (code, mask)
        for i, (code, mask) in enumerate(zip(codes, masks, strict=True))
    }
    config = {"kind": "sparse-dictionary", "atoms": atoms.shape[1], "counts": counts, "side": side}
    return Fit(config, tuple(members), {"atoms": atoms}, packed)


@torch.no_grad()
def filled(fit: Fit, shapes: Sequence[tuple[int, int]], like: Tensor) -> Part:
    """The part that a fit is, of members of these (out, in), in the dtype and on the device of ``like``."""
    part = make_part(fit.config, shapes).to(like)
    for name, tensor in fit.tensors.items():
        stored = getattr(part, name)
        if isinstance(stored, nn.ModuleList):
            for index, (module, values) in enumerate(zip(stored, tensor, strict=True)):
                put(module, values, fit.grids.get(f"{name}.{index}"))
        else:
            put(stored, tensor, fit.grids.get(name))
    for name, (matrix, mask) in fit.packed.items():
        part.get_submodule(name).fill(matrix, mask, fit.grids.get(name))
    return part


def _filled(problem: Problem, fit: Fit) -> Part:
    shapes = [problem.shape.shapes[letter] for letter, _ in fit.members]
    return filled(fit, shapes, problem.weight(*fit.members[0]))


def written(problem: Problem, fits: Sequence[Fit]) -> dict[Member, Tensor]:
    """The matrices (out, in) that parts sum to, as the compressed model will have them."""
    found: dict[Member, Tensor] = {}
    for fit in fits:
        part = _filled(problem, fit)
        for row, member in enumerate(fit.members):
            term = part(row).detach()
            found[member] = found[member] + term if member in found else term
    return found


@torch.no_grad()
def part_sources(problem: Problem, fits: Sequence[Fit]) -> list[WeightSource]:
    """One source a projection, or for several projections where matrices of them have a part in common.

    In the dtype and on the device of the model's weights.
    """
    sources: list[WeightSource] = []
    for letters in _joined(problem.projections, fits):
        own = [fit for fit in fits if fit.members[0][0] in letters]
        shapes = {letter: problem.shape.shapes[letter] for letter in letters}
        place = {(p, layer): [p, i] for p in letters for i, layer in enumerate(problem.shape.layers_of(p))}
        like = problem.weight(*next(iter(place)))
        sources.append(assembled(letters, problem.shape.count(letters[0]), shapes, own, place, like))
    return sources


@torch.no_grad()
def assembled(
    letters: str,
    num_layers: int,
    shapes: Mapping[str, tuple[int, int]],
    fits: Sequence[Fit],
    place: Mapping[Member, Sequence[Any]],
    like: Tensor,
) -> Parts:
    """The source of some letters that these parts are.

    Args:
        shapes: letter -> (out, in).
        place: member -> its letter, and which of the layers that have it is its own.
        like: of whose dtype and device it is.
    """
    parts = [{"of": [list(place[member]) for member in fit.members], **fit.config} for fit in fits]
    source = Parts(letters, num_layers, shapes, parts).to(like)
    for part, fit in zip(source.parts, fits, strict=True):
        part.load_state_dict(filled(fit, [shapes[letter] for letter, _ in fit.members], like).state_dict())
    return source


def _joined(projections: str, fits: Sequence[Fit]) -> list[str]:
    """Letters that have parts in common, together, each in the order of ``projections``."""
    group = {letter: letter for letter in projections}
    for fit in fits:
        names = {group[letter] for letter, _ in fit.members}
        group = {letter: min(names) if name in names else name for letter, name in group.items()}
    return list(dict.fromkeys("".join(p for p in projections if group[p] == group[q]) for q in projections))
