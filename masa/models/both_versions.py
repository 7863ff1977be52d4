"""``config.json`` and ``tokenizer_config.json`` as transformers 4 reads them, too.

transformers 5 writes RoPE's base and scaling under ``rope_parameters``, which 4.57 passes over without a word: it takes
its class's defaults, a base of 10,000 and no scaling. Its tokenizers' class has a name there that 4.57 does not know.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from masa.runs.files import whole_file

_NOT_SCALING = ("rope_theta", "partial_rotary_factor")


def earlier_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """What ``config.json`` says, under the names of transformers 4; empty where these cannot say it.

    transformers 5 reads both and finds the same.
    """
    named: dict[str, Any] = {}
    if "dtype" in config:
        named["torch_dtype"] = config["dtype"]
    if "n_positions" in config:
        named["n_ctx"] = config["n_positions"]  # GPT-2's, which llama.cpp's converter asks for
    rope = config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return named
    whole, local = rope.get("full_attention", rope), rope.get("sliding_attention")
    if "rope_theta" not in whole or (local and local.get("rope_type", "default") != "default"):
        return named
    if local:
        named["rope_local_base_freq"] = local["rope_theta"]
    scaling = {key: value for key, value in whole.items() if key not in _NOT_SCALING}
    named["rope_theta"] = whole["rope_theta"]
    named["rope_scaling"] = scaling if scaling.get("rope_type", "default") != "default" else None
    if "partial_rotary_factor" in whole:
        named["partial_rotary_factor"] = whole["partial_rotary_factor"]
    if config.get("model_type") == "gpt_neox":
        named |= {"rotary_emb_base": whole["rope_theta"], "rotary_pct": whole.get("partial_rotary_factor", 1.0)}
    return named


def versions(folder: Path) -> str:
    """The versions of transformers that read a folder as it is meant, in words."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings = folder / "tokenizer_config.json"
    tokenizer = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    if config.get("rope_parameters") and "rope_theta" not in earlier_names(config):
        return "5 alone, which says RoPE layer by layer"
    if config.get("model_type") == "phi3" and config["rope_parameters"].get("rope_type") == "longrope":
        return "5 alone; 4.57 refuses its RoPE scaling, whose fields have other names there"
    if _tokenizer(tokenizer) != tokenizer:
        return "4.57 and 5; the tokenizer's settings, unchanged, by 5 alone"
    return "4.57 and 5"


def write_for_both(folder: Path) -> list[str]:
    """Add the earlier names to a plain model folder's files.

    Returns:
        The files that were changed.
    """
    changed = [_edit(folder / "config.json", lambda config: config | earlier_names(config))]
    changed.append(_edit(folder / "tokenizer_config.json", _tokenizer))
    return [name for name in changed if name]


def _tokenizer(settings: dict[str, Any]) -> dict[str, Any]:
    """transformers 5 reads both forms; 4.57 neither the class's name nor a list of further special tokens."""
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    if isinstance(settings.get("extra_special_tokens"), list):
        settings = dict(settings)
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _edit(path: Path, change: Any) -> str | None:
    if not path.is_file():
        return None
    before = json.loads(path.read_text(encoding="utf-8"))
    after = change(before)
    if after == before:
        return None
    with whole_file(path) as part:
        part.write_text(json.dumps(after, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    return path.name
