"""Images with boxes: drawn, read in COCO's layout and from parquet, split without leakage, and what can go wrong."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from masa import MasaError
from masa.data import box_spec, boxed_images, boxes, coco, json_stream, pixels, shapes, sources
from masa.runs import files

SHAPES = {"name": "shapes", "image_size": 32, "count": 60, "test_count": 12, "max_boxes": 3, "validation_fraction": 0.2}


def prepare(out, spec=SHAPES, **more):
    return boxes.prepare(spec | more, out.parent / "cache", None, out)


@pytest.fixture
def layout(tmp_path):
    """A small data set in COCO's layout, and a function that changes one of its annotation files."""
    folder = tmp_path / "coco"
    shapes.write(folder, count=40, test_count=6, image_size=32, max_boxes=3, seed=1)

    def change(edit, split="train"):
        path = folder / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return folder, change


def read(layout, out, **more):
    spec = {"name": "custom", "image_size": 32, "source": f"file:{layout[0]}", "validation_fraction": 0.2}
    return prepare(out, spec | more)


def everything(directory, split):
    """(id, boxes) of every image."""
    opened = boxed_images.BoxSplit(directory, split)
    return {int(opened.records[i]["id"]): opened.boxes(i) for i in range(len(opened))}


# ---------------------------------------------------------------------------------------------------------- reading


def test_shapes_come_from_the_seed(tmp_path):
    first, second = prepare(tmp_path / "a"), prepare(tmp_path / "b")
    assert first == second
    other = prepare(tmp_path / "c", seed=1)
    assert other["splits"]["train"]["sha256"] != first["splits"]["train"]["sha256"]
    assert first["classes"] == ["rectangle", "ellipse", "triangle"]
    assert first["splits"]["train"]["images"] + first["splits"]["validation"]["images"] == 60
    assert first["splits"]["test"]["images"] == 12
    assert all(min(split["per_class"]) > 0 for split in first["splits"].values())
    assert first["splits"]["train"]["most_boxes"] == 3
    assert first["splits"]["train"]["sha256"] == files.sha256_of(tmp_path / "a" / "train.bin")
    assert not [p for p in (tmp_path / "a").iterdir() if p.is_dir()], "nothing that was drawn is left behind"


def test_boxes_of_shapes_are_tight():
    """The drawn pixels of every shape, found again by its color, fill its box."""
    for seed in range(30):
        image, [(label, (x, y, w, h), area)] = shapes.draw(np.random.default_rng(seed), 32, 1)
        color = image[int(y + h / 2), int(x + w / 2)]
        rows, columns = np.nonzero((image == color).all(2))
        assert (columns.min(), rows.min()) == (x, y)
        assert (columns.max() - x + 1, rows.max() - y + 1) == (w, h)
        assert area == len(rows)
        assert area / (w * h) == pytest.approx((1, np.pi / 4, 1 / 2)[label], abs=0.15)


def test_annotations_come_back_as_written(layout, tmp_path):
    manifest = read(layout, tmp_path / "out")
    for split, name in coco.SPLITS.items():
        written = json.loads((layout[0] / "annotations" / f"instances_{name}.json").read_text())
        found = everything(tmp_path / "out", split)
        if split == "train":
            found |= everything(tmp_path / "out", "validation")
        assert found.keys() == {image["id"] for image in written["images"]}
        for number, got in found.items():
            expected = [a for a in written["annotations"] if a["image_id"] == number]
            assert got["xywh"].tolist() == [a["bbox"] for a in expected]
            assert got["label"].tolist() == [shapes.IDS.index(a["category_id"]) for a in expected]
            assert got["area"].tolist() == [a["area"] for a in expected]
    assert manifest["files"].keys() == {f"annotations/instances_{name}.json" for name in coco.SPLITS.values()}


