"""Factored checkpoints: Hugging Face's ``config.json``, our ``masa.json`` and one safetensors file.

Every parameter is stored once. Coefficient MLPs and block embeddings are not stored, only the C that they produce.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from masa.errors import MasaError
from masa.runs.files import whole_file
from masa.sharing import compressed_sources as _compressed  # noqa: F401 (registers the kinds that compression solves for)
from masa.sharing.compression_spec import CompressionSpec
from masa.sharing.projections import SharedProjections, decoder
from masa.sharing.share import Sharing, install
from masa.sharing.spec import SharingSpec
from masa.sharing.weight_sources import from_config

FORMAT = 1
WEIGHTS, DESCRIPTION = "model.safetensors", "masa.json"
ELSEWHERE = "factored-by-masa--read-it-with-masa.load-or-run-masa-export.safetensors"
"""Where ``config.json`` says that the weights are, a file that does not exist: transformers' own loaders stop with its
name, which is the message, before they draw a weight. Else they would leave all attention random and exit with 0."""


def save(model: nn.Module, directory: str | Path) -> Path:
    """Write a factored checkpoint; files appear whole or not at all.

    Args:
        model: what :func:`masa.share` returned (or a plain Hugging Face model, stored as vanilla).
        directory: made if needed.

    Returns:
        The directory.

    Raises:
        MasaError: a model without a Hugging Face configuration, from which it could not be built again.
    """
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise MasaError(
            f"{type(model).__name__} has no Hugging Face config. Build timm models with masa.models.timm_vit.build, or "
            "store masa.fold(model).state_dict()."
        )
    directory = Path(directory)
    sharing = getattr(model, "sharing", None)
    shared = getattr(decoder(model), "shared", None)
    tensors = _unique_tensors(model)
    sources: list[dict[str, Any]] = []
    if isinstance(shared, SharedProjections):
        prefix = _prefix(model)
        tensors = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
        for name, source in shared.items():
            final = source.freeze_coefficients()
            sources.append({"kind": final.kind, **final.config()})
            tensors |= {f"{prefix}{name}.{k}": t.detach() for k, t in final.state_dict().items()}
    description = {
        "format": FORMAT,
        "spec": sharing.spec.to_dict() if sharing else {"method": "vanilla"},
        "dense_attention": sharing.dense_attention if sharing else None,
        "sources": sources,
    }
    with whole_file(directory / "config.json") as path:
        model.config.save_pretrained(path.parent)
        if sources:
            config = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": ELSEWHERE}
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    with whole_file(directory / WEIGHTS) as path:
        save_file({k: t.contiguous() for k, t in tensors.items()}, path)
    with whole_file(directory / DESCRIPTION) as path:
        path.write_text(json.dumps(description, indent=2) + "\n")
    return directory


def load(directory: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """Read a factored checkpoint written by :func:`save`, in ``eval()`` mode.

    Args:
        directory: folder with ``config.json``, ``masa.json`` and ``model.safetensors``.
        dtype: convert the parameters to this; by default what is stored.

    Raises:
        MasaError: a file that is missing, truncated or does not belong to the others; the message names it.
    """
    from accelerate import init_empty_weights
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        AutoModelForImageClassification,
        AutoModelForObjectDetection,
    )

    directory = Path(directory)
    for name in ("config.json", DESCRIPTION, WEIGHTS):
        if not (directory / name).is_file():
            raise MasaError(
                f"{directory / name} is missing: a factored checkpoint has config.json, {DESCRIPTION} and {WEIGHTS}. "
                "Write one with masa.save(model, directory)."
            )
    description = _read_description(directory / DESCRIPTION)
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        vars(config).pop("transformers_weights", None)
    except Exception as error:  # a strange value may fail anywhere in the configuration's class
        raise MasaError(f"{directory / 'config.json'} cannot be read as a model configuration: {error}") from error
    with init_empty_weights(include_buffers=False):
        vision = (AutoModelForImageClassification, AutoModelForObjectDetection)
        auto = next((kind for kind in vision if type(config) in kind._model_mapping), AutoModelForCausalLM)
        try:
            model = auto.from_config(config, trust_remote_code=False)
            if description["sources"]:
                install(model, SharedProjections(from_config(source) for source in description["sources"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MasaError(
                f"{directory}: no model can be built from config.json and {DESCRIPTION} ({type(error).__name__}: "
                f"{error}); fetch or train it again."
            ) from error
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise MasaError(f"{directory / WEIGHTS} is corrupt or truncated ({error}); fetch or train it again.") from error
    _assign(model, tensors, directory / WEIGHTS)
    if description["dense_attention"] is not None:
        spec = _read_spec(description["spec"], directory / DESCRIPTION)
        model.sharing = Sharing(spec, description["dense_attention"])
    for parameter in model.parameters() if dtype else ():
        parameter.data = parameter.data.to(dtype)  # not model.to(dtype), which would round RoPE's buffers too
    return model.eval()


def _prefix(model: nn.Module) -> str:
    """Name of the bank in ``model``'s state dict, e.g. "model.shared."."""
    shared = decoder(model).shared
    return next(name for name, module in model.named_modules() if module is shared) + "."


def _unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied tensors under their first name only."""
    unique: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach()
    return unique


def _read_spec(data: dict[str, Any], path: Path) -> SharingSpec | CompressionSpec:
    """A compressed model's spec has a reduction, a shared one's has not."""
    if "reduction" not in data:
        return SharingSpec.coerce(data)
    try:
        return CompressionSpec(**data)
    except TypeError as error:
        raise MasaError(f"{path}: {error}.") from error


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise MasaError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        found = description.get("format") if isinstance(description, dict) else type(description).__name__
        raise MasaError(f"{path} has format {found!r}; this version of masa reads format {FORMAT}.")
    if missing := {"spec", "dense_attention", "sources"} - set(description):
        raise MasaError(f"{path} lacks {', '.join(sorted(missing))}.")
    return description


def _assign(model: nn.Module, tensors: dict[str, Tensor], path: Path) -> None:
    wanted = model.state_dict()
    tied = {name for name in getattr(model, "all_tied_weights_keys", None) or {} if name not in tensors}
    missing = sorted(set(wanted) - set(tensors) - tied)
    extra = sorted(set(tensors) - set(wanted))
    if missing or extra:
        raise MasaError(
            f"{path} does not belong to its config.json and {DESCRIPTION}: "
            f"missing {missing[:3] or 'nothing'}{' …' * (len(missing) > 3)}, "
            f"unexpected {extra[:3] or 'nothing'}{' …' * (len(extra) > 3)}."
        )
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise MasaError(f"{path}: {name} has shape {tuple(tensor.shape)}, expected {tuple(wanted[name].shape)}.")
    model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
