"""Which matrices share a dictionary: the nearest, by a matching that is best for all of them (arXiv 2609.25963)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 64
"""Rows of which all matrices' numbers, or spectra, are held beside each other."""


def distances(matrices: Sequence[Tensor]) -> Tensor:
    """How far whitened matrices (m, n_i), all of one height, are from each other, (N, N), symmetric; zero to itself.

    The wider of two is looked at through every window of columns as wide as the narrower one, A:
    ``min over t of ||W[:, t : t + n] - A|| / ||A||``. Of two of one width the smaller norm divides. Norms of windows
    are differences of prefix sums, products with all windows a cross-correlation.
    """
    widths = sorted({m.shape[1] for m in matrices})
    which = {width: [i for i, m in enumerate(matrices) if m.shape[1] == width] for width in widths}
    found = torch.zeros(len(matrices), len(matrices), dtype=torch.float64)
    for a, narrow in enumerate(widths):
        for wide in widths[a:]:
            rows, columns = which[narrow], which[wide]
            near = _windows([matrices[i] for i in rows], [matrices[j] for j in columns]).double().cpu()
            found[torch.tensor(rows)[:, None], torch.tensor(columns)] = near
            found[torch.tensor(columns)[:, None], torch.tensor(rows)] = near.T
    return found.fill_diagonal_(0)


def _windows(narrow: Sequence[Tensor], wide: Sequence[Tensor]) -> Tensor:
    """Distances (N, M) between matrices of one width and others of one that is not smaller."""
    height, n, length = narrow[0].shape[0], narrow[0].shape[1], wide[0].shape[1]
    norms = torch.stack([m.square().sum() for m in narrow])
    ahead = torch.stack([torch.nn.functional.pad(m.square().sum(0).cumsum(0), (1, 0)) for m in wide])
    energy = ahead[:, n:] - ahead[:, : length - n + 1]  # (M, windows)
    if n == length:
        products = torch.zeros_like(energy[:, 0] + norms[:, None])
        for start in range(0, height, CHUNK):
            first, second = (torch.stack([m[start : start + CHUNK].flatten() for m in of]) for of in (narrow, wide))
            products += first @ second.T
        squares = (norms[:, None] + energy[:, 0] - 2 * products).clamp_min(0)
        return (squares / torch.minimum(norms[:, None], energy[:, 0])).sqrt()
    spectrum: Tensor | None = None
    for start in range(0, height, CHUNK):  # windows that fit never wrap round, so the length needs no padding
        first = torch.fft.rfft(torch.stack([m[start : start + CHUNK] for m in narrow]), n=length)
        second = torch.fft.rfft(torch.stack([m[start : start + CHUNK] for m in wide]), n=length)
        part = torch.einsum("arf,brf->abf", first.conj(), second)
        spectrum = part if spectrum is None else spectrum + part
    products = torch.fft.irfft(spectrum, n=length)[..., : length - n + 1]
    squares = (norms[:, None, None] + energy - 2 * products).clamp_min(0).amin(-1)
    return (squares / norms[:, None]).sqrt()


def match(distance: Tensor) -> list[list[int]]:
    """Pairs of 0 .. N-1 with the least summed distance, by Edmonds' blossom algorithm; an odd one stays alone."""
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(len(distance)))
    top = float(distance.max()) if len(distance) else 0.0
    for i in range(len(distance)):
        for j in range(i + 1, len(distance)):
            graph.add_edge(i, j, weight=top - float(distance[i, j]))
    pairs = [sorted(pair) for pair in networkx.max_weight_matching(graph, maxcardinality=True)]
    alone = set(range(len(distance))) - {i for pair in pairs for i in pair}
    return sorted([*pairs, *([i] for i in alone)])


def groups(distance: Tensor, size: int) -> list[list[int]]:
    """Groups of at most ``size``, a power of two: pairs, then pairs of pairs by their mean distance, and so on."""
    found = [[i] for i in range(len(distance))]
    while size > 1 and len(found) > 1:
        between = torch.stack([torch.stack([distance[a][:, b].mean() for b in found]) for a in found])
        found = [sorted(i for part in pair for i in found[part]) for pair in match(between)]
        size //= 2
    return sorted(found)