def test_annotations_in_any_order(layout, tmp_path):
    """As COCO's are: not sorted by image, keys in another order, ids with gaps, an image without boxes."""
    expected = read(layout, tmp_path / "a")

    def shuffle(content):
        np.random.default_rng(0).shuffle(content["annotations"])
        content["categories"].reverse()
        for key in ("images", "info"):
            content[key] = content.pop(key, {"year": 2017, "numbers": [1.5e3, None, True, 'a "quoted" ] word']})

    layout[1](shuffle)
    found = read(layout, tmp_path / "b")
    assert found["classes"] == expected["classes"]
    assert found["splits"]["train"]["per_class"] == expected["splits"]["train"]["per_class"]
    lone = json.loads((layout[0] / "annotations" / "instances_train2017.json").read_text())["images"][4]["id"]
    layout[1](lambda content: content.update(annotations=[a for a in content["annotations"] if a["image_id"] != lone]))
    read(layout, tmp_path / "c")
    found = everything(tmp_path / "c", "train") | everything(tmp_path / "c", "validation")
    assert len(found[lone]) == 0
    assert sum(map(len, found.values())) > 40


def test_json_is_read_in_pieces(tmp_path, monkeypatch):
    content = {"a": -12.5, "images": [{"id": i, "name": "ä" * i, "n": [i, None]} for i in range(50)], "z": {"q": [1]}}
    for indent in (None, 2):
        (tmp_path / "x.json").write_text(json.dumps(content, indent=indent, ensure_ascii=False))
        for chunk in (1, 7, 64, 1 << 20):
            monkeypatch.setattr(json_stream, "CHUNK", chunk)
            assert list(json_stream.members(tmp_path / "x.json", ("images",))) == [
                ("images", x) for x in content["images"]
            ]


def test_reading_annotations_takes_little_memory(tmp_path):
    """Outlines of 40 MB; at most the chunk and the longest of them are ever held."""
    import tracemalloc

    outline = {"size": [9, 9], "counts": "0" * 50_000}
    content = {
        "images": [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(100)],
        "annotations": [
            {"id": i, "image_id": i % 100, "category_id": 1, "bbox": [0, 0, 1, 1], "segmentation": outline}
            for i in range(800)
        ],
        "categories": [{"id": 1, "name": "thing"}],
    }
    path = tmp_path / "big.json"
    path.write_text(json.dumps(content))
    assert path.stat().st_size > 39e6
    del content, outline
    tracemalloc.start()
    assert len(coco.read_annotations(path, "error").boxes) == 800
    assert tracemalloc.get_traced_memory()[1] < 12e6
    tracemalloc.stop()


def test_no_image_is_in_two_splits(layout, tmp_path):
    folder = layout[0]
    train, test = sorted((folder / "train2017").iterdir()), sorted((folder / "val2017").iterdir())

    def same_size(content, images):
        for target, source in images:
            with Image.open(source) as image:
                size = image.size
            target.write_bytes(source.read_bytes())
            entry = next(e for e in content["images"] if e["file_name"] == target.name)
            entry["width"], entry["height"] = size
            gone = entry["id"]
            content["annotations"] = [a for a in content["annotations"] if a["image_id"] != gone]

    layout[1](lambda content: same_size(content, [(train[0], test[1]), *zip(train[20:], train[:20], strict=True)]))
    manifest = read(layout, tmp_path / "out", validation_fraction=0.4)
    assert manifest["train_images_also_in_test"] == 2, "the test image and its copy's copy"
    found = {s: {x.tobytes() for x in boxed_images.BoxSplit(tmp_path / "out", s).images} for s in pixels.SPLITS}
    assert not found["train"] & found["validation"]
    assert not (found["train"] | found["validation"]) & found["test"]


