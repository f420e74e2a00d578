"""The scoring pass: one read of an image's keys gives class-token scores and key norms."""

import triton
import triton.language as tl


@triton.jit
def class_token_score(query, stride_qc, keys, stride_kc, C: tl.constexpr, C_PAD: tl.constexpr):
    """The class token's score with itself, unscaled."""
    channels = tl.arange(0, C_PAD)
    q = tl.load(query + channels * stride_qc, mask=channels < C, other=0.0).to(tl.float32)
    k = tl.load(keys + channels * stride_kc, mask=channels < C, other=0.0).to(tl.float32)
    return tl.sum(q * k, 0)


@triton.jit
def score_patches(
    query, stride_qc, patch_keys, stride_kn, stride_kc, scores, inverse_norms,
    N: tl.constexpr, C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """q·k_j, unscaled, and 1 / |k_j| of every patch token j, to scratch.

    query: row [C]; patch_keys: first of N rows [C]; scores, inverse_norms: [N], padded to tiles.
    """
    for tile in range(tl.cdiv(N, BLOCK_N)):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        channels = tl.arange(0, BLOCK_C)  # [BC]
        # Past the end the last token again: always in bounds, and never looked at.
        rows = tl.minimum(tokens, N - 1).to(tl.int64)
        key_ptrs = patch_keys + rows[:, None] * stride_kn + channels[None, :] * stride_kc
        query_ptrs = query + channels * stride_qc
        dots = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, C, BLOCK_C):
            mask = start + channels < C if C % BLOCK_C else channels < BLOCK_C
            q = tl.load(query_ptrs, mask=mask, other=0.0).to(tl.float32)  # [BC]
            k = tl.load(key_ptrs, mask=mask[None, :], other=0.0).to(tl.float32)  # [BN, BC]
            dots += k * q[None, :]
            squares += k * k
            query_ptrs += BLOCK_C * stride_qc
            key_ptrs += BLOCK_C * stride_kc
        tl.store(scores + tokens, tl.sum(dots, 1))
        norms = tl.sqrt(tl.sum(squares, 1))  # [BN]
        tl.store(inverse_norms + tokens, 1.0 / tl.maximum(norms, 1e-12))
