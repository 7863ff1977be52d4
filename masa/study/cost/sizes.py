"""The sizes of a model that its cost depends on, and its parameters, counted exactly without building it.

Letters: L layers, d width, f width of the FFN, V vocabulary, T tokens of a sequence (patches and extra tokens of an
image), S atoms, r rank, M sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from masa.sharing.spec import ModelShape, SharingSpec


@dataclass(frozen=True)
class Sizes:
    """One model.

    Attributes:
        family: "language" (Starcoder2), "vit" (timm), "yolos" (transformers) or "llama".
        layers, width, heads, kv_heads, head_dim, ffn, vocabulary: L, d, …; vision has a vocabulary of 0.
        tokens: T of one sequence or image.
        parameters: all that are trained.
        tensors: in how many tensors they are.
        factors: FLOPs of making all shared matrices once, forward.
        made: numbers of the matrices that are made anew each pass (0 where every layer has its own).
        stored: numbers that a checkpoint holds.
        patch: numbers of one patch (vision).
        head_flops: FLOPs a token of what follows the last block, forward: 2 d V, or a detector's heads.
    """

    family: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int
    tokens: int
    parameters: int
    tensors: int
    factors: float = 0.0
    made: int = 0
    stored: int = 0
    patch: int = 0
    head_flops: float = 0.0

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        """Width of all key heads together."""
        return self.kv_heads * self.head_dim

    @property
    def block_matrices(self) -> int:
        """Numbers of one block's matrices, shared or not: what a token is multiplied with."""
        attention = self.width * (2 * self.attention_width + 2 * self.kv_width)
        return attention + (3 if self.family == "llama" else 2) * self.width * self.ffn


