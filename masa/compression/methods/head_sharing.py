"""DirectShare and PostShare (Cao et al. 2024, arXiv 2402.11819): layers reuse whole heads of earlier layers.

A unit is what cannot be separated: one head, or under grouped-query attention one key/value head with the query heads
that it serves (their rows of q, k and v, and their columns of o).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from masa.compression.base import Compressor, Problem, register, unreachable
from masa.compression.healing.training import autocast, batches, check_length, cosine
from masa.errors import MasaError
from masa.sharing.compressed_sources import SharedHeads
from masa.sharing.spec import ATTENTION
from masa.sharing.weight_sources import WeightSource

Unit = tuple[int, int]
"""(layer, key/value head)."""


@dataclass(frozen=True)
class Match:
    """Unit ``unit`` may read the heads of ``source``, which lies in an earlier layer."""

    unit: Unit
    source: Unit
    similarity: float


def heads_of(weight: Tensor, letter: str, units: int) -> Tensor:
    """The units' slices of a weight (out, in): (units, out / units, in), or of its columns for o."""
    if letter == "o":
        return weight.unflatten(1, (units, -1)).transpose(0, 1)
    return weight.unflatten(0, (units, -1))


def best_matches(problem: Problem, mode: str) -> list[Match]:
    """For every unit from the last layer to the second: the most similar unit of all earlier layers, best first.

    Args:
        mode: letters whose concatenated weights are compared by their cosine.
    """
    found, units = whole_heads(problem, mode), problem.shape.num_key_value_heads
    layers = len(found)
    gram = torch.zeros(layers * units, layers * units, dtype=torch.float64)
    for letter in mode:
        stacked = torch.cat([heads_of(problem.weight(letter, layer), letter, units) for layer in found])
        flat = stacked.flatten(1).float()
        gram += (flat @ flat.T).double().cpu()
    norms = gram.diagonal().clamp_min(1e-300).sqrt()
    cosine = gram / norms / norms[:, None]
    matches = []
    for i in reversed(range(1, layers)):
        rows = cosine[i * units : (i + 1) * units, : i * units]
        for head, (value, source) in enumerate(zip(*rows.max(dim=1), strict=True)):
            earlier, other = divmod(int(source), units)
            matches.append(Match((found[i], head), (found[earlier], other), float(value)))
    return sorted(matches, key=lambda match: -match.similarity)


def whole_heads(problem: Problem, mode: str = "") -> tuple[int, ...]:
    """The layers whose heads can be shared.

    Raises:
        MasaError: some of them have only a part of the projections, or rows that are not so many a head.
    """
    letters = "".join(dict.fromkeys(problem.projections + mode))
    layers, units = problem.same_layers(letters, "Sharing heads"), problem.shape.num_key_value_heads
    for letter in letters:
        rows = problem.shape.shapes[letter][letter == "o"]
        if rows % units:
            raise MasaError(f"Projection {letter!r} has {rows} rows, which are not the same for {units} heads of keys.")
    return layers


