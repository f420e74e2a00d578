"""What the kernel needs on a GPU, from ahead-of-time compilation; shared by tests and reports."""

from __future__ import annotations

import ptxemu
import torch
from prumerge_fast.kernels.launch_config import LaunchConfig
from prumerge_fast.kernels.prune_merge import launch_arguments, prune_merge_kernel
from triton import knobs

# Shared memory that one program may use, in bytes (CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability"; CDNA 3 has 64 KiB of LDS).
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
TARGETS = tuple(SHARED_MEMORY)


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
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # debug sections are no code
        found = ptxemu.compile_resources(
            prune_merge_kernel, *positional, targets=(target,), **named
        )
    return next(iter(found.values()))
