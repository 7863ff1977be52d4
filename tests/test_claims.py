"""The rule by which the paper's claims are judged, against independent references and by simulation."""

import copy
import re

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from scipy import stats

from masa.errors import MasaError
from masa.report import claims as report
from masa.report import own_tables, rule
from masa.runs import run
from masa.study import artefacts, claims, config


def test_residual_variance_is_that_of_least_squares():
    generator = np.random.default_rng(0)
    values = generator.normal(size=(4, 3))
    found = report.of_seeds({str(i): row.tolist() for i, row in enumerate(values)})
    method, seed = np.indices(values.shape)
    design = np.column_stack([*(method.ravel() == i for i in range(4)), *(seed.ravel() == i for i in range(1, 3))])
    rest = np.linalg.lstsq(design.astype(float), values.ravel(), rcond=None)[1]
    assert found.freedom == 12 - 6
    assert found.value == pytest.approx(rest.item() / 6, rel=1e-12)


def test_what_a_seed_does_to_all_alike_is_no_noise():
    values = {"a": [1.0, 2.0, 3.0], "b": [1.5, 2.5, 3.5]}
    assert report.of_seeds(values).value == pytest.approx(0, abs=1e-24)
    assert report.of_seeds({"a": [1.0, 2.0]}) is None
    assert report.of_seeds({"a": [1.0], "b": [2.0]}) is None
    assert report.of_seeds({}) is None


def test_documents_of_equal_length_are_a_plain_mean():
    differences = [0.1, -0.2, 0.3, 0.05]
    found = report.of_examples(differences, [7] * 4)
    assert found.value == pytest.approx(stats.sem(differences) ** 2, rel=1e-12) and found.freedom == 3
    assert report.of_examples([0.1], [7]) is None and report.of_examples([0.1, 0.2], [7, 0]) is None


def test_long_documents_weigh_more():
    """Against the bootstrap over documents."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(10, 200, 300)
    differences = generator.normal(0.01, 0.1, 300) + 0.001 * (tokens > 150)
    drawn = generator.integers(0, 300, (4000, 300))
    means = (differences[drawn] * tokens[drawn]).sum(1) / tokens[drawn].sum(1)
    assert report.of_examples(differences, tokens).value == pytest.approx(means.var(), rel=0.1)


@pytest.mark.parametrize(
    ("gain", "margin", "verdict"),
    [
        (0.03, 0.0, rule.HOLDS),
        (0.01, 0.0, rule.OPEN),
        (-0.01, 0.0, rule.OPEN),
        (-0.03, 0.0, rule.FAILS),
        (-0.03, 0.06, rule.HOLDS),
        (-0.03, 0.04, rule.OPEN),
        (-0.08, 0.04, rule.FAILS),
    ],
)
def test_verdicts(gain, margin, verdict):
    """With an error of 0.01 and 12 degrees of freedom the half width is 2.179 x 0.01."""
    judged = report.judge(gain, [report.Variance(1e-4, 12)], margin)
    assert judged.verdict == verdict
    assert judged.high - judged.gain == pytest.approx(0.01 * stats.t.ppf(0.975, 12))
    assert (judged.p < 0.05) == (verdict != rule.OPEN)
    assert judged.p == pytest.approx(2 * stats.t.cdf(-abs(gain + margin) / 0.01, 12))


@pytest.mark.parametrize(
    ("gain", "within", "verdict"),
    [
        (0.0, 0.02, rule.EQUAL),
        (0.002, 0.02, rule.EQUAL),
        (-0.002, 0.02, rule.EQUAL),
        (0.003, 0.02, rule.OPEN),
        (0.0, 0.017, rule.OPEN),
        (0.0, 0.0, rule.OPEN),
        (0.03, 0.06, rule.HOLDS),
        (-0.03, 0.06, rule.FAILS),
    ],
)
def test_equality_is_a_90_percent_interval_within_the_margins(gain, within, verdict):
    """With an error of 0.01 and 12 degrees of freedom its half width is 1.782 x 0.01."""
    judged = rule.judge(gain, [rule.Variance(1e-4, 12)], 0.0, within)
    assert judged.verdict == verdict
    if within:
        sides = [(within + gain) / 0.01, (within - gain) / 0.01]
        assert judged.p_equal == pytest.approx(max(stats.t.sf(side, 12) for side in sides))
    else:
        assert judged.p_equal is None


def test_equality_is_wrong_once_in_twenty_at_the_margin():
    generator = np.random.default_rng(0)
    drawn = generator.normal(0.01, 0.004, (6000, 8))
    found = [rule.judge(x.mean(), [rule.Variance(x.var(ddof=1) / 8, 7)], 0.0, 0.01).p_equal < 0.05 for x in drawn]
    assert np.mean(found) == pytest.approx(0.05, abs=0.012)


def test_all_claims_at_once_by_holm():
    """Against the definition: the values in order, times how many are left, never falling, at most 1."""
    assert report.holm([0.04, 0.001, 0.6, 0.02]) == pytest.approx([0.08, 0.004, 0.6, 0.06])
    assert report.holm([0.03, 0.03, 0.9, 0.8]) == pytest.approx([0.12, 0.12, 1.0, 1.0])
    assert report.holm([]) == []


def test_holm_is_wrong_once_in_twenty_tables():
    """Tables of ten claims of which none is true: about 5 % of them have a decided one, without it about 40 %."""
    tables = stats.uniform.rvs(size=(4000, 10), random_state=0)
    wrong = np.mean([min(report.holm(row.tolist())) < 0.05 for row in tables])
    assert wrong == pytest.approx(0.05, abs=0.012) and np.mean(tables.min(1) < 0.05) > 0.35


def test_nothing_is_decided_without_a_variance():
    assert report.judge(5.0, [], 0.0) == rule.Judged(5.0, None, None, rule.OPEN)


def test_no_noise_that_was_seen_decides_nothing():
    """Accuracies are discrete: two methods at two seeds may well shift alike."""
    noise = report.of_seeds({"a": [95.0, 95.3], "b": [93.9, 94.2]})
    assert report.judge(-1.1, [noise], 0.5).verdict == rule.OPEN


def test_few_documents_of_unequal_length():
    """Losses whose variance falls with a document's tokens: no bias, and less freedom than documents."""
    generator = np.random.default_rng(0)
    tokens = np.array([400, 50, 25, 25])
    found = [report.of_examples(d, tokens) for d in generator.normal(size=(20000, 4)) / np.sqrt(tokens)]
    assert np.mean([v.value for v in found]) == pytest.approx(1 / tokens.sum(), rel=0.05)
    assert found[0].freedom == pytest.approx(500**2 / (400**2 + 50**2 + 2 * 25**2) - 1)


