"""Every launch configuration fits the GPUs it is chosen for: nothing spills, on no target."""

from __future__ import annotations

import pytest
import torch
from kernel_resources import SHARED_MEMORY, TARGETS, resources_of
from prumerge_fast.kernels.launch_config import choose_launch

LARGEST_CODE = 300_000  # bytes
SHAPES = [(576, 1024), (196, 192), (256, 768), (729, 1152), (577, 1000), (1024, 1664)]
OPTIONS = {
    "default": {},
    "plus": {"plus": True, "merge": "none"},
    "budget": {"plus": True, "budget": 64, "merge": "average", "raster": True},
}
# One image, in programs of 16 rows; a batch that fills the GPU, in programs of 64.
FEW, MANY = 1, 1024


def assert_fits(
    target: str, batch: int, dtype: torch.dtype, num_patches: int, channels: int, options: dict
) -> None:
    launch = choose_launch(batch, num_patches, channels, 64, dtype, target)
    found = resources_of(launch, num_patches, channels, dtype, target, **options)
    assert found.spills == found.stack == 0
    assert found.shared <= SHARED_MEMORY[target]
    assert found.binary_size < LARGEST_CODE


@pytest.mark.parametrize("batch", [FEW, MANY])
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_120", "gfx942"])
def test_clip_in_half_precision(target: str, batch: int) -> None:
    assert_fits(target, batch, torch.float16, 576, 1024, {})


@pytest.mark.slow
@pytest.mark.parametrize("batch", [FEW, MANY])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_patches", "channels"), SHAPES)
def test_every_shape(
    target: str, batch: int, dtype: torch.dtype, num_patches: int, channels: int
) -> None:
    assert_fits(target, batch, dtype, num_patches, channels, {})


@pytest.mark.slow
@pytest.mark.parametrize("batch", [FEW, MANY])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(target: str, batch: int, dtype: torch.dtype, name: str) -> None:
    assert_fits(target, batch, dtype, 576, 1024, OPTIONS[name])


def test_a_configuration_that_spills_is_seen() -> None:
    """Without this, a measure that always said 0 would pass all of the above."""
    launch = choose_launch(MANY, 576, 1024, 64, torch.float16, "sm_80")
    few_registers = {**vars(launch), "max_registers": 64}
    found = resources_of(type(launch)(**few_registers), 576, 1024, torch.float16, "sm_80")
    assert found.spills > 0
    assert found.stack > 0