def test_crowds_are_kept_but_not_looked_for(layout, tmp_path):
    path = layout[0] / "annotations" / "instances_train2017.json"
    crowd = json.loads(path.read_text())["annotations"][0]
    layout[1](lambda content: content["annotations"][0].update(iscrowd=1))
    manifest = read(layout, tmp_path / "out")
    assert sum(split["crowd_boxes"] for split in manifest["splits"].values()) == 1
    for split in ("train", "validation"):
        opened = boxed_images.BoxSplit(tmp_path / "out", split)
        for i in range(len(opened)):
            single = [tuple(b["xywh"]) for b in opened.boxes(i) if not b["crowd"]]
            assert len(opened.target(i)["boxes"]) == len(single)
            if opened.records[i]["id"] == crowd["image_id"]:
                assert tuple(crowd["bbox"]) not in single
                assert tuple(crowd["bbox"]) in map(tuple, opened.boxes(i)["xywh"])


def test_targets_are_parts_of_the_image(tmp_path):
    prepare(tmp_path / "out")
    split = boxed_images.BoxSplit(tmp_path / "out", "test")
    assert len({tuple(split.size(i)) for i in range(len(split))}) > 5, "images differ in size"
    for i in range(len(split)):
        (width, height), target = split.size(i), split.target(i)["boxes"].double()
        x, y, w, h = split.boxes(i)["xywh"].copy().T
        expected = np.stack([(x + w / 2) / width, (y + h / 2) / height, w / width, h / height], 1)
        np.testing.assert_allclose(target, expected, atol=1e-6)


def test_a_box_that_sticks_out_by_a_fraction_is_cut_off_for_training_alone(layout, tmp_path):
    def push(content):
        first = content["annotations"][0]
        size = content["images"][0]["width"]
        first["bbox"] = [size - 4.0, 3.0, 4.6, 5.0]

    layout[1](push, "val")
    read(layout, tmp_path / "out")
    split = boxed_images.BoxSplit(tmp_path / "out", "test")
    assert split.boxes(0)["xywh"][0].tolist() == [split.size(0)[0] - 4.0, 3.0, 4.6, 5.0]
    center, extent = split.target(0)["boxes"][0, [0, 2]].tolist()
    assert center + extent / 2 == pytest.approx(1.0)


