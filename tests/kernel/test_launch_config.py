"""Choosing a launch is a pure function, so its rules can be stated without a GPU."""

from __future__ import annotations

import pytest
import torch
from prumerge_fast.kernels.launch_config import choose_launch, target_obstacle


def choose(batch: int = 1, channels: int = 1024, rows: int = 53, dtype=torch.float16):
    return choose_launch(batch, 576, channels, rows, dtype, "sm_80")


def test_few_images_share_the_gpu_and_many_fill_it() -> None:
    assert choose(batch=1).splits == 4
    assert choose(batch=1, rows=577).splits == 37
    assert choose(batch=1024).splits == 1
    # One read of the keys for all rows of a typical image.
    assert choose(batch=1024).block_m >= 53
    assert choose(batch=0).splits >= 1


@pytest.mark.parametrize("channels", [64, 192, 384, 768, 1024, 1152, 1664])
@pytest.mark.parametrize("batch", [1, 1024])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_no_step_is_cut_where_the_width_allows(
    channels: int, batch: int, dtype: torch.dtype
) -> None:
    launch = choose(batch, channels, dtype=dtype)
    for step in (launch.block_c, launch.block_score, launch.block_out):
        assert channels % step == 0


@pytest.mark.parametrize("channels", [1, 40, 65, 1000])
def test_steps_of_odd_widths(channels: int) -> None:
    step = choose(channels=channels).block_c
    assert 32 <= step <= max(32, 2 * channels)
    assert step & (step - 1) == 0


@pytest.mark.parametrize("target", ["sm_75", "sm_70", "gfx1100", "gfx90a", "gfx9420", "xpu"])
def test_targets_without_a_configuration(target: str) -> None:
    assert target_obstacle(target) is not None
    with pytest.raises(ValueError, match=target):
        choose_launch(1, 576, 1024, 53, torch.float16, target)