def test_one_variance_of_two_decides_the_degrees_of_freedom():
    small, large = report.Variance(1e-12, 1), report.Variance(1.0, 40)
    assert report.judge(0.0, [small, large], 0).high == pytest.approx(stats.t.ppf(0.975, 40), rel=1e-4)


def metrics(loss, by_document, tokens):
    parameters = {"total": 1000, "attention": 100, "attention_reduction": 0.5, "model_reduction": 0.2}
    corpus = {"loss": loss, "word_perplexity": 9.0, "byte_perplexity": 2.0}
    corpus |= {"loss_by_document": by_document, "tokens_by_document": tokens}
    return {"run": "x", "parameters": parameters, "training": {"tokens": 1}, "corpus": corpus}


def simulated(folder, effects, generator, seeds=3, documents=40):
    """Evaluations of runs whose losses are effect + seed + noise of training + noise of method and document."""
    tokens = generator.integers(20, 80, documents)
    of_seed = generator.normal(0, 0.05, seeds)
    for name, effect in effects.items():
        of_document = generator.normal(0, 0.03, documents)
        for seed in range(seeds):
            losses = 4 + effect + of_seed[seed] + generator.normal(0, 0.01) + of_document
            loss = float((losses * tokens).sum() / tokens.sum())
            path = folder / "evaluations" / "nano" / name / f"seed{seed}" / "metrics.json"
            run.write_json(path, metrics(loss, losses.tolist(), tokens.tolist()))


NAMES = ["better-than-low-rank", "better-than-sequential", "better-than-repeat-all-over", "o-is-harder"]
EXPERIMENTS = ["vanilla", "gqa", "masa-qkv", "low-rank", "sequential", "repeat-all-over", "masa-qkvo"]


