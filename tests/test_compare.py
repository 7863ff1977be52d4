"""masa compare: against pandas on the same files, at the last common step, over seeds, compressions, pictures."""

import json
import os
import shutil
import subprocess
import sys

import pandas as pd
import pytest
from conftest import ROOT
from test_training import spec_of

from masa import cli
from masa.errors import MasaError
from masa.report import compare, compare_figure, compare_text, runs
from masa.runs import run
from masa.training import language

METHODS = ("vanilla", "masa")


@pytest.fixture(scope="module")
def results(tokens, digits, tmp_path_factory):
    """Two methods with two seeds each, a Vision Transformer, evaluations of the language models, two compressions."""
    from test_image_training import spec_of as image_spec

    from masa.training import images

    folder = tmp_path_factory.mktemp("results")
    for method in METHODS:
        for seed in (0, 1):
            spec = spec_of(method, seed, steps=40)
            manifest = language.pretrain(spec, tokens, folder / "runs" / spec["run"])
            loss = manifest["training"]["validation_loss"]
            scores = {"corpus": {"loss": loss, "word_perplexity": 9.0 + seed, "byte_perplexity": 2.0}}
            scores |= {k: manifest[k] for k in ("run", "parameters", "training")}
            scores["provenance"] = {"inputs": {"run": manifest["identity"]}}
            run.write_json(folder / "evaluations" / spec["run"] / "metrics.json", scores)
    images.pretrain(image_spec("vanilla"), digits, folder / "runs" / "digits" / "vanilla" / "seed0")
    for percent, ppl in ((20, 30.0), (30, 35.0)):
        report = {"method": "svd", "options": {"ranks": "uniform"}, "projections": "qkvo", "seconds": 1.5}
        report |= {"reduction_achieved": percent / 100, "regularisation": {}, "peak_rss_bytes": 2**30}
        metrics = {"run": f"tiny/svd/{percent}", "requested_pct": percent, "compression": report, "healing": None}
        metrics |= {"parameters": {"total": 100 - percent, "attention": 50, "attention_reduction": percent / 100}}
        metrics["parameters"]["model_reduction"] = percent / 200
        metrics |= {"corpus": {"loss": 3.0, "word_perplexity": 9.0, "byte_perplexity": 2.0, "token_perplexity": ppl}}
        run.write_json(folder / "compression" / "tiny" / "svd" / str(percent) / "metrics.json", metrics | {"texts": {}})
    return folder


def found(results, *words):
    return compare.compare(runs.find(words, results))


def frame(results, name):
    """The log of a run as a pandas user reads it."""
    return pd.read_json(results / "runs" / name / "metrics.jsonl", lines=True)


def cut(results, name, step, folder):
    """A run as it was when its training had come to a step."""
    out = folder / "runs" / name
    out.mkdir(parents=True)
    shutil.copy(results / "runs" / name / "spec.json", out)
    records = [r for r in run.read_jsonl(results / "runs" / name / "metrics.jsonl") if r["step"] <= step]
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"step": 99, "loss"')
    return out


def test_numbers_and_differences_are_those_of_pandas(results):
    two = found(results, "test/vanilla/seed0", "test/masa/seed0")
    logs = [frame(results, r.name) for r in two.runs]
    for column, key in (("training_loss", "loss"), ("held_out_loss", "validation_loss")):
        last = [log[key].dropna().iloc[-1] for log in logs]
        assert two.numbers[column] == pytest.approx(last, abs=1e-9)
        assert two.differences(column) == pytest.approx([0, last[1] - last[0]], abs=1e-9)
    assert two.numbers["trained_on"] == [40 * 4 * 32] * 2
    manifests = [run.read_json(results / "runs" / r.name / "manifest.json") for r in two.runs]
    assert two.numbers["parameters"] == [m["parameters"]["total"] for m in manifests]
    assert two.numbers["attn_cr_pct"][1] == pytest.approx(100 * manifests[1]["parameters"]["attention_reduction"])
    assert two.numbers["training_hours"][0] == pytest.approx(manifests[0]["training"]["training_seconds"] / 3600)
    assert two.numbers["per_second"][0] == pytest.approx(manifests[0]["training"]["tokens_per_second"], rel=1e-2)
    assert two.numbers["word_ppl"] == [9.0, 9.0]
    assert "training_loss_at" not in two.numbers, "both have come equally far"


