"""A training's speed as a share of what its cards could do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Peak:
    """What a training could reach at the most.

    Attributes:
        flops: of matrix products that one token or image takes, forward and backward.
        rates: dtype of the linear layers -> FLOP/s of matrix products of one card, measured or its data sheet's.
    """

    flops: float
    rates: Mapping[str, float]

    def share(self, speed: float, dtype: str, cards: int) -> str:
        """A speed as text, "23 % of 782 TFLOP/s"; empty where the cards' rate in a dtype is not known.

        Args:
            speed: tokens or images a second, of all cards.
        """
        if dtype not in self.rates:
            return ""
        whole = self.rates[dtype] * cards
        percent = 100 * speed * self.flops / whole
        return f"{percent:.{0 if percent >= 10 else 1}f} % of {whole / 1e12:,.0f} TFLOP/s"
