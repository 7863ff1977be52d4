"""Tables and figures from metrics files with known numbers."""

import json

import pandas as pd
import pytest

import masa
from masa.evaluation import metrics
from masa.report import figures, own_tables, tables
from masa.report.headline import headline
from masa.runs import run
from masa.study import accounting, artefacts, config, inputs


def evaluation(loss, piqa, with_race=True, attention=100):
    tasks = {
        "piqa": {"acc": 0.4, "acc_norm": piqa},
        "hellaswag": {"acc": 0.25, "acc_norm": 0.26},
        "lambada_openai": {"acc": 0.1, "perplexity": 500.0},
        "arc_easy": {"acc": 0.3, "acc_norm": 0.31},
        "arc_challenge": {"acc": 0.2, "acc_norm": 0.21},
        "sciq": {"acc": 0.5, "acc_norm": 0.51},
        "mmlu": {"acc": 0.23},
        "wikitext": {"word_perplexity": 80.0, "byte_perplexity": 2.1},
    } | ({"race": {"acc": 0.25}} if with_race else {})
    data = {task: {"source": "mirror"} for task in tasks}
    return {
        "parameters": {"total": 1000, "attention": attention, "attention_reduction": 0.5, "model_reduction": 0.2},
        "training": {"tokens": 10, "training_seconds": 1.0, "tokens_per_second": 10.0},
        "corpus": {"loss": loss, "word_perplexity": 9.0, "byte_perplexity": 2.0, "loss_by_document": []},
        "tasks": tasks,
        "task_data": data if with_race else data | {"race": {"unavailable": "mirror: no mirror is set"}},
        "examples": dict.fromkeys(tasks, 100),
    }


@pytest.fixture
def results(tmp_path):
    for name, losses in {"vanilla": (3.0, 3.2), "masa-qkvo": (3.1, 3.1)}.items():
        for seed, loss in enumerate(losses):
            folder = tmp_path / "evaluations" / "S" / name / f"seed{seed}"
            run.write_json(folder / "metrics.json", evaluation(loss, 0.5 + 0.1 * seed, name == "vanilla" or seed == 0))
            log = tmp_path / "runs" / "S" / name / f"seed{seed}" / "metrics.jsonl"
            log.parent.mkdir(parents=True)
            log.write_text(
                "".join(f'{{"step": {i}, "tokens": {i * 10}, "validation_loss": {loss + 1 / i}}}\n' for i in (1, 2))
            )
            ranks = {p: [3.0, 4.0] for p in "qkvo"}
            coefficients = {p: [[0.1, -0.2], [0.3, 0.4]] for p in "qkvo"}
            run.write_json(folder / "weights.json", {"effective_rank": ranks, "coefficients": coefficients})
    return tmp_path


@pytest.fixture
def spec():
    merged = config.load(["config/paper.yaml"])
    merged["grids"]["main"] = {"scales": ["S"], "seeds": [0, 1]}
    merged["tables"]["table1"]["experiments"] = ["vanilla", "masa-qkvo"]
    return artefacts.artefact_spec(merged, "tables", "table1")


def test_a_row_has_mean_std_paper_difference_and_verdict(spec, results):
    frame = tables.build(spec, results)
    first = frame.iloc[0]
    assert list(frame["method"]) == ["vanilla", "masa-qkvo"]
    assert first["validation_loss"] == pytest.approx(3.1)
    assert first["validation_loss_std"] == pytest.approx(0.1414214)
    assert first["piqa"] == pytest.approx(0.55), "acc_norm, not acc"
    assert first["piqa_paper"] == 0.593
    assert first["piqa_difference"] == pytest.approx(0.55 - 0.593)
    expected = 100 * (0.55 + 0.26 + 0.1 + 0.31 + 0.21 + 0.51 + 0.25 + 0.23) / 8
    assert first["avg_pct"] == pytest.approx(expected)
    assert first["avg_pct_paper"] == 33.48
    assert first["verdict"] == "differs"
    assert first["seeds"] == 2


