"""The rules of the workflow and what each waits for, laid out in columns from left to right and drawn as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import networkx as nx

from masa.study.cost.jobs import Job

WIDTH, HEIGHT, GAP_X, GAP_Y, MARGIN = 144, 46, 48, 20, 8
SWEEPS = 12


def rules(jobs: Sequence[Job]) -> nx.DiGraph:
    """The graph of rules, as ``snakemake --rulegraph`` has it: an edge to every rule from each that it waits for."""
    graph = nx.DiGraph()
    graph.add_nodes_from(dict.fromkeys(job.rule for job in jobs))
    graph.add_edges_from((need, job.rule) for job in jobs for need, _ in job.needs)
    return graph


def view(jobs: Sequence[Job], budget: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coordinates of a picture: ``width``, ``height``, ``nodes`` (x, y, rule and its numbers) and ``edges`` (paths).

    Edges that follow from others are not drawn.

    Args:
        budget: from :func:`masa.report.page.budgets.rules`.
    """
    whole = rules(jobs)
    needed = nx.transitive_reduction(whole)
    graph = nx.DiGraph()  # networkx keeps no order when it reduces
    graph.add_nodes_from(whole)
    graph.add_edges_from(edge for edge in whole.edges if needed.has_edge(*edge))
    numbers = {row["rule"]: row for row in budget}
    columns = _ordered(_columns(graph))
    tallest = max((len(column) for column in columns), default=0)
    places = {}
    for x, column in enumerate(columns):
        top = (tallest - len(column)) * (HEIGHT + GAP_Y) / 2
        for y, name in enumerate(column):
            places[name] = (MARGIN + x * (WIDTH + GAP_X), MARGIN + top + y * (HEIGHT + GAP_Y))
    nodes = [{"x": places[n][0], "y": places[n][1], **numbers[n]} for n in graph]
    return {
        "width": 2 * MARGIN + len(columns) * (WIDTH + GAP_X) - GAP_X,
        "height": 2 * MARGIN + tallest * (HEIGHT + GAP_Y) - GAP_Y,
        "node_width": WIDTH,
        "node_height": HEIGHT,
        "nodes": nodes,
        "edges": [_path([places[n] for n in _route(edge, columns)]) for edge in graph.edges],
    }


Name = str | tuple[str, str, int]
"""A rule, or the place in column i where an edge from one rule to another passes."""


def _columns(graph: nx.DiGraph) -> list[dict[Name, list[Name]]]:
    """Each rule as far to the right as those that wait for it allow; and the places that long edges pass.

    Returns:
        Columns from left to right: name -> its neighbours in the column before.
    """
    depth = {n: i for i, names in enumerate(nx.topological_generations(graph.reverse())) for n in names}
    last = max(depth.values(), default=-1)
    columns: list[dict[Name, list[Name]]] = [{} for _ in range(last + 1)]
    for rule in graph:
        columns[last - depth[rule]][rule] = []
    for source, target in graph.edges:
        start, end = last - depth[source], last - depth[target]
        before: Name = source
        for i in range(start + 1, end):
            columns[i][source, target, i] = [before]
            before = (source, target, i)
        columns[end][target].append(before)
    return columns


def _ordered(columns: list[dict[Name, list[Name]]]) -> list[list[Name]]:
    """Order in each column by the mean place of neighbours, to and fro, keeping the order with the fewest crossings."""
    after: dict[Name, list[Name]] = {}
    for column in columns:
        for name, before in column.items():
            for other in before:
                after.setdefault(other, []).append(name)
    order = [list(column) for column in columns]
    best, fewest = [list(column) for column in order], _crossings(order, columns)
    for sweep in range(SWEEPS):
        forward = sweep % 2 == 0
        for i in range(1, len(order)) if forward else range(len(order) - 2, -1, -1):
            beside = order[i - 1] if forward else order[i + 1]
            place = {name: k for k, name in enumerate(beside)}
            linked = columns[i] if forward else after
            own = {name: k for k, name in enumerate(order[i])}

            def mean(name: Name, linked: Mapping = linked, place: Mapping = place, own: Mapping = own) -> float:
                found = [place[n] for n in linked.get(name, ())]
                return sum(found) / len(found) if found else own[name]

            order[i].sort(key=mean)
        if (crossed := _crossings(order, columns)) < fewest:
            best, fewest = [list(column) for column in order], crossed
    return best


def _crossings(order: list[list[Name]], columns: list[dict[Name, list[Name]]]) -> int:
    count = 0
    for i in range(1, len(order)):
        place = {name: k for k, name in enumerate(order[i - 1])}
        lines = [(place[n], y) for y, name in enumerate(order[i]) for n in columns[i][name]]
        count += sum((a - c) * (b - d) < 0 for k, (a, b) in enumerate(lines) for c, d in lines[:k])
    return count


def _route(edge: tuple[str, str], columns: list[list[Name]]) -> list[Name]:
    source, target = edge
    passed = [n for column in columns for n in column if isinstance(n, tuple) and n[:2] == edge]
    return [source, *passed, target]


def _path(places: list[tuple[float, float]]) -> str:
    """A smooth line from the right side of the first box to the left side of the last, level at every place between."""
    x, y = places[0][0] + WIDTH, places[0][1] + HEIGHT / 2
    path = f"M{x:g},{y:g}"
    for i, (next_x, top) in enumerate(places[1:], 1):
        next_y, bend = top + HEIGHT / 2, GAP_X / 2
        path += f" C{x + bend:g},{y:g} {next_x - bend:g},{next_y:g} {next_x:g},{next_y:g}"
        x, y = next_x, next_y
        if i < len(places) - 1:
            x += WIDTH
            path += f" H{x:g}"
    return path
