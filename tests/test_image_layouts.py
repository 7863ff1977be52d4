"""Images in every mode by its meaning, and the layouts that data sets are handed around in."""

import io
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image
from test_images import NAMES, everything, pictures, png, prepare, write_parquet

from masa import MasaError
from masa.data import cifar_pickles, image_sets, parquet_files, pixels
from masa.data.decoding import decode


def encoded(image, form="PNG", **more):
    buffer = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(buffer, form, **more)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------------------- modes

DEEP = np.arange(0, 65536, 17, dtype=np.uint16).reshape(1, -1)


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_greys(form):
    """White stays white and half stays half; Pillow's own conversion makes 99.6 % of it white."""
    expected = np.rint(DEEP / 257).astype(np.uint8)
    assert np.array_equal(decode(encoded(DEEP, form), 1, "x")[:, :, 0], expected)
    assert np.array_equal(decode(encoded(DEEP, form), 3, "x"), np.repeat(expected[:, :, None], 3, 2))
    with Image.open(io.BytesIO(encoded(DEEP, form))) as image:
        assert (np.asarray(image.convert("L")) == 255).mean() > 0.99


def test_a_tiff_whose_white_is_zero_is_turned_around():
    found = decode(encoded(DEEP, "TIFF", tiffinfo={262: 0}), 1, "x")[:, :, 0]
    assert np.array_equal(found, 255 - np.rint(DEEP / 257).astype(np.uint8))


RED_GREEN = Image.new("P", (2, 1))
RED_GREEN.putpalette([200, 0, 0, 0, 100, 0])
RED_GREEN.putpixel((1, 0), 1)
BITS = Image.new("1", (2, 1))
BITS.putpixel((1, 0), 1)
HALF = 127  # black seen through half of its opacity, on white

