"""The page from a results directory: every part as plain data, then the template with everything inlined."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from masa.errors import MasaError
from masa.report.page import assets, budgets, curves, figures, graph, origins, tables
from masa.report.page.found import Found
from masa.report.serving import COLUMNS
from masa.runs.files import whole_file
from masa.study.cost import Plan
from masa.study.cost.report import duration, size
from masa.study.cost.workflow import jobs as all_jobs


def write(config: Mapping[str, Any], results: Path, out: Path, overlays: Iterable[str] = ()) -> Found:
    """Write the report; the same files give the same page.

    Args:
        config: checked.
        results: directory of results, finished or not.
        out: the HTML file.
        overlays: configuration files that the commands on the page name.

    Returns:
        What was found, with its ``problems``.

    Raises:
        MasaError: no such directory, or the page cannot be written.
    """
    if out.is_dir():
        raise MasaError(f"{out} is a directory; --out names the page itself, e.g. {out / 'report.html'}.")
    found = Found(config, results, overlays)
    text = page(found)
    with whole_file(out) as path:
        path.write_text(text, encoding="utf-8")
    return found


def page(found: Found) -> str:
    """The whole page."""
    environment = Environment(
        loader=PackageLoader("masa.report.page"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"duration": duration, "size": size, "standing": tables.standing}
    style, script = assets.styles(), assets.scripts()
    inlined = {"style": Markup(style), "script": Markup(script), "policy": Markup(assets.policy(style, script))}
    return environment.get_template("page.html.j2").render(parts(found) | inlined)


def parts(found: Found) -> dict[str, Any]:
    """All that the template shows."""
    jobs = all_jobs(Plan(found.config))
    shown_tables, shown_figures = tables.views(found), figures.views(found)
    rules, lines = budgets.rules(found, jobs), curves.views(found)
    missing = [a for a in (*shown_tables, *shown_figures) if not (a.get("columns") or a.get("source"))]
    own = [run for run in found.runs if run.own]
    return {
        "tables": shown_tables,
        "figures": shown_figures,
        "verdicts": tables.verdicts(shown_tables),
        "runs": {"asked": len(own), "done": sum(run.state == "finished" for run in own)},
        "evaluations": len(found.evaluations),
        "compressions": len(found.compressions),
        "curves": as_json(lines),
        "curve_count": len(lines),
        "averaged": max((line["averaged"] for line in lines), default=1),
        "parameters": budgets.parameters(found),
        "rules": rules,
        "device": budgets.device(found),
        "disk": budgets.disk(found),
        "serving": budgets.serving(found),
        "serving_columns": list(COLUMNS.values()),
        "graph": graph.view(jobs, rules),
        "origins": origins.view(found),
        "missing": missing,
        "unfinished": [run for run in own if run.state != "finished"],
        "outdated": sum(run.state == "outdated" for run in own),
        "all_command": found.command(),
        "page_command": found.command("report"),
        "problems": list(dict.fromkeys(found.problems)),
        "curves_command": found.command(tables.CURVES),
    }


def as_json(data: Any) -> Markup:
    """JSON that may stand in a script element: no character in it can end the element."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