def test_only_what_differs_is_named(results):
    two = found(results, "test/vanilla/seed0", "test/masa/seed0")
    assert two.differs == {"sharing.method": ["vanilla", "masa"]}
    seeds = found(results, "test/masa")
    assert seeds.differs == {"seed": [0, 1]}
    assert (two.pairs(1), seeds.pairs(1)) == (True, False)


def test_other_data_is_named_and_not_paired(results, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(results / "runs" / "test" / "masa" / "seed0", other)
    provenance = run.read_json(other / "provenance.json")
    run.write_json(other / "provenance.json", provenance | {"inputs": {"tokens": "0" * 64}})
    two = found(results, "test/vanilla/seed0", str(other))
    assert two.differs["provenance.inputs.tokens"][1] == "0" * 64
    assert not two.pairs(1)


def test_seeds_are_paired_as_pandas_pairs_them(results):
    four = found(results, "test/vanilla", "test/masa")
    assert [r.name for r in four.runs] == [f"test/{m}/seed{s}" for m in METHODS for s in (0, 1)]
    table = four.frame().set_index(["group", "seed"])["held_out_loss"].unstack("seed")
    differences = table.loc["test/masa"] - table.loc["test/vanilla"]
    (paired,) = [p for p in four.paired if p.metric == "held_out_loss"]
    assert (paired.group, paired.base, paired.seeds) == ("test/masa", "test/vanilla", 2)
    assert paired.mean == pytest.approx(differences.mean())
    assert paired.std == pytest.approx(differences.std())
    assert not [p for p in four.paired if p.metric == "parameters"], "where neither is better, none is needed"
    three = found(results, "test/vanilla", "test/masa/seed1")
    assert {(p.seeds, p.std) for p in three.paired} == {(1, None)}
    assert not found(results, "test/vanilla/seed0", "test/masa/seed0").paired


def test_runs_in_training_are_compared_at_the_last_common_step(results, tmp_path):
    young = cut(results, "test/masa/seed0", 24, tmp_path)
    two = found(results, "test/vanilla/seed0", str(young))
    logs = [frame(results, "test/vanilla/seed0"), frame(results, "test/masa/seed0")]
    assert two.at == {"training_loss_at": 24 * 128, "held_out_loss_at": 20 * 128}
    for column, key, step in (("training_loss_at", "loss", 24), ("held_out_loss_at", "validation_loss", 20)):
        then = [log[log["step"] == step][key].dropna().iloc[0] for log in logs]
        assert two.numbers[column] == pytest.approx(then, abs=1e-9)
        assert two.differences(column)[1] == pytest.approx(then[1] - then[0], abs=1e-9)
    assert two.differences("training_loss") == [None, None], "of different points"
    assert not two.runs[1].done
    assert list(two.differs) == ["sharing.method"], "no provenance yet is no difference"
    assert not two.pairs(1), "nor is its data known"
    text = compare_text.text(two)
    assert "Held-out loss at 2,560 tokens" in text
    assert "still in training, or interrupted" in text


def test_runs_without_a_common_point(results, tmp_path):
    begun = cut(results, "test/masa/seed0", 0, tmp_path)
    two = found(results, "test/vanilla/seed0", str(begun))
    assert two.at == {}
    assert two.numbers["held_out_loss"][1] is None
    assert "no point yet at which all" in compare_text.text(two)
    with pytest.raises(MasaError, match=r"test/masa/seed0 has no held-out loss yet"):
        compare_figure.draw(two, tmp_path / "x.png")


def test_last_lines_of_different_points_are_not_compared(results, tmp_path):
    """Batches of other sizes: no line of one run is at the tokens of any line of the other."""
    for seed in (0, 1):
        shutil.copytree(results / "runs" / "test" / "masa" / f"seed{seed}", tmp_path / "masa" / f"seed{seed}")
        log = tmp_path / "masa" / f"seed{seed}" / "metrics.jsonl"
        records = [r | {"tokens": r["tokens"] + 1} for r in run.read_jsonl(log)]
        log.write_text("".join(json.dumps(r) + "\n" for r in records))
    four = found(results, "test/vanilla", str(tmp_path / "masa" / "seed0"), str(tmp_path / "masa" / "seed1"))
    assert four.at == {}
    for column in ("training_loss", "held_out_loss"):
        assert None not in four.numbers[column]
        assert four.differences(column) == [None] * 4
        assert not any("*" in cell for cell in compare_text._cells(four, column))
    metrics = {p.metric for p in four.paired}
    assert not metrics & {"training_loss", "held_out_loss"}
    assert "validation_loss" not in metrics, "these directories have no evaluations"


def test_seeds_of_other_data_are_not_paired(results, tmp_path):
    folders = []
    for seed in (0, 1):
        folders.append(tmp_path / "masa" / f"seed{seed}")
        shutil.copytree(results / "runs" / "test" / "masa" / f"seed{seed}", folders[-1])
        provenance = run.read_json(folders[-1] / "provenance.json")
        run.write_json(folders[-1] / "provenance.json", provenance | {"inputs": {"tokens": str(seed)}})
    assert found(results, "test/vanilla", *map(str, folders)).paired == ()


def test_scores_of_an_earlier_training_are_not_shown(results, tmp_path):
    shutil.copytree(results, tmp_path / "results")
    manifest = tmp_path / "results" / "runs" / "test" / "masa" / "seed0" / "manifest.json"
    run.write_json(manifest, run.read_json(manifest) | {"identity": "trained again"})
    two = found(tmp_path / "results", "test/vanilla/seed0", "test/masa/seed0")
    assert two.numbers["validation_loss"][1] is None
    assert two.numbers["held_out_loss"][1] is not None
    assert "not evaluated" in compare_text.text(two)


def test_seeds_stay_together_where_one_of_them_is_named_from_two_results(results, tmp_path):
    shutil.copytree(results / "runs" / "test" / "vanilla" / "seed0", tmp_path / "vanilla" / "seed0")
    three = found(results, "test/vanilla", str(tmp_path / "vanilla" / "seed0"))
    groups = [r.group for r in three.runs]
    assert groups[0] == groups[1] != groups[2]
    assert {p.seeds for p in three.paired} == {1}


def test_the_same_run_of_two_results_is_told_apart_by_its_directory(results, tmp_path):
    shutil.copytree(results / "runs", tmp_path / "runs")
    two = found(results, "test/masa/seed0", str(tmp_path / "runs" / "test" / "masa" / "seed0"))
    assert [r.name for r in two.runs] == [str(r.directory) for r in two.runs]
    assert all(d == 0 for d in two.differences("held_out_loss"))


def test_an_evaluation_stands_for_its_run(results):
    two = found(results, "test/vanilla/seed0", str(results / "evaluations" / "test" / "masa" / "seed0"))
    assert two.runs[1].name == "test/masa/seed0"
    assert two.runs[1].log


def test_compressions(results):
    two = found(results, "tiny/svd")
    assert [r.name for r in two.runs] == ["tiny/svd/20", "tiny/svd/30"]
    assert two.differs == {"reduction": [20, 30]}
    assert two.numbers["held_out_ppl"] == [30.0, 35.0]
    assert two.differences("parameters") == [0, -10]
    assert "30.00*" in compare_text.text(two)
    with pytest.raises(MasaError, match="no curves of training"):
        compare_figure.check(two, results / "x.png")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["test/vanila/seed0", "test/masa/seed0"],
            r"'test/vanila/seed0' does not exist\. Did you mean 'test/vanilla/seed0'",
        ),
        (["test/masa/seed0"], "Two runs at least"),
        (["test/masa", "test/masa/seed1"], "test/masa/seed1 is named twice"),
        (
            ["test/masa/seed0", "digits/vanilla/seed0"],
            r"test/masa/seed0 \(tokens\) and digits/vanilla/seed0 \(images\)",
        ),
        (["test/masa/seed0", "tiny/svd/20"], "count in different units"),
        (["../masa", "test/masa/seed0"], "does not exist"),
    ],
)
def test_what_cannot_be_compared(words, message, results):
    with pytest.raises(MasaError, match=message):
        found(results, *words)


