"""Which projections a model has, and where, block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.bank import SharedProjections as SharedProjections
from masa.sharing.families import Found, Place, find, head_dim, heads, layer_at, module_at
from masa.sharing.fused import FusedLinear, Layout, Rows
from masa.sharing.linears import SharedLinear as SharedLinear
from masa.sharing.linears import SharedWeight, is_conv1d, is_plain, sizes
from masa.sharing.spec import PROJECTIONS, ModelShape
from masa.sharing.stacks import PAGE, Stack, stack_of
from masa.sharing.stacks import bank_of as bank_of
from masa.sharing.stacks import blocks as blocks
from masa.sharing.stacks import decoder as decoder


@dataclass(frozen=True)
class Family:
    """What a model is built of, as found in its blocks (:mod:`masa.sharing.families`).

    Attributes:
        name: of the model's class.
        blocks: first to last.
        found: what each of them has.
        language: whether it reads tokens; only such models are compressed.
    """

    name: str
    blocks: nn.ModuleList | nn.Sequential
    found: tuple[Found, ...]
    language: bool

    @cached_property
    def paths(self) -> Mapping[str, str]:
        """Letter -> path of the layer in the first block that has it; a fused one's parts exist once it is split."""
        found: dict[str, str] = {}
        for letter in PROJECTIONS:
            place = next((f.places[letter] for f in self.found if letter in f.places), None)
            if place is not None:
                found[letter] = place.of(letter)
        return found

    @cached_property
    def fused(self) -> Mapping[str, str]:
        """Path of every layer that holds several projections -> their letters, in the order of its rows."""
        return {p.path: p.layout.letters for f in self.found for p in f.places.values() if p.layout}

    @property
    def attention(self) -> str:
        """Path of the attention in the first block that has one."""
        return next(f.attention for f in self.found if f.attention is not None)

    def layers(self, letter: str) -> tuple[int, ...]:
        """The blocks that have a projection."""
        return tuple(i for i, f in enumerate(self.found) if letter in f.places)

    def place(self, layer: int, letter: str) -> Place:
        """Where block ``layer`` keeps a projection."""
        return self.found[layer].places[letter]

    def at(self, layer: int, letter: str) -> nn.Linear | SharedWeight | Rows:
        """A projection of block ``layer``, also where it is only some rows of a fused layer.

        Raises:
            KeyError: the block has it not.
        """
        return _projection(self.blocks[layer], letter, self.place(layer, letter))

    def projection(self, block: nn.Module, letter: str) -> nn.Linear | SharedWeight | Rows:
        """As :meth:`at`, of a block that may be a copy."""
        return _projection(block, letter, find(block).places[letter])

    def layer(self, block: nn.Module, layer: int, letter: str) -> nn.Module:
        """The module of block ``layer``, or of a copy of it, that computes a projection, perhaps beside others."""
        found = layer_at(block, self.place(layer, letter).path)
        assert found is not None
        return found

    def write(self, block: nn.Module, layer: int, letter: str, weight: Tensor) -> None:
        """Write a weight (out, in) into a dense copy of block ``layer``."""
        projection = _projection(block, letter, self.place(layer, letter))
        if isinstance(projection, Rows):
            projection.write(weight)
        else:
            projection.weight.copy_(weight)

    def split(self, layer: int, served: str) -> None:
        """Turn every fused layer of a block that has one of the ``served`` letters into its parts."""
        block = self.blocks[layer]
        for place in {p.path: p for letter, p in self.found[layer].places.items() if letter in served}.values():
            if place.layout and is_plain(fused := block.get_submodule(place.path)):
                block.set_submodule(place.path, FusedLinear(fused, place.layout))

    def require(self, letters: str) -> None:
        """Raise :class:`MasaError` if a projection is nowhere, or of several shapes; the message says what is there."""
        absent = [letter for letter in letters if not self.layers(letter)]
        if absent:
            there = ", ".join(self.paths) or "none"
            raise MasaError(
                f"{self.name} has no projection {', '.join(absent)} of its own ({self._instead(absent)}); those that "
                f"masa can share here are {there} ({PAGE})."
            )
        for letter in letters:
            if len(self.shapes(letter)) > 1:
                several = ", ".join(f"{out} x {inp}" for out, inp in self.shapes(letter))
                alike = [p for p in self.paths if len(self.shapes(p)) == 1]
                raise MasaError(
                    f"{self.name} has {letter} in several shapes ({several}), and layers share matrices of one shape; "
                    f"alike in all layers are {', '.join(alike) or 'none'} ({PAGE})."
                )

    def shapes(self, letter: str) -> dict[tuple[int, int], int]:
        """(out, in) of a projection -> the first block that has it so."""
        found: dict[tuple[int, int], int] = {}
        for layer in self.layers(letter):
            projection = self.at(layer, letter)
            found.setdefault((projection.out_features, projection.in_features), layer)
        return found

    def passed_over(self, letters: str) -> str | None:
        """A line that says which blocks have not all of ``letters``, and what they have instead; None if all have."""
        without = [i for i, f in enumerate(self.found) if not set(letters) <= set(f.places)]
        if not without:
            return None
        kinds = {_children(self.blocks[i]) for i in without}
        return (
            f"{len(self.found) - len(without)} of {len(self.found)} blocks have all of {', '.join(letters)}; in the "
            f"others what is missing is passed over ({'; '.join(sorted(kinds))})."
        )

    def _instead(self, absent: list[str]) -> str:
        """What the first block has in the place of projections."""
        attention = [f.attention for f in self.found if f.attention is not None]
        if set(absent) & set("qkvo") and attention:
            layer = next(i for i, f in enumerate(self.found) if f.attention is not None)
            inside = self.blocks[layer].get_submodule(attention[0])
            names = [n for n, m in inside.named_modules() if n and getattr(m, "weight", None) is not None]
            linear = [n for n in names if getattr(inside.get_submodule(n).weight, "ndim", 0) == 2]
            return f"{attention[0]} has {', '.join(linear[:5])}{', …' * (len(linear) > 5)}"
        return _children(self.blocks[0])


