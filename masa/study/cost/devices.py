"""Devices that runs can be planned for, as a few measured or published numbers. A new device is one entry.

What training steps reach of a GPU was measured on some: :mod:`masa.study.cost.readings`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from masa.errors import unknown

GIB = 2**30


@dataclass(frozen=True)
class Device:
    """What one device (a GPU, or one core of a CPU) does.

    Attributes:
        name: key of :data:`DEVICES`.
        matmul_flops: dtype -> achievable FLOP/s of matrix products, that is peak x utilisation.
        element_seconds: seconds for one element of an activation to be touched once (read and written), float32 on a
            CPU, bfloat16 on a GPU.
        launch_seconds: seconds that one operator costs whatever its size (Python and dispatch).
        memory_bytes: of the device; for a CPU of one typical machine.
        startup_seconds: of a process until it trains: interpreter, imports, model, first step.
        lapack_flops: FLOP/s of dense eigen- and singular value decompositions in float64, counted as 9 n^3.
        gpu: whether operators run beside the launches of the next (and scores of attention never reach memory).
        threads: CPU threads that the rates above were taken with.
        sheet_flops: dtype -> FLOP/s of the data sheet, of a GPU.
        cards: the names that CUDA gives such GPUs, as a regular expression.
    """

    name: str
    matmul_flops: Mapping[str, float]
    element_seconds: float
    launch_seconds: float
    memory_bytes: float
    startup_seconds: float
    lapack_flops: float
    gpu: bool = True
    threads: int = 1
    sheet_flops: Mapping[str, float] = field(default_factory=dict)
    cards: str = ""

    def dtype(self, wanted: str) -> str:
        """The arithmetic that a recipe's ``dtype`` means here: "auto" is bfloat16 on a GPU that is made for it."""
        if wanted == "auto":
            return "bfloat16" if self.gpu and "bfloat16" in self.matmul_flops else "float32"
        return wanted

    def rate(self, dtype: str) -> float:
        """FLOP/s in a dtype; float32's where it has none of its own."""
        return self.matmul_flops.get(dtype, self.matmul_flops["float32"])


def _gpu(
    name: str,
    cards: str,
    float32: float,
    half: float | None,
    bandwidth: float,
    memory: float,
    utilisation: float = 0.5,
    startup: float = 25.0,
) -> Device:
    """A GPU from its data sheet.

    Args:
        cards: names of it in CUDA, as a regular expression.
        float32: TFLOP/s of plain (not TF32) float32, which torch uses by default.
        half: dense TFLOP/s in bfloat16 with float32 accumulation; None where the tensor cores have no bfloat16.
        bandwidth: GB/s of its memory.
        memory: GiB.
        utilisation: fraction of the peak that large matrix products of uncompiled PyTorch reach. 0.5 is between
            nanoGPT's 0.4 and the 0.6 of cuBLAS on 4096 x 4096 (Narayanan et al. 2021, arXiv 2104.04473, report 0.44 to
            0.52 of an A100's peak for whole models).
        startup: seconds; more than a CPU's by the CUDA context and the first kernels.
    """
    sheet = {"float32": 1e12 * float32}
    flops = {"float32": 0.7e12 * float32}  # without tensor cores, cuBLAS is nearer to its peak
    if half is not None:
        sheet |= {"bfloat16": 1e12 * half, "float16": 1e12 * half}
        flops |= {"bfloat16": utilisation * 1e12 * half, "float16": utilisation * 1e12 * half}
    # an element is read and written in two bytes, and bandwidth-bound kernels reach 0.8 of the sheet's
    element = 4 / (0.8e9 * bandwidth)
    # one operator of eager PyTorch with autograd costs the host about 1.5 us, wrappers counted as operators
    return Device(
        name, flops, element, 1.5e-6, memory * GIB, startup, lapack_flops=1.5e11, sheet_flops=sheet, cards=cards
    )


DEVICES = {
    device.name: device
    for device in (
        # NVIDIA's data sheets: H100 SXM, H200 SXM, A100 SXM 80 GB, RTX A6000, GeForce RTX 4090 and 3090 (Ada and
        # Ampere GA102 white papers; halves of a GeForce accumulate in float32 at half rate), L40S, V100 SXM2, T4
        _gpu("h100", "NVIDIA H100 80GB HBM3", 67, 989, 3350, 80),
        _gpu("h200", "NVIDIA H200", 67, 989, 4800, 141),
        _gpu("a100", "(NVIDIA )?A100-.*", 19.5, 312, 2039, 80),
        _gpu("a6000", "NVIDIA RTX A6000", 38.7, 155, 768, 48),
        _gpu("rtx4090", "NVIDIA GeForce RTX 4090", 82.6, 165, 1008, 24, utilisation=0.7),
        _gpu("rtx3090", "NVIDIA GeForce RTX 3090", 35.6, 71, 936, 24, utilisation=0.7),
        _gpu("l40s", "NVIDIA L40S", 91.6, 362, 864, 48, utilisation=0.4),
        _gpu("v100", "Tesla V100-SXM2-.*", 15.7, None, 900, 32),
        _gpu("t4", "Tesla T4", 8.1, None, 320, 16),
        # one core of a laptop with AVX-512 or two AVX2 units: 3 GHz x 32 FLOP = 96 GFLOP/s at most; `masa plan`
        # replaces all of this by what it measures
        Device("cpu", {"float32": 6e10, "bfloat16": 6e10}, 0.8e-9, 2e-6, 8 * GIB, 5.5, 1.5e10, gpu=False),
    )
}


def device(name: str) -> Device:
    """One of :data:`DEVICES`.

    Raises:
        MasaError: no such device; the message names the nearest.
    """
    if name not in DEVICES:
        raise unknown("Device", name, DEVICES)
    return DEVICES[name]
