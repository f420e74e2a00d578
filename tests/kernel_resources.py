"""What the kernel needs on a GPU, from ahead-of-time compilation; shared by tests and reports."""

from __future__ import annotations

import ptxemu
import torch
from prumerge_fast.kernels.launch_config import LaunchConfig
from prumerge_fast.kernels.prune_merge import launch_arguments, prune_merge_kernel


def resources_of(
    launch: LaunchConfig,
    num_patches: int,
    channels: int,
    dtype: torch.dtype,
    target: str,
    **options,
) -> ptxemu.resources.Resources:
    """Registers, spills, shared memory and code size of one configuration on one target."""
    rows = 1 + num_patches
    shapes = ((channels,), (rows, channels), (rows, channels))
    query, keys, hidden = (torch.empty(1, *shape, dtype=dtype) for shape in shapes)
    defaults = {
        "budget": None, "plus": False, "neighbours": 32, "fence": 1.5, "merge": "sum",
        "supplement": True, "raster": False,
    }  # fmt: skip
    _, positional, named = launch_arguments(
        query, keys, hidden, **{**defaults, **options}, launch=launch
    )
    found = ptxemu.compile_resources(prune_merge_kernel, *positional, targets=(target,), **named)
    return next(iter(found.values()))
