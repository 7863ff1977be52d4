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

from masa.errors import BEYOND, MasaError
from masa.models import quantised
from masa.runs.run import read_json
from masa.sharing.checkpoint import quietly
from masa.sharing.weight_files import heads, stored_tensor

_WRAPPER = "(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)"
WRAPPERS = {rf"^((module|{_WRAPPER})\.)+": ""} | {rf"({_WRAPPER}\.){{1,{9 - place}}}": "" for place in range(3)}
"""What torch.compile, DataParallel, FSDP and checkpointing put into names (up to three places) -> nothing."""


def read_folder(
    folder: Path, files: list[Path], dtype: torch.dtype | None, trust_remote_code: bool = False
) -> nn.Module:
    """The causal LM of a folder; where its stored dtype stays, weights are views of the mapped files.

    Quantised weights are multiplied out where transformers can do that on a CPU; then they are in memory.

    Args:
        folder: with config.json.
        files: its safetensors files.
        dtype: convert to this.
        trust_remote_code: run Python that the folder brings.

    Raises:
        MasaError: config.json describes no causal LM, or the files do not hold exactly its weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # a strange value may fail anywhere in the model's class
        raise _no_model(folder, error, trust_remote_code) from error
    stored = heads(files, "fetch it again")
    check_stored(files)
    method = quantised.method_of(config)
    options = quantised.options(folder, config, files) if method else {}
    if not method:
        quantised.refuse_bare(folder, files)
    wrapped = any(re.search(pattern, name) for name in stored for pattern in WRAPPERS)
    with quietly():
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=dtype or _dtype(stored),
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                ignore_mismatched_sizes=True,  # they are named below
                output_loading_info=True,
                key_mapping=WRAPPERS if wrapped else None,
                **options,
            )
        except Exception as error:
            if method:
                raise quantised.cannot(folder, method, str(error)) from error
            raise _no_model(folder, error, trust_remote_code) from error
    if method:
        quantised.forget(model, dtype or _dtype(stored))
    elif wrapped:
        _forget_wrappers(model)
    _check_complete(folder, model, found)
    check_finite(model, folder, dtype)
    return _untied_as_stored(model).eval()


def _no_model(folder: Path, error: Exception, trusted: bool) -> MasaError:
    path = folder / "config.json"
    try:
        config = read_json(path)
    except MasaError:  # transformers says what is wrong with it
        config = None
    if isinstance(config, dict) and config.get("auto_map") and not trusted:
        named = [
            name for value in config["auto_map"].values() for name in (value if isinstance(value, list) else [value])
        ]
        code = sorted({str(name).partition(".")[0] + ".py" for name in named if name})
        return MasaError(
            f"{folder} is of a kind that transformers reads with the folder's own Python alone ({', '.join(code)}). "
            "Look at it; if you trust it, say --trust-remote-code."
        )
    lines = str(error).splitlines() or ["no reason given"]
    said = " ".join(" ".join(lines[: 2 if lines[0].endswith(":") else 1]).split())
    said = f"it has no {said}" if isinstance(error, KeyError) else said
    return MasaError(f"{path} does not describe a causal LM of transformers: {said}")


def _forget_wrappers(model: nn.Module) -> None:
    """What was taken off the names is not put back when the model is saved; transformers could not."""
    renamings = vars(model).get("_weight_conversions") or ()
    kept = [one for one in renamings if not set(getattr(one, "source_patterns", ())) & set(WRAPPERS)]
    vars(model).pop("_weight_conversions", None)
    if kept:
        model._weight_conversions = kept


def check_stored(files: list[Path]) -> None:
    """See that no tensor is stored twice.

    Raises:
        MasaError: two shards hold one of the same name; the message names them.
    """
    holders: dict[str, Path] = {}
    for file in files:
        for name in heads([file], "fetch it again"):
            if name in holders:
                raise MasaError(f"{name} is stored in {holders[name]} and in {file.name}; fetch the model again.")
            holders[name] = file


def _dtype(stored: Mapping[str, tuple[tuple[int, ...], torch.dtype | None]]) -> torch.dtype | str:
    """The one dtype of all weights; of a file that mixes them, the one that holds all of their numbers."""
    found = {dtype for _, dtype in stored.values() if dtype is not None}
    return functools.reduce(torch.promote_types, found) if found else "auto"


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


def check_finite(model: nn.Module, where: Path, dtype: torch.dtype | None = None) -> None:
    """Look at every number once.

    Args:
        where: file or folder that it was read from.
        dtype: that it was converted to.

    Raises:
        MasaError: one is NaN or infinite; the tensor and its file are named.
    """
    for name, tensor in model.state_dict().items():
        if not_finite(tensor):
            files = sorted(where.glob("*.safetensors")) if where.is_dir() else []
            holder = next((file for file in files if name in heads([file])), None)
            if dtype is not None and holder is not None and not not_finite(stored_tensor(holder, name)):
                said = str(dtype).removeprefix("torch.")
                raise MasaError(f"{holder}: {name} has numbers that {said} cannot hold; {BEYOND}.")
            raise MasaError(
                f"{holder or where}: {name} holds NaN or infinity; fetch the model again, or save it without."
            )


def _untied_as_stored(model: nn.Module) -> nn.Module:
    """A head that is stored and differs from the embeddings stays, and the configuration says so from now on."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config, "tie_word_embeddings", False)
    if tied and head is not None and head.weight is not embeddings.weight:
        model.config.tie_word_embeddings = False
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return model
