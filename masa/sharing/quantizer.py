"""How transformers' own loaders read a factored folder: masa is registered there as a way of storing weights.

``AutoModel….from_pretrained``, ``pipeline``, ``Trainer`` and all that is built on them meet our ``quant_method`` in
``config.json`` and come here: the shared sources are put into the empty model before any weight is read, and what is
missing afterwards is an error. Nothing of the registration stays on the loaded model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from masa.errors import MasaError
from masa.sharing import compressed_sources as _compressed  # noqa: F401 (registers the kinds that compression solves for)
from masa.sharing import part_sources as _parts  # noqa: F401 (likewise)
from masa.sharing import variant_sources as _variants  # noqa: F401 (and those that are not the paper's)
from masa.sharing.bank import SharedProjections, is_hooked
from masa.sharing.description import EARLIER, METHOD, check, read_spec
from masa.sharing.embeddings import put_embeddings
from masa.sharing.linears import computed_layers
from masa.sharing.packed import Packed
from masa.sharing.projections import bank_of
from masa.sharing.runtime import check_runtime, choose, folded
from masa.sharing.share import Sharing, install
from masa.sharing.weight_files import heads
from masa.sharing.weight_sources import from_config


@register_quantization_config(METHOD)
class MasaConfig(QuantizationConfigMixin):
    """``quantization_config`` of a factored folder: how its matrices are made (:mod:`masa.sharing.description`)."""

    def __init__(self, quant_method: str = METHOD, **description: Any) -> None:
        self.quant_method = quant_method
        vars(self).update(check(description, "quantization_config in config.json"))


@register_quantizer(METHOD)
class MasaQuantizer(HfQuantizer):
    """Called by ``from_pretrained`` around the reading of weights."""

    def update_attn_implementation(self, config: Any) -> Any:
        """The first sight of the configuration, before files are looked for: they are where they always are."""
        vars(config).pop("transformers_weights", None)
        return config

    update_tp_plan = update_attn_implementation  # what is called at this place in transformers 5.17

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if getattr(model.config, "distributed_config", None) is not None:
            raise MasaError(
                "Tensor parallelism splits the matrices of each layer, and here several layers are made of one. Write "
                "a plain folder first: masa export FOLDER --out PLAIN, or masa.fold(model).save_pretrained(PLAIN)."
            )
        self.runtime = check_runtime(vars(model.config).pop("runtime", "auto"))
        where = model.config.name_or_path
        put_sources(model, vars(self.quantization_config), where)
        files = [Path(file) for file in kwargs.get("checkpoint_files") or ()]
        earlier = self.quantization_config.format == 1  # with other names, which masa.load knows
        if files and not earlier and all(file.suffix == ".safetensors" for file in files):
            check_stored(
                model,
                {name: shape for name, (shape, _) in heads(files).items()},
                files[0] if len(files) == 1 else where,
            )
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config"):
                vars(module.config).pop("_is_quantized", None)
        vars(model).pop("_keys_to_ignore_on_load_unexpected", None)
        check_loaded(model)
        if choose(model, self.runtime) == "folded":
            folded(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def put_sources(model: nn.Module, description: Mapping[str, Any], where: str | Path) -> None:
    """Put the shared sources of a description into a model without weights.

    Raises:
        MasaError: the description does not fit the model.
    """
    try:
        with torch.device("meta"):
            sources = [from_config(source) for source in description["sources"]]
        shared = SharedProjections(sources, description.get("layers"))
        shared.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))
        install(model, shared, description.get("stack"))
        if "embeddings" in description:
            put_embeddings(model, description["embeddings"])
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        file = EARLIER if description.get("format") == 1 else "config.json"
        raise MasaError(
            f"{where}: {file} describes shared matrices that this model cannot have ({type(error).__name__}: {error}); "
            "fetch or train it again."
        ) from error
    if description["dense_attention"] is not None:
        model.sharing = Sharing(read_spec(description["spec"], where), description["dense_attention"])
    base = f"{getattr(model, 'base_model_prefix', '')}."
    guards = {rf"(^|\.){re.escape(name.removeprefix(base))}\.weight$" for name in computed_layers(model)}
    model._keys_to_ignore_on_load_unexpected = {*(model._keys_to_ignore_on_load_unexpected or ()), *guards}


def check_stored(model: nn.Module, stored: Mapping[str, tuple[int, ...]], where: str | Path) -> None:
    """See, before anything is drawn, that a folder holds every tensor of its model.

    A head that is new to the model (another task's) is transformers' to draw, and it says so.

    Args:
        model: with its sources, on "meta".
        stored: name -> shape of what the folder holds.
        where: the file or folder.

    Raises:
        MasaError: tensors are missing, or one of the shared sources has another shape; some are named.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping  # which imports what imports this

    base = getattr(model, "base_model_prefix", "")
    whole = type(model).__name__ in (getattr(model.config, "architectures", None) or ()) or not hasattr(model, base)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    renamed = bool(get_model_conversion_mapping(model, add_legacy=False))  # the file may have other names then
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    sources = {f"shared.{name}" for name in bank_of(model).state_dict()}
    # what stands before these may be called otherwise in files
    stored = {**stored, **{tail: shape for name, shape in stored.items() if (tail := _of_bank(name)) in sources}}
    missing = []
    for name, tensor in model.state_dict().items():
        source = _of_bank(name) in sources
        names = (name, name.removeprefix(f"{base}."), f"{base}.{name}", *([_of_bank(name)] if source else []))
        shape = next((stored[n] for n in names if n in stored), None)
        if shape is None:
            if name not in tied and (whole or name.startswith(f"{base}.")) and (source or not renamed):
                missing += [] if any(pattern.search(name) for pattern in optional) else [name]
        elif source and shape != tuple(tensor.shape):
            raise MasaError(f"{where}: {name} has shape {shape}, expected {tuple(tensor.shape)}.")
    _refuse(missing, where)


def _of_bank(name: str) -> str:
    """A name from "shared." on, where shared sources are."""
    return "shared." + f".{name}".rpartition(".shared.")[2]


def check_loaded(model: nn.Module) -> None:
    """See afterwards that every parameter of the shared sources was read, whatever it was read from.

    Raises:
        MasaError: some were not, or a packed matrix has not as many positions as values; they are named.
    """
    shared = bank_of(model)
    if shared is None:
        return
    for name, module in shared.named_modules():
        if isinstance(module, Packed) and not module.positions.is_meta and not module.consistent():
            raise MasaError(
                f"{model.config.name_or_path}: shared.{name} has {module.count:,} values, and its positions "
                "are of another number: the file is damaged. Fetch it again, or save it again with masa.save."
            )
    if is_hooked(model):
        return  # parameters that were moved are new ones; their files were looked through before
    _refuse(
        [f"shared.{n}" for n, p in shared.named_parameters() if not getattr(p, "_is_hf_initialized", False)],
        model.config.name_or_path,
    )


def _refuse(missing: list[str], where: str | Path) -> None:
    if missing:
        raise MasaError(
            f"{where} does not hold all of its model: missing {sorted(missing)[:3]}{' …' * (len(missing) > 3)}. Fetch "
            "it again, or save it again with masa.save."
        )
