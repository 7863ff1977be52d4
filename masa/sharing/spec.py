"""What to share and how, as plain data: importable in milliseconds, without torch.

A :class:`SharingSpec` names a method of :data:`METHODS` and its numbers. Numbers may be written relative to the
model ("L/3" layers, "d/6" width); :meth:`SharingSpec.resolve` turns them into integers for one :class:`ModelShape`
and refuses what cannot be built.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from masa.errors import MasaError, unknown

ATTENTION = "qkvo"
"""Projection letters of the attention block; reductions are counted over these only."""

PROJECTIONS = {"q": "query", "k": "key", "v": "value", "o": "output", "g": "FFN gate", "u": "FFN up", "d": "FFN down"}


@dataclass(frozen=True)
class ModelShape:
    """The sizes that a spec is resolved against.

    Attributes:
        num_layers: L, the blocks.
        hidden_size: d, the width that ``d/6`` refers to.
        num_attention_heads: H, query heads.
        num_key_value_heads: key/value heads; H without grouping.
        shapes: projection letter -> (out, in) of its weight, equal in all layers.
        layers: projection letter -> the blocks that have it, where not all have.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    shapes: Mapping[str, tuple[int, int]]
    layers: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)

    def layers_of(self, letter: str) -> tuple[int, ...]:
        """The blocks that have a projection."""
        return tuple(self.layers.get(letter, range(self.num_layers)))

    def count(self, letter: str) -> int:
        """L of one projection: how many blocks have it."""
        return len(self.layers_of(letter))

    def numbers(self, letters: str) -> int:
        """Numbers of the dense matrices of some projections in all blocks that have them."""
        return sum(self.shapes[p][0] * self.shapes[p][1] * self.count(p) for p in letters)

    @classmethod
    def of_sizes(cls, model: Mapping[str, Any]) -> ModelShape:
        """The shapes of a standard Transformer (Q, K, V, O and an FFN of two layers), from its sizes alone.

        Args:
            model: ``num_layers``, ``hidden_size``, ``num_attention_heads`` and ``intermediate_size``.
        """
        d, heads, ffn = model["hidden_size"], model["num_attention_heads"], model["intermediate_size"]
        shapes = dict.fromkeys("qkvo", (d, d)) | {"u": (ffn, d), "d": (d, ffn)}
        return cls(model["num_layers"], d, heads, heads, shapes)


@dataclass(frozen=True)
class Method:
    """One way to get the matrices of all layers from fewer numbers.

    Args:
        source: kind of weight source (see :mod:`masa.sharing.weight_sources`), or None where no weights are shared.
        fields: the fields of :class:`SharingSpec` that this method reads; any other given field is an error.
        defaults: values of fields left at None.
        check: raises :class:`MasaError` if the resolved spec cannot be built for the shape.
        summary: one line for ``--help`` and the documentation.
    """

    source: str | None
    fields: tuple[str, ...]
    summary: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    check: Callable[[SharingSpec, ModelShape], None] = lambda spec, shape: None