def choose(problem: Problem, matches: list[Match]) -> dict[str, list[Match]]:
    """The best matches that meet the budget; one more shares only some projections, to come close to it.

    Returns:
        Projection letter -> the matches that it uses.

    Raises:
        MasaError: even all matches save too little.
    """
    layers, units = len(whole_heads(problem)), problem.shape.num_key_value_heads
    cost = {letter: problem.numbers(letter) // units for letter in problem.projections}
    tables = len(cost) * layers * units
    least = problem.dense + tables - len(matches) * sum(cost.values())
    if least > problem.budget:
        raise unreachable(problem, least, "sharing every head of every layer but the first still stores")
    needed = problem.dense + tables - problem.budget
    whole, rest = divmod(needed, sum(cost.values()))
    subsets = itertools.chain.from_iterable(itertools.combinations(cost, n) for n in range(len(cost) + 1))
    partial = min((s for s in subsets if sum(cost[p] for p in s) >= rest), key=lambda s: sum(cost[p] for p in s))
    return {letter: matches[: whole + (letter in partial)] for letter in cost}


def roots(matches: list[Match]) -> dict[Unit, Unit]:
    """Where every shared unit finally reads: chains are followed to a unit that is not shared itself."""
    parent = {match.unit: match.source for match in matches}

    def root(unit: Unit) -> Unit:
        while unit in parent:
            unit = parent[unit]
        return unit

    return {unit: root(unit) for unit in parent}


@register("direct-share")
class DirectShare(Compressor):
    """Replace the units that resemble a unit of an earlier layer most.

    The budget is met to within one unit's smallest projection: the last unit shares as few projections as needed.

    Args:
        mode: letters compared, "qk" as published, or "q", "k", "v", "qkv", ...
    """

    needs_calibration = False

    def __init__(self, mode: str = "qk") -> None:
        self.mode = mode

    def train(self, problem: Problem, chosen: dict[str, list[Match]]) -> None:
        """Hook for training before heads are shared."""

    def prepare(self, problem: Problem) -> list[Match]:
        if not self.mode or set(self.mode) - set(ATTENTION):
            raise MasaError(f"mode must be made of the letters {', '.join(ATTENTION)}, got {self.mode!r}.")
        if set(problem.projections) - set(ATTENTION):
            raise MasaError(f"{self.name} shares attention heads; {problem.projections!r} has other projections.")
        return best_matches(problem, self.mode)

    @torch.no_grad()
    def solve(self, problem: Problem, prepared: list[Match]) -> list[WeightSource]:
        chosen = choose(problem, prepared)
        self.shared_ = {p: [[*m.unit, *m.source, round(m.similarity, 6)] for m in found] for p, found in chosen.items()}
        self.train(problem, chosen)
        return [self._source(problem, letter, roots(found)) for letter, found in chosen.items()]

    def _source(self, problem: Problem, letter: str, root: dict[Unit, Unit]) -> SharedHeads:
        layers, units = problem.layers_of(letter), problem.shape.num_key_value_heads
        everything = list(itertools.product(layers, range(units)))
        kept = {unit: i for i, unit in enumerate(unit for unit in everything if unit not in root)}
        shape, axis = problem.shape.shapes[letter], int(letter == "o")
        source = SharedHeads(letter, len(layers), shape, heads=len(kept), units=units, axis=axis)
        source.heads.data = torch.stack(
            [heads_of(problem.weight(letter, layer), letter, units)[head] for layer, head in kept]
        ).contiguous()
        index = [kept[root.get(unit, unit)] for unit in everything]
        source.index = nn.Buffer(
            torch.tensor(index, dtype=torch.int32).view(len(layers), units).to(source.heads.device)
        )
        return source


@register("post-share")
class PostShare(DirectShare):
    """DirectShare after a short training that pulls matched heads together; **not training-free**.

    Loss: ``(1 - pull) * LM + pull * mean over matches of sum_p ||W_p^unit - W_p^source||_F`` for p in q, k, v. All
    parameters of the model are trained, so the compressed model's FFNs and embeddings differ from the original's.

    Args:
        mode: as in :class:`DirectShare`; matches are those of the weights before training.
        steps: optimiser steps of ``problem.batch_size`` sequences of the calibration tokens, drawn anew each epoch.
        lr: peak learning rate, cosine to zero; AdamW, beta (0.9, 0.95), weight decay 0.1, as published.
        pull: weight of the second term.
        seed: of the order of the sequences.
        length: cut the sequences to this many tokens.
        dtype: "bfloat16" or "float16" to run under autocast; by default the model's own.

    Raises:
        MasaError: an argument is out of its range; in ``solve``: the loss is no longer finite.
    """

    needs_tokens = True
    changes_model = True

    def __init__(
        self,
        mode: str = "qk",
        steps: int = 100,
        lr: float = 5e-5,
        pull: float = 0.5,
        seed: int = 0,
        length: int | None = None,
        dtype: str | None = None,
    ) -> None:
        super().__init__(mode)
        if steps < 1 or not lr > 0 or not 0 <= pull <= 1:
            raise MasaError(
                f"{self.name}: steps must be at least 1, lr positive and pull between 0 and 1; got steps = {steps}, "
                f"lr = {lr}, pull = {pull}."
            )
        self.steps, self.lr, self.pull, self.seed, self.length, self.dtype = steps, lr, pull, seed, length, dtype

    def train(self, problem: Problem, chosen: dict[str, list[Match]]) -> None:
        parameters = list({id(p): p for p in problem.model.parameters()}.values())
        trainable = [p.requires_grad for p in parameters]
        for p in parameters:
            p.data = p.data.clone()  # a memory-mapped file is not written to
            p.requires_grad_(True)
        try:
            self._train(problem, chosen, parameters)
        finally:
            for p, flag in zip(parameters, trainable, strict=True):
                p.requires_grad_(flag)
                p.grad = None

    @torch.enable_grad()
    def _train(self, problem: Problem, chosen: dict[str, list[Match]], parameters: list[nn.Parameter]) -> None:
        tokens = problem.tokens
        assert tokens is not None
        optimiser = torch.optim.AdamW(parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=0.1)
        tokens, device = tokens[:, : check_length(self.length, tokens)], parameters[0].device
        order, context = batches(tokens, problem.batch_size, self.seed), autocast(device, self.dtype)
        self.losses_ = []
        for step in range(self.steps):
            problem.progress("post-training", step, self.steps)
            for group in optimiser.param_groups:
                group["lr"] = self.lr * cosine(step, self.steps)
            ids = next(order).to(device)
            with context:
                lm = problem.model(input_ids=ids, labels=ids, use_cache=False).loss
            apart = self._distance(problem, chosen)
            if not math.isfinite(lm.item()):
                raise MasaError(f"post-share: the loss became {lm.item()} at step {step}. Lower lr (now {self.lr}).")
            ((1 - self.pull) * lm + self.pull * apart).backward()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            self.losses_.append([round(lm.item(), 5), round(apart.item(), 5)])

    def _distance(self, problem: Problem, chosen: dict[str, list[Match]]) -> Tensor:
        units = problem.shape.num_key_value_heads
        terms: list[Tensor] = []
        for letter, matches in chosen.items():
            if letter == "o":
                continue
            found = {n: problem.family.at(n, letter).weight for n in problem.layers_of(letter)}
            heads = {n: heads_of(weight, letter, units) for n, weight in found.items()}
            terms += [(heads[m.unit[0]][m.unit[1]] - heads[m.source[0]][m.source[1]]).norm() for m in matches]
        pairs = max(map(len, chosen.values()))
        return torch.stack(terms).sum() / pairs if terms else torch.zeros(())