def _projection(block: nn.Module, letter: str, place: Place) -> nn.Linear | SharedWeight | Rows:
    layer = layer_at(block, place.path)
    if isinstance(layer, FusedLinear):
        return getattr(layer, letter)
    if place.layout is None and is_conv1d(layer):
        return Rows(layer, letter, Layout(letter, (sizes(layer)[0],)))
    return Rows(layer, letter, place.layout) if place.layout else layer


def _children(block: nn.Module) -> str:
    """The parts of a block that are made of matrices, as "mlp: MixtralSparseMoeBlock"."""
    parts = [
        (name, child)
        for name, child in block.named_children()
        if any(getattr(p, "ndim", 0) >= 2 for p in child.parameters())
    ]
    return ", ".join(f"{name}: {type(child).__name__}" for name, child in parts[:3])


def family_of(model: nn.Module, stack: Stack | None = None) -> Family:
    """What a model's blocks are built of.

    Args:
        stack: of the model; by default :func:`~masa.sharing.stacks.stack_of` it.

    Raises:
        MasaError: it has no stack of blocks with attention, or several.
    """
    stack = stack or stack_of(model)
    return Family(type(model).__name__, stack.blocks, tuple(map(find, stack.blocks)), _reads_tokens(model))


def _reads_tokens(model: nn.Module) -> bool:
    try:
        return isinstance(model.get_input_embeddings(), nn.Embedding)
    except (AttributeError, NotImplementedError):
        return False


def model_shape(model: nn.Module, family: Family) -> ModelShape:
    """Sizes of a model, read from its actual weights and its attention's width of a head.

    Projections that differ in shape between layers are left out; :meth:`Family.require` says so.
    """
    count = len(family.blocks)
    shapes = {p: next(iter(found)) for p in family.paths if len(found := family.shapes(p)) == 1}
    layers = {p: family.layers(p) for p in shapes if len(family.layers(p)) < count}
    attention = module_at(family.blocks[layer := _first(family)], family.attention)
    sizes = {p: family.at(layer, p) for p in "qkvo" if p in family.found[layer].places}
    width = next((sizes[p].in_features for p in "qkv" if p in sizes), None) or sizes["o"].out_features
    inside = sizes["o"].in_features if "o" in sizes else sizes["q"].out_features
    head = head_dim(attention) or inside // (heads(attention) or 1)
    return ModelShape(
        num_layers=count,
        hidden_size=width,
        num_attention_heads=max(1, inside // head),
        num_key_value_heads=max(1, (sizes["k"].out_features if "k" in sizes else inside) // head),
        shapes=shapes,
        layers=layers,
    )


def _first(family: Family) -> int:
    return next(i for i, f in enumerate(family.found) if f.attention is not None)