def test_a_line_says_what_a_table_holds(spec, results):
    frame = tables.build(spec, results)
    losses = frame.sort_values("validation_loss")
    best, worst = losses.iloc[0], losses.iloc[-1]
    said = headline(frame, spec)
    assert said.startswith(f"Held-out loss (nats/token) from {best['validation_loss']:.4f} ± ")
    assert f" ({best['label']}) to {worst['validation_loss']:.4f}" in said and said.endswith(f"{len(frame)} rows")
    top = pd.DataFrame({"label": ["A", "B"], "top1_pct": [50.0, 70.5], "requested_pct": [0, 20]})
    assert headline(top, spec) == "Top-1 (%) from 70.50 (B at 20 %) to 50.00 (A), 2 rows"
    assert headline(top.head(1), spec) == "Top-1 (%) 50.00 (A)"
    assert headline(top[["label"]], spec) == ""


def test_a_task_that_could_not_be_had_is_reported(spec, results):
    for seed in (0, 1):
        path = results / "evaluations" / "S" / "masa-qkvo" / f"seed{seed}" / "metrics.json"
        run.write_json(path, evaluation(3.1, 0.5, with_race=False))
    row = tables.build(spec, results).iloc[1]
    assert pd.isna(row["race"])
    assert row["race_paper"] == 0.256
    assert row["unavailable_tasks"] == "race"
    assert pd.isna(row["avg_pct"]), "an average of seven is not the paper's average of eight"
    ours = 100 * (0.5 + 0.26 + 0.1 + 0.31 + 0.21 + 0.51 + 0.23) / 7
    paper = 100 * (0.602 + 0.278 + 0.214 + 0.332 + 0.214 + 0.572 + 0.229) / 7
    assert row["avg_available_pct"] == pytest.approx(ours)
    assert row["avg_available_pct_paper"] == pytest.approx(paper), "over the same tasks"
    assert tables.readable(tables.build(spec, results))["RACE"].iloc[1] == "n/a (0.256)"


def test_another_scale_is_never_judged(spec, results):
    for row in spec["rows"]:
        row["scale"] = "nano"
    assert set(tables.build(spec, results)["verdict"]) == {"another scale"}


def test_files_of_a_table(spec, results, tmp_path):
    frame = tables.build(spec, results)
    tables.write(frame, spec, tmp_path / "out", tables.note_for(spec, results))
    back = pd.read_csv(tmp_path / "out" / "table1.csv")
    assert back["validation_loss"].tolist() == pytest.approx(frame["validation_loss"].tolist())
    markdown = (tmp_path / "out" / "table1.md").read_text()
    assert "0.550 ± 0.071 (0.593, -0.043)" in markdown
    latex = (tmp_path / "out" / "table1.tex").read_text()
    assert "\\toprule" in latex
    assert "$\\pm$" in latex
    assert "%)" not in latex.replace("\\%)", "")


def test_latex_has_no_character_that_it_reads_otherwise():
    assert tables._escape("a\\b_{c} 5 % ± ~^") == (
        r"a\textbackslash{}b\_\{c\} 5 \% $\pm$ \textasciitilde{}\textasciicircum{}"
    )


def test_runs_table_keeps_acc_and_acc_norm(results, tmp_path):
    own_tables.runs(["S/vanilla/seed0", "S/masa-qkvo/seed1"], results, tmp_path)
    frame = pd.read_csv(tmp_path / "runs.csv")
    assert frame.loc[0, "piqa/acc"] == 0.4
    assert frame.loc[0, "piqa/acc_norm"] == 0.5
    assert list(frame["seed"]) == [0, 1]