def test_results_that_are_not_there_are_said(tmp_path):
    with pytest.raises(MasaError, match=r"results, .*nowhere, does not exist here\. Call masa in the directory"):
        found(tmp_path / "nowhere", "test/masa", "test/vanilla")
    with pytest.raises(MasaError, match="holds no runs yet"):
        found(tmp_path, "test/masa", "test/vanilla")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("spec.json", "{"),
        ("spec.json", "[]"),
        ("spec.json", '{"run": 1}'),
        ("manifest.json", "7"),
        ("manifest.json", "{"),
    ],
)
def test_damaged_files_are_named(name, content, results, tmp_path):
    shutil.copytree(results / "runs" / "test" / "masa" / "seed0", tmp_path / "run")
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(MasaError, match=name):
        found(results, "test/vanilla/seed0", str(tmp_path / "run"))


def test_damaged_lines_of_a_log_count_for_nothing(results, tmp_path):
    shutil.copytree(results / "runs" / "test" / "masa" / "seed0", tmp_path / "run")
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "tokens": "many", "loss": 1}\n{"step": 42, "tokens": 9, "loss": null}\n\x00\n')
    two = found(results, "test/masa/seed0", str(tmp_path / "run"))
    assert two.differences("training_loss") == [0, 0]


def test_the_command_writes_table_and_picture(results, tmp_path, capsys):
    picture, table = tmp_path / "new" / "c.png", tmp_path / "new" / "c.csv"
    command = [
        "compare",
        "test/vanilla",
        "test/masa",
        "--results",
        str(results),
        "--out",
        str(picture),
        "--csv",
        str(table),
    ]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "C, D" not in said
    assert "C had A's seed and data" in said
    assert "Paired differences to test/vanilla" in said
    four = found(results, "test/vanilla", "test/masa")
    read = pd.read_csv(table)
    assert list(read["run"]) == [r.name for r in four.runs]
    assert list(read["held_out_loss_minus_first"]) == pytest.approx(four.differences("held_out_loss"))
    assert list(read["spec.sharing.method"]) == ["vanilla"] * 2 + ["masa"] * 2
    from PIL import Image

    with Image.open(picture) as image:
        assert image.width > 1000
        assert len(image.convert("RGB").getcolors(1 << 24)) > 50


