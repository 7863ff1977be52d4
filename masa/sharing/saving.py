"""``save_pretrained`` of a model that shares: the same folder whoever calls it, masa.save, Trainer or the user.

transformers' own method writes the folder; here is what it is given: final coefficients in the place of the MLPs that
made them, a description in ``config.json``, and two guards against loaders that do not know masa.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.runs.files import whole_file
from masa.sharing.description import ELSEWHERE, METHOD, PLAIN
from masa.sharing.embeddings import few_bits_embeddings
from masa.sharing.linears import computed_layers
from masa.sharing.stacks import bank_of, stack_of, stacks


class SavePretrained:
    """What ``model.save_pretrained`` is while ``model`` shares.

    Args:
        model: whose method it is.
        owner: the model that has ``sharing``, of which ``model`` may be the decoder.
    """

    def __init__(self, model: nn.Module, owner: nn.Module) -> None:
        self.model, self.owner, self.as_trained = model, owner, False

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """As ``PreTrainedModel.save_pretrained``, same arguments.

        Raises:
            MasaError: the model wears an adapter, or the state that was handed in lacks a shared source.
        """
        model, method = self.model, type(self.model).save_pretrained
        if getattr(model, "_hf_peft_config_loaded", False):
            method(model, *args, **kwargs)  # which writes the adapter alone
            return
        refuse_adapters(model)
        bound = inspect.signature(method).bind(model, *args, **kwargs)
        given = bound.arguments
        folder = Path(given["save_directory"])
        push, extra = given.pop("push_to_hub", False), given.get("kwargs", {})
        given["state_dict"] = stored_tensors(model, given.get("state_dict"), self.as_trained)
        config, added = model.config, self.keys()
        for key, value in added.items():
            setattr(config, key, value)
        try:
            method(*bound.args, **bound.kwargs)
        finally:
            for key in added:
                delattr(config, key)
        if "quantization_config" in added and given.get("is_main_process", True) and (folder / "config.json").is_file():
            _point_elsewhere(folder / "config.json")
        if push:
            model.push_to_hub(extra.pop("repo_id", folder.name), **extra)

    def keys(self) -> dict[str, Any]:
        """What ``config.json`` says beside the model's own configuration."""
        stack = stack_of(self.model)
        found = (getattr(m, "sharing", None) for m in (self.owner, *stack.parents))
        sharing, shared = next((s for s in found if s is not None), None), bank_of(self.model)
        finals = [source.freeze_coefficients() for source in shared.values()] if shared is not None else []
        description = {
            "format": 2,
            "spec": sharing.spec.to_dict() if sharing else {"method": "vanilla"},
            "dense_attention": sharing.dense_attention if sharing else None,
            "sources": [{"kind": final.kind, **final.config()} for final in finals],
        }
        if not finals:
            return {PLAIN: description}
        more: dict[str, Any] = {}
        if shared.layers:
            more["layers"] = {letter: list(layers) for letter, layers in shared.layers.items()}
        if len(stacks(self.model)) > 1:
            more["stack"] = stack.path
        if more:
            description |= {"format": 3} | more
        if (embeddings := few_bits_embeddings(self.model)) is not None:
            description |= {"format": 4, "embeddings": embeddings}
        return {"quantization_config": {"quant_method": METHOD} | description, "runtime": "auto"}


@contextmanager
def as_trained(model: nn.Module) -> Iterator[None]:
    """Meanwhile ``save_pretrained`` writes what training goes on from, also where a folder would hold less.

    Only coefficients that an MLP makes are meant: such a folder is no model that could be loaded.
    """
    saver = vars(model).get("save_pretrained")
    if not isinstance(saver, SavePretrained):
        yield
        return
    saver.as_trained = True
    try:
        yield
    finally:
        saver.as_trained = False


def attach_saving(model: nn.Module) -> None:
    """Make ``save_pretrained`` of the model, and of those inside it down to its decoder, write what it shares."""
    for part in {id(m): m for m in (model, *stack_of(model).parents)}.values():
        if hasattr(type(part), "save_pretrained") and hasattr(part, "config"):
            part.save_pretrained = SavePretrained(part, model)


def detach_saving(model: nn.Module) -> None:
    """Undo :func:`attach_saving` in every part."""
    for part in model.modules():
        if isinstance(vars(part).get("save_pretrained"), SavePretrained):
            del part.save_pretrained


def adapted(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers that wear an adapter (PEFT), by name."""
    return [(n, m) for n, m in model.named_modules() if hasattr(m, "base_layer") and hasattr(m, "get_base_layer")]


def refuse_adapters(model: nn.Module) -> None:
    """Raise :class:`MasaError` if an adapter (PEFT) sits on a layer, whose tensors have other names then."""
    for name, module in adapted(model)[:1]:
        raise MasaError(
            f"{name} wears an adapter ({type(module).__name__}). Save the adapter by its own save_pretrained and "
            "the model without it (model.unload() gives it back), or merge both into a plain model: "
            "masa.fold(model)."
        )


def stored_tensors(
    model: nn.Module, given: dict[str, Tensor] | None = None, as_trained: bool = False
) -> dict[str, Tensor]:
    """What a folder stores: every parameter once, final coefficients, and a guard for every matrix that is computed.

    A guard has the name of the dense matrix and the shape (1,), so that a loader that looks for the matrix stops at
    its shape, and NaN, in case it does not.

    Args:
        model: shared, or plain.
        given: its state dict where it is not at hand in one piece, as gathered from several processes.
        as_trained: keep the MLPs that make coefficients, to go on training from them, in the place of what they make.

    Raises:
        MasaError: ``given`` lacks a tensor of a shared source.
    """
    state = dict(model.state_dict() if given is None else given)
    shared, dtype = bank_of(model), next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if shared is not None:
        prefix = next(name for name, module in model.named_modules() if module is shared) + "."
        for name, source in shared.items():
            final = source if as_trained else source.freeze_coefficients()
            if final is not source:
                state = {k: v for k, v in state.items() if not k.startswith(f"{prefix}{name}.")}
                state |= {f"{prefix}{name}.{k}": t for k, t in final.state_dict().items()}
            elif absent := [k for k in final.state_dict() if f"{prefix}{name}.{k}" not in state]:
                raise MasaError(
                    f"The state to be saved lacks {prefix}{name}.{absent[0]}, which several layers are made of."
                )
        for name in computed_layers(model):
            state[f"{name}.weight"] = torch.full((1,), torch.nan, dtype=dtype)
    return _untied(state, set(getattr(model, "all_tied_weights_keys", None) or {}))


def _untied(state: dict[str, Tensor], tied: set[str]) -> dict[str, Tensor]:
    """Copies of tensors that are one in memory, unless the configuration says so: else they would not be stored."""
    seen: dict[tuple, str] = {}
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.numel():
            continue
        key = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride())
        if key in seen and name not in tied and seen[key] not in tied:
            state[name] = tensor.clone()
        seen.setdefault(key, name)
    return state


def _point_elsewhere(path: Path) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": ELSEWHERE}
    with whole_file(path) as part:
        part.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
