"""Model folders: Hugging Face's ``config.json`` and safetensors files, every parameter once.

Coefficient MLPs and block embeddings are not stored, only the C that they produce.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from masa.errors import MasaError
from masa.runs.files import whole_files
from masa.sharing import description as described
from masa.sharing.bank import SharedProjections
from masa.sharing.compressed_sources import EARLIER_NAMES
from masa.sharing.runtime import check_runtime
from masa.sharing.saving import attach_saving, refuse_adapters
from masa.sharing.share import Sharing
from masa.sharing.weight_files import WEIGHTS, heads, weight_files


def save(model: nn.Module, directory: str | Path, **options: Any) -> Path:
    """Write a model folder, which is what ``model.save_pretrained`` writes; its files appear whole or not at all.

    Args:
        model: what :func:`masa.share` or :func:`masa.compress` returned (or a plain Hugging Face model).
        directory: made if needed.
        **options: of ``save_pretrained``, such as ``max_shard_size="2GB"``.

    Returns:
        The directory.

    Raises:
        MasaError: a model without a Hugging Face configuration, from which it could not be built again, one that wears
            an adapter, or a full disk.
    """
    if not hasattr(getattr(model, "config", None), "save_pretrained"):
        raise MasaError(
            f"{type(model).__name__} has no Hugging Face config. Build timm models with masa.models.timm_vit.build, or "
            "store masa.fold(model).state_dict()."
        )
    refuse_adapters(model)
    if any(isinstance(module, SharedProjections) for module in model.modules()):
        attach_saving(model)  # a part of it may have been shared by itself
    directory = Path(directory)
    with whole_files(directory, directory / WEIGHTS) as folder, quietly():
        model.save_pretrained(folder, **options)
        new = {file.name for file in folder.iterdir()}
    for old in directory.glob("model*.safetensors*"):
        if old.name not in new:
            old.unlink()
    (directory / described.EARLIER).unlink(missing_ok=True)
    return directory


def load(
    directory: str | Path, dtype: torch.dtype | None = None, *, runtime: str = "auto", **options: Any
) -> nn.Module:
    """Read a model folder written by :func:`save` or ``save_pretrained``, in ``eval()`` mode.

    Args:
        directory: folder with ``config.json`` and safetensors files, and ``masa.json`` if an earlier version wrote it.
        dtype: convert the parameters to this; by default what is stored.
        runtime: "factored" keeps the shared sources and multiplies through them, "folded" makes a plain model of them,
            "auto" is "factored" and says in one line where "folded" would be faster (:mod:`masa.sharing.runtime`).
        **options: of ``from_pretrained``, such as ``device_map="auto"``.

    Returns:
        A model of the class that was saved: causal LM, classifier, detector or one without a head.

    Raises:
        MasaError: a file that is missing, truncated or does not belong to the others; the message names it.
    """
    directory = Path(directory)
    check_runtime(runtime)
    description, config = described.read(directory), _config(directory)
    files = weight_files(directory)
    stored = heads(files)
    dtypes = {found for _, found in stored.values() if found is not None}
    earlier = (directory / described.EARLIER).is_file()
    if earlier and description and description["sources"]:
        config.quantization_config = {"quant_method": described.METHOD} | description
    if description and description["sources"]:
        config.runtime = runtime
    vars(config).pop(described.PLAIN, None)
    options["dtype"] = dtype or (dtypes.pop() if len(dtypes) == 1 else "auto")
    if earlier:
        vars(config).pop("transformers_weights", None)
        options["key_mapping"] = _earlier_names(stored)
    with quietly():
        try:
            model, found = _class_of(config).from_pretrained(
                directory, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
        except MasaError:
            raise
        except Exception as error:  # a strange value may fail anywhere in the model's class
            raise MasaError(f"{directory}: no model can be read ({type(error).__name__}: {error}).") from error
    _check(found, files[0] if len(files) == 1 else directory)
    if earlier:
        vars(model).pop("_weight_conversions", None)  # it is saved under the names of today
    if description and description["dense_attention"] is not None and not description["sources"]:
        spec = described.read_spec(description["spec"], directory / "config.json")
        model.sharing = Sharing(spec, description["dense_attention"])
        attach_saving(model)
    return model.eval()


def _config(directory: Path) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # a strange value may fail anywhere in the configuration's class
        raise MasaError(f"{directory / 'config.json'} cannot be read as a model configuration: {error}") from error


def _class_of(config: Any) -> Any:
    """The class of transformers that was saved; in folders that do not say, the one that this configuration has."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    vision = (transformers.AutoModelForImageClassification, transformers.AutoModelForObjectDetection)
    return next((auto for auto in vision if type(config) in auto._model_mapping), transformers.AutoModelForCausalLM)


def _earlier_names(stored: Iterable[str]) -> dict[str, str]:
    """Names of an earlier version, as patterns -> names of today."""
    names = {}
    for name in stored:
        for old, new in EARLIER_NAMES.items():
            if re.search(old, name):
                names[f"^{re.escape(name)}$"] = re.sub(old, new, name)
    return names


def _check(found: Mapping[str, Any], where: Path) -> None:
    """Raise :class:`MasaError` if a tensor is missing, of another shape, or nobody's."""
    if found["mismatched_keys"]:
        name, shape, expected = sorted(found["mismatched_keys"])[0]
        raise MasaError(f"{where}: {name} has shape {tuple(shape)}, expected {tuple(expected)}.")
    missing, extra = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if missing or extra:
        raise MasaError(
            f"{where}: the weights do not belong to config.json: "
            f"missing {missing[:3] or 'nothing'}{' …' * (len(missing) > 3)}, "
            f"unexpected {extra[:3] or 'nothing'}{' …' * (len(extra) > 3)}."
        )


@contextmanager
def quietly() -> Iterator[None]:
    """No progress bar, and no report of what is an error here."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
