"""What model families call the parts of a block: data, and how a block is read by it.

No family has a name here. A block is looked through for known parts, each by itself, so that a new family that is built
of known parts needs no entry; one that names a part anew needs one word or one line in the tables below. Paths are of
modules inside one block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from masa.sharing.fused import FusedLinear, Layout
from masa.sharing.linears import SharedWeight, is_plain, sizes

ATTENTION = (
    "self_attn",
    "attn",
    "attention",
    "self_attention",
    "attention.self",
    "attention.attention",
    "attn.attention",
    "attention.attn",
    "mixer",
    "temporal_block",
    "layer.0.SelfAttention",
    "self_att.self_attention",
    "multi_head_attention",
)
"""Where blocks keep their self-attention. Attention to another sequence (``encoder_attn``, ``cross_attn``) is another
thing, and so is what has a recurrent state (``linear_attn``, :data:`RECURRENT`)."""

QKV = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
    ("Wq", "Wk", "Wv"),
    ("wq", "wk", "wv"),
    ("linear_q", "linear_k", "linear_v"),
    ("project_q", "project_k", "project_v"),
    ("q_proj.linear", "k_proj.linear", "v_proj.linear"),
)
"""Names of Q, K and V beside each other in the attention. Q must be there; some layers borrow K and V of others."""

OUTPUT = (
    "o_proj",
    "out_proj",
    "dense",
    "proj",
    "c_proj",
    "Wo",
    "wo",
    "out_lin",
    "o",
    "linear_out",
    "projection",
    "projection_layer",
    "attention_out",
    "o_proj.linear",
    "output",
    "../output.dense",
)
"""Names of O in the attention; ".." is the module of the block around it."""

MLP = (
    "mlp",
    "feed_forward",
    "ffn",
    "mlp_block",
    "mixer",
    "",
    "layer.1.DenseReluDense",
    "layer.2.DenseReluDense",
)
"""Where blocks keep their FFN; "" is the block itself."""

FFN = (
    {"g": "gate_proj", "u": "up_proj", "d": "down_proj"},
    {"u": "up_proj", "d": "down_proj"},
    {"u": "c_fc", "d": "c_proj"},
    {"u": "fc1", "d": "fc2"},
    {"u": "fc_in", "d": "fc_out"},
    {"u": "dense_h_to_4h", "d": "dense_4h_to_h"},
    {"u": "intermediate.dense", "d": "output.dense"},
    {"u": "intermediate_dense", "d": "output_dense"},
    {"u": "linear_fc1", "d": "linear_fc2"},
    {"u": "linear1", "d": "linear2"},
    {"u": "lin1", "d": "lin2"},
    {"u": "dense1", "d": "dense2"},
    {"g": "w1", "u": "w3", "d": "w2"},
    {"g": "wi_0", "u": "wi_1", "d": "wo"},
    {"u": "wi", "d": "wo"},
    {"u": "Wi", "d": "Wo"},
    {"u": "ffn", "d": "ffn_output"},
    {"u": "0", "d": "2"},
)
"""Names of the FFN's gate, up and down, all of one entry beside each other."""


@dataclass(frozen=True)
class Fused:
    """A layer that holds several projections.

    Attributes:
        path: of the layer.
        beside: path of O or of the FFN's down projection. Its width is that of Q's rows, or of one of the FFN's parts,
            and by it the entry is told from another family's that gave the layer the same name.
        letters: its projections, in the order of its rows.
        heads: whether that order repeats for every key/value head.
        groups: how often it repeats where that is a constant.
        has, without: a module or attribute that the attention must have, and must not.
    """

    path: str
    beside: str
    letters: str = "qkv"
    heads: bool = False
    groups: int = 1
    has: str | None = None
    without: str | None = None


FUSED = (
    Fused("attn.qkv", "attn.proj"),  # timm, Qwen-VL's and SAM's images
    Fused("attention.qkv", "attention.proj"),  # ViTDet, SegGPT
    Fused("self_attn.qkv", "self_attn.projection"),  # BLIP's images
    Fused("self_attn.qkv_proj", "self_attn.o_proj"),  # Phi-3
    Fused("self_attn.W_pack", "self_attn.o_proj"),  # Baichuan
    Fused("attn.qkv_proj", "attn.out_proj", letters="qvk", groups=4),  # CodeGen, for TPUs of four cores
    Fused("attn.Wqkv", "attn.Wo"),  # ModernBERT
    Fused("attn.Wqkv", "attn.out_proj"),  # MPT
    Fused("norm_attn_norm.attn.Wqkv", "norm_attn_norm.attn.out_proj"),  # DBRX
    Fused("attn.c_attn", "attn.c_proj", without="multi_query"),  # GPT-2
    Fused("attn.c_attn", "attn.c_proj", heads=True, has="multi_query"),  # GPT-BigCode
    Fused("attn.att_proj", "attn.out_proj"),  # Bark
    Fused("attention.query_key_value", "attention.dense", heads=True),  # GPT-NeoX
    Fused(
        "self_attention.query_key_value", "self_attention.dense", heads=True, without="core_attention"
    ),  # BLOOM, Falcon
    Fused("self_attn.query_key_value", "self_attn.dense", heads=True),  # Persimmon
    Fused("attention.self.in_proj", "attention.output.dense", heads=True),  # DeBERTa
    Fused("attention.wqkv", "attention.wo", heads=True),  # InternLM 2
)
FUSED_FFN = (
    Fused("mlp.gate_up_proj", "mlp.down_proj", letters="gu"),  # Phi-3, GLM-4
    Fused("mlp.Wi", "mlp.Wo", letters="gu"),  # ModernBERT
    Fused("shared_mlp.input_linear", "shared_mlp.output_linear", letters="gu"),  # Granite 4
)

