"""Model folders and GGUF files through transformers' own readers, and what those pass over without a word.

Every tensor is looked at once: one that is missing, that the configuration has no place for, or that holds NaN or
infinity is named with its file. Nothing is drawn in its place.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.errors import MasaError
from masa.sharing.checkpoint import quietly
from masa.sharing.description import METHOD
from masa.sharing.weight_files import heads

PREFIXES = ("_orig_mod.", "module.")
"""What torch.compile and DataParallel put before names."""


def read_folder(folder: Path, files: list[Path], dtype: torch.dtype | None) -> nn.Module:
    """The causal LM of a folder; where its stored dtype stays, weights are views of the mapped files.

    Args:
        folder: with config.json.
        files: its safetensors files.
        dtype: convert to this.

    Raises:
        MasaError: config.json describes no causal LM, or the files do not hold exactly its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # a strange value may fail anywhere in the model's class
        raise _no_model(folder, error) from error
    stored = heads(files, "fetch it again")
    _refuse_quantised(folder, config)
    prefix = next((p for p in PREFIXES if stored and all(name.startswith(p) for name in stored)), None)
    mapping = {f"^{re.escape(prefix)}": ""} if prefix else None
    with quietly():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or _dtype(stored),
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
                key_mapping=mapping,
            )
        except Exception as error:
            raise _no_model(folder, error) from error
    _check_complete(folder, model, found)
    check_finite(model, folder)
    return _untied_as_stored(model).eval()


def _no_model(folder: Path, error: Exception) -> MasaError:
    return MasaError(f"{folder / 'config.json'} does not describe a causal LM of transformers: {error}")


def _dtype(stored: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]) -> torch.dtype | str:
    """The one dtype of all weights; of a file that mixes them, the one that holds all of their numbers."""
    found = {dtype for _, dtype in stored.values() if dtype is not None}
    return functools.reduce(torch.promote_types, found) if found else "auto"


def _refuse_quantised(folder: Path, config: Any) -> None:
    """Weights that are no plain numbers: scales beside them are not to be lost."""
    given = getattr(config, "quantization_config", None)
    if given is None:
        return
    method = given.get("quant_method") if isinstance(given, Mapping) else getattr(given, "quant_method", None)
    if method == METHOD:
        raise MasaError(
            f"{folder} is a factored folder of masa, whose matrices are not stored; write them out first: masa export "
            f"{folder} --out PLAIN."
        )
    raise MasaError(
        f"{folder} is quantised ({getattr(method, 'value', method)}), and only plain float weights are calibrated and "
        "compressed. Load it with transformers, call model.dequantize(), save that, and give its folder."
    )


def _check_complete(folder: Path, model: nn.Module, found: Mapping[str, Any]) -> None:
    wrong = sorted(found.get("mismatched_keys") or ())
    if wrong:
        key, stored, expected = wrong[0]
        raise MasaError(f"{folder}: {key} has shape {tuple(stored)}, but config.json says {tuple(expected)}.")
    if missing := sorted(found["missing_keys"]):
        raise MasaError(f"{folder} lacks weights that its config.json needs: {missing[:3]} ({len(missing)} in all).")
    if unused := sorted(found["unexpected_keys"]):
        raise MasaError(
            f"{folder} holds weights that its config.json has no place for: {unused[:3]} ({len(unused)} in all). Mend "
            "config.json, or remove them."
        )


def not_finite(tensor: torch.Tensor) -> bool:
    """Whether it holds NaN or infinity; no mask of its size is made."""
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return False
    low, high = torch.aminmax(tensor.detach())
    return not bool(torch.isfinite(low) and torch.isfinite(high))


def check_finite(model: nn.Module, where: Path) -> None:
    """Look at every number once.

    Raises:
        MasaError: one is NaN or infinite; the tensor and its file are named.
    """
    for name, tensor in model.state_dict().items():
        if not_finite(tensor):
            files = sorted(where.glob("*.safetensors")) if where.is_dir() else []
            holder = next((file for file in files if name in heads([file])), where)
            raise MasaError(f"{holder}: {name} holds NaN or infinity; fetch the model again, or save it without.")


def _untied_as_stored(model: nn.Module) -> nn.Module:
    """A head that is stored and differs from the embeddings stays, and the configuration says so from now on."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model
