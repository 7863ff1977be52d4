#!/usr/bin/env bash
# A grey TIFF whose white is zero comes out right with 8 bits, and as its negative with 16.
#
# Expected: the pixels of a TIFF mean what its tag PhotometricInterpretation says: 0 is "WhiteIsZero" (TIFF 6.0, section 4,
#   "Grayscale Images"). Pillow turns such images of 1, 2, 4 and 8 bits around as it reads them.
# What happens: with 16 bits the numbers are returned as they are stored, in mode "I;16", and `tag_v2[262] == 0` alone tells
#   that 0 is white. Whoever scales them to 8 bits has a negative.
# Versions: Pillow 13.0.0, Python 3.11; 2026-11-27.
# Source: PIL/TiffImagePlugin.py, `OPEN_INFO`: (II, 0, (1,), 1, (8,), ()) is read as "L;I", (II, 0, (1,), 1, (16,), ()) as
#   "I;16". Of saving with 1 and 8 bits: https://github.com/python-pillow/Pillow/pull/5655.
# Remedy: 65535 - pixels, where the mode begins with "I;16" and `image.tag_v2.get(262) == 0`.
# Output seen:
#    8 bits, stored [0, 255]: [255, 0]
#   16 bits, stored [0, 65535]: [0, 65535]
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check pillow==13.0.0
"$folder/env/bin/python" - <<'PYTHON'
import io
import struct

from PIL import Image


def tiff(bits: int, data: bytes) -> bytes:
    """Two pixels in one strip, white is zero."""
    tags = [(256, 3, 2), (257, 3, 1), (258, 3, bits), (259, 3, 1), (262, 3, 0), (273, 4, 8), (277, 3, 1), (278, 3, 1)]
    tags.append((279, 4, len(data)))
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    strip = data.ljust(4, b"\0")
    return b"II*\0" + struct.pack("<I", 8 + len(strip)) + strip + struct.pack("<H", len(tags)) + entries + b"\0" * 4


found = []
for bits, data in ((8, b"\0\xff"), (16, b"\0\0\xff\xff")):
    image = Image.open(io.BytesIO(tiff(bits, data)))
    found.append([image.getpixel((0, 0)), image.getpixel((1, 0))])
    print(f"{bits:2} bits, stored [0, {2**bits - 1}]: {found[-1]}")
raise SystemExit(0 if found == [[255, 0], [0, 65535]] else "changed")
PYTHON
