"""All weight sources of one model, and who makes their weights when."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.weight_sources import Weights, WeightSource, call, wrapped


class SharedProjections(nn.ModuleDict):
    """All weight sources of one model, registered once as ``shared`` on its decoder.

    Args:
        sources: of the model, no projection in two of them.
        layers: letter -> the blocks that share it, where not all do; a source counts layers among these alone.

    While the sources are trained, the decoder's forward pass makes every source's weights once before the first block;
    a block that runs by itself makes its own weight afresh, and a checkpointed block recomputed in backward reads the
    forward pass's weights again (only the reentrant kind of checkpoint, whose first pass had no graph to hang on to,
    makes its own). Otherwise no weight is kept: every layer multiplies through its source.
    """

    def __init__(self, sources: Iterable[WeightSource], layers: Mapping[str, Sequence[int]] | None = None) -> None:
        super().__init__({source.projections: source for source in sources})
        self._source_of = {p: name for name, source in self.items() for p in source.projections}
        self.layers = {p: tuple(found) for p, found in (layers or {}).items() if p in self._source_of}
        self._open: Weights | None = None
        self._last: Weights | None = None
        self._reentrant = self._held = False

    @property
    def projections(self) -> str:
        """Letters of all shared projections."""
        return "".join(self._source_of)

    def attach(self, home: nn.Module, around: nn.Module) -> None:
        """Register on ``home`` and open the weights around each forward pass of the module that runs the blocks."""
        if hasattr(home, "shared"):
            raise MasaError(f"{type(home).__name__} has a part called 'shared' already, where sources would be kept.")
        home.add_module("shared", self)
        handles = (
            around.register_forward_pre_hook(self._before),
            around.register_forward_hook(self._after, always_call=True),
        )
        object.__setattr__(self, "_handles", handles)

    def detach(self, module: nn.Module) -> None:
        """Undo :meth:`attach`."""
        for handle in self._handles:
            handle.remove()
        del module.shared

    def source(self, projection: str) -> WeightSource:
        """What makes the weights of one projection.

        Raises:
            MasaError: something else was put into its place, such as an adapter.
        """
        source = self._modules[self._source_of[projection]]
        if not isinstance(source, WeightSource):
            raise wrapped(source, projection)
        return source

    def make(self) -> Weights:
        """All weights of all layers and projections, fresh."""
        sources = {name: self.source(name[0]) for name in self}
        return {p: w for source in sources.values() for p, w in source().items()}

    def weight(self, projection: str, layer: int) -> Tensor:
        """The weight (out, in) of one projection in one layer, made for this call unless training has it at hand."""
        made = self.made(projection, layer)
        return self.source(projection)(projection, layer) if made is None else made

    def made(self, projection: str, layer: int) -> Tensor | None:
        """The weight that training made for this pass, or None where none is at hand and none is needed."""
        opened, last = self._open, self._last  # read once: another thread may close them meanwhile
        if opened is not None:
            if last is not None and not torch.is_grad_enabled():
                self._reentrant = True
            return opened[projection][layer]
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and last is not None and not self._reentrant:
            return last[projection][layer]
        source = self.source(projection)
        return source(projection, layer) if _is_trained(source) else None

    def hold(self, weights: Weights | None) -> None:
        """Read these weights, made of the sources by whoever calls, until they are taken back (None)."""
        self._open = self._last = weights
        self._held, self._reentrant = weights is not None, False

    def product(self, projection: str, layer: int, x: Tensor, bias: Tensor | None) -> Tensor:
        """``x W^T + b`` on the device of ``x``."""
        made = self.made(projection, layer)
        if made is not None:
            return nn.functional.linear(x, made, bias)
        y = call(self.source(projection), projection, layer, x, bias)
        return y if y.device == x.device else y.to(x.device)

    def _before(self, module: nn.Module, args: tuple) -> None:
        if self._held:
            return
        # offloaded parameters are on "meta" between calls: what is made of them at once could not stay
        if torch.is_grad_enabled() and not torch.compiler.is_exporting() and _is_trained(self):
            self._open = self._last = self.make()
            self._reentrant = False
        elif self._last is not None:
            self._last = None

    def _after(self, module: nn.Module, args: tuple, output: object) -> None:
        if self._open is not None and not self._held:
            self._open = None

    def __getstate__(self) -> dict:
        # copies and pickles carry parameters, never weights made from them
        return self.__dict__ | {"_open": None, "_last": None, "_held": False}


def _is_trained(module: nn.Module) -> bool:
    """Whether some parameter has a gradient to be computed, and none is kept elsewhere between calls."""
    parameters = list(module.parameters())
    return any(p.requires_grad for p in parameters) and not (any(p.is_meta for p in parameters) and is_hooked(module))


def is_hooked(module: nn.Module) -> bool:
    """Whether accelerate brings parameters in around ``forward`` (plain "meta" models are for counting)."""
    return any(hasattr(m, "_hf_hook") for m in module.modules())
