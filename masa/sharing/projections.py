"""Where a model family keeps its projections.

The only file that knows how Hugging Face and timm models name their parts. A new family is one entry of
:data:`FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from masa.errors import MasaError
from masa.sharing.bank import SharedProjections as SharedProjections
from masa.sharing.linears import FusedLinear, Rows, SharedWeight
from masa.sharing.linears import SharedLinear as SharedLinear
from masa.sharing.spec import ATTENTION, ModelShape


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

    def projection(self, block: nn.Module, letter: str) -> nn.Linear | SharedWeight | Rows:
        """One projection of a block, also where it is only some rows of a fused layer."""
        path = self.paths[letter]
        for whole, letters in self.fused.items():
            if letter in letters and is_plain(fused := block.get_submodule(whole)):
                return Rows(fused, letters.index(letter), len(letters))
        return block.get_submodule(path)

    def split(self, block: nn.Module, served: str) -> None:
        """Turn every fused layer that has one of the ``served`` letters into its parts."""
        for path, letters in self.fused.items():
            if set(letters) & set(served) and is_plain(fused := block.get_submodule(path)):
                block.set_submodule(path, FusedLinear(fused, letters))

    def join(self, block: nn.Module) -> None:
        """Undo :meth:`split`: one ordinary linear layer again."""
        for path in self.fused:
            if isinstance(fused := block.get_submodule(path), FusedLinear):
                block.set_submodule(path, fused.join())


def is_plain(module: nn.Module) -> bool:
    """Whether it is a linear layer with a weight of its own."""
    return isinstance(module, nn.Linear) and not isinstance(module, FusedLinear | SharedWeight)


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


def bank_of(model: nn.Module) -> SharedProjections | None:
    """The sources that the model's matrices come from, if it shares any."""
    shared = getattr(decoder(model), "shared", None)
    return shared if isinstance(shared, SharedProjections) else None


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