MODES = {
    "palette": (RED_GREEN, {}, [[200, 0, 0], [0, 100, 0]]),
    "palette, one colour clear": (RED_GREEN, {"transparency": 1}, [[200, 0, 0], [255, 255, 255]]),
    "palette, of half opacity": (RED_GREEN, {"transparency": bytes([0, 255])}, [[255, 255, 255], [0, 100, 0]]),
    "1 bit": (BITS, {}, [[0, 0, 0], [255, 255, 255]]),
    "1 bit, black clear": (BITS, {"transparency": 0}, [[255, 255, 255], [255, 255, 255]]),
    "grey and opacity": (
        Image.fromarray(np.array([[[10, 0], [10, 255], [0, 128]]], np.uint8)),
        {},
        [[255] * 3, [10] * 3, [HALF] * 3],
    ),
    "colour and opacity": (
        Image.fromarray(np.array([[[9, 8, 7, 0], [9, 8, 7, 255]]], np.uint8)),
        {},
        [[255] * 3, [9, 8, 7]],
    ),
    "colour, one clear": (
        Image.fromarray(np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)),
        {"transparency": (1, 2, 3)},
        [[9, 8, 7], [255] * 3],
    ),
    "16 bits, one grey clear": (
        Image.fromarray(np.array([[0, 1000, 65535]], np.uint16)),
        {"transparency": 1000},
        [[0] * 3, [255] * 3, [255] * 3],
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_modes_are_converted_by_their_meaning(mode):
    image, options, expected = MODES[mode]
    assert decode(encoded(image, **options), 3, "x").tolist() == [expected]


def test_cmyk_is_ink():
    assert decode(encoded(Image.new("CMYK", (1, 1), (0, 255, 255, 0)), "TIFF"), 3, "x").tolist() == [[[255, 0, 0]]]


@pytest.mark.parametrize(("mode", "what"), [("F", "floating-point numbers"), ("I", "32-bit integers")])
def test_numbers_without_a_white_are_refused(mode, what):
    with pytest.raises(MasaError, match=rf"deep\.tif: the pixels of this TIFF are {what}, and nothing says .*8 or 16"):
        decode(encoded(Image.new(mode, (2, 2)), "TIFF"), 3, "deep.tif")


@pytest.mark.parametrize("form", ["PNG", "TIFF", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(form, orientation):
    """The eight ways of EXIF's table: the first row and the first column of what is stored are, upright, …"""
    exif, upright = Image.Exif(), np.zeros((16, 32, 3), np.uint8)
    upright[:8, :8], upright[8:, :8], upright[:8, 24:] = 250, 150, 80
    exif[0x0112] = orientation
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    lossless = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}.get(form, {})
    found = decode(encoded(np.ascontiguousarray(stored), form, exif=exif, **lossless), 3, "x")
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright).max() <= (4 if form == "JPEG" else 0)


def test_broken_exif_leaves_the_pixels_alone():
    data = encoded(np.full((2, 3), 7, np.uint8), "PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert decode(data, 1, "x").tolist() == [[[7]] * 3] * 2


# --------------------------------------------------------------------------------------------------------- layouts


@pytest.fixture
def ten():
    """Training and test images of CIFAR-10's form with their labels, ten a class and two a class."""
    return pictures(100, 0), [i % 10 for i in range(100)], pictures(20, 1), [i % 10 for i in range(20)]


def contents(directory):
    """Split -> the pixels and labels in it."""
    return {split: {(x.tobytes(), y) for x, y in everything(directory, split)} for split in pixels.SPLITS}


def as_parquet(folder, ten):
    train, labels, test, test_labels = ten
    write_parquet(folder / "train.parquet", map(png, train), labels)
    write_parquet(folder / "test.parquet", map(png, test), test_labels)
    return folder


def rows(images):
    return np.stack(images).transpose(0, 3, 1, 2).reshape(len(images), -1)


def as_pickles(folder, ten, protocol=2):
    """As CIFAR-10 is unpacked: pickles of the protocol of Python 2, whose keys are bytes."""
    folder = folder / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    train, labels, test, test_labels = ten
    for i in range(5):
        part = slice(20 * i, 20 * i + 20)
        batch = {b"batch_label": b"training", b"labels": labels[part], b"data": rows(train[part])}
        (folder / f"data_batch_{i + 1}").write_bytes(pickle.dumps(batch, protocol))
    (folder / "test_batch").write_bytes(pickle.dumps({b"labels": test_labels, b"data": rows(test)}, protocol))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": NAMES, b"num_vis": 3072}, protocol))
    return folder.parent


def as_folders(folder, ten, test_split="test"):
    train, labels, test, test_labels = ten
    for split, images, classes in (("train", train, labels), (test_split, test, test_labels)):
        for i, (image, label) in enumerate(zip(images, classes, strict=True)):
            path = folder / split / NAMES[label] / f"{i:04d}.PNG"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(image))
        (folder / split / NAMES[0] / "Thumbs.db").write_bytes(b"no image")
    return folder


@pytest.mark.parametrize("write", [as_pickles, as_folders], ids=["pickles", "folders"])
def test_every_layout_gives_the_same_splits(write, ten, tmp_path):
    expected = prepare(as_parquet(tmp_path / "parquet", ten), tmp_path / "a")
    found = prepare(write(tmp_path / "other", ten), tmp_path / "b")
    assert found["classes"] == expected["classes"] == NAMES
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert {s: r["per_class"] for s, r in found["splits"].items()} == {
        s: r["per_class"] for s, r in expected["splits"].items()
    }


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_of_every_protocol_and_order(protocol, tmp_path):
    data = np.random.default_rng(0).integers(0, 256, (4, 12), dtype=np.uint8)
    for given in (data, np.asfortranarray(data)):
        (tmp_path / "batch").write_bytes(pickle.dumps({"data": given, "fine_labels": [1, 2, 3, 4]}, protocol))
        found = cifar_pickles.read(tmp_path / "batch")
        assert np.array_equal(found["data"], data)
        assert found["fine_labels"] == [1, 2, 3, 4]


def test_a_pickle_of_python_2(tmp_path):
    """As CIFAR's were written: bytes as text, and NumPy's old names."""
    text = b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85"
    text += b"U\x01b\x87R(K\x01K\x01K\x03\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xff"
    text += b"J\xff\xff\xff\xffK\x00tb\x89U\x03\x01\xfe\x80tbU\x06labelsq\x05]q\x06K\x07au."
    (tmp_path / "batch").write_bytes(text)
    found = cifar_pickles.read(tmp_path / "batch")
    assert found["data"].tolist() == [[1, 254, 128]]
    assert found["labels"] == [7]


def test_cifar100_has_its_fine_labels(tmp_path):
    folder, images = tmp_path / "cifar-100-python", pictures(30, 2)
    folder.mkdir()
    names = [f"class {i:02d}" for i in range(100)]
    coarse = {"coarse_label_names": ["x"] * 20}
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names, **coarse}))
    for name, part in (("train", slice(0, 20)), ("test", slice(20, 30))):
        labels = [3 * i for i in range(30)][part]
        batch = {"data": rows(images[part]), "fine_labels": labels, "coarse_labels": [0] * len(labels)}
        (folder / name).write_bytes(pickle.dumps(batch))
    manifest = prepare(tmp_path, tmp_path / "out", "cifar100", validation_fraction=0.3)
    assert manifest["classes"] == names
    assert {y for _, y in everything(tmp_path / "out", "test")} == {60, 63, 66, 69, 72, 75, 78, 81, 84, 87}


