"""Peak rates of devices: what the roofline model divides by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """A device's two ceilings.

    Args:
        name: As on the command line.
        operations: FP16 operations a second that matrix products reach at most, without sparsity.
        bandwidth: Bytes a second between memory and chip.
        source: Where the figures are from.
    """

    name: str
    operations: float
    bandwidth: float
    source: str


_GPUS = (
    Device("V100", 112e12, 900e9, "NVIDIA V100 datasheet, PCIe, 32 GB"),
    Device("A100", 312e12, 2039e9, "NVIDIA A100 datasheet, SXM, 80 GB"),
    Device("H100", 989.4e12, 3350e9, "NVIDIA H100 datasheet, SXM; dense: half the sparse"),
    Device("RTX4090", 165.2e12, 1008e9, "NVIDIA Ada GPU architecture paper; FP32 accumulation"),
    Device("T4", 65e12, 320e9, "NVIDIA T4 datasheet"),
)
DEVICES = {device.name: device for device in _GPUS}
"""Devices by name."""

_SIDE = 1024  # of the matrices that are multiplied
_COPIED = 2**27  # bytes: more than caches hold
_ROUNDS = 5


def measured_cpu() -> Device:
    """This machine's CPU with the threads that PyTorch uses: best of several rounds, in seconds.

    Products are of the faster of float32 and bfloat16; copying counts what it reads and writes.
    """
    import torch

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(_SIDE, _SIDE, dtype=dtype)
        rates[dtype] = 2 * _SIDE**3 / _best_seconds(lambda m=matrix: m @ m)  # type: ignore[misc]
    dtype = max(rates, key=lambda key: rates[key])
    source = torch.ones(_COPIED, dtype=torch.uint8)
    target = torch.empty_like(source)
    bandwidth = 2 * _COPIED / _best_seconds(lambda: target.copy_(source))
    return Device(
        "cpu",
        rates[dtype],
        bandwidth,
        f"measured: {str(dtype).removeprefix('torch.')} products of {_SIDE} x {_SIDE}, copies of "
        f"{_COPIED // 2**20} MiB, {torch.get_num_threads()} threads, best of {_ROUNDS}",
    )


def _best_seconds(run: Callable[[], object]) -> float:
    run()
    seconds = []
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
