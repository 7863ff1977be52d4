"""What docs/evidence.md quotes is what the committed tables say, digit for digit."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from warm import ENVIRONMENT, masa

from masa.report import claims
from masa.report.curve import curve
from masa.report.gap_figure import half_interval
from masa.runs import run
from masa.study import claims as asked
from masa.study import config

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
    judged = [
        (
            r["claim"],
            r["scale"].replace("−", "-"),
            claims.interval(r).partition(", margin")[0],
            r["verdict"],
            claims.probability(r["p_holm"]),
        )
        for _, r in frame.iterrows()
    ]
    rows = quoted("claim")
    found = [(row["claim"], row["at"], row["gain [95 %]"], row["verdict"], row["p (Holm)"]) for row in rows]
    assert found == judged


def test_claims_follow_from_the_committed_measurements():
    """Those whose measurements are committed: judged anew they are the rows of the table."""
    results = TABLES.parent
    table = pd.read_csv(TABLES / "claims.csv").set_index(["claim", "scale"])
    judged = 0
    for claim in asked.spec(config.load([ROOT / "config" / "evidence.yaml"])):
        if claim["records"] is None or not all((results / file).exists() for file in asked.files([claim])):
            continue
        row, said = claims.row(claim, results), table.loc[claim["claim"], claim["scale"]]
        assert row["verdict"] == said["verdict"]
        for number in ("gain", "low", "high", "p"):
            assert row[number] == pytest.approx(said[number], rel=1e-9, abs=1e-12)
        judged += 1
    assert judged
    asked_at_once = table.dropna(subset=["p"])
    assert asked_at_once["p_holm"].tolist() == pytest.approx(claims.holm(asked_at_once["p"].tolist()))


def test_tables_follow_from_the_committed_measurements(tmp_path):
    """By the page's own command, on a machine without a mirror."""
    (line,) = [line.split() for line in PAGE.splitlines() if line.startswith("    masa tables claims vision table3 ")]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "MASA_MIRROR"}
    masa(*line[1:-1], tmp_path, env=environment, check=True)
    for table in ("vision", "table3"):
        for ending in ("csv", "md", "tex"):
            made = (tmp_path / f"{table}.{ending}").read_text(encoding="utf-8")
            assert made == (TABLES / f"{table}.{ending}").read_text(encoding="utf-8"), f"{table}.{ending}"
    verdicts = pd.read_csv(tmp_path / "claims.csv")["verdict"]
    assert (verdicts == claims.ABSENT).sum() < len(verdicts)


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


def curves():
    """Method -> array (seed, evaluation) of held-out losses; and tokens a parameter of the evaluations."""
    found = {}
    labels = dict(pd.read_csv(TABLES / "table1.csv")[["label", "method"]].values)
    for label, name in labels.items():
        for seed in range(3):
            log = curve(TABLES.parent, f"d48/{name}/seed{seed}", "tokens")
            found.setdefault(label, []).append(list(log.values()))
    manifest = TABLES.parent / "runs" / "d48" / "vanilla" / "seed0" / "manifest.json"
    parameters = run.read_json(manifest)["parameters"]["total"]
    return {label: np.array(of_one) for label, of_one in found.items()}, np.array(list(log)) / parameters


def test_gaps_over_tokens_are_those_of_the_logs():
    losses, budgets = curves()
    at = {tokens: int(np.abs(budgets - tokens).argmin()) for tokens in (2, 5, 10, 20)}
    change = {label: of_one[:, at[20]] - of_one[:, at[10]] for label, of_one in losses.items()}
    rows = quoted("tokens a parameter")
    assert len(rows) == len(losses) - 1
    for row in rows:
        gaps = (losses[row["tokens a parameter"]] - losses["Vanilla"]).mean(0)
        assert {tokens: row[str(tokens)] for tokens in at} == {tokens: f"{gaps[i]:+.3f}" for tokens, i in at.items()}
        changed = gaps[at[20]] - gaps[at[10]]
        assert row["change from 10 to 20"] == f"{changed:+.3f} ± {half_interval(change):.3f}"
    for tokens, i in at.items():
        error = half_interval({label: of_one[:, i] for label, of_one in losses.items()})
        assert f"± {error:.3f} at {tokens}" in PAGE


