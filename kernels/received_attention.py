"""How much attention each token receives: column means of softmax(QKᵀ), never N x N in memory.

Two launches. The first finds what each query's softmax divides by; the second gives each program
some tokens of one head, and sums their shares over all queries. PyTorch sums the heads. Every sum
has one order, without atomics, so that the result is the same in every run.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import channel_offsets

_LOG2_E = math.log2(math.e)


@triton.jit
def _scores(
    query_rows, key_rows, STRIDE_QC: tl.constexpr, STRIDE_KC: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q·k of one head, unscaled, of pointers to rows [BM] and [BN]: -> [BM, BN]."""
    channels = tl.arange(0, BLOCK_D)  # [BD]
    query_ptrs = query_rows[:, None] + channel_offsets(channels, STRIDE_QC)[None, :]  # [BM, BD]
    key_ptrs = key_rows[None, :] + channel_offsets(channels, STRIDE_KC)[:, None]  # [BD, BN]
    dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D:
            inside = start + channels < D  # [BD]
            q = tl.load(query_ptrs, mask=inside[None, :], other=0.0)
            k = tl.load(key_ptrs, mask=inside[:, None], other=0.0)
        else:
            q = tl.load(query_ptrs)
            k = tl.load(key_ptrs)
        dots = tl.dot(q, k, dots, input_precision=PRECISION)
        query_ptrs += BLOCK_D * STRIDE_QC
        key_ptrs += BLOCK_D * STRIDE_KC
    return dots


