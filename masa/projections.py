"""Where a model family keeps its projections, and the linear layer that reads a shared weight.

The only file that knows how Hugging Face models name their parts. A new family is one entry of :data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.spec import ATTENTION, ModelShape
from masa.weight_sources import Weights, WeightSource, autocast_dtype


@dataclass(frozen=True)
class Family:
    """Paths of the projections inside one transformer block."""

    name: str
    attention: str
    paths: Mapping[str, str]


_QKVO = {p: f"self_attn.{p}_proj" for p in ATTENTION}
FAMILIES = (
    Family("llama", "self_attn", _QKVO | {"g": "mlp.gate_proj", "u": "mlp.up_proj", "d": "mlp.down_proj"}),
    Family("starcoder2", "self_attn", _QKVO | {"u": "mlp.c_fc", "d": "mlp.c_proj"}),
)


def decoder(model: nn.Module) -> nn.Module:
    """The module that owns the list of blocks: ``model.model`` of a causal LM, or the model itself."""
    base = getattr(model, "base_model", model)
    if not isinstance(getattr(base, "layers", None), nn.ModuleList) or not len(base.layers):
        raise MasaError(
            f"{type(model).__name__} has no list of transformer blocks at 'layers'. masa shares the projections of "
            f"models built like {' or '.join(f.name for f in FAMILIES)}; see 'How to add a model family' in the README."
        )
    return base


def family_of(model: nn.Module) -> Family:
    """Find the family whose every path exists in every block.

    Raises:
        MasaError: no family fits; the message names what is missing.
    """
    blocks = decoder(model).layers
    misses = []
    for family in FAMILIES:
        absent = [path for path in family.paths.values() if not all(_has(block, path) for block in blocks)]
        if not absent:
            return family
        misses.append(f"{family.name} needs {', '.join(absent)}")
    raise MasaError(
        f"{type(model).__name__} keeps its projections elsewhere ({'; '.join(misses)}). Models with fused or renamed "
        "projections need an entry in masa.projections.FAMILIES."
    )


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def model_shape(model: nn.Module, family: Family) -> ModelShape:
    """Sizes of a Hugging Face model, read from its config and its actual weights."""
    config, blocks = model.config, decoder(model).layers
    shapes = {}
    for letter, path in family.paths.items():
        layers = [block.get_submodule(path) for block in blocks]
        found = {(layer.out_features, layer.in_features) for layer in layers}
        if len(found) > 1:
            raise MasaError(f"Projection {letter!r} differs in shape between layers: {sorted(found)}.")
        shapes[letter] = found.pop()
    return ModelShape(
        num_layers=len(blocks),
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        shapes=shapes,
    )


class SharedProjections(nn.ModuleDict):
    """All weight sources of one model, registered once as ``shared`` on its decoder.

    With gradients, the decoder's forward pass makes every source's weights once before the first block. Without, they
    are kept until a parameter changes: folded weights, made once for good. A block that runs by itself makes its own
    weight afresh. A checkpointed block recomputed in backward reads the forward pass's weights again; only the
    reentrant kind of checkpoint, whose first pass had no graph to hang on to, makes its own.
    """

    def __init__(self, sources: Iterable[WeightSource]) -> None:
        super().__init__({source.projections: source for source in sources})
        self._source_of = {p: name for name, source in self.items() for p in source.projections}
        self._open: Weights | None = None
        self._last: Weights | None = None
        self._reentrant = False
        self._folded: Weights | None = None
        self._folded_key: tuple | None = None

    @property
    def projections(self) -> str:
        """Letters of all shared projections."""
        return "".join(self._source_of)

    def attach(self, module: nn.Module) -> None:
        """Register on the decoder and open the weights around its forward pass."""
        module.add_module("shared", self)
        handles = (
            module.register_forward_pre_hook(self._before),
            module.register_forward_hook(self._after, always_call=True),
        )
        object.__setattr__(self, "_handles", handles)

    def make(self) -> Weights:
        """All weights of all layers and projections, fresh."""
        return {p: w for source in self.values() for p, w in source.weights().items()}

    def refresh(self) -> None:
        """Forget folded weights.

        Needed only after writing to ``parameter.data`` between two evaluations, which PyTorch's version counters do
        not see; ``train()``, ``eval()`` and in-place updates are noticed.
        """
        self._folded = self._folded_key = None

    def train(self, mode: bool = True) -> SharedProjections:
        self.refresh()
        return super().train(mode)

    def weight(self, projection: str, layer: int) -> Tensor:
        """The weight (out, in) of one projection in one layer."""
        if self._open is not None:
            if self._last is not None and not torch.is_grad_enabled():
                self._reentrant = True
            return self._open[projection][layer]
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self._last is not None and not self._reentrant:
            return self._last[projection][layer]
        return self[self._source_of[projection]].layer_weight(projection, layer)

    def _before(self, module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            self.refresh()
            self._open = self._last = self.make()
            self._reentrant = False
        else:
            self._last = None
            self._open = self.make() if torch.compiler.is_compiling() else self._fold()

    def _after(self, module: nn.Module, args: tuple, output: object) -> None:
        self._open = None

    def _fold(self) -> Weights:
        params = tuple(self.parameters())
        key = (autocast_dtype(params[0]),)
        key += tuple((p.data_ptr(), p.dtype, -1 if p.is_inference() else p._version) for p in params)
        if self._folded is None or key != self._folded_key:
            # tensors made in inference mode could not be used by a later no_grad pass
            with torch.inference_mode(False), torch.no_grad():
                self._folded, self._folded_key = self.make(), key
        return self._folded

    def __getstate__(self) -> dict:
        # copies and pickles carry parameters, never weights made from them
        return self.__dict__ | {"_open": None, "_last": None, "_folded": None, "_folded_key": None}


class SharedLinear(nn.Module):
    """``y = x W^T + b`` with W from the model's :class:`SharedProjections` and b its own.

    Args:
        shared: the bank, referenced and not registered, so that every parameter appears once.
        projection, layer: which weight to read.
        like: the linear layer that this one replaces; its bias stays.
    """

    def __init__(self, shared: SharedProjections, projection: str, layer: int, like: nn.Linear | SharedLinear) -> None:
        super().__init__()
        object.__setattr__(self, "_shared", shared)
        self.projection, self.layer = projection, layer
        self.in_features, self.out_features = like.in_features, like.out_features
        self.bias = like.bias

    @property
    def weight(self) -> Tensor:
        return self._shared.weight(self.projection, self.layer)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, projection={self.projection}, layer={self.layer}"
