"""Where tokens and channels are in memory."""

import triton
import triton.language as tl


@triton.jit
def tile_rows(
    patches, tile, in_tile,
    STRIDE_N: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Pointers to the rows of a tile's tokens, `in_tile` (any shape) counted from its first.

    Past the end it is the last token again, so that every load is in bounds; what comes of it must
    not be used. Strides are compile-time constants: the offsets within a tile then become
    constants of the load instructions, instead of additions before each.
    """
    if N % BLOCK_N:
        rows = tl.minimum(tile * BLOCK_N + in_tile, N - 1)
        return patches + rows.to(tl.int64) * STRIDE_N
    return (
        patches + tl.cast(tile, tl.int64) * (BLOCK_N * STRIDE_N) + in_tile.to(tl.int64) * STRIDE_N
    )


@triton.jit
def channel_offsets(channels, STRIDE_C: tl.constexpr):
    """Offsets of channels (any shape) within a row, in 32 bits where those hold them."""
    if STRIDE_C >= 65536:
        channels = channels.to(tl.int64)
    return channels * STRIDE_C
