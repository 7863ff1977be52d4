"""Rows of "what masa reads" for images, folders of images, boxes and task data; :mod:`readable` takes them in."""

from __future__ import annotations

import io
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from readable import Case, file

PILLOW = "Pillow 13.0.0, "
MODES = "https://pillow.readthedocs.io/en/stable/handbook/concepts.html#modes"


def read_image(path: Path) -> list[Any]:
    """The pixels of an image file, as colours."""
    from masa.data.decoding import decode

    return decode(path.read_bytes(), 3, path.name).tolist()


def read_folder(path: Path) -> dict[str, Any]:
    """Classes, and the labels of each split."""
    from masa.data import image_layouts
    from masa.data.image_sets import ImageDataset

    raw = image_layouts.read(path, ImageDataset("file:x", "folder", 4, 3, 2, test="test"), "file:x")
    return {"classes": raw.classes} | {split: [label for _, _, label in rows] for split, rows in raw.splits.items()}


def read_boxes(path: Path) -> list[Any]:
    """Id and boxes of each test image; ``clip`` and ``drop`` in the folder's name are the rules."""
    from masa.data import coco, sources

    outside = next((rule for rule in ("clip", "drop") if rule in path.name), "error")
    raw = coco.read(sources.parse(f"file:{path}"), None, coco.Rules("error", outside))
    return [(scene.id, scene.boxes["xywh"].tolist()) for scene in raw.splits["test"]]


def read_task(path: Path) -> tuple[int, str]:
    """How many questions boolq has, and how long the hash is that stands beside its score."""
    from masa.data import benchmarks

    record = benchmarks.prepare(["boolq"], ["mirror"], path / "cache", str(path), path / "out")
    tasks, _ = benchmarks.load_tasks(record)
    return len(tasks["boolq"].dataset["validation"]), f"{len(record['boolq']['sha256'])} digits"


