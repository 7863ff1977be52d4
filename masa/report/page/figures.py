"""Pictures of the page: embedded PNG files with their captions and the commands that make them."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from masa.report.page.found import Found
from masa.study import experiments

PNG = b"\x89PNG\r\n\x1a\n"


def views(found: Found) -> list[dict[str, Any]]:
    """Every figure of the configuration: ``name``, ``title``, ``caption``, ``command``, ``source`` (None: missing)."""
    views = []
    for name, artefact in experiments.active(found.config, "figures").items():
        view = {"name": name, "title": artefact["title"], "command": found.command(name), "source": None}
        path = found.artefact("figures", name, "png")
        data = path.read_bytes() if path else b""
        if path and not data.startswith(PNG):
            found.problems.append(f"{path} is no PNG file; delete it and make it anew with `{view['command']}`.")
        elif path:
            view["source"] = f"data:image/png;base64,{base64.b64encode(data).decode()}"
            view["width"], view["height"] = (int.from_bytes(data[i : i + 4], "big") for i in (16, 20))
        views.append(view | {"caption": _caption(found, artefact)})
    return views


def _caption(found: Found, artefact: Mapping[str, Any]) -> str:
    """What the configuration says of the picture; then its methods, scales or models, and seeds."""
    grid = found.config["grids"][artefact["grid"]]
    if models := grid.get("pretrained"):
        names = found.config["compressions"]
        labels = [(names.get(n) or {}).get("label", n) for n in artefact["experiments"]]
        rest = f"{', '.join(models)}; {', '.join(f'{r:g}' for r in grid['reductions'])} % of attention removed"
    else:
        labels = [found.labels[n] for n in artefact["experiments"]]
        seeds = grid["seeds"]
        rest = f"{', '.join(grid['scales'])}; seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    return f"{artefact.get('caption', '')} {', '.join(labels)}; {rest}.".strip()
