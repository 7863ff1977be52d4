"""masa board: entries are what the runs' files say, the page sorts them, and bad ones are named."""

import json
import shutil
import statistics

import pytest
from conftest import ROOT

from masa import cli
from masa.errors import MasaError
from masa.report import board, runs
from masa.runs import run

EVIDENCE, BOARD = ROOT / "results/reference/evidence", ROOT / "results/reference/board"


def made(name, out, *more):
    return cli.main(["board", "--of", name, "--results", str(EVIDENCE), "--out", str(out), *more])


def test_an_entry_is_what_the_runs_files_say(tmp_path):
    out = tmp_path / "vanilla.json"
    assert made("d48/vanilla", out, "--note", "the control") == 0
    found = run.read_json(out)
    manifests = [run.read_json(EVIDENCE / f"runs/d48/vanilla/seed{seed}/manifest.json") for seed in range(3)]
    assert found["loss"] == [m["training"]["validation_loss"] for m in manifests] and found["seeds"] == [0, 1, 2]
    assert found["parameters"] == manifests[0]["parameters"] and found["label"] == "Vanilla"
    provenance = run.read_json(EVIDENCE / "runs/d48/vanilla/seed0/provenance.json")
    assert found["versions"] == provenance["packages"] and provenance["revision"] in found["commits"]
    assert found["on"]["text"] == provenance["inputs"]["tokens"] and found["on"]["tokens"] == 8753152
    assert found["bits_per_byte"] is None and found["bytes"] is None, "scores and models are not committed"


def test_the_committed_board_is_what_the_committed_runs_make(tmp_path):
    entries = board.read(BOARD)
    assert len(entries) > 10
    for item in entries:
        assert (
            made(f"d48/{item['method']}", tmp_path / "again.json", "--note", item["note"], "--label", item["label"])
            == 0
        )
        assert run.read_json(tmp_path / "again.json") == {k: v for k, v in item.items() if k != "file"}
    assert (BOARD / "README.md").read_text(encoding="utf-8") == board.page(entries)


def test_the_page_sorts_by_mean_loss_and_keeps_what_did_not_help():
    text = (BOARD / "README.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| [")]
    losses = [float(row[2].split("±")[0]) for row in rows]
    assert losses == sorted(losses) and "diverges at this rate" in text
    (vanilla,) = [row for row in rows if "[Vanilla]" in row[1]]
    values = run.read_json(BOARD / "d48/vanilla.json")["loss"]
    assert vanilla[2].strip() == f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def test_settings_that_cannot_be_compared_have_tables_of_their_own(tmp_path):
    for name, tokens in (("a", 1000), ("b", 1000), ("c", 500)):
        entry = run.read_json(BOARD / "d48/vanilla.json")
        entry["on"]["tokens"], entry["label"] = tokens, name
        run.write_json(tmp_path / f"{name}.json", entry)
    run.write_json(tmp_path / "other.json", {"something": "else"})
    assert cli.main(["board", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    tables = text.split("\n## ")[1:]
    assert len(tables) == 2 and "500 tokens" in tables[0] and tables[1].count("\n| [") == 2


def test_bits_bytes_and_memory_where_there_are_models_scores_and_logs(tmp_path):
    place = tmp_path / "runs/d48/vanilla/seed0"
    shutil.copytree(EVIDENCE / "runs/d48/vanilla/seed0", place)
    (place / "model").mkdir()
    (place / "model/model.safetensors").write_bytes(b"x" * 1234)
    manifest = run.read_json(place / "manifest.json")
    metrics = {k: manifest[k] for k in ("run", "parameters", "training")}
    metrics |= {"corpus": {"loss": 4.0, "word_perplexity": 9.0, "byte_perplexity": 4.0}}
    metrics |= {"provenance": {"inputs": {"run": manifest["identity"]}}}
    run.write_json(tmp_path / "evaluations/d48/vanilla/seed0/metrics.json", metrics)
    log = tmp_path / "logs/pretrain/d48/vanilla/seed0.log"
    log.parent.mkdir(parents=True)
    log.write_text("done in 10.0 s, peak memory 321 MiB\n")
    found = board.entry(runs.seeds_of("d48/vanilla", tmp_path))
    assert (found["bits_per_byte"], found["bytes"], found["peak_mib"]) == ([2.0], 1234, 321.0)
    row = board.page([found | {"file": "x.json"}])
    assert "321 MiB" in row and "2.0000" in row and "0.00 MB" in row


def test_runs_that_differ_in_more_than_the_seed_are_no_entry():
    first, second = (runs.read(EVIDENCE / f"runs/d48/{name}/seed0") for name in ("vanilla", "masa-qkvo"))
    with pytest.raises(MasaError, match="differs from d48/vanilla/seed0 in more than its seed"):
        board.entry([first, second])
    with pytest.raises(MasaError, match="is no language model"):
        board.entry([runs.read(EVIDENCE / "runs/cifar10-compact/vanilla/seed0")])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"loss": [4.2]}, "loss must have one finite number for each of its 3 seeds"),
        ({"loss": [4.2, 4.3, float("nan")]}, "loss must have one finite number"),
        ({"label": None}, "label is missing or of another type"),
        ({"board": 2}, "this version of masa reads format 1"),
    ],
)
def test_a_damaged_entry_is_named(change, said, tmp_path, capsys):
    (tmp_path / "it.json").write_text(json.dumps(run.read_json(BOARD / "d48/vanilla.json") | change))
    assert cli.main(["board", str(tmp_path), "--out", str(tmp_path / "page.md")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and "it.json" in line and not (tmp_path / "page.md").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "No entry of a board below"),
        (["nowhere", "--label", "x"], "--label is of an entry"),
        (["--of", "d48/vanila", "--results", str(EVIDENCE)], "Did you mean"),
        ([], "one of the arguments"),
    ],
)
def test_bad_input(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = cli.main(["board", *arguments, "--out", "x"])
    except SystemExit as error:
        status = error.code
    assert status == 2 and said in capsys.readouterr().err and not (tmp_path / "x").exists()