def image(name: str, pixels: Any, mode: str | None = None, **options: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        made = Image.fromarray(np.asarray(pixels))
        made = made if mode is None else made.convert(mode)
        made.save(folder / name, **options)
        return folder / name

    return make


def palette(folder: Path) -> Path:
    made = Image.new("P", (2, 1))
    made.putpalette([200, 0, 0, 0, 100, 0])
    made.putpixel((1, 0), 1)
    made.save(folder / "a.png", transparency=1)
    return folder / "a.png"


def turned(folder: Path) -> Path:
    exif = Image.Exif()
    exif[0x0112] = 6
    return image("a.png", np.array([[1, 2]], np.uint8), exif=exif)(folder)


def png(value: int, size: tuple[int, int] = (4, 4)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def parquet_split(path: Path, count: int) -> None:
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    rows = {"image": [{"bytes": png(i)} for i in range(count)], "label": [i % 2 for i in range(count)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict(rows, features=features).to_parquet(path)


def as_parquet(form: str, *missing: int) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        for i in [i for i in range(2) if i not in missing]:
            parquet_split(folder / form.format(split="train", i=i), 2)
        parquet_split(folder / form.replace("00002", "00001").format(split="test", i=0), 1)
        return folder

    return make


def as_pickles(folder: Path) -> Path:
    def batch(count: int) -> bytes:
        return pickle.dumps({"data": np.zeros((count, 48), np.uint8), "labels": [i % 2 for i in range(count)]}, 2)

    for i in range(1, 6):
        (folder / f"data_batch_{i}").write_bytes(batch(1))
    (folder / "test_batch").write_bytes(batch(2))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": ["cat", "dog"]}, 2))
    return folder


def with_a_program(folder: Path) -> Path:
    as_pickles(folder)
    (folder / "data_batch_1").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    return folder


def as_folders(folder: Path) -> Path:
    for split, count in (("train", 2), ("test", 1)):
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                (folder / split / name / f"{i}.png").write_bytes(png(i))
    return folder


def as_tiny_imagenet(folder: Path) -> Path:
    for name in ("n01", "n02"):
        (folder / "train" / name / "images").mkdir(parents=True)
        (folder / "train" / name / "images" / "0.JPEG").write_bytes(png(1))
    (folder / "test" / "images").mkdir(parents=True)
    (folder / "test" / "images" / "val_0.JPEG").write_bytes(png(2))
    (folder / "test" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t3\t3\n")
    return folder


def packed(folder: Path) -> Path:
    (folder / "cifar-10-python.tar.gz").write_bytes(b"an archive")
    return folder


def as_coco(box: list[float], number: int = 1, name: str = "coco", orientation: int = 1) -> Callable[[Path], Path]:
    """One image of 8 x 4 pixels a split."""

    def make(folder: Path) -> Path:
        folder = folder / name
        (folder / "annotations").mkdir(parents=True)
        exif = Image.Exif()
        exif[0x0112] = orientation
        for split in ("train2017", "val2017"):
            (folder / split).mkdir()
            Image.new("RGB", (8, 4)).save(folder / split / "a.png", exif=exif)
            content = {
                "images": [{"id": number, "file_name": "a.png", "width": 8, "height": 4}],
                "annotations": [{"id": number, "image_id": number, "category_id": 1, "bbox": box}],
                "categories": [{"id": 1, "name": "thing"}],
            }
            (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        return folder

    return make


def mirror(place: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        at = folder / place
        at.mkdir(parents=True)
        rows = [{"passage": "p", "question": "q", "label": i, "idx": i} for i in range(2)]
        (at / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        splits = "".join(f"  - split: {split}\n    path: rows.jsonl\n" for split in ("train", "validation"))
        (at / ".huggingface.yaml").write_text(f"configs:\n- config_name: boolq\n  data_files:\n{splits}")
        return folder

    return make


FOUND = {"classes": ["cat", "dog"], "train": [0, 1, 0, 1], "test": [0]}
FLOATS = np.array([[0.0, 1.0]], np.float32)
DEEP = np.array([[0, 257, 32768, 65535]], np.uint16)

READ: dict[str, Callable[[Path], Any]] = {
    "images": read_image,
    "folders": read_folder,
    "boxes": read_boxes,
    "tasks": read_task,
}


def _cases() -> dict[str, list[Case]]:
    white, grey = [255] * 3, [[0] * 3, [1] * 3, [128] * 3, [255] * 3]
    return {
        "images": [
            Case(
                "grey of 16 bits: PNG, TIFF, PGM",
                "scaled to 8 bits, white to white",
                image("a.png", DEEP),
                [grey],
                f"{PILLOW}`convert` cuts off at 255, and all but the darkest 0.4 % become white; {MODES}",
            ),
            Case(
                "a palette with a clear colour",
                "the colour, on white",
                palette,
                [[[200, 0, 0], white]],
                f'{PILLOW}`convert("RGB")` shows what was meant to be clear',
            ),
            Case(
                "grey or colour with opacity (LA, RGBA)",
                "on white",
                image("a.png", np.array([[[9, 8, 7, 0], [9, 8, 7, 255]]], np.uint8)),
                [[white, [9, 8, 7]]],
            ),
            Case("CMYK", "its colour", image("a.tif", np.array([[[255, 0, 0]]], np.uint8), "CMYK"), [[[255, 0, 0]]]),
            Case("1 bit", "black and white", image("a.png", np.array([[False, True]])), [[[0] * 3, white]]),
            Case(
                "EXIF's orientation",
                "applied: the image is upright",
                turned,
                [[[1] * 3], [[2] * 3]],
                f"{PILLOW}`Image.open` leaves it to `ImageOps.exif_transpose`",
            ),
            Case(
                "floating point",
                "refused: nothing says what is white",
                image("a.tif", FLOATS),
                re.compile("are floating-point numbers, and nothing says which of them is white"),
            ),
            Case("cut short", "refused", file("a.png", png(3)[:40]), re.compile("a.png: the image is corrupt")),
        ],
        "folders": [
            Case(
                "Parquet: `train-00000-of-00002.parquet`, `train.parquet`",
                "in the hub's layout",
                as_parquet("data/{split}-{i:05d}-of-00002.parquet"),
                FOUND,
            ),
            Case(
                "Parquet as the hub converts it: `default/train/0000.parquet`",
                "the same",
                as_parquet("default/{split}/{i:04d}.parquet"),
                FOUND,
            ),
            Case(
                "a part of several is missing",
                "refused",
                as_parquet("data/{split}-{i:05d}-of-00002.parquet", 1),
                re.compile(r"of the 2 files train-\*-of-00002 number 1 is missing"),
            ),
            Case(
                "CIFAR's pickles: `data_batch_1`, …",
                "its arrays and lists",
                as_pickles,
                {"classes": ["cat", "dog"], "train": [0] * 5, "test": [0, 1]},
            ),
            Case(
                "a pickle that asks for anything else",
                "refused; nothing is run",
                with_a_program,
                re.compile("no batch of CIFAR .*asks for os.system"),
            ),
            Case(
                "a folder a class: `train/cat/0.png`",
                "classes in alphabetical order",
                as_folders,
                {"classes": ["cat", "dog"], "train": [0, 0, 1, 1], "test": [0, 1]},
            ),
            Case(
                "tiny-imagenet-200: `train/WNID/images`, `val_annotations.txt`",
                "the same",
                as_tiny_imagenet,
                {"classes": ["n01", "n02"], "train": [0, 1], "test": [1]},
            ),
            Case(
                "none of these, or still an archive",
                "refused, with what was looked for",
                packed,
                re.compile(r"no file .*train\*\.parquet, nor another layout: .*Unpack cifar-10-python"),
            ),
        ],
        "boxes": [
            Case("COCO's layout", "boxes as annotated", as_coco([1, 1, 3, 2]), [(1, [[1, 1, 3, 2]])]),
            Case("ids beyond 2^53", "exact", as_coco([1, 1, 3, 2], 2**53 + 1), [(2**53 + 1, [[1, 1, 3, 2]])]),
            Case("a box within a pixel of the edge", "as annotated", as_coco([5, 1, 3.6, 2]), [(1, [[5, 1, 3.6, 2]])]),
            Case(
                "a box beyond it",
                "refused, with the key that changes it",
                as_coco([5, 1, 9, 2]),
                re.compile(r"lies outside its image \(outside_boxes: clip"),
            ),
            Case(
                "the same, `outside_boxes: clip`",
                "cut off at the edge",
                as_coco([5, 1, 9, 2], name="clip"),
                [(1, [[5, 1, 3, 2]])],
            ),
            Case(
                "the same, `outside_boxes: drop`",
                "left out, and counted",
                as_coco([5, 1, 9, 2], name="drop"),
                [(1, [])],
            ),
            Case(
                "annotations of an image as stored, which EXIF turns",
                "refused, with both sizes",
                as_coco([1, 1, 3, 2], orientation=6),
                re.compile(r"the image is 4 x 8, the annotations say 8 x 4 .*EXIF's orientation 6 turns it"),
            ),
        ],
        "tasks": [
            Case(
                "a mirror's `ORG/NAME`, as the task's file names it",
                "any task of lm-eval, by its content",
                mirror("aps/super_glue"),
                (2, "64 digits"),
                "datasets 5.2.0, load.py, `LocalDatasetModuleFactory`: its own cache goes by the words of the card, "
                "not by the files",
            ),
            Case("a mirror's `lm_eval/NAME`", "the same", mirror("lm_eval/super_glue"), (2, "64 digits")),
            Case("a mirror's `lm_eval/TASK`", "the same", mirror("lm_eval/boolq"), (2, "64 digits")),
        ],
    }


CASES = _cases()