class Program:
    """What a pickle of someone else's may hold."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_no_program_in_a_pickle_is_run(ten, tmp_path):
    folder = as_pickles(tmp_path / "cifar", ten) / "cifar-10-batches-py"
    for attack in (Program(str(tmp_path / "owned")), {b"data": Program(str(tmp_path / "owned")), b"labels": []}):
        (folder / "data_batch_3").write_bytes(pickle.dumps(attack))
        with pytest.raises(MasaError, match=r"data_batch_3 is no batch of CIFAR \(.*asks for .*open"):
            prepare(folder, tmp_path / "out")
        assert not (tmp_path / "owned").exists()
    objects = np.array([{"a": 1}], dtype=object)
    (folder / "data_batch_3").write_bytes(pickle.dumps({b"data": objects, b"labels": [0]}))
    with pytest.raises(MasaError, match="its array is of type O8, not bytes"):
        prepare(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"data_batch_2 is no batch of CIFAR"),
        (pickle.dumps([1, 2]), "it holds a list"),
        (
            pickle.dumps({"data": np.zeros((3, 9), np.uint8), "labels": [0] * 3}),
            "'data' is not an array of rows of 3072",
        ),
        (
            pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [0] * 2}),
            "labels is not a list of 3 integers",
        ),
        (pickle.dumps({"data": np.zeros((3, 3072), np.uint8), "labels": [0.5] * 3}), "labels is not a list of 3"),
        (pickle.dumps({"data": np.zeros((1, 3072), np.uint8), "labels": [10]}), "label 10 is not in 0"),
    ],
)
def test_damaged_pickles_are_named(content, message, ten, tmp_path):
    folder = as_pickles(tmp_path / "cifar", ten)
    (folder / "cifar-10-batches-py/data_batch_2").write_bytes(content)
    with pytest.raises(MasaError, match=message):
        prepare(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin"))
    (folder / "cifar-10-batches-py/data_batch_2").unlink()
    with pytest.raises(MasaError, match="data_batch_2 is missing"):
        prepare(folder, tmp_path / "out")


WNIDS = [f"n{i:08d}" for i in range(200)]


def tiny_imagenet(folder, validation=40):
    """As it is unpacked: 200 folders of training images, validation images in one folder with a list of classes."""
    images = pictures(400 + validation, 3, size=64)
    for i, wnid in enumerate(WNIDS):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("no image")
        for j in range(2):
            (folder / "train" / wnid / "images" / f"{wnid}_{j}.JPEG").write_bytes(png(images[2 * i + j]))
    (folder / "val/images").mkdir(parents=True)
    lines = []
    for i, image in enumerate(images[400:]):
        (folder / f"val/images/val_{i}.JPEG").write_bytes(png(image))
        lines.append(f"val_{i}.JPEG\t{WNIDS[7 * i % 200]}\t0\t32\t44\t62\n")
    (folder / "val/val_annotations.txt").write_text("".join(lines))
    (folder / "test/images").mkdir(parents=True)
    (folder / "wnids.txt").write_text("\n".join(reversed(WNIDS)) + "\n")
    (folder / "words.txt").write_text("".join(f"{wnid}\tthing {i}, other\n" for i, wnid in enumerate(WNIDS)))
    return images[400:]


def test_tiny_imagenet_as_it_is_unpacked(tmp_path):
    folder = tmp_path / "data/tiny-imagenet-200"
    shown = tiny_imagenet(folder)
    manifest = prepare(folder.parent, tmp_path / "out", "tiny-imagenet")
    assert manifest["classes"] == WNIDS, "in the order of the names, as the copy on the hub"
    assert manifest["titles"][5] == "thing 5"
    assert sum(manifest["splits"][split]["images"] for split in ("train", "validation")) == 400
    expected = {(image.tobytes(), 7 * i % 200) for i, image in enumerate(shown)}
    assert contents(tmp_path / "out")["test"] == expected
    annotations = folder / "val/val_annotations.txt"
    text = annotations.read_text()
    for changed, message in (
        (text.replace(WNIDS[7], "n99999999"), r"val_annotations\.txt, line 2: 'n99999999' is no class"),
        (text.replace("val_3.", "val_x."), r"line 4: .*val_x\.JPEG does not exist"),
        (text.partition("\n")[2], r"has no line for val_0\.JPEG \(1 images in all\)"),
    ):
        annotations.write_text(changed)
        with pytest.raises(MasaError, match=message):
            prepare(folder, tmp_path / "out", "tiny-imagenet")
    annotations.write_text(text)
    shutil.rmtree(folder / "train" / WNIDS[3])
    with pytest.raises(MasaError, match=r"has no folder n00000003, which .*wnids\.txt lists \(1 in all\)"):
        prepare(folder, tmp_path / "out", "tiny-imagenet")


def test_folders_that_are_not_as_expected_are_named(ten, tmp_path):
    folder = as_folders(tmp_path / "a", ten)
    (folder / "test" / "zebra").mkdir()
    (folder / "test" / "zebra" / "1.png").write_bytes(png(ten[0][0]))
    with pytest.raises(MasaError, match=r"test/zebra: class 'zebra' does not exist"):
        prepare(folder, tmp_path / "out")
    shutil.rmtree(folder / "test" / "zebra")
    for path in (folder / "train" / "cat").iterdir():
        path.unlink()
    with pytest.raises(MasaError, match=r"train/cat holds no image \("):
        prepare(folder, tmp_path / "out")
    shutil.rmtree(folder / "train" / "cat")
    shutil.rmtree(folder / "test")
    with pytest.raises(MasaError, match="has a folder train, but none of the test split"):
        prepare(folder, tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MasaError, match=r"no file .*train\*\.parquet, nor another layout: .*pickles"):
        prepare(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(MasaError, match="none is not a folder"):
        prepare(tmp_path / "none", tmp_path / "out")


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("default/train/0000.parquet", "default/test/0000.parquet"),
        ("data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"),
        ("plain_text/train-00000-of-00001-4a3b.parquet", "plain_text/test-00000-of-00001-9c.parquet"),
        ("train.parquet", "test.parquet"),
    ],
)
def test_names_of_parquet_files(train, test, ten, tmp_path):
    plain = prepare(as_parquet(tmp_path / "plain", ten), tmp_path / "a")
    for name, images, labels in ((train, ten[0], ten[1]), (test, ten[2], ten[3])):
        write_parquet(tmp_path / "data" / name, map(png, images), labels)
    found = prepare(tmp_path / "data", tmp_path / "b")
    assert found["splits"] == plain["splits"]
    assert list(found["files"]) == [train, test]


def test_a_converted_split_of_several_files_is_whole_or_refused(ten, tmp_path):
    for i in range(4):
        part = slice(25 * i, 25 * i + 25)
        write_parquet(tmp_path / f"d/default/train/{i:04d}.parquet", map(png, ten[0][part]), ten[1][part])
    write_parquet(tmp_path / "d/default/test/0000.parquet", map(png, ten[2]), ten[3])
    manifest = prepare(tmp_path / "d", tmp_path / "out")
    assert sum(manifest["splits"][split]["images"] for split in ("train", "validation")) == 100
    (tmp_path / "d/default/train/0001.parquet").unlink()
    with pytest.raises(MasaError, match=r"of the files 0000 to 0003 number 1 is missing \(1 in all\)"):
        prepare(tmp_path / "d", tmp_path / "out")


def test_a_split_that_is_there_twice_is_not_read_twice(ten, tmp_path):
    as_parquet(tmp_path / "d/data", ten)
    as_parquet(tmp_path / "d/default/train", ten)
    with pytest.raises(MasaError, match=r"the train split is there twice, in .*d/data and in .*d/default"):
        prepare(tmp_path / "d", tmp_path / "out")


def test_a_validation_split_by_another_name(tmp_path):
    (tmp_path / "default/validation").mkdir(parents=True)
    (tmp_path / "default/validation/0000.parquet").write_bytes(b"")
    for name in ("valid", "val", "validation"):
        assert parquet_files.parquet_files(tmp_path, name) == [tmp_path / "default/validation/0000.parquet"]
    assert parquet_files.parquet_files(tmp_path, "test") == []


def test_the_workflow_sees_the_files_of_every_layout(ten, tmp_path):
    """An edit of one of them makes the images anew; of a hundred thousand images their folders stand for them."""
    assert [p.name for p in image_sets.standing_for(as_parquet(tmp_path / "a", ten))] == [
        "test.parquet",
        "train.parquet",
    ]
    found = image_sets.standing_for(as_pickles(tmp_path / "b", ten))
    assert {p.name for p in found} == {"batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))}
    found = image_sets.standing_for(as_folders(tmp_path / "c", ten))
    assert tmp_path / "c/train/cat" in found
    assert not [path for path in found if path.suffix == ".PNG"]


def test_what_macos_puts_beside_images_is_no_image(ten, tmp_path):
    plain, folder = prepare(as_folders(tmp_path / "a", ten), tmp_path / "plain"), as_folders(tmp_path / "b" / "in", ten)
    for name in (
        "in/train/cat/._1.png",
        "in/train/cat/.DS_Store",
        "in/test/cat/Thumbs.db",
        "__MACOSX/train/cat/._1.png",
    ):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(b"Mac OS X")
    assert prepare(folder.parent, tmp_path / "out")["splits"] == plain["splits"]


def test_a_bad_image_leaves_what_was_prepared_before_and_is_named(ten, tmp_path):
    folder = as_folders(tmp_path / "a", ten)
    prepare(folder, tmp_path / "out")
    before = contents(tmp_path / "out")
    next((folder / "train" / "cat").iterdir()).write_bytes(b"<html>")
    with pytest.raises(MasaError, match=r"cat/.*: the image is corrupt, or of no format .*first bytes are b'<html>'"):
        prepare(folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_an_image_that_is_a_link_to_nowhere_is_named(ten, tmp_path):
    folder = as_folders(tmp_path / "a", ten)
    (folder / "train" / "cat" / "more.png").symlink_to("not-fetched.png")
    with pytest.raises(MasaError, match=r"train/cat/more\.png cannot be read \(No such file"):
        prepare(folder, tmp_path / "out")
