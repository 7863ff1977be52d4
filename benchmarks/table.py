"""Make the table of benchmarks/README.md of the CSV files that the benchmarks wrote.

    python benchmarks/table.py [--out results/reference/benchmarks]

The committed numbers are those of results/reference/benchmarks; --check fails where the table is not theirs.
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
        if path.stem == "serving":  # a table of its own
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parent / "results/reference/benchmarks")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where README.md has other numbers")
    given = parser.parse_args()
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    new = f"{before}{BEGIN}\n\n{table(given.out)}\n\n{END}{after}"
    if given.check:
        return int(new != text)
    readme.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