def test_accuracies_are_those_of_the_table_of_vision():
    frame = pd.read_csv(TABLES / "vision.csv").set_index("label")
    rows = quoted("Vision Transformer")
    assert sorted(row["Vision Transformer"] for row in rows) == sorted(frame.index)
    for row in rows:
        ours = frame.loc[row["Vision Transformer"]]
        assert row["attention reduction"] == f"{ours['attn_cr_pct']:.1f} %"
        assert row["top-1"] == f"{ours['top1_pct']:.2f} ± {ours['top1_pct_std']:.2f}"
        assert row["test loss"] == f"{ours['test_loss']:.4f} ± {ours['test_loss_std']:.4f}"


def test_compressions_are_those_of_table_3():
    frame = pd.read_csv(TABLES / "table3.csv")
    rows = {row["compressed by"]: list(row.values())[1:] for row in quoted("compressed by")}
    assert sorted(rows) == sorted(set(frame["label"])) and len(rows) == 14
    for (label, percent), of_one in frame.groupby(["label", "requested_pct"]):
        ours, place = of_one.iloc[0], 1 if percent == 30 else 0
        for i, column in enumerate(("held_out_ppl", "wikitext_token_ppl")):
            assert rows[label][2 * i + place] == f"{ours[column]:,.{2 if ours[column] < 1000 else 0}f}"
        accuracy = f"{ours['avg_available_pct']:.1f}" + (
            f" ± {ours['avg_available_pct_se']:.1f}" if not percent else ""
        )
        assert rows[label][4 + place] == accuracy


def test_every_committed_training_has_its_recipe_and_provenance():
    folder = TABLES.parent / "runs"
    logs = sorted(folder.rglob("metrics.jsonl"))
    assert logs and all(re.fullmatch(r"seed\d", log.parent.name) for log in logs)
    for log in logs:
        assert {path.name for path in log.parent.iterdir()} >= {"manifest.json", "spec.json", "provenance.json"}


ATOMS = {
    f"MASA-{letters}": {s: f"masa-{letters.lower()}" + {"4": ""}.get(s, f"-s{s}") for s in "248"}
    for letters in ("QKV", "QKVO")
}
COEFFICIENTS = {
    "parameters": "masa-qkvo",
    "parameters, fixed ‖c‖": "masa-qkvo-fixed-norm",
    "MLP": "masa-qkvo-mlp",
    "MLP, fixed ‖c‖": "masa-qkvo-mlp-fixed-norm",
}
RATES = {"×0.1": "d48-slow-coefficients", "×1": "d48", "×3": "d48-fast-coefficients"}


def losses(table):
    frame = pd.read_csv(TABLES / f"{table}.csv")
    return {(r["scale"], r["method"]): f"{r['validation_loss']:.3f}" for _, r in frame.iterrows()}


def test_losses_over_atoms_are_those_of_table_2():
    found, rows = losses("table2"), quoted("atoms")
    assert [row["atoms"] for row in rows] == list(ATOMS)
    for row in rows:
        assert {s: row[f"S = {s}"] for s in "248"} == {s: found["d48", name] for s, name in ATOMS[row["atoms"]].items()}


def test_dictionaries_are_those_of_their_table():
    frame = pd.read_csv(TABLES / "dictionaries.csv")
    counts, values = (list(row.values())[1:] for row in quoted("dictionaries of MASA-QKV, S = 4"))
    assert counts == [f"{n:,.0f}" for n in frame["attention_parameters"]]
    assert values == [f"{loss:.3f}" for loss in frame["validation_loss"]]


def test_coefficients_are_those_of_their_tables():
    found = losses("coefficients") | losses("coefficient_rates")
    quotes = {
        (scale, COEFFICIENTS[row["learning rate of coefficients"]]): row[rate]
        for row in quoted("learning rate of coefficients")
        for rate, scale in RATES.items()
        if row[rate]
    }
    assert quotes == found


def test_losses_over_learning_rates_are_those_of_the_trainings():
    folders = {
        rate: f"tuning/{name}/{{}}" for rate, name in {"0.0015": "1.5e-3", "0.003": "3e-3", "0.006": "6e-3"}.items()
    }
    scales = {"0.012": "d48-rate-12e-3", "0.024": "d48", "0.048": "d48-rate-48e-3"}
    folders |= {rate: f"runs/{scale}/{{}}/seed0" for rate, scale in scales.items()}
    for row in quoted("rate"):
        method = row.pop("rate").lower()
        assert row.keys() == folders.keys()
        for rate, folder in folders.items():
            manifest = TABLES.parent / folder.format(method) / "manifest.json"
            assert manifest.exists() == bool(row[rate])
            if manifest.exists():
                training = json.loads(manifest.read_text(encoding="utf-8"))["training"]
                assert row[rate] == f"{training['validation_loss']:.3f}"