@dataclass(frozen=True)
class SharingSpec:
    """How the projections of a transformer share weights across layers.

    Args:
        method: one of vanilla, gqa, low-rank, sequential, repeat-all-over, relaxed, masa and masa-per-head
            (:data:`METHODS`).
        projections: letters of the projections that share; q, k, v, o of attention, and u, d (and g in Llama-like
            models) of the FFN, e.g. "qkv", "qkvo", "qkvoud".
        atoms: number S of matrix atoms of each dictionary (``masa``); an integer, "L/3", or a mapping from a
            dictionary's letters to its own S, e.g. {"qv": 8, "k": 4}.
        sets: number M of weight sets that the L layers use in turn (``sequential``, ``repeat-all-over``, ``relaxed``).
        rank: rank r of every matrix (``low-rank``), or of what each layer adds to its set (``relaxed``). The paper's
            text says d/3, which saves only 33.3 %; d/6 is what its 66.7 % needs, and the default of ``low-rank``.
        num_key_value_heads: key/value heads after grouping (``gqa``). The paper's "6 / 8 groups" are query heads per
            key/value head.
        coefficients: "direct" (C is a parameter) or "mlp" (C comes from per-block embeddings through a three-layer
            MLP, both of which :func:`masa.fold` and :func:`masa.save` leave behind) or "legendre" (a fixed basis over
            depth: atoms alone are learned).
        coefficient_norm: "free", or "fixed" to keep every row of C at norm 1 (the synthesised weights then keep the
            atoms' scale).
        embedding_dim: width of the per-block embedding and of the MLP's hidden layers (``coefficients="mlp"``).
        dictionaries: groups of projections that use one common dictionary, each with its own coefficients, e.g. "qv";
            all others have a dictionary of their own.
    """

    method: str
    projections: str | None = None
    atoms: int | str | Mapping[str, int | str] | None = None
    sets: int | str | None = None
    rank: int | str | None = None
    num_key_value_heads: int | str | None = None
    coefficients: str | None = None
    coefficient_norm: str | None = None
    embedding_dim: int | None = None
    dictionaries: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise unknown("Method", self.method, METHODS)
        method = METHODS[self.method]
        given = {f.name for f in dataclasses.fields(self) if getattr(self, f.name) is not None} - {"method"}
        for name in sorted(given - set(method.fields)):
            raise MasaError(
                f"{name!r} has no effect with method {self.method!r}, which reads "
                f"{', '.join(method.fields) or 'no further field'}. Remove it, or choose another method."
            )
        for name, value in method.defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        if self.projections is not None:
            self._check_letters("projections", self.projections)
        for name, options in (("coefficients", ("direct", "mlp", "legendre")), ("coefficient_norm", ("free", "fixed"))):
            value = getattr(self, name)
            if value is not None and value not in options:
                raise unknown(f"The value of {name!r}", value, options)
        if self.embedding_dim is not None and (self.coefficients != "mlp" or self.embedding_dim < 1):
            raise MasaError(
                f"embedding_dim = {self.embedding_dim!r} must be at least 1, and has an effect only with "
                "coefficients = 'mlp'."
            )
        if self.method == "gqa" and self.num_key_value_heads is None:
            raise MasaError("Method 'gqa' needs num_key_value_heads, e.g. 2 or 'H/6'.")
        if self.dictionaries is not None:
            if not isinstance(self.dictionaries, str | list | tuple):
                raise MasaError(f"dictionaries must be a list of letters such as ['qv'], got {self.dictionaries!r}.")
            if isinstance(self.dictionaries, str):
                object.__setattr__(self, "dictionaries", (self.dictionaries,))
            object.__setattr__(self, "dictionaries", tuple(self.dictionaries))
            self._check_dictionaries()

    @staticmethod
    def _check_letters(name: str, letters: Any) -> None:
        if not isinstance(letters, str) or not letters:
            raise MasaError(f"{name!r} must be a string of the letters {', '.join(PROJECTIONS)}, got {letters!r}.")
        for letter in letters:
            if letter not in PROJECTIONS:
                raise unknown(f"{name} {letters!r}: projection", letter, PROJECTIONS)
        if len(set(letters)) != len(letters):
            raise MasaError(f"{name} {letters!r} names a projection twice.")

    def _check_dictionaries(self) -> None:
        seen: set[str] = set()
        for group in self.dictionaries or ():
            self._check_letters("dictionaries", group)
            if missing := set(group) - set(self.projections or ""):
                raise MasaError(
                    f"Dictionary {group!r} names {', '.join(sorted(missing))}, which projections="
                    f"{self.projections!r} does not share."
                )
            if seen & set(group):
                raise MasaError(f"dictionaries {list(self.dictionaries or ())} name a projection twice.")
            seen |= set(group)

    @classmethod
    def coerce(cls, spec: SharingSpec | Mapping[str, Any] | str) -> SharingSpec:
        """Accept a spec, a mapping of its fields, or a bare method name.

        Raises:
            MasaError: something else, or an unknown field.
        """
        if isinstance(spec, cls):
            return spec
        if isinstance(spec, str):
            return cls(method=spec)
        if not isinstance(spec, Mapping):
            raise MasaError(
                f"A sharing spec is a SharingSpec, a mapping or a method's name, got {type(spec).__name__}."
            )
        names = [f.name for f in dataclasses.fields(cls)]
        for key in spec:
            if key not in names:
                raise unknown("Sharing key", key, names)
        if "method" not in spec:
            raise MasaError(f"A sharing spec needs the key 'method': one of {', '.join(METHODS)}.")
        return cls(**spec)

    def to_dict(self) -> dict[str, Any]:
        """The fields that are set, as JSON-able data."""
        data = {k: v for k, v in dataclasses.asdict(self).items() if v is not None}
        if "dictionaries" in data:
            data["dictionaries"] = list(data["dictionaries"])
        return data

    def groups(self) -> list[str]:
        """The dictionaries' letters: the common ones as given, every other projection by itself, in model order."""
        common = {letter: group for group in self.dictionaries or () for letter in group}
        return list(dict.fromkeys(common.get(letter, letter) for letter in self.projections or ""))

    def resolve(self, shape: ModelShape) -> SharingSpec:
        """Return this spec with every number an integer for ``shape``.

        Args:
            shape: sizes of the model that is to share.

        Raises:
            MasaError: a projection that the model lacks, S > L, a fraction that is no integer, unequal shapes under one
                dictionary, or what the method itself refuses.
        """
        values: dict[str, Any] = {}
        for letter in self.projections or "":
            if letter not in shape.shapes:
                raise unknown("In this model, projection", letter, shape.shapes)
        for name in ("sets", "rank", "num_key_value_heads"):
            if getattr(self, name) is not None:
                values[name] = _number(name, getattr(self, name), shape, self.projections or "")
        if self.atoms is not None:
            given = self.atoms if isinstance(self.atoms, Mapping) else dict.fromkeys(self.groups(), self.atoms)
            if set(given) != set(self.groups()):
                raise MasaError(f"atoms has entries for {sorted(given)}, but the dictionaries are {self.groups()}.")
            values["atoms"] = {group: _number("atoms", given[group], shape, group) for group in self.groups()}
            if len(set(values["atoms"].values())) == 1:
                values["atoms"] = next(iter(values["atoms"].values()))
        resolved = dataclasses.replace(self, **values)
        METHODS[self.method].check(resolved, shape)
        return resolved

    def atoms_of(self, group: str) -> int:
        """S of one dictionary of a resolved spec."""
        return int(self.atoms[group] if isinstance(self.atoms, Mapping) else self.atoms)  # type: ignore[arg-type,index]