@pytest.fixture(scope="module")
def main_claims():
    merged = config.load()
    merged["grids"]["main"]["seeds"] = [0, 1, 2]
    return {c["name"]: c for c in artefacts.table_spec(merged, "claims") if c["name"] in NAMES}


def test_the_interval_covers_the_truth_19_times_of_20(main_claims, tmp_path):
    """Of 4 x 150 simulated comparisons about 30 intervals miss, which share methods and seeds."""
    generator = np.random.default_rng(0)
    effects = dict.fromkeys(EXPERIMENTS, 0.02) | {"masa-qkvo": 0.0}
    truth = dict.fromkeys(NAMES, 0.02) | {"o-is-harder": -3 * 0.02}
    missed, without_documents = 0, 0
    for _ in range(150):
        simulated(tmp_path, effects, generator)
        for name, claim in main_claims.items():
            row = report.row(claim, tmp_path)
            missed += not row["low"] <= truth[name] <= row["high"]
            without_documents += abs(row["gain"] - truth[name]) > stats.t.ppf(0.975, 12) * row["error_seeds"]
    assert 15 <= missed <= 45
    assert without_documents > 60, "the simulation would notice an interval that forgets documents"


def test_errors_of_seeds_examples_and_own_seeds_by_hand(main_claims, tmp_path):
    simulated(tmp_path, dict.fromkeys(EXPERIMENTS, 0.0), np.random.default_rng(3))
    row = report.row(main_claims["o-is-harder"], tmp_path)

    def losses(name):
        folder = tmp_path / "evaluations" / "nano" / name
        return np.array([run.read_json(folder / f"seed{s}" / "metrics.json")["corpus"]["loss"] for s in range(3)])

    loss = {name: losses(name) for name in EXPERIMENTS}
    contrast = 4 * loss["masa-qkv"] - 3 * loss["masa-qkvo"] - loss["vanilla"]
    assert row["gain"] == pytest.approx(-contrast.mean())
    assert row["error_own_seeds"] == pytest.approx(stats.sem(contrast))
    pooled = report.of_seeds({name: values.tolist() for name, values in loss.items()})
    assert row["error_seeds"] == pytest.approx((26 / 3 * pooled.value) ** 0.5), "16 + 9 + 1"
    total = row["error_seeds"] ** 2 + row["error_examples"] ** 2
    assert row["low"] < row["gain"] - 1.96 * total**0.5 < row["high"]


def test_the_table(main_claims, tmp_path):
    judged_claims = list(main_claims.values())[:3]
    generator = np.random.default_rng(1)
    effects = dict.fromkeys(EXPERIMENTS, 0.0) | {"low-rank": 0.2, "sequential": -0.2}
    simulated(tmp_path, effects, generator)
    absent = copy.deepcopy(judged_claims[0]) | {"records": None, "scale": "elsewhere"}
    own_tables.write("claims", [*judged_claims, absent], tmp_path, tmp_path / "tables")
    frame = pd.read_csv(tmp_path / "tables" / "claims.csv")
    assert list(frame["verdict"])[:2] == [rule.HOLDS, rule.FAILS]
    assert frame["verdict"].iloc[3] == report.ABSENT and pd.isna(frame["gain"].iloc[3])
    assert frame["gain"].iloc[0] == pytest.approx(0.2, abs=0.06)
    shown = (tmp_path / "tables" / "claims.md").read_text()
    tests = [*frame["p"].iloc[:3], *frame["p_equal"].iloc[:3]]  # all that were asked at once
    assert frame["p_holm"].iloc[:3].tolist() == pytest.approx(report.holm(tests)[:3])
    assert pd.isna(frame["p_holm"].iloc[3]) and "< 0.001" in shown and "for want of" not in shown
    assert "$<$ 0.001" in (tmp_path / "tables" / "claims.tex").read_text()
    assert "MASA-QKVO − Sequential (validation_loss)" in shown and "[" in shown and not re.search(r"\bnan\b", shown)


def test_a_misspelt_table_is_told_the_tables_that_every_configuration_has():
    with pytest.raises(MasaError, match="Did you mean 'claims'"):
        artefacts.table_spec(config.load(), "claimz")


