"""Where a model family keeps its projections, and the linear layer that reads a shared weight.

The only file that knows how Hugging Face and timm models name their parts. A new family is one entry of
:data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.spec import ATTENTION, ModelShape
from masa.sharing.weight_sources import Weights, WeightSource, autocast_dtype


@dataclass(frozen=True)
class Family:
    """Paths of the projections inside one transformer block.

    Attributes:
        attention: path of the attention module.
        paths: projection letter -> path of its linear layer.
        blocks: path of the list of blocks on the decoder or encoder.
        fused: path of a linear layer that several projections share -> their letters, in the order of its rows. The
            paths of these letters are below it; they exist once the layer is split (:class:`FusedLinear`).
        head_dim: name of the attention's width of one head.
        language: whether it is a language model; only these group key/value heads, and are compressed.
    """

    name: str
    attention: str
    paths: Mapping[str, str]
    blocks: str = "layers"
    fused: Mapping[str, str] = field(default_factory=dict)
    head_dim: str = "head_dim"
    language: bool = True

    def projection(self, block: nn.Module, letter: str) -> nn.Linear | SharedLinear | Rows:
        """One projection of a block, also where it is only some rows of a fused layer."""
        path = self.paths[letter]
        for whole, letters in self.fused.items():
            if letter in letters and isinstance(fused := block.get_submodule(whole), nn.Linear):
                return Rows(fused, letters.index(letter), len(letters))
        return block.get_submodule(path)

    def split(self, block: nn.Module, served: str) -> None:
        """Turn every fused layer that has one of the ``served`` letters into its parts."""
        for path, letters in self.fused.items():
            if set(letters) & set(served) and isinstance(fused := block.get_submodule(path), nn.Linear):
                block.set_submodule(path, FusedLinear(fused, letters))

    def join(self, block: nn.Module) -> None:
        """Undo :meth:`split`: one ordinary linear layer again."""
        for path in self.fused:
            if isinstance(fused := block.get_submodule(path), FusedLinear):
                block.set_submodule(path, fused.join())


_QKVO = {p: f"self_attn.{p}_proj" for p in ATTENTION}
FAMILIES = (
    Family("llama", "self_attn", _QKVO | {"g": "mlp.gate_proj", "u": "mlp.up_proj", "d": "mlp.down_proj"}),
    Family("starcoder2", "self_attn", _QKVO | {"u": "mlp.c_fc", "d": "mlp.c_proj"}),
    Family(
        "timm's VisionTransformer",
        "attn",
        {p: f"attn.qkv.{p}" for p in "qkv"} | {"o": "attn.proj", "u": "mlp.fc1", "d": "mlp.fc2"},
        blocks="blocks",
        fused={"attn.qkv": "qkv"},
        language=False,
    ),
    Family(
        "YOLOS",
        "attention.attention",
        {"q": "attention.attention.query", "k": "attention.attention.key", "v": "attention.attention.value"}
        | {"o": "attention.output.dense", "u": "intermediate.dense", "d": "output.dense"},
        blocks="encoder.layer",
        head_dim="attention_head_size",
        language=False,
    ),
)


def decoder(model: nn.Module) -> nn.Module:
    """The module that owns the list of blocks: ``base_model`` of a Hugging Face model, or the model itself."""
    base = getattr(model, "base_model", model)
    if _blocks(base) is None:
        names = " or ".join(repr(name) for name in dict.fromkeys(f.blocks for f in FAMILIES))
        raise MasaError(
            f"{type(model).__name__} has no list of transformer blocks at {names}. masa shares the projections of "
            f"models built like {' or '.join(f.name for f in FAMILIES)}; docs/howto/family.md says how to add another."
        )
    return base


def blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks, first to last."""
    return _blocks(decoder(model))  # type: ignore[return-value]


def _blocks(base: nn.Module) -> nn.ModuleList | nn.Sequential | None:
    found = (base.get_submodule(family.blocks) for family in FAMILIES if _has(base, family.blocks))
    return next((b for b in found if isinstance(b, nn.ModuleList | nn.Sequential) and len(b)), None)


