"""What docs/evidence.md quotes is what the committed tables say, digit for digit."""

import re

import pandas as pd
import pytest
from conftest import ROOT

from masa.report import claims

TABLES = ROOT / "results" / "reference" / "evidence" / "tables"
PAGE = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")


def quoted(first):
    """Rows of the page's table whose first heading is ``first``, as heading -> cell without emphasis."""
    lines = PAGE.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first} |"))
    cells = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        cells.append([cell.strip().replace("*", "").replace("−", "-") for cell in line.strip("|").split("|")])
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def test_every_claim_is_quoted_as_it_was_judged():
    frame = pd.read_csv(TABLES / "claims.csv").dropna(subset=["gain"])
    judged = [(r["claim"], claims.interval(r).partition(", margin")[0], r["verdict"]) for _, r in frame.iterrows()]
    found = [(row["claim"], row["gain [95 %]"].partition(", margin")[0], row["verdict"]) for row in quoted("claim")]
    assert found == judged


def test_losses_are_those_of_table_1():
    frame = pd.read_csv(TABLES / "table1.csv").set_index("label")
    rows = quoted("method")
    assert sorted(row["method"] for row in rows) == sorted(frame.index)
    for row in rows:
        ours = frame.loc[row["method"]]
        assert row["held-out loss"] == f"{ours['validation_loss']:.4f} ± {ours['validation_loss_std']:.4f}"
        assert row["attention reduction"] == f"{ours['attn_cr_pct']:.1f} %"
        if row["less vanilla's"]:
            assert float(row["less vanilla's"]) == pytest.approx(
                ours["validation_loss"] - frame.loc["Vanilla", "validation_loss"], abs=6e-5
            )


def test_every_committed_training_has_its_recipe_and_provenance():
    folder = TABLES.parent / "runs"
    logs = sorted(folder.rglob("metrics.jsonl"))
    assert logs and all(re.fullmatch(r"seed\d", log.parent.name) for log in logs)
    for log in logs:
        assert {path.name for path in log.parent.iterdir()} >= {"manifest.json", "spec.json", "provenance.json"}
