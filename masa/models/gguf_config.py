"""The configuration that a GGUF file describes: every key that changes the model is taken over, or refused by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from masa.errors import MasaError, unknown
from masa.models.gguf_architectures import ARCHITECTURES, INERT, NEUTRAL, Architecture

KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.key_length": "head_dim",
}
"""Key of all architectures -> attribute of transformers' configurations."""

_NEEDED = ("context_length", "embedding_length", "block_count", "attention.head_count")
_EPSILONS = ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon")
_TOKENS = {"bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "padding_token_id": "pad_token_id"}
_ORIGINAL = 8192
"""Positions that Llama 3 was trained with; the others are multiples that give the same factors."""

WAY_OUT = "Give the original folder instead."


def configuration(file: Path, values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], factors: Any) -> Any:
    """transformers' configuration of a GGUF file.

    Args:
        file: for messages.
        values: key -> value of the file's metadata.
        shapes: name -> shape, of all tensors.
        factors: name -> values, of the tensors that divide RoPE's frequencies (``rope_freqs``, ``rope_factors_*``).

    Raises:
        MasaError: an architecture or a key that is not read; the message names it.
    """
    from transformers import AutoConfig

    arch = str(values.get("general.architecture"))
    if values.get("general.type", "model") != "model" or any(key.startswith("adapter.") for key in values):
        raise MasaError(f"{file} holds no model, but {values.get('general.type', 'an adapter')!r}.")
    if arch not in ARCHITECTURES:
        raise unknown(f"{file}: the architecture", arch, ARCHITECTURES)
    entry, keys = ARCHITECTURES[arch], _keys(file, arch, values)
    names = KEYS | dict(entry.keys)
    found = {names[key]: value for key, value in keys.items() if key in names}
    found["vocab_size"] = _vocabulary(file, keys, shapes)
    found["tie_word_embeddings"] = "output.weight" not in shapes
    found |= {name: values.get(f"tokenizer.ggml.{key}") for key, name in _TOKENS.items()}
    found |= {flag: any(part in name for name in shapes) for part, flag in entry.flags.items()}
    if missing := [key for key in _NEEDED if key not in keys]:
        raise MasaError(f"{file} lacks the key {arch}.{missing[0]}; fetch it again.")
    if not any(key in keys for key in _EPSILONS):
        raise MasaError(f"{file} lacks the key {arch}.{_EPSILONS[0]}, or another's epsilon; fetch it again.")
    found.setdefault("num_key_value_heads", found["num_attention_heads"])
    found.setdefault("head_dim", found["hidden_size"] // found["num_attention_heads"])
    found |= entry.fixed(found) if callable(entry.fixed) else entry.fixed
    for key in ("sliding_window", "clip_qkv", "attn_logit_softcapping", "final_logit_softcapping"):
        found |= {key: found[key] or None} if key in found else {}
    left = set(keys) - set(names) - set(INERT)
    left -= _rope(file, entry, keys, found, factors)
    left -= _window(file, arch, entry, keys, found)
    _refuse_others(file, arch, {key: keys[key] for key in sorted(left)}, found)
    known_to_all = {"unk_token_id": "tokenizer.ggml.unknown_token_id", "_model_name_or_path": "general.name"}
    more = {name: values[key] for name, key in known_to_all.items() if key in values}
    return AutoConfig.for_model(entry.model_type, **_spelled(entry.model_type, found), **more)


def _keys(file: Path, arch: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Keys of the architecture without its name; what is one number for all layers, as this number."""
    keys = {key.removeprefix(f"{arch}."): value for key, value in values.items() if key.startswith(f"{arch}.")}
    for key, value in keys.items():
        if isinstance(value, list) and key in KEYS:
            if len(set(value)) != 1:
                raise MasaError(f"{file}: {arch}.{key} differs from layer to layer ({value}). {WAY_OUT}")
            keys[key] = value[0]
    return keys


def _vocabulary(file: Path, keys: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> int:
    if "token_embd.weight" not in shapes:
        raise MasaError(f"{file} lacks the tensor token_embd.weight; fetch it again.")
    rows = shapes["token_embd.weight"][0]
    if keys.get("vocab_size", rows) != rows:
        raise MasaError(f"{file} has {rows} embeddings, but its vocab_size is {keys['vocab_size']}; fetch it again.")
    return rows


def _spelled(model_type: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes by the names that this configuration's class gives them; those that it does not have are left out."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    known = set(kind().to_dict()) | {"rope_parameters"}
    spelled = {kind.attribute_map.get(name, name): value for name, value in found.items()}
    return {name: value for name, value in spelled.items() if name in known}


def _refuse_others(file: Path, arch: str, left: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raise :class:`MasaError` for a key that would change the model and is not taken over."""
    same = {"attention.value_length": found["head_dim"], "vocab_size": found["vocab_size"]}
    same |= {"attention.key_length_swa": found["head_dim"], "attention.value_length_swa": found["head_dim"]}
    for key, value in left.items():
        if value in NEUTRAL.get(key, ()) or (key in same and value == same[key]):
            continue
        raise MasaError(
            f"{file}: {arch}.{key} = {_short(value)} is not taken over, and would change the model. {WAY_OUT}"
        )


def _window(file: Path, arch: str, entry: Architecture, keys: Mapping[str, Any], found: dict[str, Any]) -> set[str]:
    """Which layers look through the sliding window; the keys that were read for it."""
    if entry.pattern is None:
        return set()
    read = {"attention.sliding_window", "attention.sliding_window_pattern"}
    layers, pattern = found["num_hidden_layers"], keys.get("attention.sliding_window_pattern", entry.pattern)
    if isinstance(pattern, int):
        pattern = [bool((layer + 1) % pattern) for layer in range(layers)]
    if len(pattern) != layers:
        raise MasaError(f"{file}: {arch}.attention.sliding_window_pattern has not one value a layer. {WAY_OUT}")
    window = keys.get("attention.sliding_window", 0)
    found["sliding_window"] = window or found.get("max_position_embeddings")
    found["layer_types"] = ["sliding_attention" if local and window else "full_attention" for local in pattern]
    return read


def _rope(file: Path, entry: Architecture, keys: Mapping[str, Any], found: dict[str, Any], factors: Any) -> set[str]:
    """``rope_parameters``; the keys that were read for it."""
    theta, head = float(keys.get("rope.freq_base", 10_000.0)), found["head_dim"]
    for name, given in factors.items():
        if not (np.isfinite(given) & (np.asarray(given) > 0)).all():
            raise MasaError(f"{file}: {name} holds factors that are no positive numbers; fetch it again.")
        if len(given) != keys.get("rope.dimension_count", head) // 2:
            raise MasaError(f"{file}: {name} has {len(given)} factors for heads of {head}; fetch it again.")
    rope = {"rope_theta": theta} | _scaling(file, keys, found, factors)
    read = {"rope.freq_base", "rope.freq_base_swa", *(key for key in keys if key.startswith("rope.scaling."))}
    turned = keys.get("rope.dimension_count", head)
    if not 0 < turned <= head:
        raise MasaError(f"{file}: rope.dimension_count = {turned} are not numbers of a head of {head}; fetch it again.")
    if entry.turns:
        rope["partial_rotary_factor"] = turned / head
        read.add("rope.dimension_count")
    elif turned == head:
        read.add("rope.dimension_count")
    if rope["rope_type"] == "longrope" and entry.model_type == "phi3":
        found["original_max_position_embeddings"] = rope["original_max_position_embeddings"]
    if entry.model_type == "gemma3_text":
        local = float(keys.get("rope.freq_base_swa", 10_000.0))
        kinds = {"sliding_attention": {"rope_type": "default", "rope_theta": local}, "full_attention": rope}
        found["rope_parameters"] = kinds
        return read
    if keys.get("rope.freq_base_swa", theta) != theta:
        read.discard("rope.freq_base_swa")
    found["rope_parameters"] = rope
    return read


def _scaling(file: Path, keys: Mapping[str, Any], found: Mapping[str, Any], factors: Any) -> dict[str, Any]:
    """How RoPE's frequencies are scaled, as transformers says it."""
    scale = {key.removeprefix("rope.scaling."): v for key, v in keys.items() if key.startswith("rope.scaling.")}
    kind, factor = scale.get("type") or "linear", float(scale.get("factor") or 1.0)  # llama.cpp's defaults
    by_key = kind if kind in ("linear", "yarn") and factor != 1.0 else "none"
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise MasaError(f"{file}: rope.scaling.type = {kind} is not taken over. {WAY_OUT}")
    if factors and by_key != "none":
        raise MasaError(f"{file} scales RoPE twice, by {', '.join(factors)} and rope.scaling.type = {kind}. {WAY_OUT}")
    if kind == "longrope" and factor != 1.0:
        raise MasaError(f"{file}: rope.scaling.factor = {factor} is not taken over beside {kind}. {WAY_OUT}")
    attention = float(scale.get("attn_factor") or 1.0)
    original = scale.get("original_context_length") or found.get("max_position_embeddings")
    known = {"type", "factor", "attn_factor", "original_context_length", "finetuned"}
    if by_key == "yarn":
        known |= {"yarn_beta_fast", "yarn_beta_slow", "yarn_attn_factor", "yarn_ext_factor"}
    if odd := [key for key in scale if key not in known and scale[key] not in (0, 1)]:
        raise MasaError(f"{file}: rope.scaling.{odd[0]} = {scale[odd[0]]} is not taken over. {WAY_OUT}")
    if by_key == "yarn":
        if scale.get("yarn_ext_factor", 1.0) != 1.0:
            raise MasaError(
                f"{file}: rope.scaling.yarn_ext_factor = {scale['yarn_ext_factor']} is not taken over. {WAY_OUT}"
            )
        attention *= float(scale.get("yarn_attn_factor") or 1.0)
        yarn = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
        yarn |= {f"beta_{end}": float(scale.get(f"yarn_beta_{end}") or v) for end, v in (("fast", 32.0), ("slow", 1.0))}
        return yarn | {"attention_factor": attention * (1.0 + 0.1 * math.log(factor))}
    if factors:
        return _by_factors(file, keys, found, factors, attention, original)
    if attention != 1.0:
        raise MasaError(f"{file}: rope.scaling.attn_factor = {attention} is not taken over. {WAY_OUT}")
    return {"rope_type": "linear", "factor": factor} if by_key == "linear" else {"rope_type": "default"}


def _by_factors(
    file: Path, keys: Mapping[str, Any], found: Mapping[str, Any], factors: Any, attention: float, original: int
) -> dict[str, Any]:
    """Scaling by one factor a frequency: Llama 3's, if its rule gives the same numbers; else the numbers themselves."""
    if "rope_freqs.weight" in factors:
        given = np.asarray(factors["rope_freqs.weight"], np.float64)
        theta = float(keys.get("rope.freq_base", 10_000.0))
        if attention == 1.0 and (rule := llama3(given, theta)):
            return rule
        factors = {"rope_factors_long.weight": given, "rope_factors_short.weight": given}
        original = found.get("max_position_embeddings") or original
    wanted = ("rope_factors_short.weight", "rope_factors_long.weight")
    if missing := [name for name in wanted if name not in factors]:
        raise MasaError(f"{file} lacks the tensor {missing[0]}; fetch it again.")
    short, long = ([float(v) for v in factors[name]] for name in wanted)
    sizes = {"factor": found["max_position_embeddings"] / original, "original_max_position_embeddings": original}
    return {"rope_type": "longrope", "short_factor": short, "long_factor": long, "attention_factor": attention} | sizes


def llama3(factors: np.ndarray, theta: float) -> dict[str, Any] | None:
    """Parameters of Llama 3's rule that give these factors in float32, or None.

    Long waves are divided by F, short ones by 1, those between by 1 / ((1 - s) / F + s) with s = (n / w - l) / (h - l)
    of the wave's length w. Only n / l and n / h show in the factors, so that n is set.

    Args:
        factors: (d/2), of frequencies theta^(-2i/d).
        theta: RoPE's base.
    """
    frequencies = theta ** (-np.arange(len(factors)) / len(factors))
    waves, largest = 2 * math.pi / frequencies, float(factors.max())
    if (factors == 1.0).all():
        return {"rope_type": "default"}
    between = (factors > 1.0) & (factors < largest)
    tries = [(_ORIGINAL, 1.0, 4.0)]
    if between.sum() >= 2:
        smooth = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
        slope, offset = np.polyfit(1 / waves[between], smooth, 1)  # n / (h - l), -l / (h - l)
        low, high = -offset / slope * _ORIGINAL, (1 - offset) / slope * _ORIGINAL
        tries += [(_ORIGINAL, float(f"{low:.5g}"), float(f"{high:.5g}")), (_ORIGINAL, float(low), float(high))]
    for n, low, high in tries:
        if not 0 < low < high:
            continue
        smooth = np.clip((n / waves - low) / (high - low), 0, 1)
        if np.allclose(1 / ((1 - smooth) / largest + smooth), factors, rtol=3e-7, atol=0):
            return {
                "rope_type": "llama3",
                "factor": largest,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": n,
            }
    return None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:56]} …"
