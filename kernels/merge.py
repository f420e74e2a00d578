"""Steps 3 and 4: rows of weights over all tokens, and their product with the tokens.

The supplement is one more row of weights. Small weights would lose bits in float16, so a row is
scaled before it is rounded and its product is scaled back.
"""

import triton
import triton.language as tl

from .neighbours import neighbour_mask
from .tiles import tile_rows


@triton.jit
def power_of_two_scale(largest):
    """A power of two that brings `largest` (at most 1) into [1, 2), and its inverse."""
    exponent = tl.maximum(largest.to(tl.int32, bitcast=True) >> 23, 1)
    scale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return scale, (exponent << 23).to(tl.float32, bitcast=True)


@triton.jit
def neighbour_weight(
    similarities, attention, threshold, last, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Total attention of each centre's neighbours: -> [BM]."""
    places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for tile in range(num_tiles):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        cosines = tl.load(similarities + tile * BLOCK_M * BLOCK_N + places)  # [BM, BN]
        mask = neighbour_mask(cosines, tokens, threshold, last)
        total += tl.where(mask, tl.load(attention + tokens)[None, :], 0.0)
    return tl.sum(total, 1)


@triton.jit
def store_weights(
    weights, similarities, attention, left, threshold, last, scale, is_centre, is_supplement,
    supplement_scale, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scaled weight of every token in every row, to scratch [tiles, BM, BN].

    attention and left (attention of the tokens that are no centres, else 0): scratch [N], padded
    to tiles with 0; threshold, last, scale, is_centre, is_supplement: [BM].
    """
    places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for tile in range(num_tiles):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        cosines = tl.load(similarities + tile * BLOCK_M * BLOCK_N + places)  # [BM, BN]
        is_merged = neighbour_mask(cosines, tokens, threshold, last) & is_centre[:, None]
        weight = tl.where(is_merged, tl.load(attention + tokens)[None, :] * scale[:, None], 0.0)
        rest = tl.load(left + tokens) * supplement_scale  # [BN]
        weight = tl.where(is_supplement[:, None], rest[None, :], weight)
        places_out = weights + tile * BLOCK_M * BLOCK_N + places
        tl.store(places_out, weight.to(weights.dtype.element_ty))


@triton.jit
def store_supplement_weights(
    weights, left, is_supplement, supplement_scale, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`store_weights` where centres stay as they are."""
    places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    for tile in range(num_tiles):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        rest = tl.load(left + tokens) * supplement_scale  # [BN]
        weight = tl.where(is_supplement[:, None], rest[None, :], 0.0)  # [BM, BN]
        places_out = weights + tile * BLOCK_M * BLOCK_N + places
        tl.store(places_out, weight.to(weights.dtype.element_ty))


@triton.jit
def weighted_rows(
    weights, patches, start, num_tiles,
    STRIDE_N: tl.constexpr, STRIDE_C: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_OUT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weights [BM, N] times tokens [N, C], channels `start` to `start + BO`: -> [BM, BO]."""
    places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    channels = start + tl.arange(0, BLOCK_OUT)  # [BO]
    sums = tl.zeros((BLOCK_M, BLOCK_OUT), tl.float32)
    for tile in range(num_tiles):
        weight = tl.load(weights + tile * BLOCK_M * BLOCK_N + places)  # [BM, BN]
        rows = tile_rows(patches, tile, tl.arange(0, BLOCK_N), STRIDE_N, N, BLOCK_N)  # [BN]
        patch_ptrs = rows[:, None] + channels[None, :] * STRIDE_C  # [BN, BO]
        if C % BLOCK_OUT:
            values = tl.load(patch_ptrs, mask=(channels < C)[None, :], other=0.0)  # [BN, BO]
        else:
            values = tl.load(patch_ptrs)  # [BN, BO]
        sums = tl.dot(weight, values, sums, input_precision=PRECISION)
    return sums
