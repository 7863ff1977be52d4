"""GGUF files as models of transformers: all parts of a file, every tensor, and the configuration that it describes.

transformers' own reader drops what it has no name for (RoPE's scaling, windows, soft caps, the other parts of a split
file) and draws what is missing. Its table of tensors' names and its tokenizers are used here, its table of keys is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from masa.errors import MasaError
from masa.models.gguf_architectures import ARCHITECTURES
from masa.models.gguf_config import WAY_OUT, configuration

PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
"""llama.cpp's names of the parts of one file."""

_FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_NOT_READ = re.compile(
    r"(rope_freqs|rope_factors_(long|short))\.weight|.*\.rotary_emb\.inv_freq|blk\.\d+\.attn_rot_embd.*"
)


def parts_of(file: Path) -> list[Path]:
    """A file, or all parts of a split one, whichever of them is named.

    Raises:
        MasaError: there is no such file, it is no GGUF file, or a part is missing; the message names it.
    """
    if not file.is_file():
        raise MasaError(f"GGUF file {file} does not exist.")
    count = _contents(_opened(file)).get("split.count", 1)
    named = PART.fullmatch(file.name)
    if not isinstance(count, int) or count <= 1:
        return [file]
    if named is None or int(named["count"]) != count:
        raise MasaError(
            f"{file} is one of {count} parts, which are found by llama.cpp's names for them: call it "
            f"NAME-00001-of-{count:05}.gguf, and the others likewise."
        )
    parts = [file.parent / f"{named['stem']}-{number:05}-of-{count:05}.gguf" for number in range(1, count + 1)]
    if missing := [part.name for part in parts if not part.is_file()]:
        raise MasaError(f"{file} is one of {count} parts, and {', '.join(missing)} is missing in {file.parent}.")
    return parts


def read_gguf(file: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """A model without memory (on ``meta``) and its weights in float32, dequantised.

    Args:
        file: or any part of a split one.

    Raises:
        MasaError: a part, a key or a tensor is missing, is broken, or is not taken over; the message names it.
    """
    from transformers import AutoModelForCausalLM

    readers = [_opened(part) for part in parts_of(file)]
    values, tensors = _merged(file, readers)
    factors = {name: _dequantised(file, tensors[name]) for name in _FACTORS if name in tensors}
    shapes = {name: tuple(int(size) for size in reversed(t.shape)) for name, t in tensors.items()}
    try:
        config = configuration(file, values, shapes, factors)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    except MasaError:
        raise
    except Exception as error:  # a strange value may fail anywhere in the model's class
        raise MasaError(f"{file} cannot be read as a GGUF model: {_line(error)}") from error
    return model, _weights(file, values["general.architecture"], model, tensors)


def read_tokenizer(file: Path) -> Any:
    """The tokenizer of a GGUF file, by transformers; it is in the first part of a split one.

    Raises:
        MasaError: transformers cannot build it.
    """
    from transformers import PreTrainedTokenizerFast

    first = parts_of(file)[0]
    try:
        return PreTrainedTokenizerFast.from_pretrained(str(first.parent), gguf_file=first.name)
    except Exception as error:  # a broken file may fail anywhere in the reader
        raise MasaError(f"The tokenizer of {first} cannot be read: {_line(error)}") from error


def _merged(file: Path, readers: list[Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata of the first part, tensors of all."""
    every = [_contents(reader) for reader in readers]
    values, tensors = every[0], {}
    for number, (found, reader) in enumerate(zip(every, readers, strict=True)):
        if len(readers) > 1 and found.get("split.no", number) != number:
            raise MasaError(f"{file}: part {number + 1} says that it is part {found['split.no'] + 1}; fetch it again.")
        for tensor in reader.tensors:
            if tensor.name in tensors:
                raise MasaError(f"{file} holds the tensor {tensor.name} twice; fetch it again.")
            tensors[tensor.name] = tensor
    wanted = values.get("split.tensors.count", len(tensors))
    if len(readers) > 1 and wanted != len(tensors):
        raise MasaError(f"{file}: its parts hold {len(tensors)} tensors of {wanted}; fetch them again.")
    return values, tensors


def _weights(file: Path, arch: str, model: Any, tensors: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Name in the model -> values (float32); every tensor of the file and of the model is met once."""
    from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

    names = get_gguf_hf_weights_map(model, TensorProcessor(), model_type=arch)
    undo, config = ARCHITECTURES[arch].undo, model.config
    sizes = {"num_attention_heads": config.num_attention_heads}
    sizes["num_key_value_heads"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    expected, found = {name: tuple(t.shape) for name, t in model.state_dict().items()}, {}
    left = [name for name in tensors if name not in names and not _NOT_READ.fullmatch(name)]
    if left:
        raise MasaError(
            f"{file} holds tensors that {arch} has no place for here: {left[:3]} ({len(left)} in all). {WAY_OUT}"
        )
    for name, tensor in tensors.items():
        if name not in names:
            continue
        array = _dequantised(file, tensor)
        array = undo(array, name, sizes) if undo else array
        value = torch.from_numpy(array.copy())
        if tuple(value.shape) != expected[names[name]]:
            raise MasaError(f"{file}: {name} has shape {tuple(value.shape)}, its keys say {expected[names[name]]}.")
        if not torch.isfinite(value).all():
            raise MasaError(f"{file}: {name} holds NaN or infinity; fetch the model again.")
        found[names[name]] = value
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    if missing := sorted(set(expected) - set(found) - tied):
        known = {there: name for name, there in names.items()}
        lacks = [known.get(name, name) for name in missing]
        raise MasaError(f"{file} lacks weights of its model: {lacks[:3]} ({len(lacks)} in all).")
    return found


def _dequantised(file: Path, tensor: Any) -> Any:
    from gguf import dequantize

    try:
        return dequantize(tensor.data, tensor.tensor_type).astype("float32", copy=False)
    except (NotImplementedError, ValueError) as error:
        raise MasaError(
            f"{file}: {tensor.name} is stored as {tensor.tensor_type.name}, which gguf cannot read."
        ) from error


def _opened(file: Path) -> Any:
    from gguf import GGUFReader

    try:
        return GGUFReader(file)
    except Exception as error:  # a broken file may fail anywhere in the reader
        raise MasaError(f"{file} cannot be read as a GGUF model: {_line(error)}") from error


def _contents(reader: Any) -> dict[str, Any]:
    try:
        return {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError) as error:
        raise MasaError(f"The metadata of a GGUF file cannot be read: {error}; fetch it again.") from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
