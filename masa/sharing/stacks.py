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


def stacks(model: nn.Module) -> list[Stack]:
    """All stacks of a model, in the order of its modules."""
    base = getattr(model, "base_model", model)
    return list(_walk(base, "", base, (base,)))


def stack_of(model: nn.Module) -> Stack:
    """The stack whose projections are shared: the only one, or the text's.

    Raises:
        MasaError: none, or several of which none is the text's; the message names them.
    """
    found, name = stacks(model), type(model).__name__
    config = getattr(model, "config", None)
    text = _text_config(config)
    if text is not config:  # images or sound beside text
        found = [s for s in found if type(getattr(s.home, "config", None)) is type(text)] or found[:0]
        if not found:
            raise MasaError(
                f"{name}: its text's part has no list of transformer blocks with attention that masa knows; share "
                f"another of its models by itself ({PAGE})."
            )
    if len(found) == 1:
        return found[0]
    if found:
        paths = ", ".join(s.path for s in found[:3]) + ", …" * (len(found) > 3)
        part = _path_of(model, found[-1].home)
        raise MasaError(
            f"{name} has {len(found)} stacks of blocks ({paths}); share one of them by itself, as in "
            f"masa.share(model.{part}, …) ({PAGE})."
        )
    raise MasaError(f"{name} has no list of transformer blocks with attention that masa knows{_seen(model)} ({PAGE}).")


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


def _text_config(config: Any) -> Any:
    """The configuration of the text's part, or the whole one where there are no parts or several of text."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):
        return config


def _path_of(model: nn.Module, part: nn.Module) -> str:
    return next((name for name, module in model.named_modules() if module is part), "…")


def _seen(model: nn.Module) -> str:
    """What the longest list of a model holds, in brackets."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    name, longest = max(lists, key=lambda pair: len(pair[1]), default=("", None))
    return f" ({name}: {type(longest[0]).__name__})" if longest is not None else ""
