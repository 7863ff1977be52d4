"""Where a model keeps its transformer blocks, found by what is in them.

A stack is a list of blocks of which one at least has self-attention. A model with several (images and text, encoder and
decoder) is shared by its text's part where its configuration says which that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from masa.errors import MasaError
from masa.sharing.bank import SharedProjections
from masa.sharing.families import has_attention
from masa.sharing.linears import SharedWeight

PAGE = "docs/howto/family.md"


@dataclass(frozen=True)
class Stack:
    """One list of blocks.

    Attributes:
        path: of the list, in the model that was searched.
        blocks: the list, first to last.
        owner: the module that runs through it.
        home: the innermost model around it, where shared sources are kept.
        parents: all models around it, ``home`` the last, the one that was searched not among them unless it is home.
    """

    path: str
    blocks: nn.ModuleList | nn.Sequential
    owner: nn.Module
    home: nn.Module
    parents: tuple[nn.Module, ...]

    def beside(self, model: nn.Module) -> str | None:
        """A line that says which other stacks the model has, if it has any."""
        others = [s.path for s in stacks(model) if s.path != self.path]
        if not others:
            return None
        return f"{self.path} shares; {', '.join(others[:4])} {'stays' if len(others) == 1 else 'stay'} as before."


def stacks(model: nn.Module) -> list[Stack]:
    """All stacks of a model, in the order of its modules."""
    base = getattr(model, "base_model", model)
    return list(_walk(base, "", base, (base,)))


def stack_of(model: nn.Module, path: str | None = None) -> Stack:
    """The stack whose projections are shared: the one at ``path``, the only one, the one that shares, or the text's.

    Raises:
        MasaError: none, or several of which nothing says which is meant; the message names them.
    """
    found, name = stacks(model), type(model).__name__
    if not found:
        raise MasaError(
            f"{name} has no list of transformer blocks with attention that masa knows{_seen(model)} ({PAGE})."
        )
    if path is not None and len(found) > 1:
        found = [s for s in found if s.path == path]
    elif sharing := [s for s in found if _shares(s)]:
        found = sharing
    elif (text := _text_config(model)) is not None:
        found = [s for s in found if type(getattr(s.home, "config", None)) is type(text)]
    if len(found) == 1:
        return found[0]
    there = [repr(s.path) for s in stacks(model)]
    shown = ", ".join(there[:4]) + ", …" * (len(there) > 4)
    if path is not None:
        raise MasaError(f"{name} has no stack of blocks {path!r}; there are {shown}.")
    raise MasaError(
        f"{name} has {len(there)} stacks of blocks ({shown}); say which is to share, as in masa.share(model, spec, "
        f"stack={there[-1]}) ({PAGE})."
    )


def decoder(model: nn.Module) -> nn.Module:
    """The module that owns the list of blocks and what they share: the innermost Hugging Face model around it."""
    return stack_of(model).home


def blocks(model: nn.Module) -> nn.ModuleList | nn.Sequential:
    """The transformer blocks, first to last."""
    return stack_of(model).blocks


def bank_of(model: nn.Module) -> SharedProjections | None:
    """The sources that the model's matrices come from, if it shares any."""
    shared = decoder(model)._modules.get("shared")
    return shared if isinstance(shared, SharedProjections) else None


def is_model(module: nn.Module) -> bool:
    """Whether it is a model that Hugging Face's ``save_pretrained`` writes."""
    return hasattr(type(module), "save_pretrained") and hasattr(module, "config")


def _walk(module: nn.Module, path: str, owner: nn.Module, parents: tuple[nn.Module, ...]) -> Iterator[Stack]:
    for name, child in module._modules.items():
        if child is None or isinstance(child, SharedProjections):
            continue
        below = f"{path}.{name}".lstrip(".")
        if isinstance(child, nn.ModuleList | nn.Sequential) and any(has_attention(block) for block in child):
            yield Stack(below, child, owner, parents[-1], parents)
            continue
        contains = isinstance(child, nn.ModuleList | nn.ModuleDict)
        yield from _walk(child, below, owner if contains else child, (*parents, child) if is_model(child) else parents)


def _shares(stack: Stack) -> bool:
    """Whether blocks of the stack read from shared sources."""
    shared = isinstance(stack.home._modules.get("shared"), SharedProjections)
    return shared and any(isinstance(module, SharedWeight) for module in stack.blocks.modules())


def _text_config(model: nn.Module) -> Any:
    """The configuration of the text's part, where a model has one beside others: images, sound."""
    config = getattr(model, "config", None)
    try:
        text = config.get_text_config()
    except (AttributeError, ValueError):
        return None
    return None if text is config else text


def _seen(model: nn.Module) -> str:
    """What the longest list of a model holds, in brackets."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    name, longest = max(lists, key=lambda pair: len(pair[1]), default=("", None))
    return f" ({name}: {type(longest[0]).__name__})" if longest is not None else ""