def test_pixels_are_the_resized_images(layout, tmp_path):
    manifest = read(layout, tmp_path / "out", image_size=16)
    split = boxed_images.BoxSplit(tmp_path / "out", "test")
    for i in range(len(split)):
        with Image.open(layout[0] / "val2017" / f"{split.records[i]['id']:012d}.png") as image:
            expected = np.asarray(image.convert("RGB").resize((16, 16), Image.Resampling.BILINEAR))
        assert np.array_equal(split.images[i], expected)
    x = np.array(boxed_images.BoxSplit(tmp_path / "out", "train").images) / 255
    np.testing.assert_allclose(manifest["mean"], x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(manifest["std"], x.std((0, 1, 2)), atol=1e-5)


def write_parquet(path, rows, names=("rectangle", "ellipse", "triangle")):
    """A file as the hub has it: corners, class numbers, no crowds."""
    import datasets

    objects = {
        "bbox_id": datasets.Value("int64"),
        "category": datasets.ClassLabel(names=list(names)),
        "bbox": datasets.List(datasets.Value("float64"), 4),
        "area": datasets.Value("float64"),
    }
    features = datasets.Features(
        {
            "image_id": datasets.Value("int64"),
            "image": datasets.Image(),
            "width": datasets.Value("int64"),
            "height": datasets.Value("int64"),
            "objects": {key: datasets.List(value) for key, value in objects.items()},
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_list(rows, features=features).to_parquet(path)


def rows_of(layout, split):
    """The images of a layout as rows of the hub's copy."""
    content = json.loads((layout[0] / "annotations" / f"instances_{split}2017.json").read_text())
    rows = []
    for image in content["images"]:
        mine = [a for a in content["annotations"] if a["image_id"] == image["id"]]
        rows.append(
            {
                "image_id": image["id"],
                "image": {"bytes": (layout[0] / f"{split}2017" / image["file_name"]).read_bytes(), "path": "x.png"},
                "width": image["width"],
                "height": image["height"],
                "objects": {
                    "bbox_id": [a["id"] for a in mine],
                    "category": [shapes.IDS.index(a["category_id"]) for a in mine],
                    "bbox": [[a["bbox"][0], a["bbox"][1], *np.add(a["bbox"][:2], a["bbox"][2:])] for a in mine],
                    "area": [a["area"] for a in mine],
                },
            }
        )
    return rows


@pytest.fixture
def parquet(layout, tmp_path):
    """The hub's copy of the layout's images, and its rows."""
    folder, rows = tmp_path / "parquet", {split: rows_of(layout, split) for split in ("train", "val")}
    for split, content in rows.items():
        write_parquet(folder / "data" / f"{split}-00000-of-00001-abc.parquet", content)
    return folder, rows


def test_parquet_gives_the_same_files(layout, parquet, tmp_path):
    """Train and validation are the same by the hash of the pixels, and every box, wherever it was read from."""
    expected, found = read(layout, tmp_path / "a"), read(parquet, tmp_path / "b")
    assert found["splits"] == expected["splits"]
    assert found["classes"] == expected["classes"]
    assert found["files"].keys() == {f"data/{split}-00000-of-00001-abc.parquet" for split in ("train", "val")}


def test_a_mirror_holds_either(layout, tmp_path):
    spec = {"name": "custom", "image_size": 32, "source": "mirror:coco", "validation_fraction": 0.2}
    found = boxes.prepare(spec, tmp_path, str(layout[0].parent), tmp_path / "out")
    assert found["splits"] == read(layout, tmp_path / "again")["splits"]


def test_mirroring_is_a_function_of_seed_and_item(tmp_path):
    prepare(tmp_path / "out")
    split = boxed_images.BoxSplit(tmp_path / "out", "train")
    stream = boxed_images.TrainingBoxes(split, 100, 0, True)
    forward = [stream[i] for i in range(100)]
    again = boxed_images.TrainingBoxes(split, 100, 0, True)
    for i in reversed(range(100)):
        assert torch.equal(again[i]["pixel_values"], forward[i]["pixel_values"])
        assert torch.equal(again[i]["labels"]["boxes"], forward[i]["labels"]["boxes"])
    plain = boxed_images.TrainingBoxes(split, 100, 0, False)
    same = [torch.equal(plain[i]["pixel_values"], forward[i]["pixel_values"]) for i in range(100)]
    assert 30 < sum(same) < 70
    i = same.index(False)
    x, target = boxed_images.mirrored(plain[i]["pixel_values"], plain[i]["labels"])
    assert torch.equal(x, forward[i]["pixel_values"])
    assert torch.equal(target["boxes"], forward[i]["labels"]["boxes"])
    twice, back = boxed_images.mirrored(x, target)
    assert torch.equal(twice, plain[i]["pixel_values"])
    torch.testing.assert_close(back["boxes"], plain[i]["labels"]["boxes"])
    number = len(split)
    epochs = [[plain.index(e * number + i) for i in range(number)] for e in range(2)]
    assert all(sorted(epoch) == list(range(number)) for epoch in epochs)


# -------------------------------------------------------------------------------------------------------- bad input


def first(content):
    return content["annotations"][0]


BAD = {
    "negative": (lambda c: first(c).update(bbox=[9, 9, -3, 4]), r"annotation 1: the box .* has a negative width"),
    "empty": (lambda c: first(c).update(bbox=[9, 9, 0, 4]), r"annotation 1: the box .* is empty"),
    "outside": (lambda c: first(c).update(bbox=[30, 9, 20, 4]), r"annotation 1: the box .* lies outside"),
    "beyond": (lambda c: first(c).update(bbox=[-0.9, 9, 0.5, 4]), r"annotation 1: the box .* is empty"),
    "infinite": (lambda c: first(c).update(bbox=[1, 9, float("nan"), 4]), r"annotation 1: the box .* is not finite"),
    "three": (lambda c: first(c).update(bbox=[1, 2, 3]), "an entry of annotations cannot be read"),
    "category": (lambda c: first(c).update(category_id=3), "annotation 1 is of category 3, which is not among"),
    "image": (lambda c: first(c).update(image_id=999), "annotation 1 is of image 999, which is not among the images"),
    "same annotation": (lambda c: c["annotations"][1].update(id=1), "two annotations have the id 1"),
    "same image": (lambda c: c["images"][1].update(id=1), "two images have the id 1"),
    "same category": (lambda c: c["categories"][1].update(id=2), "two categories have the id 2"),
    "no size": (lambda c: c["images"][3].pop("width"), "an entry of images lacks 'width'"),
    "text id": (lambda c: c["images"][3].update(id="4"), "an entry of images cannot be read .*not an integer"),
    "no object": (lambda c: c["images"].append(7), "an entry of images cannot be read"),
    "no number as area": (lambda c: first(c).update(area=float("nan")), "cannot be read .area nan is no size"),
    "negative area": (lambda c: first(c).update(area=-5), "cannot be read .area -5 is no size"),
    "no annotations": (lambda c: c.pop("annotations"), "lists no annotations"),
    "no images": (lambda c: c.update(images=[]), "lists no images"),
    "no categories": (lambda c: c.pop("categories"), "lists no categories"),
    "other size": (lambda c: c["images"][0].update(width=64), r"image 1 .*\.png\): the image is .*say 64 x"),
    "missing": (lambda c: c["images"][2].update(file_name="no.png"), r"image 3 \(.*no\.png\) cannot be read \(No such"),
    "other classes": (lambda c: c["categories"][0].update(name="square"), "have different categories"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_annotations_are_named(what, layout, tmp_path):
    edit, message = BAD[what]
    layout[1](edit)
    with pytest.raises(MasaError, match=message) as caught:
        read(layout, tmp_path / "out")
    assert "instances_train2017.json" in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert not list((tmp_path / "out").glob("*.bin")), "nothing half-written is left"


def test_empty_boxes_can_be_left_out(layout, tmp_path):
    layout[1](BAD["empty"][0])
    with_all = read((layout[0],), tmp_path / "out", empty_boxes="drop")
    assert with_all["empty_boxes_dropped"] == 1
    layout[1](BAD["negative"][0])
    with pytest.raises(MasaError, match="negative"):
        read(layout, tmp_path / "out", empty_boxes="drop")


def test_corrupt_files_are_named(layout, tmp_path):
    path = sorted((layout[0] / "train2017").iterdir())[5]
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    with pytest.raises(MasaError, match=rf"image 6 .*{path.name}\): the image is corrupt"):
        read(layout, tmp_path / "out")
    path.write_bytes(whole)
    annotations = layout[0] / "annotations" / "instances_val2017.json"
    text = annotations.read_text()
    for broken in (text[:-200], text.replace("[", "", 1), "[]", "", "\x00"):
        annotations.write_text(broken)
        with pytest.raises(MasaError, match=r"instances_val2017\.json is corrupt or no JSON object"):
            read(layout, tmp_path / "out")
    annotations.unlink()
    with pytest.raises(MasaError, match=r"instances_val2017\.json does not exist"):
        read(layout, tmp_path / "out")


def test_bad_parquet_is_named(parquet, tmp_path):
    folder, rows = parquet
    path, val = folder / "data" / "train-00000-of-00001-abc.parquet", rows["val"]
    for edit, message in (
        (lambda r: r["objects"]["bbox"].__setitem__(0, [9, 9, 4, 12]), r"row 3 \(image 3\): annotation .* negative"),
        (lambda r: r["objects"]["bbox"].pop(), r"row 3 \(image 3\): \d boxes, but \d categories"),
        (lambda r: r["image"].update(bytes=r["image"]["bytes"][:50]), r"row 3 \(image 3\): the image is corrupt"),
        (lambda r: r.update(image_id=1), r"row 3 \(image 1\): two images have this id"),
        (lambda r: r.update(width=5), r"row 3 \(image 3\): the image is .*columns say \(5"),
    ):
        changed = json.loads(json.dumps(rows["train"], default=lambda data: data.hex()))
        for row in changed:
            row["image"]["bytes"] = bytes.fromhex(row["image"]["bytes"])
        edit(changed[2])
        write_parquet(path, changed)
        with pytest.raises(MasaError, match=message):
            read(parquet, tmp_path / "out")
    write_parquet(path, val[:2], names=("rectangle", "triangle", "ellipse"))
    with pytest.raises(MasaError, match=r"names its classes otherwise than .* at label 1"):
        read(parquet, tmp_path / "out")
    write_parquet(path, val[:2])
    with pytest.raises(MasaError, match=r"the train split is empty .* 2 training images dropped"):
        read(parquet, tmp_path / "out")
    path.write_bytes(b"PAR1")
    with pytest.raises(MasaError, match="corrupt or not Parquet"):
        read(parquet, tmp_path / "out")
    path.unlink()
    with pytest.raises(MasaError, match=r"neither annotations/ .* nor a file train\*\.parquet"):
        read(parquet, tmp_path / "out")


def test_an_empty_split(layout, tmp_path):
    with pytest.raises(MasaError, match="the validation split is empty"):
        read(layout, tmp_path / "out", validation_fraction=1e-9)
    assert not list((tmp_path / "out").glob("*.bin"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "shape"}, "Did you mean 'shapes'"),
        ({"name": None}, "Available: coco, custom, shapes"),
        ({"conut": 3}, "Did you mean 'count'"),
        ({"count": 1}, "count must be an integer of at least 2"),
        ({"image_size": None}, "image_size must be an integer of at least 8"),
        ({"image_size": True}, "image_size must be"),
        ({"validation_fraction": 1.0}, "no split may be empty"),
        ({"source": "file:x"}, "key 'source' does not exist"),
        ({"name": "coco", "source": "hub:detection-datasets/coco"}, "must pin a commit"),
        ({"name": "coco", "source": "mirror:coco"}, "needs a mirror"),
        ({"name": "coco", "source": "file:nowhere"}, "nowhere is not a folder"),
        ({"name": "coco", "source": "pypi:x==1"}, "boxes come from file:, mirror: or hub:"),
        ({"name": "coco"}, "need a source: file:FOLDER"),
        ({"name": "custom", "source": "file:x", "empty_boxes": "dorp"}, "Did you mean 'drop'"),
    ],
)
def test_bad_specs(change, message, tmp_path):
    spec = SHAPES if change.get("name", "shapes") is None or "coco" not in str(change) else {"image_size": 32}
    spec = {"image_size": 32} if change.get("name") == "custom" else spec
    with pytest.raises(MasaError, match=message):
        prepare(tmp_path / "out", {k: v for k, v in (spec | change).items() if v is not None or k == "image_size"})


def test_coco_has_80_classes(layout, tmp_path):
    with pytest.raises(MasaError, match="has 3 classes, coco has 80"):
        read(layout, tmp_path / "out", name="coco")


def test_specs_need_neither_numpy_nor_torch():
    import subprocess
    import sys

    code = (
        "import sys; from masa.data import box_spec; from masa.models import yolos;"
        f"box_spec.resolve({SHAPES!r});"
        "assert not {'torch', 'transformers', 'datasets', 'pandas', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=sources.Path(box_spec.__file__).parents[2])


def test_damaged_box_directories(tmp_path):
    prepare(tmp_path / "out")
    (tmp_path / "out" / "train-boxes.bin").write_bytes(b"short")
    with pytest.raises(MasaError, match=r"train-boxes\.bin has 5 bytes, expected"):
        boxed_images.BoxSplit(tmp_path / "out", "train")
    with pytest.raises(MasaError, match="Did you mean 'test'"):
        boxed_images.BoxSplit(tmp_path / "out", "tests")
    (tmp_path / "out" / "manifest.json").write_text('{"classes": [], "splits": {"train": {"images": 3}}}')
    with pytest.raises(MasaError, match="not one of images with boxes"):
        boxed_images.BoxSplit(tmp_path / "out", "train")


# ------------------------------------------------------------------------------------- ids, edges and the right way up


def renumbered(content, offset):
    """The same annotations with ids that a double cannot tell apart."""
    for image in content["images"]:
        image["id"] += offset
    for annotation in content["annotations"]:
        annotation["id"] += offset
        annotation["image_id"] += offset


@pytest.mark.parametrize("offset", [2**53, 2**62, -(2**60)])
def test_ids_are_exact(offset, layout, tmp_path):
    read(layout, tmp_path / "a")
    expected = everything(tmp_path / "a", "test")
    layout[1](lambda content: renumbered(content, offset), "val")
    read(layout, tmp_path / "b")
    found = everything(tmp_path / "b", "test")
    assert found.keys() == {number + offset for number in expected}
    for number, boxes_of_one in expected.items():
        assert np.array_equal(found[number + offset], boxes_of_one)
    layout[1](lambda content: renumbered(content, 2**63), "val")
    if offset > 0:
        with pytest.raises(MasaError, match=r"entry of images cannot be read \(\d+ does not fit into 64 bits\)"):
            read(layout, tmp_path / "c")


def over_the_edge(content):
    """Three boxes of the first image: one over its right edge by 5 pixels, one beyond it, one that just fits."""
    width, height = content["images"][0]["width"], content["images"][0]["height"]
    own, others = [], []
    for annotation in content["annotations"]:
        (own if annotation["image_id"] == content["images"][0]["id"] else others).append(annotation)
    new = [[width - 4.5, 3.0, 9.5, 6.0], [width + 3.0, 2.0, 4.0, 4.0], [0.0, 0.0, float(width), float(height)]]
    given = [own[0] | {"id": 10_000 + i, "bbox": box, "area": box[2] * box[3]} for i, box in enumerate(new)]
    given[0]["area"] = 20.0  # of a mask, smaller than the box
    content["annotations"] = others + given


def test_boxes_over_the_edge_are_clipped_or_dropped(layout, tmp_path):
    layout[1](over_the_edge, "val")
    with pytest.raises(
        MasaError, match=r"annotation 10000: the box .* lies outside its image \(outside_boxes: clip cuts"
    ):
        read(layout, tmp_path / "a")
    with pytest.raises(MasaError, match=r"annotation 10001: .* is empty \(empty_boxes: drop"):
        read(layout, tmp_path / "b", outside_boxes="clip")
    manifest = read(layout, tmp_path / "c", outside_boxes="clip", empty_boxes="drop")
    assert (manifest["boxes_clipped"], manifest["empty_boxes_dropped"], manifest["outside_boxes_dropped"]) == (1, 1, 0)
    split = boxed_images.BoxSplit(tmp_path / "c", "test")
    width, height = split.size(0)
    assert split.boxes(0)["xywh"].tolist() == [[width - 4.5, 3.0, 4.5, 6.0], [0.0, 0.0, width, height]]
    assert split.boxes(0)["area"].tolist() == [20.0, width * height]
    manifest = read(layout, tmp_path / "d", outside_boxes="drop")
    assert (manifest["boxes_clipped"], manifest["empty_boxes_dropped"], manifest["outside_boxes_dropped"]) == (0, 0, 2)
    assert boxed_images.BoxSplit(tmp_path / "d", "test").boxes(0)["xywh"].tolist() == [[0.0, 0.0, width, height]]
    with pytest.raises(MasaError, match="Did you mean 'clip'"):
        read(layout, tmp_path / "e", outside_boxes="clipp")


def test_a_rounded_box_stays_as_it_is_where_others_are_clipped(layout, tmp_path):
    """Within a pixel, as before: what is scored was never changed."""
    layout[1](lambda content: content["annotations"][0].update(bbox=[-0.6, 1.0, 9.0, 7.0], area=60.0), "val")
    manifest = read(layout, tmp_path / "out", outside_boxes="clip")
    assert manifest["boxes_clipped"] == 0
    assert boxed_images.BoxSplit(tmp_path / "out", "test").boxes(0)["xywh"][0].tolist() == [-0.6, 1.0, 9.0, 7.0]


def test_boxes_of_parquet_are_clipped_alike(layout, tmp_path):
    folder, rows = tmp_path / "parquet", {split: rows_of(layout, split) for split in ("train", "val")}
    width = rows["val"][0]["width"]
    rows["val"][0]["objects"]["bbox"][0] = [width - 4, 3, width + 5, 9]
    rows["val"][0]["objects"]["area"][0] = 54.0
    for split, of_split in rows.items():
        write_parquet(folder / "default" / split / "0000.parquet", of_split)
    spec = {"name": "custom", "image_size": 32, "source": f"file:{folder}", "validation_fraction": 0.2}
    with pytest.raises(MasaError, match="lies outside its image"):
        prepare(tmp_path / "a", spec)
    manifest = prepare(tmp_path / "b", spec, outside_boxes="clip")
    assert manifest["boxes_clipped"] == 1
    first = boxed_images.BoxSplit(tmp_path / "b", "test").boxes(0)[0]
    assert first["xywh"].tolist() == [width - 4, 3, 4, 6]
    assert first["area"] == 24.0
    assert list(manifest["files"]) == ["default/train/0000.parquet", "default/val/0000.parquet"]


def turn(path, orientation, upright):
    """Store an image so that EXIF's orientation 6 or 8 shows it upright, or as it is with that tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    stored = np.rot90(pixels, {6: 1, 8: -1}[orientation]) if upright else pixels
    Image.fromarray(np.ascontiguousarray(stored)).save(path, "PNG", exif=exif)
    return pixels


@pytest.mark.parametrize("orientation", [6, 8])
def test_an_image_that_exif_turns_is_read_upright(orientation, layout, tmp_path):
    read(layout, tmp_path / "a")
    for path in (layout[0] / "val2017").iterdir():
        turn(path, orientation, upright=True)
    read(layout, tmp_path / "b")
    before, after = (boxed_images.BoxSplit(tmp_path / name, "test") for name in "ab")
    assert np.array_equal(before.images, after.images)


def test_annotations_of_an_image_as_stored_are_told_from_a_wrong_size(layout, tmp_path):
    content = json.loads((layout[0] / "annotations/instances_val2017.json").read_text())
    entry = next(e for e in content["images"] if e["width"] != e["height"])
    path = layout[0] / "val2017" / entry["file_name"]
    turn(path, 6, upright=False)
    width, height = entry["width"], entry["height"]
    said = (
        rf"the image is {height} x {width}, the annotations say {width} x {height} .*EXIF's orientation 6 turns it: its"
    )
    with pytest.raises(MasaError, match=said):
        read(layout, tmp_path / "out")


def test_bad_annotations_leave_what_was_prepared_before(layout, tmp_path):
    read(layout, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    layout[1](BAD["missing"][0])
    with pytest.raises(MasaError, match="cannot be read"):
        read(layout, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_annotations_with_a_byte_order_mark(layout, tmp_path):
    plain = read(layout, tmp_path / "plain")
    path = layout[0] / "annotations" / "instances_train2017.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(layout, tmp_path / "marked")["splits"] == plain["splits"]
