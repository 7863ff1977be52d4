"""Vision Transformers trained for real on digits: the same images, the same bits again, and what can go wrong."""

import signal

import pytest
import timm
import torch
from conftest import kill_again_and_again, stop_and_resume
from test_vision import SIZES

import masa
from masa.data import pixels
from masa.evaluation.classification import predict
from masa.models import timm_vit, vit
from masa.runs import run
from masa.sharing.parameters import parameter_groups
from masa.training import images, trainer

MODEL = SIZES | {"hidden_size": 32, "intermediate_size": 32}


def spec_of(method="masa", seed=0, model=None, **recipe):
    sharing = method if isinstance(method, dict) else {"method": method}
    base = {"steps": 8, "batch_size": 16, "learning_rate": 3e-3, "evaluations": 2, "label_smoothing": 0.1}
    return {
        "run": f"digits/{sharing['method']}/seed{seed}",
        "seed": seed,
        "model": MODEL | (model or {}),
        "sharing": sharing,
        "training": base | recipe,
    }


EVERYTHING = {
    "augmentation": {"scale": [0.7, 1.0], "hflip": 0.0, "color_jitter": 0.1, "re_prob": 0.2},
    "mixup": {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "prob": 0.5},
    "ema_decay": 0.99,
}


def test_a_run_learns_and_stores_everything(digits, tmp_path):
    result = images.pretrain(spec_of(steps=90, evaluations=3, batch_size=32), digits, tmp_path)
    log = list(run.read_jsonl(tmp_path / "metrics.jsonl"))
    held_out = [r for r in log if "validation_loss" in r]
    assert [r["images"] for r in held_out] == [30 * 32, 60 * 32, 90 * 32]
    assert held_out[-1]["validation_loss"] < held_out[0]["validation_loss"] - 0.1
    assert held_out[-1]["validation_top1"] > 0.2
    assert held_out[-1]["validation_top5"] > held_out[-1]["validation_top1"]
    assert result["training"]["validation_top1"] == held_out[-1]["validation_top1"]
    assert result["training"]["images"] == 90 * 32
    assert result["training"]["images_per_second"] > 0
    spec = run.read_json(tmp_path / "spec.json")
    assert spec["data"] == "digits"
    assert spec["training"]["weight_decay"] == 0.05, "defaults are written down"
    model = masa.load(tmp_path / "model")
    again = predict(model, pixels.ImageSplit(digits, "validation"))
    assert again.loss == pytest.approx(held_out[-1]["validation_loss"], rel=1e-5)
    assert model.config.id2label[7] == "7"
    provenance = run.read_json(tmp_path / "provenance.json")
    assert provenance["inputs"]["images"]
    assert provenance["packages"]["timm"] == timm.__version__
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("method", ["masa", "vanilla"])
def test_the_same_run_gives_the_same_bits(method, digits, tmp_path):
    first = images.pretrain(spec_of(method, **EVERYTHING), digits, tmp_path / "a")
    second = images.pretrain(spec_of(method, **EVERYTHING), digits, tmp_path / "b")
    other = images.pretrain(spec_of(method, seed=1, **EVERYTHING), digits, tmp_path / "c")
    assert first["sha256"] == second["sha256"]
    assert other["sha256"] != first["sha256"]


def test_all_methods_see_the_same_images_and_start_from_the_same_common_weights(digits, tmp_path, monkeypatch):
    seen = {}
    step = trainer.Trainer.training_step
    for method in ("vanilla", "masa", "low-rank", "sequential", "repeat-all-over"):
        batches, start = [], {}

        def look(self, model, inputs, *rest, batches=batches, start=start, **more):
            if not batches:
                start |= {n: p.detach().clone() for n, p in model.named_parameters() if "mlp" in n or "embed" in n}
            batches.append({k: v.clone() for k, v in inputs.items()})
            return step(self, model, inputs, *rest, **more)

        monkeypatch.setattr(trainer.Trainer, "training_step", look)
        images.pretrain(spec_of(method, steps=2, **EVERYTHING), digits, tmp_path / method)
        monkeypatch.setattr(trainer.Trainer, "training_step", step)
        seen[method] = batches, start
    batches, start = seen.pop("vanilla")
    for other, common in seen.values():
        assert all(torch.equal(a[k], b[k]) for a, b in zip(batches, other, strict=True) for k in a)
        assert start.keys() == common.keys()
        assert all(torch.equal(start[n], common[n]) for n in start)


def test_gradient_accumulation_is_the_same_step(digits, tmp_path):
    whole = images.pretrain(spec_of(steps=4), digits, tmp_path / "a")["training"]["validation_loss"]
    parts = images.pretrain(spec_of(steps=4, micro_batch_size=4), digits, tmp_path / "b")["training"]
    assert parts["validation_loss"] == pytest.approx(whole, rel=1e-5)


def test_the_loss_is_smoothed_cross_entropy(digits):
    model = timm_vit.build(MODEL, {"method": "vanilla"})
    x, y = next(pixels.ImageSplit(digits, "train").batches(6))
    trained = images.ImageTrainer.__new__(images.ImageTrainer)
    trained.label_smoothing = 0.2
    logp = model(x).logits.log_softmax(1)
    expected = -(0.8 * logp[torch.arange(6), y] + 0.2 * logp.mean(1)).mean()
    torch.testing.assert_close(trained.compute_loss(model, {"pixel_values": x, "labels": y}), expected)
    mixed = 0.3 * torch.eye(10)[y] + 0.7 * torch.eye(10)[y.flip(0)]
    expected = -((0.8 * mixed + 0.02) * logp).sum(1).mean()
    torch.testing.assert_close(trained.compute_loss(model, {"pixel_values": x, "labels": mixed}), expected)


