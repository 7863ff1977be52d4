"""Averaged weights and the order of data: against float64, through kills; runs that ask for neither stay."""

import pytest
import torch
from conftest import kill_after_checkpoints
from safetensors.torch import load_file
from test_training import spec_of
from transformers import TrainerCallback

import masa
from masa.data.tokens import validation_tokens
from masa.errors import MasaError
from masa.evaluation.perplexity import held_out_loss
from masa.models.recipes import without_later
from masa.runs import run
from masa.training import language, parallel, trainer
from masa.training.averaging import TailAverage


@pytest.mark.parametrize(
    ("steps", "fraction", "first"), [(20, 0.1, 19), (20, 0.3, 15), (25, 0.1, 23), (20, 1, 1), (10, 0.01, 10)]
)
def test_which_steps_are_averaged(steps, fraction, first):
    assert TailAverage(steps, fraction).first == first


def test_what_is_kept_is_the_mean_of_the_last_weights(tokens, tmp_path, monkeypatch):
    seen = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model, **_):
            seen.append({name: p.detach().double().clone() for name, p in model.named_parameters()})

    task = trainer.Task
    monkeypatch.setattr(trainer, "Task", lambda **k: task(**{**k, "callbacks": [Recorder(), *k["callbacks"]]}))
    spec = spec_of(steps=20, average_fraction=0.25)
    manifest = language.pretrain(spec, tokens, tmp_path)
    stored, last = load_file(tmp_path / "model/model.safetensors"), seen[-5:]
    assert len(seen) == 20
    compared = 0
    for name, tensor in stored.items():
        if name in last[0]:
            expected = torch.stack([weights[name] for weights in last]).mean(0)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
            compared += not torch.allclose(tensor.double(), last[-1][name], rtol=1e-5)
    assert compared > 5, "so that the test can fail"
    ids, _ = validation_tokens(tokens)
    loss = held_out_loss(masa.load(tmp_path / "model").eval(), ids, spec["training"]["context"]).mean
    assert manifest["training"]["validation_loss"] == pytest.approx(loss, rel=1e-6), (
        "what is scored last is what is kept"
    )
    assert manifest["training"]["validation_loss_last_weights"] != manifest["training"]["validation_loss"]


def test_until_the_last_step_the_log_is_that_of_a_training_without(tokens, tmp_path):
    plain = language.pretrain(spec_of(steps=20), tokens, tmp_path / "plain")
    averaged = language.pretrain(spec_of(steps=20, average_fraction=0.25), tokens, tmp_path / "averaged")
    curves = [
        [
            (r["step"], r["validation_loss"])
            for r in run.read_jsonl(tmp_path / name / "metrics.jsonl")
            if "validation_loss" in r
        ]
        for name in ("plain", "averaged")
    ]
    assert curves[0][:-1] == curves[1][:-1] and curves[0][-1][1] != curves[1][-1][1]
    assert averaged["training"]["validation_loss_last_weights"] == plain["training"]["validation_loss"]
    assert plain["identity"] != averaged["identity"]


def test_a_killed_one_goes_on_to_the_same_bits(tokens, tmp_path, undisturbed):
    spec = spec_of(steps=150, average_fraction=1, checkpoint_minutes=1e-4)
    whole = undisturbed(language.pretrain, spec, tokens)
    kill_after_checkpoints(lambda: language.pretrain(spec, tokens, tmp_path / "cut"), tmp_path / "cut", count=2)
    assert list((tmp_path / "cut/checkpoints").glob("*/tail-average.safetensors"))
    again = language.pretrain(spec, tokens, tmp_path / "cut")
    assert again["sha256"] == whole["sha256"]
    assert again["training"]["validation_loss"] == whole["training"]["validation_loss"]


def test_another_order_of_data_from_the_same_first_weights(tokens, tmp_path):
    own = language.pretrain(spec_of(steps=4, seed=3), tokens, tmp_path / "own")
    same = language.pretrain(spec_of(steps=4, seed=3, data_seed=3), tokens, tmp_path / "same")
    other = language.pretrain(spec_of(steps=4, seed=3, data_seed=4), tokens, tmp_path / "other")
    weights = [load_file(tmp_path / name / "model/model.safetensors") for name in ("own", "same", "other")]
    assert own["sha256"]["model.safetensors"] == same["sha256"]["model.safetensors"]
    assert other["sha256"]["model.safetensors"] != own["sha256"]["model.safetensors"]
    embedding = "model.embed_tokens.weight"
    fresh = [
        language.pretrain(spec_of(steps=1, seed=3, learning_rate=1e-12, data_seed=s), tokens, tmp_path / f"f{s}")
        for s in (3, 4)
    ]
    first = [load_file(tmp_path / f"f{s}/model/model.safetensors")[embedding] for s in (3, 4)]
    torch.testing.assert_close(*first, rtol=0, atol=1e-9)
    assert fresh and not torch.equal(weights[0][embedding], weights[2][embedding])


def test_recipes_without_them_keep_their_identity_and_parts_are_refused(monkeypatch):
    assert without_later({"average_fraction": 0, "data_seed": None, "steps": 3}) == {"steps": 3}
    spec = spec_of(average_fraction=0.1)
    monkeypatch.setattr(parallel, "is_sharded", lambda spec: True)
    with pytest.raises(MasaError, match=r"average_fraction needs training.parallel: ddp"):
        parallel.check(spec)