def _number(name: str, value: int | str, shape: ModelShape, letters: str) -> int:
    """Turn 8, "8", "L/3", "d/6" (a rank is rounded down) or "H/6" into a positive integer.

    Args:
        letters: of the projections that it is for; L is how many blocks have them.
    """
    counts = {p: shape.count(p) for p in letters} or {"": shape.num_layers}
    sizes = {"L": max(counts.values()), "d": shape.hidden_size, "H": shape.num_attention_heads}
    if str(value).startswith("L") and len(set(counts.values())) > 1:
        found = ", ".join(f"{p}: {count}" for p, count in counts.items())
        raise MasaError(f"{name} = {value!r}: L is not one number here ({found} blocks). Give an integer.")
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise MasaError(f"{name} must be an integer or a fraction such as 'L/3', got {value!r}.")
    if match := re.fullmatch(r"([LdH])/(\d+)", str(value)):
        size, divisor = sizes[match[1]], int(match[2])
        if divisor == 0 or (size % divisor and name != "rank"):  # a rank may be rounded down, a set may not
            raise MasaError(f"{name} = {value!r} is not an integer here: {match[1]} = {size}.")
        number = size // divisor
    elif re.fullmatch(r"[LdH]", str(value)):
        number = sizes[str(value)]
    elif re.fullmatch(r"-?\d+", str(value)):
        number = int(value)
    else:
        raise MasaError(f"{name} must be an integer or a fraction of L, d or H such as 'L/3' or 'd/6', got {value!r}.")
    if number < 1:
        raise MasaError(f"{name} = {value!r} must be at least 1.")
    return number


def _check_atoms(spec: SharingSpec, shape: ModelShape) -> None:
    for group in spec.groups():
        L = shape.count(group[0])
        if len({shape.layers_of(letter) for letter in group}) > 1:
            counts = ", ".join(f"{letter}: {shape.count(letter)}" for letter in group)
            raise MasaError(f"A common dictionary needs the same layers, but {group!r} is in {counts} blocks.")
        if spec.atoms_of(group) > len(group) * L:
            limit = f"{len(group)} x L = {len(group) * L}" if len(group) > 1 else f"L = {L}"
            raise MasaError(
                f"atoms = {spec.atoms_of(group)} for {group!r} is more than {limit}: more atoms than matrices save "
                "nothing. Choose fewer."
            )
        if len({shape.shapes[letter] for letter in group}) > 1:
            sizes = ", ".join(f"{letter}: {shape.shapes[letter]}" for letter in group)
            raise MasaError(
                f"A common dictionary needs equal shapes, but {group!r} has {sizes} (grouped-query attention?)."
            )


