"""How many tokens a language model has positions for."""

from __future__ import annotations

from torch import nn

POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")
"""What configurations call the longest text."""


def positions_of(model: nn.Module) -> int | None:
    """Tokens of the longest text, or None where distance is a bias.

    RoBERTa and its kin count from behind the padding's id, so that their tables hold fewer positions than rows.
    """
    config = model.config.get_text_config()
    known = next((n for name in POSITIONS if isinstance(n := getattr(config, name, None), int) and n > 0), None)
    if known is None:
        return None
    tables = (m for name, m in model.named_modules() if name.endswith(("position_embeddings", "embed_positions")))
    for table in tables:
        padding = getattr(table, "padding_idx", None)
        if isinstance(table, nn.Embedding) and padding is not None and table.num_embeddings == known:
            return known - padding - 1
    return known
