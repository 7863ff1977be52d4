"""Where the matrices of all layers come from: one class per kind, and nothing else knows how they are made.

Dimensions: L layers, P projections served by one source, S atoms, M sets, r rank, (out, in) of one weight.
To add a kind, subclass :class:`WeightSource`, decorate it with :func:`register` and name it in
:data:`masa.sharing.spec.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from masa.errors import MasaError, unknown
from masa.sharing.coefficients import MAKERS, BlockEmbedding, DirectCoefficients
from masa.sharing.products import (
    full_precision,
    linear_in_atoms,
    linear_in_factors,
    mix,
    mix_one,
    on_device_of,
)
from masa.sharing.spec import ModelShape, SharingSpec

Weights = dict[str, tuple[Tensor, ...]]
"""Projection letter -> its L weights, each (out, in)."""

KINDS: dict[str, type[WeightSource]] = {}


def register(kind: str) -> Callable[[type[WeightSource]], type[WeightSource]]:
    """Class decorator: make a :class:`WeightSource` loadable under ``kind``."""

    def add(cls: type[WeightSource]) -> type[WeightSource]:
        cls.kind = kind
        KINDS[kind] = cls
        return cls

    return add


class WeightSource(nn.Module):
    """Yields the L weights of each projection that it serves, or multiplies by one of them.

    Called as a module, never read by its parameters alone, so that tools that keep parameters elsewhere and bring them
    in around ``forward`` (offload to the CPU or to disk) work: ``source()`` is all weights, ``source(projection,
    layer)`` one, ``source(projection, layer, x, bias)`` the product. Of a parameter rows are taken by ``select``, and
    transposes by ``transpose``, which let other threads run meanwhile; ``[]``, ``.T`` and ``.mT`` do not, and would
    wait for ever for one that builds a graph.

    Args:
        projections: letters served, e.g. "q", or "qv" for a common dictionary.
        num_layers: L, the blocks that share these projections.
        shape: (out, in) of every weight.
    """

    kind: ClassVar[str]

    def __init__(self, projections: str, num_layers: int, shape: tuple[int, int]) -> None:
        super().__init__()
        self.projections, self.num_layers, self.shape = projections, num_layers, tuple(shape)

    @classmethod
    def from_spec(cls, spec: SharingSpec, shape: ModelShape) -> list[WeightSource]:
        """The sources that a resolved spec asks for, with parameters not yet initialised."""
        raise NotImplementedError

    def config(self) -> dict[str, Any]:
        """JSON-able arguments that build this source again, empty (see :func:`from_config`)."""
        return {"projections": self.projections, "num_layers": self.num_layers, "shape": list(self.shape)}

    def reset_parameters(self, std: float) -> None:
        """Draw parameters such that every synthesised weight has elements of standard deviation ``std``."""
        raise NotImplementedError

    def weights(self) -> Weights:
        """All weights of all layers, made at once."""
        raise NotImplementedError

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        """One weight (out, in), of which a product may be made; a source may make it cheaper than all."""
        return self.weights()[projection][layer]

    def product(self, projection: str, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """``y = x W_l^T + b``, (..., in) -> (..., out), in whatever order is cheapest; nothing of it is kept."""
        weight = self.layer_weight(projection, layer)
        return nn.functional.linear(on_device_of(weight, x), weight, bias)

    def forward(
        self,
        projection: str | None = None,
        layer: int = 0,
        x: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Weights | Tensor:
        """All weights, one of them, or ``x`` times one of them; see the class."""
        if projection is None:
            return self.weights()
        if x is None:
            return self.layer_weight(projection, layer)
        return self.product(projection, layer, x, bias)

    def coefficient_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters that take no weight decay and may have a learning rate of their own."""
        yield from ()

    def freeze_coefficients(self) -> WeightSource:
        """What is left of this source after training: itself, unless a part only served training."""
        return self

    def stored_numbers(self) -> int:
        """How many numbers a checkpoint must hold to reproduce all weights."""
        return sum(p.numel() for p in self.freeze_coefficients().parameters())

    def stored_numbers_of(self, letters: str) -> int:
        """The part of :meth:`stored_numbers` that counts for these projections, of those that this source serves."""
        return self.stored_numbers() * sum(p in letters for p in self.projections) // len(self.projections)

    def stored_bytes(self) -> int:
        """Bytes of the tensors that a checkpoint holds of this source."""
        final = self.freeze_coefficients()
        return sum(t.numel() * t.element_size() for t in final.state_dict().values())

    def dense_numbers(self) -> int:
        """How many numbers all weights have."""
        return len(self.projections) * self.num_layers * self.shape[0] * self.shape[1]

    def read_numbers(self) -> int:
        """How many numbers are read to multiply one token by the weights of every layer (:meth:`product`)."""
        return self.dense_numbers()


