"""Notebooks run from top to bottom on real smoke results, and what is committed is readable without running."""

import os
import re
import shutil
import subprocess
import sys

import nbformat
import PIL.Image
import pytest
from projects import BIN, ROOT

from masa.errors import MasaError
from masa.report import notebooks
from masa.study import artefacts

PATHS = sorted((ROOT / "notebooks").glob("*.ipynb"))
READ_RESULTS = ("01_idea", "04_results")
SAYS = {
    "01_idea": ("smoke: 12 layers", "largest difference", "9,408 attention parameters of 52,560; 66.0% saved"),
    "02_share_your_model": (
        "nats/byte with 37,056 attention parameters",
        "Did you mean 'masa'",
        "2 steps: held-out loss",
    ),
    "03_compress": ("134,515,008 parameters", "of the energy, random", "at 20 %"),
    "04_results": ("10 trained runs, 10 of them evaluated", "Table 3", "smoke/masa-qkvo/seed0"),
}
PLACE = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|opt|usr|var|mnt)/|[A-Z]:\\\\")


@pytest.fixture
def execute(tmp_path):
    """Run a copy of a notebook in a few steps, as ``notebooks/execute.py`` does; returns it and all that it says."""

    def run(name, results=None):
        path = tmp_path / f"{name}.ipynb"
        shutil.copy(ROOT / "notebooks" / path.name, path)
        environment = os.environ | {
            "MASA_NOTEBOOK_QUICK": "1",
            "TMPDIR": str(tmp_path),
            "MASA_RESULTS": str(results or ""),
        }
        command = [sys.executable, ROOT / "notebooks/execute.py", path]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-5000:]
        notebook = nbformat.read(path, as_version=4)
        return notebook, "\n".join(texts(notebook))

    return run


def outputs(notebook):
    return [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]


def texts(notebook):
    """All text of all outputs, but for HTML, which has the same as plain text."""
    for o in outputs(notebook):
        yield from [o["text"]] if "text" in o else [o["data"].get(k, "") for k in ("text/plain", "text/markdown")]


def check_outputs(notebook, results=None):
    assert not any(cell.metadata for cell in notebook.cells), "no timestamps"
    assert set(notebook.metadata.language_info) == {"name"}, "no versions of the machine that ran it"
    assert not [o for o in outputs(notebook) if o.output_type == "error" or o.get("name") == "stderr"]
    for text in texts(notebook):
        assert not PLACE.search(text), text
        assert not results or str(results) not in text
        assert len(text) < 10_000, "more than the longest table, of all counted models"


def test_all_are_tested():
    assert [path.stem for path in PATHS] == sorted(SAYS)


@pytest.mark.parametrize("name", SAYS)
def test_a_notebook_runs(name, execute, request):
    results = request.getfixturevalue("smoke_results") if name in READ_RESULTS else None
    notebook, said = execute(name, results)
    for expected in SAYS[name]:
        assert expected in said
    assert any("image/png" in o.get("data", {}) for o in outputs(notebook))
    check_outputs(notebook, results)