def test_the_table_of_curves_has_every_line(results, tmp_path):
    own_tables.metrics(["S/vanilla/seed0", "S/masa-qkvo/seed1"], results, tmp_path)
    frame = pd.read_csv(tmp_path / "metrics.csv")
    assert list(frame.columns)[:5] == ["run", "scale", "method", "seed", "step"]
    assert list(frame["run"]) == ["S/vanilla/seed0"] * 2 + ["S/masa-qkvo/seed1"] * 2
    assert list(frame["validation_loss"]) == pytest.approx([4.0, 3.5, 4.1, 3.6])
    own_tables.metrics([], results, tmp_path)  # of a configuration that compresses only
    with pytest.raises(masa.MasaError, match=r"S/gqa/seed0/metrics.jsonl does not exist; the run's training"):
        own_tables.metrics(["S/gqa/seed0"], results, tmp_path)


def test_counted_parameters_are_judged_by_the_papers_own_digits(tmp_path):
    """Counts of the real models at S; a model of another size differs."""
    c = config.load()
    c["parameters"]["scales"] = ["S"]
    accounting.count(inputs.parameters_spec(c), tmp_path / "parameters.json")
    spec = artefacts.table_spec(c, "parameters")
    own_tables.parameters(spec, tmp_path, tmp_path)
    frame = pd.read_csv(tmp_path / "parameters.csv").set_index("method")
    assert set(frame.loc[frame["verdict"] == "agrees"].index) == {
        "vanilla", "gqa", "masa-qkv", "low-rank", "sequential", "repeat-all-over", "masa-qkvo",
    }  # fmt: skip
    assert frame.loc["low-rank-text", "verdict"] == "not in the paper"
    assert frame.loc["vanilla", "parameters_m_difference"] == pytest.approx(-0.37, abs=0.01)
    assert "| 109.63           | 110 " in (tmp_path / "parameters.md").read_text()
    counts = json.loads((tmp_path / "parameters.json").read_text())
    for record in counts:
        record["total"] *= 1.01
        record["attention_reduction"] += 0.002 * (record["experiment"] == "gqa")
    (tmp_path / "parameters.json").write_text(json.dumps(counts))
    own_tables.parameters(spec, tmp_path, tmp_path)
    verdicts = pd.read_csv(tmp_path / "parameters.csv").set_index("method")["verdict"]
    assert set(verdicts.index[verdicts == "differs"]) == {"vanilla", "gqa"}


def test_an_ambiguous_paper_row_is_an_error(spec, results):
    spec["paper"] = {"file": "config/paper/table2.csv", "match": ["scale", "method"]}
    with pytest.raises(masa.MasaError, match=r"rows match .* add columns"):
        tables.build(spec, results)


@pytest.mark.parametrize("name", ["validation_loss", "quality_parameters", "effective_rank", "coefficient_maps"])
def test_every_figure_is_drawn_the_same_twice(name, results, tmp_path):
    merged = config.load(["config/paper.yaml"])
    merged["grids"] |= {key: {"scales": ["S"], "seeds": [0, 1]} for key in ("main", "sweep")}
    known = ["masa-qkvo"] if name == "coefficient_maps" else ["vanilla", "masa-qkvo"]
    merged["figures"][name]["experiments"] = known
    spec = artefacts.artefact_spec(merged, "figures", name)
    pictures = []
    for folder in ("a", "b"):
        figures.write(spec, results, tmp_path / folder)
        pictures.append((tmp_path / folder / f"{name}.png").read_bytes())
        assert (tmp_path / folder / f"{name}.pdf").stat().st_size > 2000
    assert pictures[0] == pictures[1]
    assert len(pictures[0]) > 5000


def test_unknown_kind_of_figure(results, tmp_path):
    with pytest.raises(masa.MasaError, match="Did you mean 'curves'"):
        figures.write({"name": "x", "kind": "curve", "rows": [], "title": ""}, results, tmp_path)


def test_averages():
    full = dict.fromkeys(metrics.AVERAGED, 0.5)
    assert metrics.averages(full) == {"avg_pct": 50.0, "avg_available_pct": 50.0}
    full.pop("race")
    assert metrics.averages(full) == {"avg_available_pct": 50.0}
