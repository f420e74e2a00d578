"""How a launch is cut into programs and tiles: a pure function of shapes, dtype and target."""

from __future__ import annotations

import dataclasses

import torch


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
