"""Share and count: the mechanism that everything else in this project uses.

::

    model = masa.share(model, masa.SharingSpec(method="masa", projections="qkvo", atoms=4))   # train it
    plain = masa.fold(model)                                                                  # masa no longer needed
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from masa.errors import MasaError
from masa.sharing import variant_sources as _variants  # noqa: F401 (registers the kinds that are not the paper's)
from masa.sharing.bank import SharedProjections
from masa.sharing.compression_spec import CompressionSpec
from masa.sharing.embeddings import embedding_numbers
from masa.sharing.fused import Part
from masa.sharing.linears import SharedLinear, SharedWeight
from masa.sharing.projections import Family, bank_of, family_of, model_shape
from masa.sharing.saving import attach_saving
from masa.sharing.spec import ATTENTION, METHODS, SharingSpec
from masa.sharing.stacks import stack_of
from masa.sharing.weight_sources import KINDS

_log = logging.getLogger("masa")


@dataclass(frozen=True)
class Sharing:
    """How a model came to share, kept as ``model.sharing``: its spec and what the dense attention would hold."""

    spec: SharingSpec | CompressionSpec
    dense_attention: int


@dataclass(frozen=True)
class ParameterCount:
    """Numbers that a checkpoint stores, and the reductions that follow from them.

    Attributes:
        total: all stored numbers. Coefficient MLPs and block embeddings count as the C that they leave behind.
        trained: numbers that the optimiser updates, MLPs included.
        attention: stored numbers of the Q, K, V and O matrices (atoms, coefficients, factors; biases are not counted).
        attention_dense: the same in the vanilla model of this size.
        attention_reduction: 1 - attention / attention_dense.
        model_reduction: numbers saved in shared matrices / (total + numbers saved).
    """

    total: int
    trained: int
    attention: int
    attention_dense: int
    attention_reduction: float
    model_reduction: float

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return dataclasses.asdict(self)


def share(model: nn.Module, spec: SharingSpec | Mapping[str, Any] | str, *, stack: str | None = None) -> nn.Module:
    """Make the projections of ``model`` share weights across layers, in place, newly initialised for training.

    The matrices of the shared projections are replaced and their values lost; biases, norms, FFNs and embeddings stay.
    Weights are drawn so that every synthesised matrix has the standard deviation ``model.config.initializer_range``
    (0.02 where there is none, as timm draws them).

    Args:
        model: a Transformer of Hugging Face, for text, images or sound, or a VisionTransformer of timm, by itself or
            inside Hugging Face's TimmWrapper; on any device ("meta" included). Blocks without one of the projections
            keep what they have, and a line in the log says so.
        spec: a :class:`SharingSpec`, a mapping of its fields, or a method's name.
        stack: path of the list of blocks that is to share, in a model with several (encoder and decoder); by default
            the only one, or that of the text beside images or sound.

    Returns:
        ``model`` itself.

    Raises:
        MasaError: an unknown method, a projection that the model has not, numbers that do not fit it, an unsupported
            architecture, or a model that already shares.

    Example:
        >>> from transformers import Starcoder2Config, Starcoder2ForCausalLM
        >>> config = Starcoder2Config(hidden_size=48, intermediate_size=96, num_hidden_layers=6, vocab_size=256,
        ...     num_attention_heads=4, num_key_value_heads=4, bos_token_id=None, eos_token_id=None)
        >>> model = share(Starcoder2ForCausalLM(config), SharingSpec(method="masa", projections="qkvo", atoms=2))
        >>> f"{count_parameters(model).attention_reduction:.1%}"
        '66.6%'
    """
    spec = SharingSpec.coerce(spec)
    if getattr(model, "sharing", None) is not None:
        raise MasaError(f"This model already shares weights ({model.sharing.spec.method}); fold it first.")
    chosen = stack_of(model, stack)
    family = family_of(model, chosen)
    family.require(spec.projections or "")
    shape = model_shape(model, family)
    spec = spec.resolve(shape)
    dense = _attention_numbers(family)
    kind = METHODS[spec.method].source
    std = getattr(getattr(chosen.home, "config", None), "initializer_range", None) or 0.02
    for line in (chosen.beside(model), family.passed_over(spec.projections or "")):
        if kind is not None and line:
            _log.warning("masa: %s", line)
    if kind == "grouped_heads":
        group_heads(family, chosen.home, int(spec.num_key_value_heads or 1), std)
    elif kind is not None:
        example = next(chosen.home.parameters())
        sources = KINDS[kind].from_spec(spec, shape)
        for source in sources:
            source.to(device=example.device)
            source.reset_parameters(std)
        install(model, SharedProjections(sources, shape.layers).to(dtype=example.dtype), stack)
    model.sharing = Sharing(spec, dense)
    attach_saving(model)
    return model


def install(model: nn.Module, shared: SharedProjections, path: str | None = None) -> None:
    """Replace the linear layers that ``shared`` serves and attach it to the decoder; biases stay where they are.

    Args:
        path: of the stack, as :func:`share` takes it.
    """
    stack = stack_of(model, path)
    family = family_of(model, stack)
    for letter in shared.projections:
        layers, wanted = shared.layers.get(letter, range(len(stack.blocks))), shared.source(letter).num_layers
        if len(layers) != wanted:
            raise ValueError(f"{letter} is shared by {wanted} layers, and {len(layers)} blocks have it")
        for position, layer in enumerate(layers):
            family.split(layer, letter)
            path, block = family.place(layer, letter).of(letter), stack.blocks[layer]
            old = block.get_submodule(path)
            kind = SharedWeight if isinstance(old, Part) else SharedLinear
            block.set_submodule(path, kind(shared, letter, position, like=old))
    shared.attach(stack.home, around=stack.owner)
    attach_saving(model)


def group_heads(family: Family, home: nn.Module, num_key_value_heads: int, std: float) -> None:
    """Give the model fewer key/value heads, newly drawn from N(0, std^2); query head h reads head h // (H / kv).

    Raises:
        MasaError: the model's attention cannot group them, as no vision model's can.
    """
    attentions = [
        block.get_submodule(found.attention)
        for block, found in zip(family.blocks, family.found, strict=True)
        if found.attention is not None
    ]
    separate = all({"k", "v"} <= set(f.places) and not f.places["k"].layout for f in family.found)
    if not separate or not all(hasattr(a, "num_key_value_groups") and hasattr(a, "head_dim") for a in attentions):
        raise MasaError(
            f"Method 'gqa' does not exist for {family.name}, whose attention cannot group key/value heads. Choose "
            "another method."
        )
    config = home.config
    for layer, attention in enumerate(attentions):
        block = family.blocks[layer]
        for letter in "kv":
            old = block.get_submodule(family.paths[letter])
            new = nn.Linear(
                old.in_features,
                num_key_value_heads * attention.head_dim,
                bias=old.bias is not None,
                device=old.weight.device,
                dtype=old.weight.dtype,
            )
            nn.init.normal_(new.weight, std=std)
            if new.bias is not None:
                nn.init.zeros_(new.bias)
            block.set_submodule(family.paths[letter], new)
        attention.num_key_value_groups = config.num_attention_heads // num_key_value_heads
    config.num_key_value_heads = num_key_value_heads


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count stored numbers and the reductions that follow; works on the meta device.

    Args:
        model: dense, shared or compressed, of an architecture that masa knows.

    Returns:
        Whole numbers, and reductions as fractions (not percent).

    Raises:
        MasaError: an architecture that masa does not know.
    """
    family, shared = family_of(model), bank_of(model)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    attention, served = 0, ""
    if shared is not None:
        served = shared.projections
        for source in shared.values():
            attention += source.stored_numbers_of(ATTENTION)
        # several sources may share a block embedding, so their parameters are counted together
        total += sum(s.stored_numbers() for s in shared.values()) - sum(p.numel() for p in shared.parameters())
    total += embedding_numbers(model)
    attention += _attention_numbers(family, served)
    dense = model.sharing.dense_attention if getattr(model, "sharing", None) else attention
    shape = model_shape(model, family)
    saved = dense - attention
    if served.strip(ATTENTION):  # FFN projections share too: their dense size counts for the whole model
        ffn = [p for p in served if p not in ATTENTION]
        stored = sum(s.stored_numbers_of("".join(ffn)) for s in shared.values())
        saved += shape.numbers("".join(ffn)) - stored
    return ParameterCount(total, trained, attention, dense, 1 - attention / dense, saved / (total + saved))


def _attention_numbers(family: Family, without: str = "") -> int:
    """Numbers of the attention's matrices in all blocks, but for the projections ``without``."""
    found = (family.at(layer, p) for p in ATTENTION if p not in without for layer in family.layers(p))
    return sum(projection.out_features * projection.in_features for projection in found)