def call(module: nn.Module, *args: Any) -> Any:
    """``module(*args)``, at the cost of a function where nobody hooks in (accelerate puts its own ``forward``)."""
    if module._forward_pre_hooks or module._forward_hooks or module._backward_hooks or module._backward_pre_hooks:
        return module(*args)
    return module.forward(*args)


def wrapped(module: nn.Module, projections: str) -> MasaError:
    """The error for something that was put around a source or a part of it, such as an adapter."""
    return MasaError(
        f"{type(module).__name__} was put around the shared source of {projections!r}, which all layers read. Adapters "
        "go on the layers: give their names (q_proj, …) or 'all-linear' as target_modules, not target_parameters; or "
        "fold the model first (masa.fold)."
    )


def from_config(config: Mapping[str, Any]) -> WeightSource:
    """Build an empty source from :meth:`WeightSource.config` plus its ``kind``."""
    arguments = dict(config)
    kind = arguments.pop("kind", None)
    if kind not in KINDS:
        raise unknown("Kind of weight source", kind, KINDS)
    try:
        return KINDS[kind](**arguments)
    except TypeError as error:
        raise MasaError(f"Weight source of kind {kind!r}: {error}.") from error


@register("atoms")
class Atoms(WeightSource):
    """MASA: ``W_l = sum_s C[l, s] D[s]`` (arXiv 2508.04581, Eq. 2), for one projection or a common dictionary.

    Args:
        atoms: S.
        coefficients: "direct": C is a parameter. "mlp": ``C = MLP(E)`` from per-block embeddings E (L, e). "legendre":
            C is a fixed basis over depth.
        coefficient_norm: "fixed" divides every row of C by its norm.
        embedding_dim: e, also the MLP's hidden width.

    At initialisation every row of C has norm 1 and the rows of different layers differ, so that with D ~ N(0, std^2)
    the weights have the standard deviation of a dense layer.
    """

    def __init__(
        self,
        projections: str,
        num_layers: int,
        shape: tuple[int, int],
        atoms: int,
        coefficients: str = "direct",
        coefficient_norm: str = "free",
        embedding_dim: int | None = None,
        embedding: BlockEmbedding | None = None,
    ) -> None:
        super().__init__(projections, num_layers, shape)
        self.num_atoms, self.coefficient_norm = atoms, coefficient_norm
        self.atoms = nn.Parameter(torch.empty(atoms, *self.shape))
        maker = MAKERS[coefficients]
        self.maker = nn.ModuleDict(
            {p: maker(num_layers, atoms, embedding_dim=embedding_dim, embedding=embedding) for p in projections}
        )

    @classmethod
    def from_spec(cls, spec: SharingSpec, shape: ModelShape) -> list[WeightSource]:
        width = spec.embedding_dim or 64
        embeddings: dict[tuple[int, ...], BlockEmbedding] = {}  # one for all projections of the same blocks
        if spec.coefficients == "mlp":
            for layers in dict.fromkeys(shape.layers_of(group[0]) for group in spec.groups()):
                embeddings[layers] = BlockEmbedding(len(layers), width)
        return [
            cls(
                group,
                shape.count(group[0]),
                shape.shapes[group[0]],
                atoms=spec.atoms_of(group),
                coefficients=spec.coefficients or "direct",
                coefficient_norm=spec.coefficient_norm or "free",
                embedding_dim=width,
                embedding=embeddings.get(shape.layers_of(group[0])),
            )
            for group in spec.groups()
        ]

    def config(self) -> dict[str, Any]:
        return super().config() | {"atoms": self.num_atoms}

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.atoms, std=std)
        for maker in self.maker.values():
            maker.reset_parameters()

    def coefficients(self, projection: str) -> Tensor:
        """C of one projection, (L, S), never rounded by autocast."""
        with full_precision(self.atoms):
            c = self.maker[projection]()
        return nn.functional.normalize(c, dim=1) if self.coefficient_norm == "fixed" else c

    def weights(self) -> Weights:
        stacked = torch.cat([self.coefficients(p) for p in self.projections])  # (P * L, S)
        # unbind, not indexing: its backward is one stack instead of one full-size tensor a layer
        rows = mix(stacked, self.atoms).unbind(0)
        L = self.num_layers
        return {p: rows[i * L : (i + 1) * L] for i, p in enumerate(self.projections)}

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        return mix_one(self.coefficients(projection).select(0, layer), self.atoms)

    def product(self, projection: str, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear_in_atoms(x, self.coefficients(projection).select(0, layer), self.atoms, bias)

    def read_numbers(self) -> int:
        return self.num_atoms * self.dense_numbers()

    def coefficient_parameters(self) -> Iterator[nn.Parameter]:
        yield from self.maker.parameters()

    @torch.no_grad()
    def freeze_coefficients(self) -> WeightSource:
        """The same weights from D and plain C alone."""
        if self.coefficient_norm == "free" and all(isinstance(m, DirectCoefficients) for m in self.maker.values()):
            return self
        plain = Atoms(self.projections, self.num_layers, self.shape, self.num_atoms).to(self.atoms.device)
        plain.atoms = self.atoms
        for p in self.projections:
            plain.maker[p].values = nn.Parameter(self.coefficients(p).clone())
        return plain


@register("low_rank")
class LowRank(WeightSource):
    """``W_l = B_l A_l`` with B (L, out, r) and A (L, r, in), from a truncated SVD of dense normal draws."""

    def __init__(self, projections: str, num_layers: int, shape: tuple[int, int], rank: int) -> None:
        super().__init__(projections, num_layers, shape)
        self.rank = rank
        self.left = nn.Parameter(torch.empty(num_layers, self.shape[0], rank))
        self.right = nn.Parameter(torch.empty(num_layers, rank, self.shape[1]))

    @classmethod
    def from_spec(cls, spec: SharingSpec, shape: ModelShape) -> list[WeightSource]:
        return [cls(p, shape.count(p), shape.shapes[p], rank=int(spec.rank or 1)) for p in spec.projections or ""]

    def config(self) -> dict[str, Any]:
        return super().config() | {"rank": self.rank}

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        dense = torch.randn(self.num_layers, *self.shape, device=self.left.device) * std
        if dense.is_meta:
            return
        u, s, vh = torch.linalg.svd(dense, full_matrices=False)
        root = s[:, : self.rank].sqrt()
        self.left.copy_(u[:, :, : self.rank] * root[:, None, :])
        self.right.copy_(root[:, :, None] * vh[:, : self.rank])

    def weights(self) -> Weights:
        return {self.projections: torch.bmm(self.left, self.right).unbind(0)}

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        return self.left.select(0, layer) @ self.right.select(0, layer)

    def product(self, projection: str, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        return linear_in_factors(x, self.left.select(0, layer), self.right.select(0, layer), bias)

    def read_numbers(self) -> int:
        return self.stored_numbers()


class Assigned(WeightSource):
    """M sets of weights for L layers; a subclass says which layer uses which set. No weight is ever copied."""

    def __init__(self, projections: str, num_layers: int, shape: tuple[int, int], sets: int) -> None:
        super().__init__(projections, num_layers, shape)
        self.num_sets = sets
        self.sets = nn.Parameter(torch.empty(sets, *self.shape))

    def set_of(self, layer: int) -> int:
        raise NotImplementedError

    @classmethod
    def from_spec(cls, spec: SharingSpec, shape: ModelShape) -> list[WeightSource]:
        return [cls(p, shape.count(p), shape.shapes[p], sets=int(spec.sets or 1)) for p in spec.projections or ""]

    def config(self) -> dict[str, Any]:
        return super().config() | {"sets": self.num_sets}

    def reset_parameters(self, std: float) -> None:
        nn.init.normal_(self.sets, std=std)

    def weights(self) -> Weights:
        sets = self.sets.unbind(0)
        return {self.projections: tuple(sets[self.set_of(layer)] for layer in range(self.num_layers))}

    def layer_weight(self, projection: str, layer: int) -> Tensor:
        return self.sets.select(0, self.set_of(layer))


@register("sequential")
class Sequential(Assigned):
    """Neighbouring layers share: layer l uses set ``l * M // L``."""

    def set_of(self, layer: int) -> int:
        return layer * self.num_sets // self.num_layers


@register("repeat")
class Repeat(Assigned):
    """The sets repeat all over the stack: layer l uses set ``l % M``."""

    def set_of(self, layer: int) -> int:
        return layer % self.num_sets
