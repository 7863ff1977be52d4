"""The optimisers that ``training.optimizer`` names. A new one is an entry of :data:`OPTIMIZERS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from masa.errors import unknown
from masa.models.recipes import LATER
from masa.sharing.parameters import hidden_matrices, parameter_groups

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """One optimiser.

    Attributes:
        make: from the model, its parameter groups, the recipe, and whether AdamW may be fused.
        sharded: whether it can train weights that are cut into parts (``parallel: fsdp``).
    """

    make: Callable[[nn.Module, Groups, Mapping[str, Any], bool], Optimizer]
    sharded: bool


def of(recipe: Mapping[str, Any]) -> tuple[str, Entry]:
    """The name and entry of a recipe's optimiser.

    Raises:
        MasaError: an unknown name.
    """
    name = recipe.get("optimizer", LATER["optimizer"])
    if name not in OPTIMIZERS:
        raise unknown("training.optimizer: value", name, OPTIMIZERS)
    return name, OPTIMIZERS[name]


def build(model: nn.Module, recipe: Mapping[str, Any], fused: bool = True) -> Optimizer:
    """The optimiser of a run, with every parameter that is trained in exactly one of its groups.

    Args:
        model: shared or plain.
        recipe: ``training`` of a run spec.
        fused: whether AdamW runs as one kernel.

    Raises:
        MasaError: an unknown optimiser.
    """
    return of(recipe)[1].make(model, parameter_groups(model, recipe), recipe, fused)


def _adamw(model: nn.Module, groups: Groups, recipe: Mapping[str, Any], fused: bool) -> Optimizer:
    return torch.optim.AdamW(groups, betas=tuple(recipe["adam_betas"]), fused=fused)


def _muon(model: nn.Module, groups: Groups, recipe: Mapping[str, Any], fused: bool) -> Optimizer:
    """Muon for the matrices of the blocks, whatever they are stored as, and AdamW for everything else.

    Learning rate and weight decay of a group stay its own: ``match_rms_adamw`` scales every update to the size that
    AdamW's have, so that both can be used with one rate and one schedule (Liu et al. 2025, arXiv 2502.16982).
    """
    hidden = hidden_matrices(model)
    muon = []
    for rows in sorted(set(hidden.values())):
        muon += _only(groups, {p for p, n in hidden.items() if n == rows}, matrices_in_rows=rows)
    others = _only(groups, set(model.parameters()) - set(hidden))
    return Together(Muon(muon, adjust_lr_fn="match_rms_adamw"), _adamw(model, others, recipe, fused))


def _only(groups: Groups, wanted: set[nn.Parameter], **more: Any) -> Groups:
    """Groups with some parameters alone, in the same order; none that is empty."""
    kept = [group | more | {"params": [p for p in group["params"] if p in wanted]} for group in groups]
    return [group for group in kept if group["params"]]


class Muon(torch.optim.Muon):
    """torch's Muon, also for parameters that hold several matrices, each of which is orthogonalised for itself.

    These are stacks (n, out, in) - MASA's atoms, low-rank factors, sets - and, in a group with ``matrices_in_rows`` of
    n, matrices (n * out, in) that stand below each other, as those of fused Q, K and V. A matrix moves as it would if
    it were a parameter of its own, to the same bits.
    """

    def __init__(self, params: Groups, **options: Any) -> None:
        super().__init__([{"params": []}], **options)  # torch refuses what is no matrix only here
        self.param_groups.clear()
        for group in params:
            self.add_param_group({"matrices_in_rows": 1} | group)

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], buffers: list[Tensor]
    ) -> bool:
        """Hand on matrices, as views, where torch hands on whole parameters."""
        whole: tuple[list[Tensor], ...] = ([], [], [])
        super()._init_group(group, *whole)
        parts = group["matrices_in_rows"]
        for matrices, tensors in zip((params, grads, buffers), whole, strict=True):
            for tensor in tensors:
                rows, columns = tensor.shape[-2:]
                matrices += tensor.view(-1, rows // parts, columns).unbind(0)
        return False


class Together(Optimizer):
    """Several optimisers as one: its groups are theirs, so schedules and checkpoints see a single optimiser.

    Args:
        optimizers: each of other parameters.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for optimizer in optimizers for group in optimizer.param_groups], {})
        self._hand_on()

    def _hand_on(self) -> None:
        """Let the optimisers use these groups and this state, which loading a checkpoint makes anew."""
        groups = iter(self.param_groups)
        for optimizer in self.optimizers:
            optimizer.param_groups = [next(groups) for _ in optimizer.param_groups]
            optimizer.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._hand_on()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss


OPTIMIZERS = {"adamw": Entry(_adamw, sharded=True), "muon": Entry(_muon, sharded=False)}
"""``training.optimizer`` -> how it is made."""
