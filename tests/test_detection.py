"""Detectors trained for real on drawn shapes: shared, folded, resumed to the same bits, and scored by hand."""

import json
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import stop_and_resume
from PIL import Image

import masa
import masa.compression
from masa.data import boxed_images, boxes
from masa.evaluation import detection as detection_evaluation
from masa.evaluation import detections
from masa.evaluation.detections import Detections, detect
from masa.models import detector, yolos
from masa.runs import run
from masa.sharing.parameters import parameter_groups
from masa.sharing.projections import SharedLinear, blocks, decoder, family_of
from masa.training import detection as detection_training
from masa.training import trainer

MODEL = {
    "family": "yolos",
    "image_size": 32,
    "patch_size": 8,
    "channels": 3,
    "num_classes": 3,
    "num_layers": 6,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_detection_tokens": 5,
}
SPECS = [
    {"method": "vanilla"},
    {"method": "low-rank"},
    {"method": "sequential"},
    {"method": "repeat-all-over", "projections": "qkv"},
    {"method": "masa"},
    {"method": "masa", "projections": "qkvoud"},
    {"method": "masa", "coefficients": "mlp"},
    {"method": "masa", "dictionaries": ["qk", "vo"]},
]


def label(spec):
    return "-".join(str(v) for v in spec.values())