def test_results_that_are_not_finished_are_shown_as_far_as_they_go(smoke_results, tmp_path, execute):
    """Runs of language models alone, one of them not evaluated, and no table or figure yet."""
    partial = tmp_path / "smoke"
    for part in ("runs", "evaluations"):
        shutil.copytree(smoke_results / part / "smoke", partial / part / "smoke")
    shutil.rmtree(partial / "evaluations/smoke/gqa")
    notebook, said = execute("04_results", partial)
    assert "6 trained runs, 5 of them evaluated; by scale: {'smoke': 6}" in said
    assert "table1: not made with these results" in said
    assert "figure2: not made with these results" in said
    assert "of 6 runs" in said
    assert "smoke/masa-qkvo/seed0" in said
    check_outputs(notebook, partial)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_readable_without_running(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run it once, from the top"
    assert path.stat().st_size < 400_000
    check_outputs(notebook)
    assert any("image/png" in o.get("data", {}) for o in outputs(notebook))
    assert all(len(cell.source.splitlines()) <= 40 for cell in cells), "short cells"
    assert sum(cell.cell_type == "markdown" for cell in notebook.cells) >= len(cells) / 2
    for other in set(PATHS) - {path}:
        assert f"({other.name})" in notebook.cells[0].source


def test_notebooks_are_formatted_and_the_linter_finds_nothing():
    for command in (["check"], ["format", "--check"]):
        subprocess.run([f"{BIN}/ruff", *command, "notebooks"], cwd=ROOT, check=True, capture_output=True)


# ------------------------------------------------------------------------------------------------------ their helpers


def finish(folder, *runs):
    for run in runs:
        manifest = folder / "runs" / run / "manifest.json"
        manifest.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text("{}")


def test_scales_are_those_where_all_have_finished(tmp_path):
    finish(tmp_path, "a/vanilla/seed0", "b/vanilla/seed1", "b/masa-qkvo/seed0", "c/gqa/seed0", "c/vanilla/seed0")
    finish(tmp_path, "c/masa-qkvo/seed1")
    assert notebooks.finished_scales(tmp_path, "vanilla", "masa-qkvo") == ["c", "b"]  # most experiments first
    assert notebooks.finished_scales(tmp_path) == ["c", "b", "a"]
    assert notebooks.finished_scales(tmp_path, "low-rank") == []
    assert notebooks.finished_scales(tmp_path / "missing") == []


def test_results_are_found_or_the_command_that_makes_them_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(notebooks, "PROJECT", tmp_path)
    monkeypatch.delenv("MASA_RESULTS", raising=False)
    with pytest.raises(
        MasaError, match=r"No finished runs of vanilla at one scale in results or results/smoke.*make r"
    ):
        notebooks.find_results("vanilla")
    finish(tmp_path / "results/smoke", "smoke/vanilla/seed0")
    assert notebooks.find_results("vanilla") == tmp_path / "results/smoke"
    assert "No finished runs in results yet: this reads results/smoke" in capsys.readouterr().out
    finish(tmp_path / "results", "nano/vanilla/seed0")
    assert notebooks.find_results("vanilla") == tmp_path / "results"
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("MASA_RESULTS", "elsewhere")
    with pytest.raises(MasaError, match=r"No finished runs in elsewhere \(MASA_RESULTS\)"):
        notebooks.find_results()
    finish(tmp_path / "elsewhere", "nano/vanilla/seed0")
    assert notebooks.find_results() == tmp_path / "elsewhere"


def test_a_configuration_goes_with_its_results(tmp_path):
    assert notebooks.configuration(tmp_path / "smoke")["results"] == "results/smoke"
    assert notebooks.configuration(tmp_path / "results")["results"] == "results"


def test_rows_that_are_not_evaluated_are_left_out(tmp_path):
    spec = artefacts.artefact_spec(notebooks.configuration(tmp_path / "results"), "figures", "validation_loss")
    for run in ("nano/vanilla/seed0", "nano/vanilla/seed1", "nano/masa-qkvo/seed1", "nano/gqa/seed0"):
        folder = tmp_path / "evaluations" / run
        folder.mkdir(parents=True)
        (folder / "metrics.json").write_text("{}")
    found = notebooks.finished_rows(spec, tmp_path)
    runs = {row["experiment"]: row["runs"] for row in found["rows"]}
    assert runs == {"vanilla": ["nano/vanilla/seed0"], "gqa": ["nano/gqa/seed0"]}, "differences are of the same seed"
    assert all(row["records"] == [f"evaluations/{run}" for run in row["runs"]] for row in found["rows"])
    assert len(spec["rows"]) == 7, "the spec itself stays"
    shutil.rmtree(tmp_path / "evaluations/nano/gqa")
    runs = {row["experiment"]: row["runs"] for row in notebooks.finished_rows(spec, tmp_path)["rows"]}
    assert runs == {"vanilla": ["nano/vanilla/seed1"], "masa-qkvo": ["nano/masa-qkvo/seed1"]}


def test_compressions_have_no_seeds_to_pair(tmp_path):
    spec = artefacts.artefact_spec(notebooks.configuration(tmp_path / "results"), "tables", "table3")
    kept = [row["records"][0] for row in spec["rows"] if row["experiment"] in ("original", "svd-llm")]
    for record in kept:
        (tmp_path / record).mkdir(parents=True)
        (tmp_path / record / "metrics.json").write_text("{}")
    assert [row["records"] for row in notebooks.finished_rows(spec, tmp_path)["rows"]] == [[record] for record in kept]


def test_pictures_are_small_and_keep_their_shape(tmp_path):
    PIL.Image.effect_noise((1600, 400), 60).save(tmp_path / "wide.png", dpi=(300, 300))
    (tmp_path / "shown.png").write_bytes(notebooks.picture(tmp_path / "wide.png", dots=75, colours=8).data)
    with PIL.Image.open(tmp_path / "shown.png") as shown:
        assert shown.size == (400, 100)
        assert len(shown.getcolors()) <= 8
    assert (tmp_path / "shown.png").stat().st_size < (tmp_path / "wide.png").stat().st_size / 8
    with pytest.raises(MasaError, match="make it with `masa figures missing"):
        notebooks.picture(tmp_path / "missing.png")


def test_quick_is_an_environment_variable():
    command = [sys.executable, "-c", "from masa.report import notebooks; print(notebooks.QUICK)"]
    for value, expected in (("1", "True"), ("0", "False"), ("", "False")):
        result = subprocess.run(command, cwd=ROOT, env={"MASA_NOTEBOOK_QUICK": value}, capture_output=True, text=True)
        assert result.stdout.strip() == expected, result.stderr
