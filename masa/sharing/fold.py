"""Fold: every shared matrix written out, in a plain model that needs no masa."""

from __future__ import annotations

import copy

import torch
from torch import nn

from masa.errors import MasaError
from masa.sharing.bank import SharedProjections, is_hooked
from masa.sharing.embeddings import write_out
from masa.sharing.fused import FusedLinear
from masa.sharing.linears import SharedLinear, SharedWeight, like
from masa.sharing.saving import adapted, detach_saving
from masa.sharing.stacks import decoder, stacks


@torch.no_grad()
def fold(model: nn.Module) -> nn.Module:
    """Write every shared matrix out and return a plain model of the original class; ``model`` is not changed.

    The result has ordinary linear layers, no trace of masa, and the logits of ``model``, but for rounding. Coefficient
    MLPs, block embeddings and the training mode are left behind (the result is in ``eval()``). An adapter that the
    model wears (PEFT's LoRA and others that can be merged) is merged into the matrices.

    Args:
        model: what :func:`masa.share`, :func:`masa.compress` or :func:`masa.load` returned, by itself or in PEFT's
            wrapper; a plain model is copied.

    Returns:
        A new model on the same device and of the same dtype; every W (out, in) of
        ``W_l = sum_s c_ls D_s`` (arXiv 2508.04581, Eq. 2) is a parameter of its own.

    Raises:
        MasaError: an architecture that masa does not know, an adapter that cannot be merged, or a model of which parts
            are kept elsewhere (offloaded to the CPU or to disk).
    """
    if is_hooked(model) and any(p.is_meta for p in model.parameters()):
        raise MasaError(
            "Parts of this model are kept on the CPU or on disk and fetched while it runs, so that it cannot be copied "
            "as it is. Load it again without a device map, and fold that."
        )
    plain = copy.deepcopy(model)
    fold_in_place(plain)
    plain = _merge_adapters(plain)
    if not stacks(plain):
        decoder(plain)  # raises
    return plain.eval()


@torch.no_grad()
def fold_in_place(model: nn.Module) -> None:
    """Put a layer of the family's own kind into every place that reads a shared matrix, and take the sources away."""
    for name, module in list(model.named_modules()):
        if isinstance(module, SharedLinear):
            written = like(module.replaced, module.computed().detach().clone(), module.bias)
            model.set_submodule(name, written.train(module.training))
        elif isinstance(module, FusedLinear) and any(isinstance(part, SharedWeight) for part in module.parts()):
            model.set_submodule(name, module.join().train(module.training))
    for module in list(model.modules()):
        shared = module._modules.get("shared")  # not getattr, which PEFT's wrappers pass on
        if isinstance(shared, SharedProjections):
            shared.detach(module)
        vars(module).pop("sharing", None)
    write_out(model)
    detach_saving(model)


def _merge_adapters(model: nn.Module) -> nn.Module:
    """Merge what the model wears into its matrices and take PEFT's wrapper off."""
    wearing = adapted(model)
    wrapped = hasattr(model, "get_base_model") and hasattr(model, "peft_config")
    if not wearing and not wrapped:
        return model
    try:
        if wrapped:
            return model.merge_and_unload()
        for name, module in wearing:
            module.merge()
            model.set_submodule(name, module.get_base_layer())
    except (AttributeError, NotImplementedError, ValueError, RuntimeError) as error:
        kind = type(next(iter(model.peft_config.values()))).__name__ if hasattr(model, "peft_config") else "an adapter"
        raise MasaError(
            f"This model wears {kind}, which cannot be merged into its matrices ({error}). Fold the model without it."
        ) from error
    for name in ("peft_config", "_hf_peft_config_loaded"):
        vars(model).pop(name, None)
    return model