@triton.jit
def log_sums_kernel(
    # inputs: [B, Q, H * D], [B, R, H * D]
    query, keys,
    stride_qb, stride_kb,
    STRIDE_QN: tl.constexpr, STRIDE_QC: tl.constexpr,
    STRIDE_KN: tl.constexpr, STRIDE_KC: tl.constexpr,
    # output, contiguous: [B, H, Q], logarithms to the base 2
    log_sums,
    scale,
    Q: tl.constexpr, R: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 of what the softmax of each query divides by, for a tile of queries of one head."""
    head = tl.program_id(0)
    image = (head // H).to(tl.int64)
    first_channel = (head % H).to(tl.int64) * D
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    # Rows past the end read the last one; nothing of theirs is kept.
    read = tl.minimum(rows, Q - 1).to(tl.int64)
    query_rows = query + image * stride_qb + read * STRIDE_QN + first_channel * STRIDE_QC
    image_keys = keys + image * stride_kb + first_channel * STRIDE_KC
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, R, BLOCK_N):
        tokens = start + tl.arange(0, BLOCK_N)  # [BN]
        key_rows = image_keys + tl.minimum(tokens, R - 1).to(tl.int64) * STRIDE_KN
        scores = scale * _scores(
            query_rows, key_rows, STRIDE_QC, STRIDE_KC, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )
        scores = tl.where((tokens < R)[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shares = tl.sum(tl.exp2(scores - higher[:, None]), 1)
        total = total * tl.exp2(top - higher) + shares
        top = higher
    tl.store(log_sums + head.to(tl.int64) * Q + rows, top + tl.log2(total), mask=rows < Q)


@triton.jit
def received_attention_kernel(
    # inputs: [B, Q, H * D], [B, R, H * D], [B, H, Q]
    query, keys, log_sums,
    stride_qb, stride_kb,
    STRIDE_QN: tl.constexpr, STRIDE_QC: tl.constexpr,
    STRIDE_KN: tl.constexpr, STRIDE_KC: tl.constexpr,
    # output, contiguous: [B, H, N], of the last N of R keys
    shares,
    scale,
    Q: tl.constexpr, R: tl.constexpr, N: tl.constexpr, H: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a tile of tokens adds to the mean over heads: its mean share in the softmax of each
    query of one head."""
    head = tl.program_id(0)
    image = (head // H).to(tl.int64)
    first_channel = (head % H).to(tl.int64) * D
    tokens = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    read = (R - N + tl.minimum(tokens, N - 1)).to(tl.int64)
    key_rows = keys + image * stride_kb + read * STRIDE_KN + first_channel * STRIDE_KC  # [BN]
    head_query = query + image * stride_qb + first_channel * STRIDE_QC
    head_sums = log_sums + head.to(tl.int64) * Q
    sums = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, Q, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)  # [BM]
        query_rows = head_query + tl.minimum(rows, Q - 1).to(tl.int64) * STRIDE_QN
        scores = scale * _scores(
            query_rows, key_rows, STRIDE_QC, STRIDE_KC, D, BLOCK_M, BLOCK_N, BLOCK_D, PRECISION
        )
        log_sum = tl.load(head_sums + rows, mask=rows < Q, other=0.0)  # [BM]
        of_query = tl.exp2(scores - log_sum[:, None])  # [BM, BN]
        sums += tl.sum(tl.where((rows < Q)[:, None], of_query, 0.0), 0)
    tl.store(shares + head.to(tl.int64) * N + tokens, sums / (H * Q), mask=tokens < N)


class Tiles(NamedTuple):
    """How both launches are cut: queries, tokens and channels a tile, and how products round.

    `max_registers` of a thread; `None`: as the assembler sees fit.
    """

    block_m: int
    block_n: int
    block_d: int
    precision: str
    num_warps: int
    max_registers: int | None


def choose_tiles(head_width: int, dtype: torch.dtype, target: str) -> Tiles:
    """For heads of so many channels; `target` is `"sm_80"`, `"gfx942"` and so on."""
    # The widest step of those that waste least: a head of 72 channels takes five steps of 16.
    block_d = min((64, 32, 16), key=lambda width: -(-head_width // width) * width)
    is_cuda = target.startswith("sm_")
    # All that there are; left alone, the assembler may spill to fit one program more on the GPU.
    max_registers = 255 if is_cuda else None
    if dtype == torch.float32:
        precision = "tf32x3" if is_cuda else "ieee"
        return Tiles(32, 32, min(block_d, 32), precision, 4, max_registers)
    return Tiles(64, 64, block_d, "tf32", 4, max_registers)


def received_attention(
    query: Tensor, keys: Tensor, num_heads: int, *, tiles: Tiles, class_token: bool
) -> Tensor:
    """Attention received, in two launches on the current device.

    Args:
        query: [B, R, C], float16, bfloat16 or float32; any strides, as of keys.
        keys: [B, R, C].
        num_heads: H, heads of C / H channels each.
        tiles: How to cut the work.
        class_token: Whether row 0 is the class token's, whose query is not asked and whose column
            is dropped; N = R - 1 then, else N = R.

    Returns:
        [B, N] float32.
    """
    shares, launches = launch_arguments(
        query, keys, num_heads, tiles=tiles, class_token=class_token
    )
    if len(shares) > 0:
        for launch in launches:
            launch.kernel[launch.grid](*launch.positional, **launch.named)
    return shares.sum(1)


class Launch(NamedTuple):
    """One of the two launches, with all that its kernel takes."""

    kernel: Any
    grid: tuple[int, int]
    positional: tuple[Any, ...]
    named: dict[str, Any]


def launch_arguments(
    query: Tensor, keys: Tensor, num_heads: int, *, tiles: Tiles, class_token: bool
) -> tuple[Tensor, tuple[Launch, Launch]]:
    """What each head adds to the output, [B, H, N], not yet filled, and what fills it; arguments
    as in `received_attention`."""
    batch, rows, channels = keys.shape
    query = query[:, int(class_token) :]
    num_patches, head_width = query.shape[1], channels // num_heads
    log_sums = keys.new_empty(batch, num_heads, num_patches, dtype=torch.float32)
    shares = torch.empty_like(log_sums)
    scale = _LOG2_E / math.sqrt(head_width)
    strides = (query.stride(0), keys.stride(0), *query.stride()[1:], *keys.stride()[1:])
    named = {
        "Q": num_patches,
        "R": rows,
        "H": num_heads,
        "D": head_width,
        "BLOCK_M": tiles.block_m,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": tiles.block_d,
        "PRECISION": tiles.precision,
        "num_warps": tiles.num_warps,
    }
    if tiles.max_registers is not None:
        named["maxnreg"] = tiles.max_registers
    first = Launch(
        log_sums_kernel,
        (batch * num_heads, triton.cdiv(num_patches, tiles.block_m)),
        (query, keys, *strides, log_sums, scale),
        named,
    )
    second = Launch(
        received_attention_kernel,
        (batch * num_heads, triton.cdiv(num_patches, tiles.block_n)),
        (query, keys, log_sums, *strides, shares, scale),
        {**named, "N": num_patches},
    )
    return shares, (first, second)
