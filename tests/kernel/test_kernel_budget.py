"""Instruction and memory budgets, counted by the emulator for sm_80 on one golden image.

Counts, not times: they do not vary from run to run, so a regression shows at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import ptxemu
import pytest
from kernel_cases import golden
from prumerge_fast.kernels import launch_config

from prumerge_fast.reduction.dispatch import prune_merge

IMAGE = "heavy_tailed_0"  # [577, 1024] in float16, 52 centres
ONE_IMAGE = 450_000  # warp instructions
LONGEST_PROGRAM = 130_000
ALONE = 1.6  # one program an image, relative to the several of B = 1
READS = 3.0  # of a single read of K and Y


@pytest.fixture
def emulator() -> Iterator[ptxemu.Emulator]:
    with ptxemu.install(80, schedule="lockstep", profile=True) as installed:
        yield installed


def count(emulator: ptxemu.Emulator, batch: int) -> ptxemu.LaunchStats:
    inputs, _ = golden(IMAGE)
    # A copy, because NumPy's memory is not aligned as a GPU's is.
    prune_merge(*(tensor.repeat_interleave(batch, 0) for tensor in inputs), backend="triton")
    assert emulator.last is not None
    return emulator.last


def test_one_image(emulator: ptxemu.Emulator) -> None:
    stats = count(emulator, 1)
    assert len(stats.program_instructions) > 1
    assert stats.warp_instructions <= ONE_IMAGE
    assert stats.critical_path <= LONGEST_PROGRAM


@pytest.mark.parametrize("batch", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_one_program_an_image(
    emulator: ptxemu.Emulator, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """As in a batch that fills the GPU; programs of different images do the same work."""
    shared = count(emulator, 1)
    of_large_batch = launch_config.choose_launch
    monkeypatch.setattr(
        launch_config, "choose_launch", lambda batch, *rest: of_large_batch(1024, *rest)
    )
    stats = count(emulator, batch)
    assert len(stats.program_instructions) == batch
    assert stats.warp_instructions <= ALONE * shared.warp_instructions * batch
    (_, keys, hidden), _ = golden(IMAGE)
    once = (keys.nbytes + hidden.nbytes) * batch / 32
    assert stats.of("global", "load").transactions <= READS * once