def _check_sets(spec: SharingSpec, shape: ModelShape) -> None:
    for count in dict.fromkeys(map(shape.count, spec.projections or "")):
        if count % int(spec.sets or 1):
            divisors = [m for m in range(1, count + 1) if count % m == 0]
            raise MasaError(f"sets = {spec.sets} does not divide L = {count}. Choose one of {divisors}.")


def _check_rank(spec: SharingSpec, shape: ModelShape) -> None:
    limit = min(min(shape.shapes[letter]) for letter in spec.projections or "")
    if int(spec.rank or 1) > limit:
        raise MasaError(f"rank = {spec.rank} exceeds {limit}, the smaller side of the smallest shared matrix.")


def _check_heads(spec: SharingSpec, shape: ModelShape) -> None:
    heads, groups = int(spec.num_key_value_heads or 1), shape.num_key_value_heads
    if groups % heads:
        divisors = [n for n in range(1, groups + 1) if groups % n == 0]
        raise MasaError(
            f"num_key_value_heads = {heads} does not divide the model's {groups}. Choose one of {divisors}."
        )


def _check_relaxed(spec: SharingSpec, shape: ModelShape) -> None:
    _check_sets(spec, shape)
    _check_rank(spec, shape)


def _check_head_atoms(spec: SharingSpec, shape: ModelShape) -> None:
    if others := [letter for letter in spec.projections or "" if letter not in ATTENTION]:
        raise MasaError(
            f"projections = {spec.projections!r}: {others[0]!r} ({PROJECTIONS[others[0]]}) has no heads, so it cannot "
            f"have coefficients for each. Choose among {ATTENTION!r}, or method 'masa'."
        )
    for letter in spec.projections or "":
        heads = shape.num_key_value_heads if letter in "kv" else shape.num_attention_heads
        if shape.shapes[letter][letter == "o"] % heads:
            raise MasaError(f"{letter!r} is {shape.shapes[letter]}, which {heads} heads do not divide.")
    _check_atoms(spec, shape)


_SETS: Any = {
    "fields": ("projections", "sets"),
    "defaults": {"projections": ATTENTION, "sets": "L/3"},
    "check": _check_sets,
}

METHODS: dict[str, Method] = {
    "vanilla": Method(None, (), "every layer keeps its own matrices"),
    "gqa": Method(
        "grouped_heads",
        ("num_key_value_heads",),
        "grouped-query attention: fewer key/value heads (Ainslie et al. 2023)",
        check=_check_heads,
    ),
    "low-rank": Method(
        "low_rank",
        ("projections", "rank"),
        "every matrix is a product B A of rank r",
        defaults={"projections": ATTENTION, "rank": "d/6"},
        check=_check_rank,
    ),
    "sequential": Method("sequential", summary="M sets; layer l uses set l*M//L (Takase and Kiyono 2023)", **_SETS),
    "repeat-all-over": Method("repeat", summary="M sets; layer l uses set l % M (the paper's name for CYCLE)", **_SETS),
    "masa": Method(
        "atoms",
        ("projections", "atoms", "coefficients", "coefficient_norm", "embedding_dim", "dictionaries"),
        "every matrix is a combination of S matrix atoms (arXiv 2508.04581, Eq. 2)",
        defaults={"projections": ATTENTION, "atoms": "L/3", "coefficients": "direct", "coefficient_norm": "free"},
        check=_check_atoms,
    ),
    "masa-per-head": Method(
        "head_atoms",
        ("projections", "atoms"),
        "masa with coefficients of their own for each head (ours)",
        defaults={"projections": ATTENTION, "atoms": "L/3"},
        check=_check_head_atoms,
    ),
    "relaxed": Method(
        "relaxed",
        ("projections", "sets", "rank"),
        "M sets; layer l uses set l % M and adds a matrix of rank r (Bae et al. 2024)",
        defaults={"projections": ATTENTION, "sets": "L/6", "rank": "d/12"},
        check=_check_relaxed,
    ),
}