def test_a_table_of_which_nothing_can_be_decided(main_claims, tmp_path):
    simulated(tmp_path, dict.fromkeys(EXPERIMENTS, 0.0), np.random.default_rng(1), seeds=1)
    claim = main_claims["o-is-harder"]
    records = {name: of_one[:1] for name, of_one in claim["records"].items()}
    own_tables.write("claims", [claim | {"records": records, "noise": {}}], tmp_path, tmp_path / "tables")
    (row,) = pd.read_csv(tmp_path / "tables" / "claims.csv").to_dict("records")
    assert row["verdict"] == rule.OPEN and pd.isna(row["p"]) and pd.isna(row["p_holm"])


def test_what_is_missing_is_named_and_the_rest_judged(main_claims, tmp_path):
    simulated(tmp_path, dict.fromkeys(EXPERIMENTS, 0.0), np.random.default_rng(1))
    (tmp_path / "evaluations" / "nano" / "low-rank" / "seed2" / "metrics.json").unlink()
    asked = [claim | {"noise": {}} for claim in main_claims.values()]
    own_tables.write("claims", asked, tmp_path, tmp_path / "tables")
    frame = pd.read_csv(tmp_path / "tables" / "claims.csv")
    assert (frame["verdict"] == report.ABSENT).tolist() == [True, False, False, False]
    assert "for want of measurements in evaluations/nano/low-rank." in (tmp_path / "tables" / "claims.md").read_text()
    assert report.row(main_claims["o-is-harder"], tmp_path)["verdict"] == report.ABSENT, "its noise is not all there"
    with pytest.raises(MasaError, match=r"nowhere.*metrics\.json does not exist"):
        own_tables.write("claims", asked, tmp_path / "nowhere", tmp_path / "tables")


VISION = ["vanilla", "masa-qkvo", "low-rank"]


def images_scored(folder, right):
    """Evaluations of Vision Transformers, from an array (method, seed, image) of what they got right."""
    for name, of_method in zip(VISION, right, strict=True):
        for seed, correct in enumerate(of_method):
            scores = {"top1": float(correct.mean()), "loss": 1.0, "calibration_error": 0.1, "top5": None}
            scores["correct_by_image"] = "".join(str(int(x)) for x in correct)
            record = metrics(0.0, [], []) | {"classification": scores, "training": {"images": 1}}
            del record["corpus"]
            run.write_json(folder / "evaluations" / "digits-compact" / name / f"seed{seed}" / "metrics.json", record)


@pytest.fixture(scope="module")
def vision_claims():
    merged = config.load()
    merged["grids"]["vision"]["seeds"] = [0, 1, 2]
    found = {c["name"]: c for c in artefacts.table_spec(merged, "claims") if c["name"].startswith("vit-")}
    for claim in found.values():
        claim["noise"] = {name: records for name, records in claim["noise"].items() if name in VISION}
    return found


def test_accuracies_are_paired_image_by_image(vision_claims, tmp_path):
    generator = np.random.default_rng(0)
    hard = generator.random(500) < 0.3  # the same images for all
    right = np.array([[~hard ^ (generator.random(500) < 0.02) for _ in range(3)] for _ in VISION])
    images_scored(tmp_path, right)
    row = report.row(vision_claims["vit-at-least-vanilla"], tmp_path)
    contrast = 100 * (right[1].mean(0) - right[0].mean(0))
    assert row["gain"] == pytest.approx(contrast.mean())
    assert row["error_examples"] == pytest.approx(stats.sem(contrast))
    unpaired = 100 * (right[0].mean(0).std() ** 2 / 500 + right[1].mean(0).std() ** 2 / 500) ** 0.5
    assert row["error_examples"] < unpaired / 3, "images that are hard for both cancel"
    assert row["high"] - row["gain"] > 1.96 * (row["error_seeds"] ** 2 + row["error_examples"] ** 2) ** 0.5


def test_an_evaluation_without_single_scores_says_how_to_mend_it(vision_claims, tmp_path):
    images_scored(tmp_path, np.ones((3, 3, 4), bool))
    path = tmp_path / "evaluations" / "digits-compact" / "vanilla" / "seed1" / "metrics.json"
    record = run.read_json(path)
    del record["classification"]["correct_by_image"]
    run.write_json(path, record)
    with pytest.raises(MasaError, match=r"correct_by_image.*masa evaluate"):
        report.row(vision_claims["vit-at-least-vanilla"], tmp_path)


