"""Scores of image classifiers by hand, and the whole path on the command line."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from test_image_training import spec_of

import masa
from masa import cli
from masa.data import images, pixels
from masa.evaluation import images as image_evaluation
from masa.evaluation.classification import Predictions, predict
from masa.runs import run
from masa.training import images as image_training


def test_scores_by_hand():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(400, 7, generator=generator), torch.randint(0, 6, (400,), generator=generator)
    found = Predictions(logits, labels).scores()
    guess = logits.argmax(1)
    assert found["top1"] == pytest.approx((guess == labels).double().mean().item())
    assert found["top5"] == pytest.approx((logits.topk(5).indices == labels[:, None]).any(1).double().mean().item())
    assert found["loss"] == pytest.approx(-logits.log_softmax(1)[torch.arange(400), labels].mean().item(), rel=1e-5)
    confusion = torch.zeros(7, 7, dtype=int)
    for true, said in zip(labels, guess, strict=True):
        confusion[true, said] += 1
    assert found["confusion"] == confusion.tolist()
    assert found["per_class"][2] == pytest.approx((guess[labels == 2] == 2).double().mean().item())
    assert found["per_class"][6] is None, "a class without images has no accuracy"
    assert found["images"] == 400
    assert [digit == "1" for digit in found["correct_by_image"]] == (guess == labels).tolist()
    json.dumps(found, allow_nan=False)


def test_top5_of_five_classes_is_not_a_score():
    assert Predictions(torch.randn(8, 5), torch.arange(8) % 5).scores()["top5"] is None


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    image_training.pretrain(spec_of(steps=40, evaluations=1), digits, folder)
    return folder


def test_evaluation_has_all_that_a_report_draws(trained, digits, tmp_path):
    metrics = image_evaluation.evaluate(trained, digits, {"examples": 10}, tmp_path)
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    found = predict(masa.load(trained / "model"), pixels.ImageSplit(digits, "test"))
    scores = metrics["classification"]
    assert scores["top1"] == pytest.approx(found.accuracy(), abs=1e-6)
    assert np.sum(scores["confusion"]) == scores["images"] == len(found.labels)
    assert scores["top1"] == pytest.approx(np.trace(scores["confusion"]) / scores["images"], abs=1e-6)
    assert metrics["parameters"]["attention_reduction"] == pytest.approx(2 / 3, abs=2e-3)
    assert metrics["classes"] == list("0123456789")
    examples = metrics["examples"]
    assert len(examples) == 10
    assert len({e["index"] for e in examples}) == 10
    assert [e["index"] for e in examples[:5]] == list(range(5))
    assert all(e["label"] != e["prediction"] for e in examples[5:])
    picture = np.asarray(Image.open(tmp_path / "examples.png"))
    assert picture.shape == (8, 80)
    split = pixels.ImageSplit(digits, "test")
    for e in examples:
        assert np.array_equal(picture[:, 8 * e["tile"] : 8 * e["tile"] + 8], split.images[e["index"], :, :, 0])
        assert split.labels[e["index"]] == e["label"]
    weights = run.read_json(tmp_path / "weights.json")
    assert len(weights["effective_rank"]["q"]) == 6
    assert set(weights["coefficients"]) == set("qkvo")


def test_bad_input(trained, digits, tmp_path):
    for settings, message in (
        ({"exampels": 3}, "Did you mean 'examples'"),
        ({"split": "tset"}, "Did you mean 'test'"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            image_evaluation.evaluate(trained, digits, settings, tmp_path / "out")
    with pytest.raises(masa.MasaError, match=r"manifest\.json does not exist"):
        image_evaluation.evaluate(tmp_path, digits, {}, tmp_path / "out")
    other = tmp_path / "other"  # the same digits in other splits: its test has training images of this run
    images.prepare({"name": "digits", "test_fraction": 0.3}, tmp_path / "cache", None, other)
    with pytest.raises(masa.MasaError, match=r"was trained on other images than those in .*other"):
        image_evaluation.evaluate(trained, other, {}, tmp_path / "out")


def test_the_whole_path_on_the_command_line(tmp_path, capsys):
    spec = tmp_path / "spec.json"
    spec.write_text(json.dumps(spec_of(steps=3, evaluations=1)))
    where = tmp_path / "images"
    images_spec = json.dumps({"data": {"name": "digits"}, "cache": str(tmp_path), "mirror": None})
    trained, scored, counted = tmp_path / "run", tmp_path / "scores", tmp_path / "parameters.json"
    for call in (
        ["images", "--spec", images_spec, "--out", where],
        ["train-vit", "--spec", spec, "--images", where, "--out", trained],
        ["evaluate", trained, "--images", where, "--out", scored],
        ["evaluate", trained, "--images", where, "--spec", '{"limit": 5, "examples": 2}', "--out", scored],
        ["parameters", "--spec", json.dumps([spec_of()]), "--out", counted],
    ):
        assert cli.main([*map(str, call)]) == 0, call
    assert run.read_json(scored / "metrics.json")["classification"]["images"] == 5
    (record,) = run.read_json(counted)
    stored = run.read_json(trained / "manifest.json")["parameters"]
    assert {k: record[k] for k in stored} == stored
    assert cli.main(["evaluate", str(trained), "--tokens", "x", "--out", str(scored)]) == 2
    assert "is a Vision Transformer and needs --images DIR" in capsys.readouterr().err
    assert cli.main(["pretrain", "--spec", str(spec), "--tokens", "x", "--out", str(trained)]) == 2