def test_a_picture_holds_the_curves(results, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "close", lambda *_: None)
    compare_figure.draw(found(results, "test/vanilla/seed0", "test/masa/seed0"), tmp_path / "c.pdf")
    left, right = plt.gcf().axes[:2]
    logs = [frame(results, f"test/{m}/seed0").dropna(subset=["validation_loss"]) for m in METHODS]
    for line, log in zip(left.get_lines(), logs, strict=True):
        assert list(line.get_xdata()) == list(log["tokens"])
        assert list(line.get_ydata()) == pytest.approx(list(log["validation_loss"]))
    difference = logs[1]["validation_loss"].to_numpy() - logs[0]["validation_loss"].to_numpy()
    assert list(right.get_lines()[1].get_ydata()) == pytest.approx(list(difference))
    assert not any(right.get_lines()[0].get_ydata())
    assert {t.get_text() for t in right.texts} == {"vanilla", "masa"}
    assert (tmp_path / "c.pdf").read_bytes().startswith(b"%PDF")


def test_a_wrong_kind_of_picture_is_refused_before_anything_is_written(results, tmp_path):
    command = ["compare", "test/vanilla", "test/masa", "--results", str(results)]
    assert cli.main([*command, "--csv", str(tmp_path / "c.csv"), "--out", str(tmp_path / "c.jpeg")]) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_directory_is_no_file_to_write(results, tmp_path, capsys):
    for option in ("--out", "--csv"):
        assert cli.main(["compare", "test/vanilla", "--results", str(results), option, str(tmp_path)]) == 2
        assert f"{option} {tmp_path} is a directory" in capsys.readouterr().err


def test_a_pipe_without_unicode(results):
    command = [sys.executable, "-m", "masa.cli", "compare", "test/vanilla", "test/masa", "--results", str(results)]
    said = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert said.returncode == 0, said.stderr
    assert b"mean ? standard deviation" in said.stdout


def test_json_has_what_the_documentation_says(results, capsys):
    assert cli.main(["compare", "test/vanilla", "test/masa", "--results", str(results), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    page = (ROOT / "docs" / "howto" / "compare.md").read_text()
    for name in [*data, *data["runs"][0], *data["paired"][0], *data["numbers"]["parameters"], *data["at"]]:
        assert f"`{name}`" in page, name
    assert data["numbers"]["held_out_loss"]["minus_first"][0] == 0


@pytest.mark.parametrize("width", [60, 80, 90])
def test_tables_are_parted_to_fit_the_terminal(width, results):
    four = found(results, "test/vanilla", "test/masa")
    whole, parted = compare_text.text(four), compare_text.text(four, width)
    assert max(map(len, whole.splitlines())) > width
    lines = [line for line in parted.splitlines() if not line.startswith(("Paired", "*"))]
    assert all(len(line) <= width for line in lines)
    assert sum(line.startswith("Parameters") for line in lines) > 1
    assert parted.split().count("-") >= 3
    for cell in compare_text._cells(four, "held_out_loss"):
        assert cell.strip() in parted
