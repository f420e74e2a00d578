"""How a launch is cut into programs and tiles: a pure function of shapes, dtype and target."""

from __future__ import annotations

import dataclasses

import torch

_WIDE_GPU = 128  # multiprocessors of a large GPU, to the nearest power of two
_AMD_GPUS = ("gfx942",)  # the kernel is known to compile for; for gfx90a and gfx950 it does not
_TENSOR_CORES_FROM = 80  # compute capability; Triton emits no tensor-core code below


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """One way to launch the kernel.

    Args:
        splits: Programs an image.
        block_m: Output rows a tile.
        block_n: Tokens a tile.
        block_c: Channels a step of the similarities.
        block_score: Channels a step of the scoring pass.
        block_out: Channels a tile of the output.
        precision: `input_precision` of `tl.dot`.
        num_warps: Warps a program.
        num_stages: Depth of software pipelining.
        max_registers: Registers a thread; `None`: as the assembler sees fit.
    """

    splits: int
    block_m: int
    block_n: int
    block_c: int
    block_score: int
    block_out: int
    precision: str
    num_warps: int
    num_stages: int
    max_registers: int | None

    def vector(self, length: int) -> int:
        """Padded length of a vector: a power of two that gives every thread elements of its own."""
        return max(1 << (length - 1).bit_length(), 256 * self.num_warps)

    def scratch_words(self, num_patches: int) -> int:
        """32-bit words of scratch a program."""
        padded = -(-num_patches // self.block_n) * self.block_n
        return padded * (6 + 2 * self.block_m)


def choose_launch(
    batch: int,
    num_patches: int,
    channels: int,
    rows: int,
    dtype: torch.dtype,
    target: str,
    width: int | None = None,
) -> LaunchConfig:
    """The configuration for B images of N patch tokens, with keys of C channels.

    Args:
        batch: B.
        num_patches: N.
        channels: C.
        rows: Output rows of a typical image; a guess where the image decides.
        dtype: float16, bfloat16 or float32.
        target: `"sm_80"`, `"gfx942"` and so on.
        width: D, channels of the features; `None`: as many as the keys'.

    Raises:
        ValueError: There is no configuration for the target.
    """
    # Few images: many programs share one, so that the GPU is full. Many: the keys are read least
    # often when one program takes large tiles of rows.
    splits = max(1, min(-(-rows // 16), _WIDE_GPU // max(batch, 1)))
    return _configure(splits, channels, rows, dtype, target, width or channels)


def launch_candidates(
    batch: int,
    num_patches: int,
    channels: int,
    rows: int,
    dtype: torch.dtype,
    target: str,
    width: int | None = None,
) -> list[LaunchConfig]:
    """Configurations worth timing, the one of `choose_launch` first; arguments as there."""
    first = choose_launch(batch, num_patches, channels, rows, dtype, target, width)
    tiles = -(-rows // 16)
    splits = sorted({tiles, *(1 << i for i in range(tiles.bit_length()))})
    others = [
        _configure(count, channels, rows, dtype, target, width or channels) for count in splits
    ]
    narrow = [
        dataclasses.replace(
            launch,
            block_c=max(32, launch.block_c // 2),
            block_score=max(32, launch.block_score // 2),
            block_out=max(32, launch.block_out // 2),
        )
        for launch in (first, *others)
    ]
    return list(dict.fromkeys((first, *others, *narrow)))


def _configure(
    splits: int, channels: int, rows: int, dtype: torch.dtype, target: str, width: int
) -> LaunchConfig:
    """Tiles for `splits` programs an image."""
    obstacle = target_obstacle(target)
    if obstacle is not None:
        raise ValueError(f"target: {obstacle}")
    rows_each = -(-rows // splits)
    is_cuda = target.startswith("sm_")
    # All that there are; left alone, the assembler may spill to fit one program more on the GPU.
    max_registers = 255 if is_cuda else None
    if dtype == torch.float32:
        return LaunchConfig(
            splits=splits,
            block_m=16,
            block_n=64,
            block_c=_step(64, channels),
            block_score=_step(64, channels),
            block_out=_step(64, width),
            precision="tf32x3" if is_cuda else "ieee",
            num_warps=4,
            num_stages=2 if is_cuda else 1,
            max_registers=max_registers,
        )
    # Of the tile sizes tried, the largest that spill nowhere: tests/kernel/test_kernel_resources
    if rows_each > 32:
        return LaunchConfig(
            splits=splits,
            block_m=64,
            block_n=64,
            block_c=_step(64, channels),
            block_score=_step(128, channels),
            block_out=_step(64 if target in ("sm_86", "sm_89") else 128, width),
            precision="tf32",
            num_warps=8,
            num_stages=2,
            max_registers=max_registers,
        )
    step, out = _step(256, channels), _step(256, width)
    return LaunchConfig(
        splits=splits,
        block_m=16,
        block_n=64,
        block_c=step,
        block_score=step,
        block_out=out,
        precision="tf32",
        num_warps=4,
        num_stages=2,
        max_registers=max_registers,
    )


def target_obstacle(target: str) -> str | None:
    """Why there is no configuration for a target; `None` where there is one."""
    if target in _AMD_GPUS:
        return None
    if not target.startswith("sm_"):
        return f"no launch configuration has been checked for {target}"
    if int(target.removeprefix("sm_")) < _TENSOR_CORES_FROM:
        return (
            f"Triton emits no tensor-core code for {target}: the kernel needs "
            f"sm_{_TENSOR_CORES_FROM} or newer"
        )
    return None


def _step(limit: int, channels: int) -> int:
    """Channels a step: a power of two that divides `channels`, or wastes little; 32 to `limit`."""
    block = limit
    while block > 64 and channels % block:
        block //= 2
    while block > 32 and block // 2 >= channels:
        block //= 2
    return block