def spec_of(method="masa", seed=0, model=None, **recipe):
    sharing = method if isinstance(method, dict) else {"method": method}
    base = {"steps": 8, "batch_size": 8, "learning_rate": 3e-3, "evaluations": 2}
    return {
        "run": f"shapes/{sharing['method']}/seed{seed}",
        "seed": seed,
        "model": MODEL | (model or {}),
        "sharing": sharing,
        "training": base | recipe,
    }


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """A box directory: 64 drawn images of about 32 x 32."""
    folder = tmp_path_factory.mktemp("boxes") / "shapes"
    spec = {"name": "shapes", "image_size": 32, "count": 64, "test_count": 16, "validation_fraction": 0.2}
    boxes.prepare(spec, folder.parent / "cache", None, folder)
    return folder


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def targets(counts, seed=0):
    """Random boxes for images of so many boxes each."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for count in counts:
        extent = 0.1 + 0.4 * torch.rand(count, 2, generator=generator)
        center = extent / 2 + (1 - extent) * torch.rand(count, 2, generator=generator)
        labels = torch.randint(0, 3, (count,), generator=generator)
        made.append({"class_labels": labels, "boxes": torch.cat([center, extent], 1)})
    return made


# ------------------------------------------------------------------------------------------------------------ model


@pytest.mark.parametrize("spec", SPECS, ids=label)
def test_folded_model_is_plain_yolos_with_the_same_outputs(spec, images, tmp_path):
    from transformers import YolosForObjectDetection

    model = detector.build(MODEL, spec).eval()
    folded = masa.fold(model)
    assert type(folded) is YolosForObjectDetection
    assert not any(isinstance(m, SharedLinear) or "masa" in type(m).__module__ for m in folded.modules())
    masa.save(model, tmp_path / "factored")
    again = masa.load(tmp_path / "factored")
    folded.save_pretrained(tmp_path / "plain")
    plain = YolosForObjectDetection.from_pretrained(tmp_path / "plain").eval()
    with torch.no_grad():
        expected = model(images)
        assert torch.equal(folded(images).logits, plain(images).logits)
        for other in (again, plain):
            torch.testing.assert_close(other(images).logits, expected.logits, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(other(images).pred_boxes, expected.pred_boxes, rtol=1e-5, atol=1e-6)
    assert masa.count_parameters(again) == masa.count_parameters(model) or spec.get("coefficients") == "mlp"
    assert masa.count_parameters(plain).attention == masa.count_parameters(model).attention_dense


def test_plain_weights_load_where_masa_is_not(images, tmp_path):
    model = detector.build(MODEL, {"method": "masa"}, ["rectangle", "ellipse", "triangle"])
    detector.save_plain(model, tmp_path, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    np.save(tmp_path / "x.npy", np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8))
    code = (
        "import sys, torch, numpy; sys.modules['masa'] = None; from PIL import Image;"
        "from transformers import AutoImageProcessor, AutoModelForObjectDetection as Auto;"
        f"folder = {str(tmp_path)!r}; model = Auto.from_pretrained(folder); x = numpy.load(folder + '/x.npy');"
        "x = AutoImageProcessor.from_pretrained(folder)(Image.fromarray(x), return_tensors='pt');"
        "assert x['pixel_values'].shape == (1, 3, 32, 32), x['pixel_values'].shape;"
        "assert model.config.id2label[2] == 'triangle';"
        "torch.save([x['pixel_values'], model(x['pixel_values']).logits], folder + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    x, logits = torch.load(tmp_path / "y.pt")
    with torch.no_grad():
        torch.testing.assert_close(masa.fold(model)(x).logits, logits, rtol=1e-5, atol=1e-6)
    ours = boxes.resize(np.load(tmp_path / "x.npy"), 32)
    ours = boxed_images.normalise(ours[None], [0.5, 0.4, 0.3], [0.2, 0.2, 0.2])
    torch.testing.assert_close(ours, x, atol=0.05, rtol=0)


@pytest.mark.parametrize("spec", SPECS[1:], ids=label)
def test_every_parameter_learns_and_the_stack_is_made_once(spec, images, monkeypatch):
    model = detector.build(MODEL | {"use_mid_position_embeddings": True}, spec).train()
    shared, made = decoder(model).shared, []
    make = type(shared).make
    monkeypatch.setattr(type(shared), "make", lambda self: made.append(1) or make(self))
    model(images, labels=targets([2, 1, 3])).loss.backward()
    assert len(made) == 1
    assert all(p.grad is not None for p in model.parameters())
    assert len({id(p) for p in model.parameters()}) == len(list(model.named_parameters(remove_duplicate=False)))


def test_gradients_equal_those_of_the_folded_weights(images):
    model = detector.build(MODEL, {"method": "masa"}).double().train()
    folded = masa.fold(model).train()
    for m in (model, folded):
        outputs = m(images.double())
        (outputs.logits.square().sum() + outputs.pred_boxes.square().sum()).backward()
    family, shared = family_of(model), decoder(model).shared
    for letter in "qkvo":
        source = shared[letter]
        dense = torch.stack([family.projection(b, letter).weight.grad for b in blocks(folded)])
        c, d = source.maker[letter].values, source.atoms
        torch.testing.assert_close(d.grad, torch.einsum("ls,loi->soi", c, dense), rtol=1e-5, atol=1e-8)
        torch.testing.assert_close(c.grad, torch.einsum("loi,soi->ls", dense, d), rtol=1e-5, atol=1e-8)


def test_the_size_of_yolos_tiny():
    """Every parameter counted by hand; MASA-QKVO with L/3 atoms saves two thirds of the attention and nothing else."""
    sizes = MODEL | {"image_size": 512, "patch_size": 16, "num_classes": 91, "num_layers": 12, "hidden_size": 192}
    sizes |= {"num_attention_heads": 3, "intermediate_size": 768, "num_detection_tokens": 100}
    with torch.device("meta"):
        vanilla = masa.count_parameters(detector.build(sizes, {"method": "vanilla"}))
        ours = masa.count_parameters(detector.build(sizes, {"method": "masa"}))
    assert vanilla.attention == ours.attention_dense == 12 * 4 * 192**2
    assert ours.attention == 4 * 4 * (192**2 + 12)
    assert vanilla.total - ours.total == vanilla.attention - ours.attention
    block = 4 * 192**2 + 2 * 192 * 768 + (4 * 192 + 768 + 192) + 4 * 192
    heads = 4 * (192**2 + 192) + 193 * 92 + 193 * 4
    tokens = 192 * (16**2 * 3 + 1) + 192 * (1 + 100 + 32**2 + 1 + 100)
    assert vanilla.total == 12 * block + heads + tokens + 2 * 192


def test_detection_tokens_differ_and_do_not_decay():
    model = detector.build(MODEL | {"use_mid_position_embeddings": True}, {"method": "masa"})
    assert detector.tokens(model).keys() == set(detector.TOKENS)
    assert all(p.detach().std() == pytest.approx(0.02, rel=0.3) for p in detector.tokens(model).values())
    model.base_model.no_weight_decay = lambda: set(detector.tokens(model))
    decay, plain, coefficients = parameter_groups(model, yolos.recipe(spec_of()["training"]))
    assert {id(p) for p in detector.tokens(model).values()} <= {id(p) for p in plain["params"]}
    assert (decay["weight_decay"], plain["weight_decay"]) == (1e-4, 0.0)
    assert len(coefficients["params"]) == 4


def test_what_does_not_exist_for_a_detector():
    with pytest.raises(masa.MasaError, match="'gqa' does not exist for YolosForObjectDetection"):
        detector.build(MODEL, {"method": "gqa", "num_key_value_heads": 2})
    with pytest.raises(masa.MasaError, match="is no language model"):
        masa.compression.compress(masa.fold(detector.build(MODEL, {"method": "vanilla"})), "matrix-pca")
    with pytest.raises(masa.MasaError, match="num_classes = 3, but the data has 2 classes"):
        detector.build(MODEL, {"method": "masa"}, ["a", "b"])


# ------------------------------------------------------------------------------------------------------------- loss


def test_the_loss_is_transformers_own(images):
    model = detector.build(MODEL, {"method": "masa"})
    for counts in ([2, 1, 3], [0, 5, 0]):
        wanted = targets(counts)
        expected = model(images, labels=wanted).loss
        criterion = detector.Criterion(model.config)
        torch.testing.assert_close(criterion(model(images), wanted, sum(counts), 3), expected)


def test_parts_of_a_batch_sum_up_to_its_loss(images):
    """Also where a part has no boxes, of which transformers' matcher makes a traceback."""
    model = detector.build(MODEL, {"method": "masa"}).double()
    criterion, x = detector.Criterion(model.config), images.double()
    for counts in ([2, 1, 3], [0, 5, 1], [0, 0, 0]):
        wanted = targets(counts)
        whole = criterion(model(x), wanted, sum(counts), 3)
        parts = [criterion(model(x[[i]]), wanted[i : i + 1], sum(counts), 3) for i in range(3)]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-6)
        means = [criterion(model(x[[i]]), wanted[i : i + 1], counts[i], 1) for i in range(3)]
        assert sum(counts) == 0 or abs(sum(means) / 3 - whole) > 1e-3, "a mean of means is another loss"


def test_the_loss_by_hand():
    """One image, two tokens, one box that the second token is nearer to."""
    logits = torch.tensor([[[0.0, 0.0, 0.0, 1.0], [2.0, 0.0, 0.0, 0.0]]])
    found = torch.tensor([[[0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.4, 0.4]]])
    outputs = type("Outputs", (), {"logits": logits, "pred_boxes": found})
    wanted = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.2]])}]
    config = detector.build(MODEL, {"method": "vanilla"}).config
    logp = logits.log_softmax(-1)[0]
    entropy = -(0.1 * logp[0, 3] + 1.0 * logp[1, 0]) / 1.1
    overlap = 0.5  # 0.4 x 0.2 within 0.4 x 0.4, whose hull is the larger box
    expected = entropy + 5 * 0.2 + 2 * (1 - overlap)
    torch.testing.assert_close(detector.Criterion(config)(outputs, wanted, 1, 1), expected)


# --------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["vanilla", "masa"])
def test_a_run_learns_and_stores_everything(method, drawn, tmp_path):
    result = detection_training.pretrain(spec_of(method, steps=60, evaluations=3, max_grad_norm=1.0), drawn, tmp_path)
    log = list(run.read_jsonl(tmp_path / "metrics.jsonl"))
    losses = [r["loss"] for r in log if "loss" in r]
    assert np.mean(losses[-10:]) < np.mean(losses[:10]) - 0.5
    held_out = [r for r in log if "validation_loss" in r]
    assert [r["images"] for r in held_out] == [20 * 8, 40 * 8, 60 * 8]
    assert all(0 <= r["validation_map"] <= 1 for r in held_out)
    assert result["training"]["validation_loss"] == held_out[-1]["validation_loss"]
    spec = run.read_json(tmp_path / "spec.json")
    assert spec["data"] == "shapes"
    assert spec["training"]["weight_decay"] == 1e-4, "defaults are written down"
    model = masa.load(tmp_path / "model")
    again = detect(model, boxed_images.BoxSplit(drawn, "validation"), batch_size=3)
    assert again.loss == pytest.approx(held_out[-1]["validation_loss"], rel=1e-5)
    assert model.config.id2label[2] == "triangle"
    provenance = run.read_json(tmp_path / "provenance.json")
    assert provenance["inputs"]["boxes"]
    assert provenance["packages"]["pycocotools"]
    assert not (tmp_path / "checkpoints").exists()


def test_the_same_run_gives_the_same_bits(drawn, tmp_path):
    first = detection_training.pretrain(spec_of(), drawn, tmp_path / "a")
    second = detection_training.pretrain(spec_of(), drawn, tmp_path / "b")
    other = detection_training.pretrain(spec_of(seed=1), drawn, tmp_path / "c")
    assert first["sha256"] == second["sha256"]
    assert other["sha256"] != first["sha256"]


def test_all_methods_see_the_same_images_and_start_from_the_same_common_weights(drawn, tmp_path, monkeypatch):
    seen = {}
    step = trainer.Trainer.training_step
    for method in ("vanilla", "masa", "low-rank"):
        batches, start = [], {}

        def look(self, model, inputs, *rest, batches=batches, start=start, **more):
            if not batches:
                common = ("embeddings", "intermediate", "classifier", "bbox_predictor")
                named = model.named_parameters()
                start |= {n: p.detach().clone() for n, p in named if any(part in n for part in common)}
            batches.append(
                torch.cat([inputs["pixel_values"].flatten(), *(t["boxes"].flatten() for t in inputs["labels"])])
            )
            return step(self, model, inputs, *rest, **more)

        monkeypatch.setattr(trainer.Trainer, "training_step", look)
        detection_training.pretrain(spec_of(method, steps=2), drawn, tmp_path / method)
        monkeypatch.setattr(trainer.Trainer, "training_step", step)
        seen[method] = batches, start
    batches, start = seen.pop("vanilla")
    assert len(start) > 20
    for other, common in seen.values():
        assert all(torch.equal(a, b) for a, b in zip(batches, other, strict=True))
        assert start.keys() == common.keys()
        assert all(torch.equal(start[n], common[n]) for n in start)


def test_gradient_accumulation_is_the_same_step(drawn, tmp_path):
    whole = detection_training.pretrain(spec_of(steps=3), drawn, tmp_path / "a")
    parts = detection_training.pretrain(spec_of(steps=3, micro_batch_size=1), drawn, tmp_path / "b")
    assert parts["training"]["validation_loss"] == pytest.approx(whole["training"]["validation_loss"], rel=1e-5)
    losses = [[r["loss"] for r in run.read_jsonl(tmp_path / x / "metrics.jsonl") if "loss" in r] for x in "ab"]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_epochs_are_steps(drawn, tmp_path):
    spec = spec_of(epochs=1.5)
    spec["training"].pop("steps")
    result = detection_training.pretrain(spec, drawn, tmp_path)
    count = boxed_images.read_manifest(drawn)["splits"]["train"]["images"]
    assert result["training"]["steps"] == -(-count * 3 // 16)


def test_a_run_stopped_by_a_signal_goes_on_to_the_same_bits(drawn, tmp_path):
    """With dropout and mirroring, which draw; and in a process that is killed for real."""
    spec = spec_of(steps=200, model={"hidden_dropout_prob": 0.1}, micro_batch_size=4)
    stop_and_resume(detection_training.pretrain, spec, "boxes", drawn, tmp_path, lines=3, number=signal.SIGINT)


@pytest.mark.parametrize(
    ("model", "recipe", "message"),
    [
        ({"patch_size": 5}, {}, r"Run shapes/masa/seed0: model\.patch_size = 5 does not divide"),
        ({"num_attention_heads": 5}, {}, "num_attention_heads = 5 does not divide hidden_size"),
        ({"channels": 1}, {}, "a detector reads RGB images"),
        ({"num_classes": 4}, {}, r"model\.num_classes = 4, but the shapes images .* have 3"),
        ({"image_size": 64}, {}, r"model\.image_size = 64, but the shapes images .* have 32"),
        ({"num_detection_tokens": 2}, {}, r"num_detection_tokens = 2, but an image of the train split .* has 3 boxes"),
        ({"num_detection_tokens": 0}, {}, "num_detection_tokens must be an integer of at least 1"),
        ({"num_detection_token": 3}, {}, "Did you mean 'num_detection_tokens'"),
        ({"use_mid_position_embeddings": "no"}, {}, "use_mid_position_embeddings must be true or false, got 'no'"),
        ({"hidden_dropout_prob": 1}, {}, "hidden_dropout_prob must be a number of at least 0 and less than 1, got 1"),
        ({"initializer_range": 0}, {}, "initializer_range must be a number of more than 0 and at most 1, got 0"),
        ({"initializer_range": "x"}, {}, "initializer_range must be a number"),
        ({}, {"epochs": 1}, "either epochs or steps"),
        ({}, {"learning_rat": 1}, "Did you mean 'learning_rate'"),
        ({}, {"mixup": {}}, "key 'mixup' does not exist"),
        ({}, {"horizontal_flip": 0.5}, "horizontal_flip must be true or false, got 0.5"),
        ({}, {"micro_batch_size": 5}, "micro_batch_size = 5 does not divide batch_size = 8"),
    ],
)
def test_bad_specs_stop_before_training(model, recipe, message, drawn, tmp_path):
    with pytest.raises(masa.MasaError, match=message):
        detection_training.pretrain(spec_of(model=model, **recipe), drawn, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_sharing_and_missing_keys(drawn, tmp_path):
    for change, message in (
        ({"sharing": {"method": "gqa", "num_key_value_heads": 2}}, "grouped-query attention does not exist in trans"),
        ({"sharing": {"method": "masa", "atoms": 7}}, "more than L = 6"),
        ({"model": {"family": "yolos"}}, "A detector's model needs image_size"),
    ):
        with pytest.raises(masa.MasaError, match=message):
            yolos.resolve_run(spec_of() | change)
    with pytest.raises(masa.MasaError, match="A run spec needs 'seed'"):
        yolos.resolve_run({k: v for k, v in spec_of().items() if k != "seed"})


def test_exploding_loss_stops_and_names_the_step(drawn, tmp_path):
    with pytest.raises(masa.MasaError, match=r"shapes/vanilla/seed0: the loss is \w+ at step \d+"):
        detection_training.pretrain(spec_of("vanilla", learning_rate=1e30, max_grad_norm=1e30), drawn, tmp_path)


# ----------------------------------------------------------------------------------------------------------- scores


def perfect(split, scores=0.9):
    """What a detector finds that knows the annotations; further tokens find nothing, with no confidence."""
    count, most = len(split), max(len(split.boxes(i)) for i in range(len(split)))
    found = torch.zeros(count, most + 1, 4, dtype=torch.float64)
    confidence, labels = torch.zeros(count, most + 1), torch.zeros(count, most + 1, dtype=torch.int64)
    for i in range(count):
        truth = split.boxes(i)
        found[i, : len(truth)] = torch.from_numpy(truth["xywh"].copy())
        labels[i, : len(truth)] = torch.from_numpy(truth["label"].astype(np.int64))
        confidence[i, : len(truth)] = scores
    return Detections(split, found, confidence, labels, 0.0)


def iou(a, b):
    sides = [min(a[i] + a[i + 2], b[i] + b[i + 2]) - max(a[i], b[i]) for i in (0, 1)]
    both = max(sides[0], 0) * max(sides[1], 0)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def average_precision(found, split, category, threshold):
    """COCO's, written down anew: greedy matches by confidence, precision at 101 recalls."""
    truth = [[tuple(b["xywh"]) for b in split.boxes(i) if b["label"] == category] for i in range(len(split))]
    total = sum(map(len, truth))
    if not total:
        return None
    flat = [
        (-float(found.scores[i, t]), i, t)
        for i in range(len(split))
        for t in range(found.scores.shape[1])
        if found.labels[i, t] == category
    ]
    taken, hits = [set() for _ in truth], []
    for _, i, t in sorted(flat):
        overlaps = [(iou(found.boxes[i, t].tolist(), box), k) for k, box in enumerate(truth[i]) if k not in taken[i]]
        best, k = max(overlaps, default=(0, None))
        hits.append(best >= threshold)
        if best >= threshold:
            taken[i].add(k)
    right = np.cumsum(hits)
    recall, precision = right / total, right / np.arange(1, len(hits) + 1)
    points = [precision[recall >= r].max(initial=0) for r in np.linspace(0, 1, 101)]
    return float(np.mean(points))


def test_perfect_predictions_score_one(drawn):
    split = boxed_images.BoxSplit(drawn, "test")
    scores = perfect(split).scores_of(3)
    assert scores["map"] == scores["map_50"] == scores["map_75"] == scores["mar_100"] == pytest.approx(1.0)
    assert scores["per_class"] == pytest.approx([1.0, 1.0, 1.0])
    assert scores["map_small"] == pytest.approx(1.0)
    assert scores["map_large"] is None, "no drawn shape is larger than 96 x 96"
    assert scores["boxes"] == sum(len(split.boxes(i)) for i in range(len(split)))
    assert perfect(split).scores_of(5)["per_class"][3:] == [None, None]
    json.dumps(scores, allow_nan=False)


def test_mean_average_precision_by_hand(drawn):
    """Boxes that are moved, doubled, mislabelled and made up, against COCO's rule written down anew."""
    split, generator = boxed_images.BoxSplit(drawn, "test"), np.random.default_rng(0)
    found = perfect(split)
    shape = found.scores.shape
    confidence = torch.from_numpy(generator.permutation(shape[0] * shape[1]).reshape(shape) / 1000.0)
    moved = found.boxes + torch.from_numpy(generator.normal(0, 1.0, found.boxes.shape))
    moved[..., 2:] = moved[..., 2:].clamp(min=1.0)
    labels = torch.where(torch.from_numpy(generator.random(shape) < 0.2), (found.labels + 1) % 3, found.labels)
    found = Detections(split, moved, confidence, labels, 0.0)
    scores = found.scores_of(3)
    table = np.array([[average_precision(found, split, c, t) for t in detections.THRESHOLDS] for c in range(3)])
    assert 0.05 < table.mean() < 0.8
    assert scores["map"] == pytest.approx(table.mean(), abs=1e-6)
    assert scores["map_50"] == pytest.approx(table[:, 0].mean(), abs=1e-6)
    assert scores["map_75"] == pytest.approx(table[:, 5].mean(), abs=1e-6)
    assert scores["per_class"] == pytest.approx(table.mean(1).tolist(), abs=1e-6)


def test_a_crowd_neither_counts_nor_costs(drawn, tmp_path):
    """A found box inside a crowd is no mistake; a crowd that is not found is none, either."""
    split = boxed_images.BoxSplit(drawn, "test")
    i = next(i for i in range(len(split)) if len(split.boxes(i)) > 1)
    split._boxes = np.array(split._boxes)
    split._boxes["crowd"][split._first[i]] = 1
    found = perfect(split)
    assert found.scores_of(3)["map"] == pytest.approx(1.0)
    assert found.scores_of(3)["boxes"] == len(split._boxes) - 1
    found.boxes[i, 0] = 0
    found.scores[i, 0] = 0
    assert found.scores_of(3)["map"] == pytest.approx(1.0)


def test_found_boxes_are_those_of_transformers(drawn):
    """In pixels of images of different sizes, none of which is the size that the model sees."""
    from transformers import YolosImageProcessor

    model = detector.build(MODEL, {"method": "masa"}).eval()
    split = boxed_images.BoxSplit(drawn, "test")
    found = detect(model, split, batch_size=5)
    with torch.no_grad():
        outputs = model(torch.cat([x for x, _ in split.batches(16)]))
    sizes = torch.tensor([[r["height"], r["width"]] for r in split.records])
    theirs = YolosImageProcessor().post_process_object_detection(outputs, threshold=0.0, target_sizes=sizes)
    for i, one in enumerate(theirs):
        x, y, w, h = found.boxes[i].T
        torch.testing.assert_close(torch.stack([x, y, x + w, y + h], 1).float(), one["boxes"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.scores[i], one["scores"], rtol=1e-4, atol=1e-6)
        assert torch.equal(found.labels[i], one["labels"])


def test_evaluation_has_all_that_a_report_draws(drawn, tmp_path):
    detection_training.pretrain(spec_of(steps=10, evaluations=1), drawn, tmp_path / "run")
    metrics = detection_evaluation.evaluate(tmp_path / "run", drawn, {"examples": 8, "boxes": 3}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == metrics
    split = boxed_images.BoxSplit(drawn, "test")
    found = detect(masa.load(tmp_path / "run" / "model"), split)
    assert metrics["detection"]["loss"] == pytest.approx(found.loss, rel=1e-5)
    assert metrics["detection"]["map"] == pytest.approx(found.scores_of(3)["map"], abs=1e-6)
    assert metrics["detection"]["images"] == 16
    assert metrics["parameters"]["attention_reduction"] == pytest.approx(2 / 3, abs=2e-3)
    assert metrics["classes"] == ["rectangle", "ellipse", "triangle"]
    assert Image.open(tmp_path / "out" / "examples.png").size == (4 * 32, 32)
    for tile, example in enumerate(metrics["examples"]):
        assert example["tile"] == tile
        assert len(example["truth"]) == len(split.boxes(tile))
        confidence = [one["score"] for one in example["found"]]
        assert len(confidence) == 3
        assert confidence == sorted(confidence, reverse=True)
        x, y, w, h = example["truth"][0]["box"]
        assert 0 <= x <= x + w <= 1.001
        assert 0 <= y <= y + h <= 1.001
    assert run.read_json(tmp_path / "out" / "weights.json")["coefficients"]["q"]
    assert (
        detection_evaluation.evaluate(tmp_path / "run", drawn, {"limit": 5}, tmp_path / "out")["detection"]["images"]
        == 5
    )
    for settings, message in (({"splt": "test"}, "Did you mean 'split'"), ({"split": "tset"}, "Did you mean 'test'")):
        with pytest.raises(masa.MasaError, match=message):
            detection_evaluation.evaluate(tmp_path / "run", drawn, settings, tmp_path / "out")
    with pytest.raises(masa.MasaError, match=r"manifest\.json does not exist"):
        detection_evaluation.evaluate(tmp_path / "none", drawn, {}, tmp_path / "out")