def compressed(folder, name, losses, tokens, texts):
    """A compression's metrics whose documents have these losses, on the held-out text and on others."""
    ends = {"nll_by_document": [a * t for a, t in zip(losses, tokens, strict=True)], "tokens_by_document": tokens}
    score = ends | {"token_perplexity": float(np.exp(np.average(losses, weights=tokens)))}
    record = metrics(0.0, [], [])
    record |= {"corpus": record["corpus"] | score, "texts": dict.fromkeys(texts, score), "requested_pct": 20}
    del record["training"]
    part = {"reduction_achieved": 0.2, "regularisation": {}, "seconds": 1.0, "peak_rss_bytes": 1}
    path = folder / "compression" / "SmolLM2-135M" / name / "20" / "metrics.json"
    run.write_json(path, record | {"compression": part, "healing": None})


def test_perplexities_of_a_text_that_may_be_missing(tmp_path):
    found = [c for c in artefacts.table_spec(config.load(), "claims") if c["name"].startswith("pca-")]
    claim = next(c for c in found if c["metric"] == "wikitext_token_ppl" and c["scale"].endswith("20 %"))
    tokens = [10, 20, 30]
    compressed(tmp_path, "svd-llm", [3.0, 3.2, 3.1], tokens, ["wikitext"])
    compressed(tmp_path, "matrix-pca", [2.8, 3.1, 3.0], tokens, ["wikitext"])
    row = report.row(claim, tmp_path)
    assert row["gain"] == pytest.approx((0.2 * 10 + 0.1 * 20 + 0.1 * 30) / 60) and row["verdict"] == rule.HOLDS
    assert row["error_examples"] > 0
    compressed(tmp_path, "svd-llm", [3.0, 3.2, 3.1], tokens, [])
    assert report.row(claim, tmp_path)["verdict"] == report.ABSENT


def test_one_seed_takes_its_noise_from_those_that_have_several():
    found = {c["name"]: c for c in artefacts.table_spec(config.load(), "claims")}
    sweep = found["more-atoms-qkvo"]
    assert len(sweep["records"]["masa-qkvo-s8"]) == 1
    assert sorted(sweep["noise"]) == sorted(EXPERIMENTS) and all(len(r) == 2 for r in sweep["noise"].values())
    assert found["pca-better-than-svd-llm"]["noise"] == {}


def test_an_experiment_with_other_seeds_takes_no_noise_from_the_rest():
    runs = {f"d/{name}/seed{seed}" for name in ("a", "b", "c") for seed in range(3)}
    assert sorted(claims.several_seeds(runs | {"d/x/seed3", "d/x/seed4"}, "d")) == ["a", "b", "c"]
    fewer = claims.several_seeds(runs | {"d/x/seed0", "d/x/seed1", "e/y/seed0"}, "d")
    assert sorted(fewer) == ["a", "b", "c"] and len(fewer["a"]) == 3, "4 degrees of freedom, not 3"
    assert claims.several_seeds({"d/a/seed0", "d/b/seed0"}, "d") == claims.several_seeds(set(), "d") == {}


def test_a_claim_asks_for_no_run_of_its_own():
    smoke = config.load([ROOT / "config" / "smoke.yaml"])
    found = artefacts.table_spec(smoke, "claims")
    assert {c["name"] for c in found} == set(smoke["claims"])
    assert any(c["records"] is None for c in found) and any(c["records"] for c in found)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"contrast": {"masa-qkvo": 1, "vanilla": -2}}, "the weights add up to -1, not to 0"),
        ({"contrast": {"masa-qkvo": 0, "vanilla": 0}}, "all weights are 0"),
        ({"contrast": {"masa-qkvo": 1, "vanila": -1}}, "Did you mean 'vanilla'"),
        ({"grid": "mian"}, "Did you mean 'main'"),
        ({"metric": "parameters"}, "metric"),
        ({"margin": -1}, "margin"),
    ],
)
def test_a_wrong_claim_is_one_clear_message(change, message, tmp_path):
    merged = config.load()
    merged["claims"]["better-than-low-rank"] |= change
    with pytest.raises(MasaError, match=r"claims\.better-than-low-rank") as error:
        config.check(merged)
    assert message.lower() in str(error.value).lower()


def test_contrasts_in_words():
    assert claims.contrast({"A": -3, "B": 4, "C": -1}) == "4 B − 3 A − C"