LATENT = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""Parts of multi-head latent attention, whose K and V, and mostly Q, are products of two: only its O is one layer."""

RECURRENT = ("A_log", "dt_bias", "conv1d", "q_conv1d", "slope_rate")
"""Parts of layers with a recurrent state: their q_proj and so on are no attention's."""

HEAD_DIM = ("head_dim", "attention_head_size", "head_size")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
"""Attributes of the attention: width of a head, number of heads."""


@dataclass(frozen=True)
class Place:
    """Where a block keeps one projection: a layer, or the rows of a fused one."""

    path: str
    layout: Layout | None = None

    def of(self, letter: str) -> str:
        """Path of the layer that the projection is, or that it becomes once the fused one is split."""
        return f"{self.path}.{letter}" if self.layout and len(self.layout.letters) > 1 else self.path


@dataclass(frozen=True)
class Found:
    """What one block has.

    Attributes:
        attention: path of its attention, or None.
        places: letter -> where it is.
    """

    attention: str | None
    places: Mapping[str, Place] = field(default_factory=dict)


def find(block: nn.Module) -> Found:
    """Look a block through for the parts of :data:`ATTENTION`, :data:`FFN` and the fused ones."""
    attention, places = _attention(block)
    return Found(attention, places | _ffn(block))


def has_attention(block: nn.Module) -> bool:
    """Whether a block has self-attention of which a projection is known."""
    return _attention(block)[0] is not None


def module_at(block: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, the block itself at "", or None."""
    module: nn.Module | None = block
    for step in path.split(".") if path else ():
        module = module._modules.get(step) if module is not None else None
    return module


def layer_at(block: nn.Module, path: str) -> nn.Module | None:
    """The linear layer at a path, under an adapter too: plain, fused and split, or shared; else None."""
    module = module_at(block, path)
    module = getattr(module, "base_layer", module)
    return module if is_plain(module) or isinstance(module, SharedWeight | FusedLinear) else None


def head_dim(attention: nn.Module) -> int | None:
    """Width of one head, if the attention says it."""
    return next((n for name in HEAD_DIM if isinstance(n := getattr(attention, name, None), int)), None)


def heads(attention: nn.Module) -> int | None:
    """Number of query heads, if the attention says it."""
    return next((n for name in HEADS if isinstance(n := getattr(attention, name, None), int)), None)


def _attention(block: nn.Module) -> tuple[str | None, dict[str, Place]]:
    for entry in FUSED:
        if places := _fused(block, entry):
            return entry.path.rpartition(".")[0], places
    for path in ATTENTION:
        module = module_at(block, path)
        if module is None or any(hasattr(module, name) for name in RECURRENT):
            continue
        places = {}
        for names in QKV:
            found = {p: f"{path}.{name}" for p, name in zip("qkv", names, strict=True)}
            if layer_at(block, found["q"]) is not None:
                places = {p: Place(at) for p, at in found.items() if layer_at(block, at) is not None}
                break
        if places or any(name in module._modules for name in LATENT):
            outputs = [at for name in OUTPUT if layer_at(block, at := _joined(path, name)) is not None]
            if outputs:
                places["o"] = Place(outputs[0])
            return path, places
    return None, {}


def _ffn(block: nn.Module) -> dict[str, Place]:
    for entry in FUSED_FFN:
        if places := _fused(block, entry):
            return places
    for path in MLP:
        if module_at(block, path) is None:
            continue
        for names in FFN:
            found = {letter: f"{path}.{name}".lstrip(".") for letter, name in names.items()}
            layers = {letter: layer_at(block, at) for letter, at in found.items()}
            if all(layer is not None for layer in layers.values()):
                # an up projection of twice the width holds a gate as well, in an order that nobody said
                whole = sizes(layers["u"])[0] == sizes(layers["d"])[1]
                return {letter: Place(at) for letter, at in found.items() if whole or letter == "d"}
    return {}


def _fused(block: nn.Module, entry: Fused) -> dict[str, Place]:
    layer, beside = layer_at(block, entry.path), layer_at(block, entry.beside)
    if layer is None or beside is None:
        return {}
    attention = module_at(block, entry.path.rpartition(".")[0])
    if entry.has is not None and not hasattr(attention, entry.has):
        return {}
    if entry.without is not None and hasattr(attention, entry.without):
        return {}
    layout = layer.layout if isinstance(layer, FusedLinear) else _layout(layer, beside, attention, entry)
    if layout is None:
        return {}
    last = "o" if "q" in entry.letters else "d"
    return {letter: Place(entry.path, layout) for letter in layout.letters} | {last: Place(entry.beside)}


def _layout(layer: nn.Module, beside: nn.Module, attention: nn.Module | None, entry: Fused) -> Layout | None:
    """The rows of each projection, from the sizes of the layer and of the one beside it; None if they do not fit."""
    rows, width, groups = sizes(layer)[0], sizes(beside)[1], entry.groups
    if "q" not in entry.letters:
        return Layout(entry.letters, (width, width)) if rows == 2 * width else None
    other, odd = divmod(rows - width, 2)
    if entry.heads:
        head = head_dim(attention) if attention is not None else None
        if not head or other % head:
            return None
        groups = other // head
    if odd or other <= 0 or width % groups or other % groups:
        return None
    return Layout(entry.letters, tuple((width if p == "q" else other) // groups for p in entry.letters), groups)


def _joined(path: str, name: str) -> str:
    """Path of a layer in the module at ``path``, or in the one around it, which is not the block."""
    if not name.startswith("../"):
        return f"{path}.{name}"
    around = path.rpartition(".")[0]
    return f"{around}.{name[3:]}" if around else "-"
