"""How a model calls its blocks: what it gives to each, in what form each answers, and what it does after the last.

All of it is seen in the model's own forward pass, so that every block gets what its model gives it: its own mask (Gemma
2's layers have two kinds), its own position embeddings, per-layer inputs, positional arguments or named ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.projections import blocks, decoder

PROBE = 8
"""Tokens of the one sequence that a model is looked at with."""


@dataclass(frozen=True)
class Call:
    """What a block is called with, its hidden states apart."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    named: bool

    @classmethod
    def of(cls, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """Hidden states and the rest of a call.

        Raises:
            MasaError: it has no hidden states.
        """
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], kwargs, False)
        if isinstance(kwargs.get("hidden_states"), Tensor):
            return kwargs["hidden_states"], cls(args, {k: v for k, v in kwargs.items() if k != "hidden_states"}, True)
        raise MasaError(f"{type(block).__name__} is not called with hidden states: its model cannot be calibrated.")

    def run(self, block: nn.Module, hidden: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """What ``block`` makes of hidden states, everything of floating numbers converted to ``dtype`` if given."""
        given = self.args, self.kwargs
        args, kwargs = given if dtype is None else _map(partial(_cast, dtype), given)
        output = block(*args, hidden_states=hidden, **kwargs) if self.named else block(hidden, *args, **kwargs)
        return _hidden_of(block, output)

    def keeping(self, known: Callable[[Tensor], Tensor]) -> Call:
        """The same with equal tensors that are kept already; what can change stays the object that it is."""

        def kept(value: Any) -> Any:
            if isinstance(value, Tensor):
                return known(value)
            return tuple(map(kept, value)) if type(value) is tuple else value

        return Call(kept(self.args), {key: kept(value) for key, value in self.kwargs.items()}, self.named)


class Calls:
    """The blocks of a model as it calls them.

    Args:
        model: in ``eval()``, of an architecture that masa knows.
        ids: (n, T) tokens, of which the first :data:`PROBE` of one sequence go through the model once.

    Raises:
        MasaError: the model cannot run on tokens alone, or does not run its blocks one after the other.
    """

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model, self.home = model, decoder(model)
        self.blocks: Sequence[nn.Module] = list(blocks(model))
        self.probe, self._other = ids[:1, :PROBE], ids[-1:, 1 - PROBE :]
        self._rest: list[tuple[Any, ...] | None] = []  # of every block's answer, what follows the hidden states
        self.hidden_dtype = torch.float32
        self._look()

    @torch.no_grad()
    def _look(self) -> None:
        """Run the model and see how the blocks answer."""
        seen: list[nn.Module] = []

        def keep(block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            seen.append(block)
            self.hidden_dtype = _hidden_of(block, output).dtype
            self._rest.append(tuple(output[1:]) if isinstance(output, tuple | list) else None)

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        try:
            self.run(self.probe)
        finally:
            for handle in handles:
                handle.remove()
        if len(seen) != len(self.blocks) or any(a is not b for a, b in zip(seen, self.blocks, strict=True)):
            raise MasaError(
                f"{type(self.model).__name__} does not run each of its {len(self.blocks)} blocks once and in order."
            )

    def run(self, ids: Tensor) -> Tensor:
        """The last hidden states of tokens (n, T), from which the model's head would make its logits.

        Raises:
            MasaError: the model does not run on tokens alone, or not on so many.
        """
        found: list[Tensor] = []

        def stop(home: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            found.append(output if isinstance(output, Tensor) else output[0])
            raise _Reached

        handle = self.home.register_forward_hook(stop)
        try:
            with contextlib.suppress(_Reached):
                self.model(input_ids=ids, use_cache=False)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            what = f"{len(ids)} sequences of {ids.shape[1]} token ids"
            raise MasaError(f"{type(self.model).__name__} does not run on {what} alone: {error}") from error
        finally:
            handle.remove()
        return found[0] if found else ids

    def enter(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """What the first block is given for tokens (n, T), and what all of them are given beside; no block runs."""
        entered, calls = [], []

        def stop(hidden: Tensor, call: Call) -> Tensor:
            entered.append(hidden)
            calls.append(call)
            if len(calls) == len(self.blocks):
                raise _Reached
            return hidden

        with torch.no_grad(), self._passed_over(stop):
            self.run(ids)
        return entered[0], calls

    def leave(self, rows: Tensor) -> Tensor:
        """What the model without its head makes of the last block's output, (n, d) of n tokens."""
        with self._passed_over(self._ending_in(rows)):
            return self.run(self._of_one_token(rows)).flatten(0, 1)

    def logits(self, rows: Tensor) -> Tensor:
        """The logits (n, V) of the last block's output, (n, d) of n tokens; some models scale theirs, or cap them."""
        with self._passed_over(self._ending_in(rows)):
            return self.model(input_ids=self._of_one_token(rows), use_cache=False).logits.flatten(0, 1)

    def _of_one_token(self, rows: Tensor) -> Tensor:
        """As many sequences of one token as there are rows: no model has too few positions for them."""
        return self.probe[:, :1].expand(len(rows), 1)

    def _ending_in(self, rows: Tensor) -> Callable[[Tensor, Call], Tensor]:
        count = iter(range(1, len(self.blocks) + 1))
        return lambda hidden, call: rows[:, None] if next(count) == len(self.blocks) else hidden

    @contextlib.contextmanager
    def _passed_over(self, instead: Callable[[Tensor, Call], Tensor]) -> Iterator[None]:
        """Meanwhile no block runs: ``instead`` gives the hidden states that it would answer."""

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            answer, rest = instead(*Call.of(self.blocks[index], args, kwargs)), self._rest[index]
            return answer if rest is None else (answer, *rest)

        before = [vars(block).get("forward") for block in self.blocks]  # of whoever wrapped it, as accelerate does
        try:
            for index, block in enumerate(self.blocks):
                block.forward = partial(forward, index)
            yield
        finally:
            for block, own in zip(self.blocks, before, strict=True):
                vars(block).pop("forward", None)
                if own is not None:
                    block.forward = own

    def check(self, gradients: bool = False) -> None:
        """Compare the blocks run one after the other with the model run as a whole, on a few tokens.

        These are others, and fewer, than those that the answers' forms were seen with: what blocks hand on besides
        hidden states (T5's position bias) would be of those.

        Args:
            gradients: compare those at the first block's input, too, taken back block by block.

        Raises:
            MasaError: they differ: the model passes more from block to block than hidden states.
        """
        with frozen(self.model):
            pairs = zip(("", "gradients of "), self._one_by_one(gradients), self._whole(gradients), strict=False)
        tolerance = 1e-3 if self.hidden_dtype in (torch.float32, torch.float64) else 5e-2
        for what, ours, exact in pairs:
            unlike = ours.shape != exact.shape
            apart = 1.0 if unlike else float((ours - exact).float().norm() / exact.float().norm().clamp_min(1e-30))
            if apart > tolerance:  # a NaN is not: broken weights are named where they are met
                mend = " A calibration without gradients may do, for other methods." if what else ""
                raise MasaError(
                    f"{type(self.model).__name__} passes more from block to block than hidden states: {what}blocks run "
                    f"one by one are off by {apart:.1g}, so that they cannot be calibrated one at a time.{mend}"
                )

    def _whole(self, gradients: bool) -> list[Tensor]:
        """The model's output, and the gradient of a sum of it at the first block's input."""
        start: list[Tensor] = []

        def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            hidden, call = Call.of(block, args, kwargs)
            start.append(hidden.detach().requires_grad_(gradients))
            if call.named:
                return call.args, call.kwargs | {"hidden_states": start[0]}
            return (start[0], *call.args), kwargs

        handle = self.blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
        try:
            with torch.set_grad_enabled(gradients):
                end = self.run(self._other).flatten(0, 1)
                return [end.detach(), *(torch.autograd.grad(_weighed(end), start[0]) if gradients else ())]
        finally:
            handle.remove()

    def _one_by_one(self, gradients: bool) -> list[Tensor]:
        """The same, of blocks that know nothing of each other."""
        hidden, calls = self.enter(self._other)
        inputs = []
        with torch.no_grad():
            for block, call in zip(self.blocks, calls, strict=True):
                inputs.append(hidden)
                try:
                    hidden = call.run(block, hidden)
                except RuntimeError as error:
                    name = type(self.model).__name__
                    raise MasaError(f"{name}'s blocks cannot be calibrated one at a time: {error}") from error
        with torch.set_grad_enabled(gradients):
            last = hidden.flatten(0, 1).detach().requires_grad_(gradients)
            end = self.leave(last)
            if not gradients:
                return [end]
            gradient = torch.autograd.grad(_weighed(end), last)[0].view_as(hidden)
            for block, call, entered in reversed(list(zip(self.blocks, calls, inputs, strict=True))):
                x = entered.detach().requires_grad_()
                (gradient,) = torch.autograd.grad(call.run(block, x), x, gradient)
        return [end.detach(), gradient]


def _weighed(end: Tensor) -> Tensor:
    """A sum of numbers, each with a weight of its own, the same every time."""
    weights = torch.randn(end.shape, generator=torch.Generator().manual_seed(0))
    return (end * weights.to(end)).sum()


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter wants a gradient: they flow through activations alone."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in parameters:
            p.requires_grad_(True)


class _Reached(Exception):
    pass


def _hidden_of(block: nn.Module, output: Any) -> Tensor:
    hidden = output[0] if isinstance(output, tuple | list) else output
    if not isinstance(hidden, Tensor):
        raise MasaError(f"{type(block).__name__} answers with {type(hidden).__name__}, not with hidden states.")
    return hidden


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """The same tuples, lists and plain mappings with every tensor changed; other objects are as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if type(value) in (tuple, list):
        return type(value)(_map(change, part) for part in value)
    if type(value) is dict:
        return {key: _map(change, part) for key, part in value.items()}
    return value


def _cast(dtype: torch.dtype, tensor: Tensor) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor
