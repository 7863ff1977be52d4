"""Results of runs that never ran, with known numbers, so that every kind of figure can be drawn in a second."""

import numpy as np
from PIL import Image

from masa.runs import run
from masa.study import artefacts, config


def spec_of(name, names=None, overlays=(), **grid):
    """The spec of a figure of the configuration, with other experiments or another grid."""
    merged = config.load(overlays)
    figure = merged["figures"][name]
    merged["grids"][figure["grid"]] |= grid
    if names:
        figure["experiments"] = names
    return artefacts.artefact_spec(merged, "figures", name)


def write_results(spec, folder, classes=10, texts=("held_out",), examples=16, titles=None):
    """Metrics files (and weights, curves, example pictures) for all rows of a figure, below ``folder``."""
    generator = np.random.default_rng(0)
    for index, row in enumerate(spec["rows"]):
        for seed, record in enumerate(row["records"]):
            out = folder / record
            if "reduction" in row:
                metrics = _compression(row, index, texts)
            elif row["model"].get("family") == "vit":
                metrics = _images(row, generator, classes, titles, examples)
                _tiles(out, generator, examples, 1 if classes == 10 else 3)
            elif row["model"].get("family") == "yolos":
                metrics = _boxes(row, generator, examples // 2)
                _tiles(out, generator, examples // 2, 3)
            else:
                metrics = _language(row, 3 + 0.013 * index + 0.02 * seed)
            run.write_json(out / "metrics.json", metrics)
            if "runs" in row:
                run.write_json(out / "weights.json", _weights(row, generator))
                trained = folder / "runs" / row["runs"][seed]
                run.write_json(trained / "manifest.json", {"parameters": metrics["parameters"]})
                _log(trained / "metrics.jsonl", row, index, seed)
    return folder


def _parameters(row):
    share = {"masa": 0.1 * (row["sharing"].get("atoms") or 5) if row["sharing"].get("atoms") else 0.4}
    attention = round(100_000 * share.get(row["sharing"]["method"], 0.35 if len(row["experiment"]) > 7 else 1))
    parts = {"total": 200_000 + attention, "attention": attention, "attention_reduction": 0.5, "model_reduction": 0.2}
    return {"parameters": parts}


def _language(row, loss):
    corpus = {"loss": loss, "word_perplexity": 9.0, "byte_perplexity": 2.0, "loss_by_document": []}
    training = {"tokens": 10, "training_seconds": 1.0}
    return _parameters(row) | {"training": training, "corpus": corpus, "tasks": {}, "task_data": {}, "examples": {}}


def _log(path, row, index, seed):
    unit = "images" if "family" in row["model"] else "tokens"
    path.parent.mkdir(parents=True, exist_ok=True)
    losses = [3 + 0.01 * index + 0.02 * seed * index + 1 / i for i in range(1, 6)]
    lines = [f'{{"step": {i}, "{unit}": {i * 50_000}, "validation_loss": {v}}}\n' for i, v in enumerate(losses, 1)]
    path.write_text("".join(lines))


def _weights(row, generator):
    layers, atoms = row["model"]["num_layers"], row["sharing"].get("atoms") or 4
    atoms = atoms if isinstance(atoms, int) else 4
    ranks = {p: generator.uniform(20, 40, layers).tolist() for p in "qkvo"}
    return {
        "effective_rank": ranks,
        "coefficients": {p: generator.normal(size=(layers, atoms)).tolist() for p in "qkvo"},
    }


def _images(row, generator, classes, titles, examples):
    confusion = generator.integers(0, 9, (classes, classes)) + 60 * np.eye(classes, dtype=int)
    right = confusion.diagonal() / confusion.sum(1)
    scores = {"images": 900, "loss": 0.4, "top1": float(right.mean()), "top1_stderr": 0.008, "top5": 0.99}
    scores |= {"calibration_error": 0.02, "per_class": right.tolist(), "confusion": confusion.tolist()}
    guesses = [{"tile": i, "label": i % classes, "prediction": i // 2 % classes} for i in range(examples)]
    return _parameters(row) | {
        "dataset": row["scale"].rpartition("-")[0],
        "training": {"images": 100},
        "classification": scores,
        "classes": [str(i) for i in range(classes)],
        "titles": titles,
        "examples": [g | {"index": g["tile"], "top": [[g["prediction"], 0.987]]} for g in guesses],
    }


def _boxes(row, generator, examples):
    def box():
        return {"label": int(generator.integers(3)), "crowd": False, "box": [*generator.uniform(0, 0.5, 2), 0.4, 0.3]}

    return _parameters(row) | {
        "dataset": "shapes",
        "training": {"images": 100},
        "detection": {"loss": 1.0, "map": 0.3},
        "classes": ["rectangle", "ellipse", "triangle"],
        "examples": [
            {"tile": i, "size": [40, 30 + 2 * i], "truth": [box()], "found": [box() | {"score": s} for s in (0.9, 0.2)]}
            for i in range(examples)
        ],
    }


def _tiles(out, generator, count, channels, side=16):
    out.mkdir(parents=True, exist_ok=True)
    pixels = generator.integers(0, 255, (side, side * count, channels), dtype=np.uint8)
    if count:
        Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels).save(out / "examples.png")


def _compression(row, index, texts):
    layers = 30
    value = 30 + 0.02 * row["reduction"] * (1 + 1.7 ** (index % 14))
    perplexity = {t: {"token_perplexity": value * (1 + i / 3)} for i, t in enumerate(texts)}
    corpus = {"loss": np.log(value), "token_perplexity": value, "word_perplexity": 9.0, "byte_perplexity": 2.0}
    groups = [list(range(i, min(i + 4, layers))) for i in range(0, layers, 4)]
    ranks = {p: [[[i], "dense" if (i + index) % 5 == 0 else 5 * i] for i in range(layers)] for p in "qkvo"}
    report = {
        "reduction_achieved": row["reduction"] / 100 + 0.0001 * index,
        "regularisation": {},
        "seconds": 3.0,
        "peak_rss_bytes": 2**30,
        "projections": "qkvo",
        "shapes": {p: [192, 576] for p in "qkvo"},
        "learned": {"ranks": ranks, "groups": groups},
    }
    return {
        "requested_pct": row["reduction"],
        "parameters": {"total": 100, "attention": 50, "attention_reduction": 0.2, "model_reduction": 0.1},
        "compression": report if row["experiment"] != "original" else None,
        "healing": None,
        "storage": {
            "file_bytes": 1e6 * (280 - 17 * (index % 14) - row["reduction"]),
            "resident_bytes": None,
            "types": None,
        },
        "drift": [0.3 / (1 + i % 7) for i in range(layers - 1)],
        "corpus": corpus,
        "texts": perplexity,
        "text_data": {},
        "tasks": {},
        "task_data": {},
        "examples": {},
    }
