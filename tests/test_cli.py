"""The command line: help that shows an example, errors that help, exit codes that mean something."""

import argparse
import json
import os
import re
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT
from warm import masa

from masa import MasaError, cli
from masa.study import config

VERBS = sorted(
    name
    for action in cli.make_parser()._actions
    if isinstance(action, argparse._SubParsersAction)
    for name in action.choices
)
OTHERS = {"lm-eval"}
"""Verbs that are another program's command line: ``--help`` is its own."""
EXPECTED = (
    "fetch tokenize pretrain train-vit calibrate compress evaluate lm-eval plan status compare export tables figures"
)


def test_the_verbs_match_the_rules():
    assert set(EXPECTED.split()) <= set(VERBS)


@pytest.mark.parametrize("verb", sorted({*VERBS} - OTHERS))
def test_help_shows_an_example_that_parses(verb, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "exit status" in said
    example = re.search(r"example:\n  masa (.*)", said)[1].split()
    assert example[0] == verb
    assert cli.make_parser().parse_args(example)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pretrian"], "Did you mean 'pretrain'"),
        (["pretrain", "--tokns", "x", "--run", "a/b/seed0", "--tokens", "y", "--out", "z"], "Did you mean '--tokens'"),
        (["plan", "quickly"], "takes no argument 'quickly'"),
        (["plan", "--measured", "--artefacts"], "not allowed with argument --measured"),
        (["tables", "table1", "table2", "--spec", "{}", "--out", "x"], "--spec is of one artefact"),
        (["pretrain", "--tokens", "x", "--out", "y"], "one of the arguments --run --spec is required"),
        (["pretrain", "--run", "nano/masa", "--tokens", "x", "--out", "y"], "not of the form SCALE/EXPERIMENT/seedN"),
        (["pretrain", "--run", "nano/vanila/seed0", "--tokens", "x", "--out", "y"], "Did you mean 'vanilla'"),
        (["pretrain", "--spec", "{oops", "--tokens", "x", "--out", "y"], "not valid JSON"),
        (["pretrain", "--spec", "none.json", "--tokens", "x", "--out", "y"], "No such file"),
        (["pretrain", "--run", "nano/vanilla/seed0", "--tokens", "none", "--out", "/tmp/masa-test"], "does not exist"),
        (
            ["evaluate", "none", "--tokens", "x", "--tokenizer", "x", "--benchmarks", "none", "--out", "y"],
            "none/manifest",
        ),
        (["images", "--out", "x"], "either the name of a data set or --spec"),
        (["images", "cifar", "--out", "x"], "Did you mean 'cifar10'"),
        (
            ["train-vit", "--run", "nano/vanilla/seed0", "--images", "x", "--out", "y"],
            "needs --tokens DIR (masa pretrain)",
        ),
        (["train-vit", "--spec", '{"model": {"family": "vti"}}', "--images", "x", "--out", "y"], "Did you mean 'vit'"),
        (["train-vit", "--spec", "[]", "--images", "x", "--out", "y"], "A run spec is a mapping"),
        (["tables", "tabel1", "--out", "x"], "Did you mean 'table1'"),
        (["tables", "long_run", "--out", "x"], "grids.long is empty"),
        (["figures", "x", "--out", "x"], "'x' does not exist"),
        (["config", "--configfile", "none.yaml"], "none.yaml does not exist"),
        (["throughput", "--scale", "nan", "--out", "x"], "Did you mean 'nano'"),
    ],
)
def test_bad_input_is_a_message_and_status_2(arguments, message):
    result = masa(*arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def lm_eval(monkeypatch):
    """Put a function into the place of lm-eval's entry point."""

    def put(entry):
        monkeypatch.setitem(sys.modules, "lm_eval.__main__", SimpleNamespace(cli_evaluate=entry))

    return put


def test_all_that_follows_lm_eval_is_handed_on_as_it_is(lm_eval, monkeypatch):
    seen, before = [], sys.argv
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    lm_eval(lambda: seen.extend([*sys.argv, os.environ.get("TQDM_DISABLE")]))
    given = ["run", "--model", "hf", "--configfile", "a", "--log", "b", "--version", "-h", "--", "", "--limit=3"]
    assert cli.main(["lm-eval", *given]) == 0
    assert seen == ["lm-eval", *given, None], "its progress bars are not switched off"
    assert sys.argv is before


def test_lm_eval_ends_as_it_ends_and_masas_errors_are_one_line(lm_eval, capsys):
    def fail(error):
        def entry():
            raise error

        lm_eval(entry)
        return cli.main(["lm-eval", "ls"])

    for error, code in ((SystemExit(3), 3), (SystemExit("no task"), "no task"), (ValueError("its own"), 1)):
        with pytest.raises(SystemExit) as end:
            fail(error)
        assert end.value.code == code
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("ValueError: its own\n")
    assert fail(MasaError("a tensor is missing")) == 2
    assert capsys.readouterr().err == "masa: error: a tensor is missing\n"
    assert fail(KeyboardInterrupt()) == 130


def test_lm_eval_that_is_not_installed_is_named(monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.main(["lm-eval", "--help"]) == 2
    said = "masa: error: `masa lm-eval` needs lm_eval, which is not installed; pip install 'masa[study]'\n"
    assert capsys.readouterr().err == said


def test_the_help_of_lm_eval_is_its_own():
    done = masa("lm-eval", "--help")
    assert done.returncode == 0
    assert done.stdout.startswith("usage: lm-eval ")
    assert re.search(r"^    lm-eval +run lm-eval's own command line", masa("--help").stdout, re.M)
    assert masa("lm-eval", "run", "--tusks", "piqa").returncode == 2


def test_an_error_is_also_in_the_log(tmp_path):
    result = masa("tables", "tabel1", "--out", str(tmp_path), "--log", str(tmp_path / "logs" / "a.log"))
    assert result.returncode == 2
    assert "Did you mean 'table1'" in (tmp_path / "logs" / "a.log").read_text()


def test_config_lists_runs_and_prints_json():
    said = masa("config", "--configfile", "config/smoke.yaml")
    listed = said.stdout.splitlines()
    assert listed[0].split("\t") == ["smoke/vanilla/seed0", "10 steps", "2,560 tokens"]
    assert listed[-1].split("\t") == ["SmolLM2-135M/matrix-pca-healed", "compression"]
    assert "the configuration is right: 10 runs of training, 5 compressions" in said.stderr
    assert json.loads(masa("config", "--json").stdout) == config.load()


def test_the_whole_path_works_without_snakemake(tmp_path, cache):
    """tokenizer, tokenize, pretrain, fetch, evaluate, table: each verb alone, on a corpus of one's own."""
    docs = tmp_path / "docs.jsonl"
    docs.write_text("".join(json.dumps({"text": f"Sentence {i} of my own corpus. " * 5}) + "\n" for i in range(300)))
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(
        json.dumps(
            {
                "cache": str(cache),
                "results": str(tmp_path / "results"),
                "data": {
                    "corpus": {"source": f"file:{docs}", "reader": "json", "sha256": None, "validation_tokens": 300},
                    "tokenizer": {"vocab_size": 280, "training_bytes": 20000},
                },
                "evaluation": {"tasks": ["piqa", "race"], "limit": 2},
                "grids": {"main": {"seeds": [0]}},
                "tables": {"table1": {"experiments": ["masa-qkvo"]}},
            }
        )
    )
    more = ["--configfile", "config/smoke.yaml", str(overlay)]
    r = tmp_path / "results"
    trained, scored = r / "runs/smoke/masa-qkvo/seed0", r / "evaluations/smoke/masa-qkvo/seed0"
    for call in (
        ["tokenizer", "--out", r / "tok"],
        ["tokenize", "--tokenizer", r / "tok", "--tokens", "2560", "--out", r / "tokens"],
        ["pretrain", "--run", "smoke/masa-qkvo/seed0", "--tokens", r / "tokens", "--out", trained],
        ["fetch", "--out", r / "bench"],
        [
            "evaluate",
            trained,
            "--tokens",
            r / "tokens",
            "--tokenizer",
            r / "tok",
            "--benchmarks",
            r / "bench",
            "--out",
            scored,
        ],
        ["tables", "table1", "--out", r / "tables"],
    ):
        assert cli.main([*map(str, call), *more]) == 0, call
    assert "MASA-QKVO" in (r / "tables" / "table1.md").read_text()
    assert "n/a" in (r / "tables" / "table1.md").read_text()


@pytest.mark.parametrize(
    "page", ["README.md", "config/README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        assert target.startswith("http") or ((ROOT / page).parent / target).exists(), target
    assert not re.search(r"\b[A-Z]{2,}RESULTS?\b", text), "a placeholder is left"