def test_who_decays():
    model = timm_vit.build(MODEL, {"method": "masa", "coefficients": "mlp"})
    decay, plain, coefficients = parameter_groups(model, vit.recipe(spec_of()["training"]))
    names = {id(p): n for n, p in model.named_parameters()}
    of = [{names[id(p)] for p in group["params"]} for group in (decay, plain, coefficients)]
    assert sum(map(len, of)) == len(names)
    assert {n for n in of[0] if "atoms" in n} == {f"timm_model.shared.{p}.atoms" for p in "qkvo"}
    assert {"timm_model.pos_embed", "timm_model.cls_token", "timm_model.norm.weight"} <= of[1]
    assert all("maker" in n for n in of[2])


def test_epochs_are_steps(digits, tmp_path):
    spec = spec_of(batch_size=200, epochs=1.5)
    spec["training"].pop("steps")
    result = images.pretrain(spec, digits, tmp_path)
    assert result["training"]["steps"] == -(-1206 * 3 // 400)


def test_the_average_is_what_is_scored_and_stored(digits, tmp_path):
    plain = images.pretrain(spec_of(steps=20), digits, tmp_path / "a")
    averaged = images.pretrain(spec_of(steps=20, ema_decay=0.9), digits, tmp_path / "b")
    assert plain["training"]["validation_loss"] != averaged["training"]["validation_loss"]
    found = predict(masa.load(tmp_path / "b" / "model"), pixels.ImageSplit(digits, "validation"))
    assert found.loss == pytest.approx(averaged["training"]["validation_loss"], rel=1e-5)


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(digits, tmp_path):
    """With dropout of whole blocks, augmentation, mixup and an average: everything that draws or remembers."""
    spec = spec_of(steps=60, model={"drop_path_rate": 0.2, "drop_rate": 0.1}, **EVERYTHING)
    stop_and_resume(images.pretrain, spec, "images", digits, tmp_path, lines=15, number=signal.SIGUSR1)


def test_twenty_kills_at_random_moments_change_no_bit(digits, tmp_path, undisturbed):
    """SIGKILL with everything that draws or remembers, in a run that saves after every step."""
    spec = spec_of(steps=150, checkpoint_minutes=1e-5, model={"drop_path_rate": 0.2, "drop_rate": 0.1}, **EVERYTHING)
    whole = undisturbed(images.pretrain, spec, digits)
    out = tmp_path / "cut"
    assert kill_again_and_again(lambda: images.pretrain(spec, digits, out), out, 20) == 20
    assert images.pretrain(spec, digits, out)["sha256"] == whole["sha256"]


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        ({"patch_size": 3}, {}, "Run digits/masa/seed0: model.patch_size = 3 does not divide"),
        ({"channels": 3}, {}, r"model\.channels = 3, but the digits images .* have 1"),
        ({"num_classes": 11}, {}, r"model\.num_classes = 11, but the digits images .* have 10"),
        ({"image_size": 16}, {}, r"model\.image_size = 16, but the digits images .* have 8"),
        ({}, {"epochs": 1}, "either epochs or steps"),
        ({}, {"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ({}, {"label_smoothing": 1.0}, "label_smoothing must be a number of at least 0 and less than 1, got 1.0"),
        ({}, {"ema_decay": 1.5}, "ema_decay must be null or a number of more than 0 and less than 1, got 1.5"),
        ({}, {"micro_batch_size": 5}, "micro_batch_size = 5 does not divide batch_size = 16"),
        ({}, {"mixup": {}, "micro_batch_size": 1}, "must be even"),
        ({}, {"augmentation": {"hflop": 1}}, "Did you mean 'hflip'"),
        ({}, {"mixup": {"cutmx_alpha": 1}}, "Did you mean 'cutmix_alpha'"),
    ],
)
def test_bad_specs_stop_before_training(model, recipe, message, digits, tmp_path):
    with pytest.raises(masa.MasaError, match=message):
        images.pretrain(spec_of(model=model, **recipe), digits, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_sharing_stops_before_training(digits, tmp_path):
    for sharing, message in (
        ({"method": "gqa", "num_key_value_heads": 2}, "grouped-query attention does not exist in timm"),
        ({"method": "masa", "atoms": 7}, "more than L = 6"),
        ({"method": "sequential", "sets": 4}, "sets = 4 does not divide L = 6"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            images.pretrain(spec_of(sharing), digits, tmp_path / "run")


def test_images_that_are_none(tmp_path):
    (tmp_path / "manifest.json").write_text('{"train": 3}')
    with pytest.raises(masa.MasaError, match="not one of images"):
        images.pretrain(spec_of(), tmp_path, tmp_path / "run")


def test_exploding_loss_stops_and_names_the_step(digits, tmp_path):
    with pytest.raises(masa.MasaError, match=r"digits/vanilla/seed0: the loss is \w+ at step \d+"):
        images.pretrain(
            spec_of("vanilla", learning_rate=1e30, max_grad_norm=1e30, warmup_fraction=0.0), digits, tmp_path
        )
