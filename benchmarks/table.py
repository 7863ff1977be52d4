"""Make the tables of benchmarks/README.md and docs/performance.md of the CSV files that the benchmarks wrote.

    python benchmarks/table.py [--out results/reference/benchmarks]

The committed numbers are those of results/reference/benchmarks; --check fails where a table is not theirs.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path

from masa.report.serving import COLUMNS
from masa.report.serving import table as models

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- table: python benchmarks/table.py -->", "<!-- end -->"


def table(folder: Path) -> str:
    """Markdown of all results in a folder, one line a number."""
    lines = ["| what | measured | target | met | script |", "|---|---|---|---|---|"]
    machines = set()
    for path in sorted(folder.glob("*.csv")):
        if path.stem in ("serving", "job_parts"):  # tables of their own
            continue
        made_with = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["provenance"]
        machines.add(f"{made_with['cpu']}, Python {made_with['python']}, torch {made_with['packages']['torch']}")
        with path.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                spread = f" ± {row['spread']}" if row["spread"] else ""
                unit = "" if row["unit"] == "ratio" else f" {row['unit']}"
                cells = [row["what"], f"{row['value']}{spread}{unit}", row["target"], row["met"]]
                lines.append(f"| {' | '.join(cells)} | [{path.stem}]({path.stem}.py) |")
    return "\n".join([f"Measured on: {'; '.join(sorted(machines))}.", "", *lines, "", *serving(folder / "serving.csv")])


def serving(path: Path) -> list[str]:
    """Markdown of how factored models serve, one line a model; what missed its target is bold."""
    if not path.is_file():
        return []
    columns = ["[serving](serving.py)", *COLUMNS.values()]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for row in models(path):
        cells = [f"**{text}**" if missed else text for text, missed in row["cells"]]
        lines.append(f"| {' | '.join([row['name'], *cells])} |")
    return lines


def jobs(path: Path) -> str:
    """Markdown of where the time of a job of each kind goes, one line a kind: seconds, and percent of them."""
    parts: dict[str, dict[str, float]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            kind, part = row["what"].split(": ")
            parts.setdefault(kind, {})[part] = float(row["value"])
    columns = [c for c in dict.fromkeys(c for found in parts.values() for c in found) if c not in ("whole", "other")]
    lines = [
        f"| job | seconds | {' | '.join(f'{c} (%)' for c in columns)} | the rest (%) |",
        "|---" * (len(columns) + 3) + "|",
    ]
    for kind, found in sorted(parts.items(), key=lambda item: -item[1]["whole"]):
        shares = [f"{100 * found[c]:.0f}" if c in found else "" for c in columns]
        rest = 100 * (1 - sum(found.get(c, 0) for c in columns))
        lines.append(f"| `{kind}` | {found['whole']:.1f} | {' | '.join(shares)} | {rest:.0f} |")
    return "\n".join(lines)


def put(text: str, new: str) -> str:
    """A page with another table between its two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/reference/benchmarks")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page has other numbers")
    given = parser.parse_args()
    pages = {HERE / "README.md": table(given.out)}
    if (measured := given.out / "job_parts.csv").is_file():
        pages[HERE.parent / "docs/performance.md"] = jobs(measured)
    for page, made in pages.items():
        text = page.read_text(encoding="utf-8")
        new = put(text, made)
        if given.check and new != text:
            return 1
        if not given.check:
            page.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
