"""Embeddings with few bits, and the head that reads the same table: a row is written out for a token that asks for it.

The table is a :class:`~masa.sharing.grouped.Grouped` whose rows are whole groups. A head of its own, which shares
nothing with the embeddings, is a table of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from masa.errors import MasaError
from masa.sharing.grouped import BITS, GROUPS, Grouped
from masa.sharing.products import on_device_of

CHUNK = 4096
"""Words whose rows are written out at once for the head."""


class FewBitsEmbedding(nn.Module):
    """As :class:`torch.nn.Embedding`, a word's row (d) for its number."""

    def __init__(self, words: int, width: int, bits: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = words, width
        self.table = Grouped((words, width), bits, group_of(width, bits))

    @property
    def weight(self) -> Tensor:
        """All rows, written out for who asks (V, d)."""
        return self.table()

    def forward(self, words: Tensor) -> Tensor:
        return self.table.rows(words.flatten()).view(*words.shape, self.embedding_dim)


class FewBitsHead(nn.Module):
    """As the :class:`torch.nn.Linear` that makes logits (…, V), from the table of the embeddings or one of its own.

    Args:
        table: of an embedding, whose it stays.
        bias: of the words, or None.
        words, width, bits: of a table of its own, without ``table``.
    """

    def __init__(
        self,
        table: Grouped | None,
        bias: nn.Parameter | None = None,
        words: int = 0,
        width: int = 0,
        bits: int = 8,
    ) -> None:
        super().__init__()
        if table is None:
            self.own = Grouped((words, width), bits, group_of(width, bits))
        else:
            object.__setattr__(self, "_table", table)
        self.bias = bias
        self.out_features, self.in_features = self.table.shape

    @property
    def table(self) -> Grouped:
        return self.own if "own" in self._modules else self._table

    @property
    def weight(self) -> Tensor:
        """All rows, written out for who asks (V, d)."""
        return self.table()

    def forward(self, x: Tensor) -> Tensor:
        x = on_device_of(self.table.numbers, x)
        starts = range(0, self.out_features, CHUNK)
        found = [nn.functional.linear(x, self.table.rows(slice(start, start + CHUNK)).to(x.dtype)) for start in starts]
        logits = torch.cat(found, -1)
        return logits if self.bias is None else logits + self.bias


def group_of(width: int, bits: int) -> int:
    """The largest group, at most the usual, that rows of this width are whole numbers of.

    Raises:
        MasaError: an odd width.
    """
    for group in range(GROUPS[bits], 1, -2):
        if width % group == 0:
            return group
    raise MasaError(f"Embeddings of an odd width ({width}) have no groups of few bits; leave them as they are.")


def put_embeddings(model: nn.Module, described: Mapping[str, Any]) -> None:
    """Put empty embeddings with few bits, and the head, into a model.

    Args:
        model: with its own embeddings, on any device.
        described: ``bits``; ``tied``, whether the head reads the table of the embeddings.

    Raises:
        MasaError: embeddings or a head that do more than look up and multiply.
    """
    bits, tied = int(described["bits"]), bool(described["tied"])
    if bits not in BITS:
        raise ValueError(f"embeddings of {bits} bits")
    before, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module, known in ((before, nn.Embedding), (head, nn.Linear)):
        if type(module) not in (known, type(None)):
            raise MasaError(f"{type(module).__name__} has no form with few bits: leave the embeddings as they are.")
    dtype = before.weight.dtype
    with torch.device(before.weight.device):
        new = FewBitsEmbedding(*before.weight.shape, bits).to(dtype)
        top = None
        if head is not None:
            top = FewBitsHead(new.table if tied else None, head.bias, *head.weight.shape, bits).to(dtype)
    model.set_input_embeddings(new)
    if top is not None:
        model.set_output_embeddings(top)
    for part in model.modules():  # transformers would tie what is no parameter
        if getattr(part, "all_tied_weights_keys", None):
            names = {k: v for k, v in part.all_tied_weights_keys.items() if not _of_these(k, v, model)}
            part.all_tied_weights_keys = names
        if getattr(part, "_tied_weights_keys", None):
            part._tied_weights_keys = None


def _of_these(first: str, second: str, model: nn.Module) -> bool:
    modules = dict(model.named_modules())
    parents = (name.rpartition(".")[0] for name in (first, second))
    return any(isinstance(modules.get(p), FewBitsEmbedding | FewBitsHead) or p not in modules for p in parents)


def few_bits_embeddings(model: nn.Module) -> dict[str, Any] | None:
    """What :func:`put_embeddings` needs to put them there again; None where the model has its own."""
    embeddings = next((m for m in model.modules() if isinstance(m, FewBitsEmbedding)), None)
    if embeddings is None:  # models of sound have no input embeddings to be asked for
        return None
    head = model.get_output_embeddings()
    tied = isinstance(head, FewBitsHead) and head.table is embeddings.table
    return {"bits": embeddings.table.bits, "tied": tied}


def embedding_numbers(model: nn.Module) -> int:
    """What embeddings and head with few bits take, in numbers of the model's dtype, rounded up."""
    tables = {id(m.table): m.table for m in model.modules() if isinstance(m, FewBitsEmbedding | FewBitsHead)}
    return sum(
        -(-sum(t.nbytes for t in table.state_dict().values()) // table.like.element_size()) for table in tables.values()
    )


@torch.no_grad()
def round_embeddings(model: nn.Module, bits: int) -> None:
    """Store the embeddings and the head with few bits, each number rounded to its nearest.

    Raises:
        MasaError: see :func:`put_embeddings`; or they have few bits already.
    """
    before, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(before, FewBitsEmbedding):
        raise MasaError("The embeddings have few bits already.")
    tied = head is not None and head.weight is before.weight
    put_embeddings(model, {"bits": bits, "tied": tied})
    model.get_input_embeddings().table.fill(before.weight)
    if head is not None and not tied:
        model.get_output_embeddings().table.fill(head.weight)


@torch.no_grad()
def write_out(model: nn.Module) -> None:
    """Put ordinary embeddings and an ordinary head, tied where they were, in the place of those with few bits."""
    if (described := few_bits_embeddings(model)) is None:
        return
    few, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = nn.Embedding(*few.table.shape, _weight=few.weight.clone())
    model.set_input_embeddings(plain)
    if isinstance(head, FewBitsHead):
        top = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
        top.weight = plain.weight if described["tied"] else nn.Parameter(head.weight.clone())
        if head.bias is not None:
            top.bias = head.bias
        model.set_output_embeddings(top)
    for part in model.modules():
        vars(part).pop("_tied_weights_keys", None)
    if hasattr(model, "get_expanded_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