def family_of(model: nn.Module) -> Family:
    """Find the family whose every path exists in every block.

    Raises:
        MasaError: no family fits; the message names what is missing.
    """
    misses = []
    for family in FAMILIES:
        absent = [path for path in _needed(family) if not all(_has(block, path) for block in blocks(model))]
        if not absent:
            return family
        misses.append(f"{family.name} needs {', '.join(absent)}")
    raise MasaError(
        f"{type(model).__name__} keeps its projections elsewhere ({'; '.join(misses)}). Models with fused or renamed "
        "projections need an entry in masa.sharing.projections.FAMILIES."
    )


def separate(model: nn.Module) -> Family:
    """The family of a model whose projections are linear layers of their own, as compression needs.

    Raises:
        MasaError: it fuses some of them, or is no language model.
    """
    family = family_of(model)
    if family.fused:
        raise MasaError(
            f"{type(model).__name__} fuses {', '.join(family.fused)}: compression reads separate projections, as in "
            "language models. Such a model can share weights while it trains (masa.share)."
        )
    if not family.language:
        raise MasaError(
            f"{type(model).__name__} is no language model: compression calibrates on tokens. Such a model can share "
            "weights while it trains (masa.share)."
        )
    return family


def _needed(family: Family) -> list[str]:
    """Paths that every block must have, fused layers as a whole."""
    inside = set("".join(family.fused.values()))
    return [*family.fused, *(path for letter, path in family.paths.items() if letter not in inside)]


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


def model_shape(model: nn.Module, family: Family) -> ModelShape:
    """Sizes of a model, read from its actual weights and its attention's ``head_dim``."""
    layers = blocks(model)
    shapes = {}
    for letter in family.paths:
        projections = [family.projection(block, letter) for block in layers]
        found = {(projection.out_features, projection.in_features) for projection in projections}
        if len(found) > 1:
            raise MasaError(f"Projection {letter!r} differs in shape between layers: {sorted(found)}.")
        shapes[letter] = found.pop()
    head = getattr(layers[0].get_submodule(family.attention), family.head_dim)
    return ModelShape(
        num_layers=len(layers),
        hidden_size=shapes["q"][1],
        num_attention_heads=shapes["q"][0] // head,
        num_key_value_heads=shapes["k"][0] // head,
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


@dataclass(frozen=True)
class Rows:
    """One projection inside a fused linear layer: the ``index``-th of ``count`` equal blocks of its rows."""

    fused: nn.Linear
    index: int
    count: int
    bias: None = None

    @property
    def in_features(self) -> int:
        return self.fused.in_features

    @property
    def out_features(self) -> int:
        return self.fused.out_features // self.count

    @property
    def weight(self) -> Tensor:
        """(out, in), a view."""
        return self.fused.weight.view(self.count, self.out_features, self.in_features)[self.index]


class FusedLinear(nn.Module):
    """A fused linear layer whose projections can be replaced one by one: ``y = x [W_q; W_k; W_v]^T + b``.

    The parts are children named by their letters; the bias of all of them stays here. The weights are put together
    before one GEMM, so the model's own attention reads the same tensor as before.

    Args:
        fused: the layer to split; its values are copied.
        letters: its projections, in the order of its rows.
    """

    def __init__(self, fused: nn.Linear, letters: str) -> None:
        super().__init__()
        self.letters = letters
        self.in_features, self.out_features = fused.in_features, fused.out_features
        for index, letter in enumerate(letters):
            self.add_module(letter, linear(Rows(fused, index, len(letters)).weight.detach().clone()))
        self.bias = fused.bias

    @property
    def weight(self) -> Tensor:
        return torch.cat([getattr(self, letter).weight for letter in self.letters])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)

    def join(self) -> nn.Linear:
        """One ordinary linear layer with the same weights."""
        return linear(self.weight.detach(), self.bias)


def linear(weight: Tensor, bias: nn.Parameter | None = None) -> nn.Linear:
    """A linear layer of these very parameters, on their device and of their dtype."""
    with torch.device("meta"):
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight.contiguous())
    layer.bias = bias
    return layer
