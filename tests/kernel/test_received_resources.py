"""Both launches of attention received fit every GPU they are compiled for."""

from __future__ import annotations

import ptxemu
import pytest
import torch
from kernel_resources import SHARED_MEMORY, TARGETS
from prumerge_fast.kernels.received_attention import Launch, choose_tiles, launch_arguments

# N, C and heads of SigLIP-SO400M/14-384, of InternViT-300M-448, and of CLIP ViT-L/14-336, the last
# by one head over the full width.
SHAPES = [(729, 1152, 16), (1024, 1024, 16), (576, 1024, 1)]


def resources(launch: Launch, target: str) -> ptxemu.resources.Resources:
    found = ptxemu.compile_resources(
        launch.kernel, *launch.positional, targets=(target,), **launch.named
    )
    return next(iter(found.values()))


@pytest.mark.parametrize(("patches", "channels", "heads"), SHAPES)
@pytest.mark.parametrize(
    ("target", "dtype"),
    [
        ("sm_80", torch.float16),
        ("sm_90", torch.bfloat16),
        ("sm_120", torch.float32),
        ("gfx942", torch.float16),
        *(
            pytest.param(target, dtype, marks=pytest.mark.slow)
            for target in TARGETS
            for dtype in (torch.float16, torch.bfloat16, torch.float32)
        ),
    ],
)
def test_nothing_spills(
    target: str, dtype: torch.dtype, patches: int, channels: int, heads: int
) -> None:
    query, keys = torch.empty(2, 1, patches, channels, dtype=dtype)
    tiles = choose_tiles(channels // heads, dtype, target)
    _, launches = launch_arguments(query, keys, heads, tiles=tiles, class_token=False)
    for launch in launches:
        found = resources(launch, target)
        assert found.spills == found.stack == 0
        assert found.shared <= SHARED_MEMORY[target]
        assert found.binary_size < 300_000


@pytest.mark.parametrize(
    ("head_width", "block_d"),
    [(64, 64), (72, 16), (80, 16), (88, 32), (96, 32), (128, 64), (5, 16)],
)
def test_steps_waste_little(head_width: int, block_d: int) -> None:
    assert choose_tiles(head_width, torch.float16, "sm_80").block_d == block_d
