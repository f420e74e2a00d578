"""The scoring pass: one read of an image's keys gives class-token scores and key norms.

Without a query, where scores are given, it gives norms alone.
"""

import triton
import triton.language as tl

from .tiles import channel_offsets, tile_rows


@triton.jit
def class_token_score(
    query, stride_qc, keys, STRIDE_C: tl.constexpr, C: tl.constexpr, C_PAD: tl.constexpr
):  # fmt: skip
    """The class token's score with itself, unscaled."""
    channels = tl.arange(0, C_PAD)
    q = tl.load(query + channels * stride_qc, mask=channels < C, other=0.0).to(tl.float32)
    key_ptrs = keys + channel_offsets(channels, STRIDE_C)
    k = tl.load(key_ptrs, mask=channels < C, other=0.0).to(tl.float32)
    return tl.sum(q * k, 0)


@triton.jit
def score_patches(
    query, stride_qc, patch_keys, scores, inverse_norms, num_tiles,
    STRIDE_N: tl.constexpr, STRIDE_C: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):  # fmt: skip
    """q·k_j, unscaled, and 1 / |k_j| of every patch token j, to scratch.

    query: row [C], or None: no scores; patch_keys: first of N rows [C]; scores, inverse_norms: [N],
    padded to tiles.
    """
    for tile in range(num_tiles):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        if TENSOR_CORES:
            dots, squares = _tile_by_products(
                query, stride_qc, patch_keys, tile, STRIDE_N, STRIDE_C, N, C, BLOCK_N, BLOCK_C
            )
        else:
            dots, squares = _tile_by_sums(
                query, stride_qc, patch_keys, tile, STRIDE_N, STRIDE_C, N, C, BLOCK_N, BLOCK_C
            )
        if query is not None:
            tl.store(scores + tokens, dots)
        tl.store(inverse_norms + tokens, 1.0 / tl.maximum(tl.sqrt(squares), 1e-12))


@triton.jit
def _tile_by_sums(
    query, stride_qc, patch_keys, tile,
    STRIDE_N: tl.constexpr, STRIDE_C: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q·k_j and k_j·k_j of one tile of tokens, in float32 multiply-adds: -> [BN], [BN]."""
    channels = tl.arange(0, BLOCK_C)  # [BC]
    key_ptrs = tile_rows(patch_keys, tile, tl.arange(0, BLOCK_N), STRIDE_N, N, BLOCK_N)[:, None]
    key_ptrs += channel_offsets(channels, STRIDE_C)[None, :]  # [BN, BC]
    if query is not None:
        query_ptrs = query + channels * stride_qc
    dots = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, C, BLOCK_C):
        if C % BLOCK_C:
            mask = start + channels < C
            k = tl.load(key_ptrs, mask=mask[None, :], other=0.0).to(tl.float32)  # [BN, BC]
        else:
            k = tl.load(key_ptrs).to(tl.float32)  # [BN, BC]
        if query is not None:
            if C % BLOCK_C:
                q = tl.load(query_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BC]
            else:
                q = tl.load(query_ptrs).to(tl.float32)  # [BC]
            dots += k * q[None, :]
            query_ptrs += BLOCK_C * stride_qc
        squares += k * k
        key_ptrs += BLOCK_C * STRIDE_C
    return tl.sum(dots, 1), tl.sum(squares, 1)


@triton.jit
def _tile_by_products(
    query, stride_qc, patch_keys, tile,
    STRIDE_N: tl.constexpr, STRIDE_C: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """`_tile_by_sums` on tensor cores, for 16-bit keys: their products are exact in float32.

    Squares are the diagonals of K·Kᵀ, of 16 tokens at a time: the smallest tile that a tensor
    core takes, so a sixteenth of its work is of use, and still a quarter of the instructions.
    """
    GROUP: tl.constexpr = 16
    COPIES: tl.constexpr = 8  # of the query: the narrowest right-hand side
    channels = tl.arange(0, BLOCK_C)  # [BC]
    in_group = tl.arange(0, GROUP)  # [16]
    in_tile = tl.arange(0, BLOCK_N // GROUP)[:, None] * GROUP + in_group[None, :]  # [BN / 16, 16]
    key_ptrs = tile_rows(patch_keys, tile, in_tile, STRIDE_N, N, BLOCK_N)[:, :, None]
    key_ptrs += channel_offsets(channels, STRIDE_C)[None, None, :]  # [BN / 16, 16, BC]
    if query is not None:
        query_ptrs = query + (channels[:, None] + tl.arange(0, COPIES)[None, :] * 0) * stride_qc
    dots = tl.zeros((BLOCK_N, COPIES), tl.float32)
    grams = tl.zeros((BLOCK_N // GROUP, GROUP, GROUP), tl.float32)
    for start in range(0, C, BLOCK_C):
        if C % BLOCK_C:
            mask = start + channels < C
            k = tl.load(key_ptrs, mask=mask[None, None, :], other=0.0)  # [BN / 16, 16, BC]
        else:
            k = tl.load(key_ptrs)  # [BN / 16, 16, BC]
        grams = tl.dot(k, tl.permute(k, (0, 2, 1)), grams)
        if query is not None:
            if C % BLOCK_C:
                q = tl.load(query_ptrs, mask=mask[:, None], other=0.0)  # [BC, 8]
            else:
                q = tl.load(query_ptrs)  # [BC, 8]
            dots = tl.dot(tl.reshape(k, (BLOCK_N, BLOCK_C)), q, dots)
            query_ptrs += BLOCK_C * stride_qc
        key_ptrs += BLOCK_C * STRIDE_C
    is_diagonal = in_group[:, None] == in_group[None, :]  # [16, 16]
    squares = tl.sum(tl.where(is_diagonal[None, :, :], grams, 0.0), 2)  # [BN / 16, 16]
    # The copies agree, but a maximum drops NaN unless it is told not to.
    return tl.sum(dots, 1) / COPIES, tl.reshape(squares, (BLOCK_N,))
