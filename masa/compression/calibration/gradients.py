"""Second moments of the loss's gradients at the outputs of the projections: how much an output error matters.

With ``G = E[g g^T]`` and ``H = E[x x^T]`` a small change dW of a weight raises the loss by about
``tr(G dW H dW^T) / 2`` nats a token, the Kronecker-factored Fisher approximation (Martens and Grosse 2015,
arXiv 1503.05671). Labels are drawn from the model's own predictions, so this measures the divergence from the model
itself and needs no labels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from masa.compression.calibration.statistics import Calibration
from masa.errors import MasaError
from masa.sharing.projections import decoder, family_of


@torch.enable_grad()
def add_gradients(
    calibration: Calibration,
    model: nn.Module,
    tokens: Tensor,
    projections: str,
    batch_size: int,
    progress: Callable[[str, int, int], None],
    seed: int = 0,
) -> None:
    """Add ``gradient.q`` and so on, G (out, out) in float64, to every layer's statistics.

    The whole model runs forward and backward: memory holds its activations for one batch.

    Args:
        calibration: receives the statistics.
        model: the model that it belongs to.
        tokens: (n, T) sequences to use.
        projections: letters.
        batch_size: sequences at once.
        progress: called with ("gradients", done, of).
        seed: of the labels drawn.

    Raises:
        MasaError: a gradient is not finite; the message names layer and projection.
    """
    paths, blocks = dict(family_of(model).paths), decoder(model).layers
    grams: dict[tuple[str, int], Tensor] = {}

    def watch(key: tuple[str, int]) -> Callable[..., None]:
        def add(gradient: Tensor) -> None:
            g = gradient.detach().flatten(0, -2).float()
            product = (g.T @ g).double()
            grams[key] = grams[key] + product if key in grams else product

        def forward(module: nn.Module, args: Any, output: Tensor) -> None:
            output.register_hook(add)

        return forward

    parameters = list({id(p): p for p in model.parameters()}.values())
    flags = [p.requires_grad for p in parameters]
    for p in parameters:  # gradients flow through activations alone, from the embeddings on
        p.requires_grad_(False)
    handles = [model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_(True))]
    for layer, block in enumerate(blocks):
        handles += [block.get_submodule(paths[p]).register_forward_hook(watch((p, layer))) for p in projections]
    generator = torch.Generator(device=tokens.device).manual_seed(seed)
    try:
        for start in range(0, len(tokens), batch_size):
            progress("gradients", start, len(tokens))
            ids = tokens[start : start + batch_size].to(model.get_input_embeddings().weight.device)
            logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1).float()
            drawn = torch.multinomial(logits.detach().softmax(-1).to(tokens.device), 1, generator=generator)
            nn.functional.cross_entropy(logits, drawn.flatten().to(logits.device), reduction="sum").backward()
        progress("gradients", len(tokens), len(tokens))
    finally:
        for handle in handles:
            handle.remove()
        for p, flag in zip(parameters, flags, strict=True):
            p.requires_grad_(flag)
    for layer in range(len(blocks)):
        for p in projections:
            if not torch.isfinite(grams[p, layer]).all():
                raise MasaError(f"NaN or infinity in the gradients at the output of {p!r} of layer {layer}.")
        calibration.add(layer, {f"gradient.{p}": grams[p, layer] / tokens.numel() for p in projections})
    calibration.gradient_samples = len(tokens)