def of_run(spec: Mapping[str, Any]) -> Sizes:
    """Sizes of a resolved run (:func:`masa.study.experiments.run_spec`)."""
    model, family = spec["model"], spec["model"].get("family", "language")
    sharing = SharingSpec.coerce(spec["sharing"])
    shape = ModelShape.of_sizes(model)
    L, d, f, heads = shape.num_layers, shape.hidden_size, model["intermediate_size"], shape.num_attention_heads
    kv_heads = int(sharing.num_key_value_heads or heads)
    kv = kv_heads * (d // heads)
    matrices = {"q": d * d, "k": d * kv, "v": d * kv, "o": d * d, "u": d * f, "d": d * f}
    shared = set(sharing.projections or "")
    own = sum(count for letter, count in matrices.items() if letter not in shared)
    small = 2 * d + 2 * kv + f + d + 4 * d  # biases and two norms of a block
    sources, source_tensors, unstored, factors = _sources(sharing, shape)
    outside, outside_tensors, tokens, patch, head = _outside(model, family, spec["training"])
    # timm keeps the biases of q, k and v in one tensor, and so their matrices where these are not shared
    fused = 0 if family != "vit" else 2 if shared & set("qkv") else 4
    parameters = outside + L * (own + small) + sources
    return Sizes(
        family=family,
        layers=L,
        width=d,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=d // heads,
        ffn=f,
        vocabulary=model.get("vocab_size", 0),
        tokens=tokens,
        parameters=parameters,
        tensors=outside_tensors + L * (16 - len(shared) - fused) + source_tensors,
        factors=factors,
        made=L * sum(matrices[letter] for letter in shared) if factors else 0,
        stored=parameters - unstored,
        patch=patch,
        head_flops=head,
    )


def _sources(sharing: SharingSpec, shape: ModelShape) -> tuple[int, int, int, float]:
    """Parameters of the shared sources, their tensors, those that no checkpoint keeps, FLOPs of making all matrices."""
    L, method = shape.num_layers, sharing.method
    if method in ("vanilla", "gqa"):
        return 0, 0, 0, 0.0
    numbers = {p: shape.shapes[p][0] * shape.shapes[p][1] for p in sharing.projections or ""}
    if method == "low-rank":
        r = int(sharing.rank or 1)
        sides = sum(sum(shape.shapes[p]) for p in numbers)
        return L * r * sides, 2 * len(numbers), 0, 2.0 * L * r * sum(numbers.values())
    if method in ("sequential", "repeat-all-over"):
        return int(sharing.sets or 1) * sum(numbers.values()), len(numbers), 0, 0.0
    if method == "relaxed":
        r, sides = int(sharing.rank or 1), sum(sum(shape.shapes[p]) for p in numbers)
        dense = int(sharing.sets or 1) * sum(numbers.values())
        return dense + L * r * sides, 3 * len(numbers), 0, 2.0 * L * r * sum(numbers.values())
    if sharing.atoms is None:  # a method that is not counted here: at most what it would be without sharing
        return L * sum(numbers.values()), L * len(numbers), 0, 0.0
    total, tensors, unstored, flops = 0, 0, 0, 0.0
    e = sharing.embedding_dim or 64
    for group in sharing.groups():
        S = sharing.atoms_of(group)
        each = 1 if method == "masa" else shape.num_key_value_heads if group in "kv" else shape.num_attention_heads
        total += S * numbers[group[0]] + len(group) * L * S * each
        tensors += 1 + len(group)
        flops += 2.0 * S * L * sum(numbers[p] for p in group)
        if sharing.coefficients == "mlp":  # three layers instead of L x S numbers; the embeddings once for all
            mlp = len(group) * (2 * (e * e + e) + e * S + S - L * S)
            total, unstored, tensors = total + mlp, unstored + mlp, tensors + 5 * len(group)
    if sharing.coefficients == "mlp":
        total, unstored, tensors = total + L * e, unstored + L * e, tensors + 1
    return total, tensors, unstored, flops


def _outside(model: Mapping[str, Any], family: str, recipe: Mapping[str, Any]) -> tuple[int, int, int, int, float]:
    """Outside of the blocks: parameters, tensors, tokens of a sequence, numbers of a patch, FLOPs a token of heads."""
    d = model["hidden_size"]
    if family == "language":
        vocabulary = model["vocab_size"]
        return vocabulary * d + 2 * d, 3, recipe["context"], 0, 2.0 * d * vocabulary
    patches = (model["image_size"] // model["patch_size"]) ** 2
    patch = model["channels"] * model["patch_size"] ** 2
    common = d + d * patch + d + 2 * d  # class token, patches with bias, last norm
    if family == "vit":
        classes, tokens = model["num_classes"], patches + 1
        return common + tokens * d + d * classes + classes, 8, tokens, patch, 2.0 * d * classes / tokens
    detections, classes = model["num_detection_tokens"], model["num_classes"] + 1
    tokens = patches + 1 + detections
    middle = (model["num_layers"] - 1) * tokens * d if model["use_mid_position_embeddings"] else 0
    heads = 4 * (d * d + d) + d * classes + classes + 4 * d + 4  # two MLPs of three layers
    head = 2.0 * (4 * d * d + d * classes + 4 * d) * detections / tokens
    return common + (detections + tokens) * d + middle + heads, 19 + bool(middle), tokens, patch, head


def of_pretrained(entry: Mapping[str, Any], tokens: int) -> Sizes | None:
    """Sizes of a Llama-like model, from ``sizes`` of an entry of the configuration's ``pretrained``; None without."""
    known = entry.get("sizes")
    if not known:
        return None
    d, heads, kv_heads = known["hidden_size"], known["num_attention_heads"], known["num_key_value_heads"]
    head_dim = known.get("head_dim") or d // heads
    L, f, V = known["num_layers"], known["intermediate_size"], known["vocab_size"]
    block = d * (2 * heads + 2 * kv_heads) * head_dim + 3 * d * f + 2 * d
    parameters = L * block + d + V * d * (1 if known.get("tied", True) else 2)
    return Sizes(
        family="llama",
        layers=L,
        width=d,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=f,
        vocabulary=V,
        tokens=tokens,
        parameters=parameters,
        tensors=9 * L + 2,
        stored=parameters,
        head_flops=2.0 * d * V,
    )
