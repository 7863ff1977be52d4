"""From data sets with boxes to pixel files: decode and resize once, split without leakage, keep the boxes exact.

A box directory holds, for each of the splits train, validation and test, ``{split}.bin`` (uint8 pixels, N x S x S x 3),
``{split}-images.bin`` (:data:`.box_records.IMAGE` of each image), ``{split}-boxes.bin`` (:data:`.box_records.BOX` of
each box, image after image) and ``manifest.json`` with classes, counts, checksums and the mean and standard deviation
of the training pixels. Boxes are stored as annotated, in pixels of the original image: what is scored was never
rounded. A new data set is one entry of :data:`masa.data.box_spec.DATASETS`.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from masa.data import coco, shapes, sources
from masa.data.box_records import BOX, IMAGE, Rules
from masa.data.box_spec import DATASETS, resolve
from masa.data.coco import Raw, Scene
from masa.data.pixels import SPLITS, Moments
from masa.errors import MasaError
from masa.runs import files
from masa.runs.progress import Progress
from masa.runs.run import write_json


def prepare(spec: Mapping[str, Any], cache: Path, mirror: str | None, out: Path) -> dict[str, Any]:
    """Write the files of one data set; memory holds one image, and of all others only numbers.

    The data set's own validation images (val2017) are the test split. Of its training images ``validation_fraction``
    are held out by a hash of the pixels, so that two copies of an image are never in different splits; training images
    that are also test images are dropped, and the manifest says how many. Images are resized to a square.

    Args:
        spec: see :func:`masa.data.box_spec.resolve`.
        cache: not used; a generated data set is drawn anew.
        mirror: where the mirror is.
        out: box directory.

    Returns:
        The manifest.

    Raises:
        MasaError: a bad spec, a source that cannot be had, an image that is missing, corrupt or of another size than
            annotated, an annotation that cannot be, or a split that stays empty; files and annotations are named.
    """
    spec = resolve(spec)
    with _opened(spec, mirror, out) as raw, ExitStack() as stack:
        expected = DATASETS[spec["name"]].num_classes
        if expected is not None and len(raw.classes) != expected:
            raise MasaError(f"{spec['source']} has {len(raw.classes)} classes, {spec['name']} has {expected}.")
        writers = {
            split: stack.enter_context(_Writer(out, split, spec["image_size"], len(raw.classes))) for split in SPLITS
        }
        dropped = _distribute(spec, raw, writers)
        (out / "manifest.json").unlink(missing_ok=True)  # now that all was read: the files are replaced next
    mean, std = writers["train"].moments.statistics()
    manifest = {
        "dataset": spec["name"],
        "source": spec.get("source", f"drawn from seed {spec.get('seed')}"),
        "spec": spec,
        "files": dict(raw.files),
        "image_size": spec["image_size"],
        "channels": 3,
        "classes": raw.classes,
        "mean": mean,
        "std": std,
        "train_images_also_in_test": dropped,
        "empty_boxes_dropped": raw.counts["empty"],
        "outside_boxes_dropped": raw.counts["outside"],
        "boxes_clipped": raw.counts["clipped"],
        "splits": {split: writer.record() for split, writer in writers.items()},
    }
    write_json(out / "manifest.json", manifest)
    return manifest


@contextmanager
def _opened(spec: Mapping[str, Any], mirror: str | None, out: Path) -> Iterator[Raw]:
    """The data set; a generated one is written in COCO's layout and read like any other."""
    if not DATASETS[spec["name"]].generated:
        yield coco.read(
            sources.parse(spec["source"]), mirror, Rules(spec["empty_boxes"], spec.get("outside_boxes", "error"))
        )
        return
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out, prefix=".shapes.") as temporary:
        folder = Path(temporary) / "shapes"
        given = {key: spec[key] for key in ("count", "test_count", "image_size", "max_boxes", "seed")}
        shapes.write(folder, **given)
        yield coco.read_layout(folder, "error")


def _distribute(spec: Mapping[str, Any], raw: Raw, writers: Mapping[str, _Writer]) -> int:
    """Write every image into its split; returns the number of training images that are also test images."""
    progress, done, dropped = Progress(f"boxes {spec['name']}", sum(raw.sizes.values()), "images"), 0, 0
    tested: set[bytes] = set()
    for stored in ("test", "train"):  # the test split first: what is in it may not be trained on
        for scene in raw.splits[stored]:
            digest = hashlib.sha256(str(scene.pixels.shape).encode() + scene.pixels.tobytes()).digest()
            if stored == "test":
                tested.add(digest)
                writers["test"].add(scene)
            elif digest in tested:
                dropped += 1
            else:
                held_out = int.from_bytes(digest[:8]) / 2**64 < spec["validation_fraction"]
                writers["validation" if held_out else "train"].add(scene)
            done += 1
            progress.update(done)
    for split, writer in writers.items():
        if not writer.images:
            raise MasaError(
                f"{spec['name']}: the {split} split is empty ({done} images read, {dropped} training images dropped "
                "because they are test images). Check the source and validation_fraction."
            )
    progress.close(done)
    return dropped


class _Writer:
    """Appends scenes of one split; the files appear whole when the block ends without an error."""

    def __init__(self, out: Path, split: str, image_size: int, classes: int) -> None:
        self.out, self.split, self.image_size, self.classes = out, split, image_size, classes
        self.images: list[tuple[int, int, int, int]] = []
        self.crowds = self.most = 0
        self.per_class = np.zeros(classes, np.int64)
        self.moments = Moments(3)

    def __enter__(self) -> _Writer:
        self.stack = ExitStack()
        self.pixel_file, self.box_file = (
            self.stack.enter_context(self.stack.enter_context(files.whole_file(path)).open("wb"))
            for path in (self.out / f"{self.split}.bin", self.out / f"{self.split}-boxes.bin")
        )
        return self

    def __exit__(self, *error: Any) -> None:
        self.stack.__exit__(*error)
        if error[0] is None:
            with files.whole_file(self.out / f"{self.split}-images.bin") as path:
                np.array(self.images, IMAGE).tofile(path)

    def add(self, scene: Scene) -> None:
        pixels = resize(scene.pixels, self.image_size)
        self.pixel_file.write(np.ascontiguousarray(pixels).tobytes())
        self.box_file.write(scene.boxes.astype(BOX).tobytes())
        height, width = scene.pixels.shape[:2]
        self.images.append((scene.id, width, height, len(scene.boxes)))
        single = scene.boxes["label"][scene.boxes["crowd"] == 0]
        self.per_class += np.bincount(single, minlength=self.classes)
        self.crowds += len(scene.boxes) - len(single)
        self.most = max(self.most, len(single))
        self.moments.add(pixels)

    def record(self) -> dict[str, Any]:
        """Counts and checksums; ``boxes`` and ``per_class`` are without crowds, ``most_boxes`` those of one image."""
        return {
            "images": len(self.images),
            "boxes": int(self.per_class.sum()),
            "crowd_boxes": self.crowds,
            "most_boxes": self.most,
            "per_class": self.per_class.tolist(),
            "sha256": files.sha256_of(self.out / f"{self.split}.bin"),
            "images_sha256": files.sha256_of(self.out / f"{self.split}-images.bin"),
            "boxes_sha256": files.sha256_of(self.out / f"{self.split}-boxes.bin"),
        }


def resize(pixels: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) -> (size, size, 3), bilinear and antialiased."""
    from PIL import Image

    if pixels.shape[:2] == (size, size):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize((size, size), Image.Resampling.BILINEAR))
