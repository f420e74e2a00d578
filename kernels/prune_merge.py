"""The whole reduction in one launch: class attention, selection, similarity and merge.

With scores given in place of a query, it is the reduction behind them.

Program (i, s) of the grid takes every `splits`-th tile of the output rows of image i, from tile s.
The programs of an image repeat its scoring and selection instead of waiting for one another, so
there is no order of programs in which they could hang.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch_config import LaunchConfig
from .merge import (
    neighbour_weight,
    power_of_two_scale,
    store_supplement_weights,
    store_weights,
    weighted_rows,
)
from .neighbours import kth_largest, last_tied, store_similarities
from .scores import class_token_score, score_patches
from .selection import (
    above_fence,
    class_attention,
    evenly_spaced,
    most_attended,
    on_grid,
    store_centres,
)
from .tiles import channel_offsets

# Numbers that change from call to call are not worth a compilation each.
_NOT_SPECIALIZED = [
    "capacity", "q1_rank", "q3_rank", "num_attended", "num_spatial", "neighbours",
]  # fmt: skip


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def prune_merge_kernel(
    # inputs: [B, C] or None, [B, 1 + N, C], [B, 1 + N, D]; without a query there is no class row
    query, keys, hidden,
    # [B, N], contiguous, for None as the query; else None
    attention_in,
    stride_qb, stride_qc, stride_kb, stride_yb,
    STRIDE_KN: tl.constexpr, STRIDE_KC: tl.constexpr,
    STRIDE_YN: tl.constexpr, STRIDE_YC: tl.constexpr,
    # outputs, contiguous: [B, capacity, D], [B], [B, capacity], [B, N]
    tokens, lengths, kept, attention_out,
    # one block of `scratch_words` words a program
    scratch,
    capacity,
    # options
    softmax_scale, q1_rank, q1_weight, q3_rank, q3_weight, fence,
    num_attended, num_spatial, neighbours,
    N: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    HAS_BUDGET: tl.constexpr, PLUS: tl.constexpr, RASTER: tl.constexpr,
    MERGE: tl.constexpr, SUPPLEMENT: tl.constexpr,
    # launch configuration
    N_PAD: tl.constexpr, C_PAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_SCORE: tl.constexpr, BLOCK_OUT: tl.constexpr,
    PRECISION: tl.constexpr, TENSOR_CORES: tl.constexpr, SCRATCH_WORDS: tl.constexpr,
):  # fmt: skip
    """See `prune_merge`; merge is "sum", "average" or "none"."""
    TILES: tl.constexpr = tl.cdiv(N, BLOCK_N) * BLOCK_N
    # The grid has no third axis, which the compiler does not know: unrolled loops would spill.
    num_tiles = tl.cdiv(N, BLOCK_N) * tl.num_programs(2)
    split = tl.program_id(1)
    splits = tl.num_programs(1)
    program = (tl.program_id(0) * splits + split).to(tl.int64)
    words = scratch + program * SCRATCH_WORDS
    # Scratch of this program; the attention that merges and what is left over are padded with 0.
    scores = words
    inverse_norms = words + TILES
    attention_words = words + 2 * TILES
    left = words + 3 * TILES
    centres = (words + 4 * TILES).to(tl.pointer_type(tl.int32))
    guesses = words + 5 * TILES
    similarities = guesses + TILES
    packed = similarities.to(tl.pointer_type(tl.int64))
    weights = (similarities + BLOCK_M * TILES).to(tl.pointer_type(hidden.dtype.element_ty))

    image = tl.program_id(0).to(tl.int64)
    stride_qc = tl.cast(stride_qc, tl.int64)
    image_keys = keys + image * stride_kb
    if query is None:
        image_query = None
        patch_keys = image_keys
        patches = hidden + image * stride_yb
    else:
        image_query = query + image * stride_qb
        patch_keys = image_keys + STRIDE_KN
        patches = hidden + image * stride_yb + STRIDE_YN

    # ---- step 1: scores and norms
    score_patches(
        image_query, stride_qc, patch_keys, scores, inverse_norms, num_tiles,
        STRIDE_KN, STRIDE_KC, N, C, BLOCK_N, BLOCK_SCORE, TENSOR_CORES,
    )  # fmt: skip
    index = tl.arange(0, N_PAD)  # [N_PAD]
    in_range = index < N
    if query is None:
        tl.debug_barrier()
        attention = tl.load(attention_in + image * N + index, mask=in_range, other=0.0)
    else:
        own_score = class_token_score(image_query, stride_qc, image_keys, STRIDE_KC, C, C_PAD)
        tl.debug_barrier()
        patch_scores = tl.load(scores + index, mask=in_range, other=0.0)
        attention = class_attention(
            patch_scores * softmax_scale, own_score * softmax_scale, in_range
        )

    # ---- step 2: centres
    # NaN ranks as 0, and so does a negative score, which may be given.
    comparable = tl.where(attention > 0.0, attention, 0.0)
    bits = tl.where(in_range, comparable.to(tl.int32, bitcast=True), -1)
    if HAS_BUDGET:
        attended = most_attended(bits, num_attended, N)
    else:
        attended = in_range & above_fence(
            comparable, bits, q1_rank, q1_weight, q3_rank, q3_weight, fence, N
        )
    if PLUS and HAS_BUDGET:
        free = in_range & (attended == 0)
        spatial = evenly_spaced(free, N - num_attended, num_spatial)
    elif PLUS:
        spatial = on_grid(index, attended, N)
    else:
        spatial = attended & (index < 0)
    count = store_centres(centres, packed, attended, spatial, bits, index, PLUS, RASTER, BLOCK_N)
    length = count + 1 if SUPPLEMENT else count
    rest = tl.where(attended | spatial, 0.0, attention)  # [N_PAD]
    in_tiles = index < TILES
    tl.store(attention_words + index, tl.where(in_range, attention, 0.0), mask=in_tiles)
    tl.store(left + index, tl.where(in_range, rest, 0.0), mask=in_tiles)
    scale, unscale = power_of_two_scale(tl.max(tl.where(in_range, comparable, 0.0), 0))
    left_most = tl.max(tl.where(in_range & (rest == rest), rest, 0.0), 0)
    supplement_scale, supplement_unscale = power_of_two_scale(left_most)
    tl.debug_barrier()
    if split == 0:
        tl.store(attention_out + image * N + index, attention, mask=in_range)
        tl.store(lengths + image, length)
        for start in range(0, capacity, N_PAD):
            rows = start + index
            chosen = tl.load(centres + rows, mask=rows < count, other=-1)
            tl.store(kept + image * capacity + rows, chosen, mask=rows < capacity)

    # ---- steps 3 and 4: one tile of output rows after the other
    image_tokens = tokens + image * capacity * D
    for first in range(split * BLOCK_M, capacity, splits * BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)  # [BM]
        out_rows = image_tokens + rows.to(tl.int64)[:, None] * D
        if first < length:
            is_centre = rows < count
            own = tl.load(centres + rows, mask=is_centre, other=0)  # [BM]
            is_supplement = (rows == count) & SUPPLEMENT
            own_weight = tl.where(is_centre, 1.0, 0.0)
            row_unscale = tl.where(is_centre, unscale, supplement_unscale)
            if MERGE == "none":
                store_supplement_weights(
                    weights, left, is_supplement, supplement_scale, num_tiles, BLOCK_M, BLOCK_N
                )
            else:
                store_similarities(
                    own, patch_keys, inverse_norms, similarities, guesses, num_tiles,
                    STRIDE_KN, STRIDE_KC, N, C, BLOCK_M, BLOCK_N, BLOCK_C, PRECISION,
                )  # fmt: skip
                tl.debug_barrier()
                threshold, reached = kth_largest(
                    similarities, guesses, is_centre, neighbours, num_tiles, N, BLOCK_M, BLOCK_N
                )
                last = last_tied(
                    similarities, threshold, reached, is_centre, neighbours, num_tiles,
                    N, BLOCK_M, BLOCK_N,
                )  # fmt: skip
                row_scale = tl.zeros((BLOCK_M,), tl.float32) + scale
                if MERGE == "average":
                    own_attention = tl.load(attention_words + own)  # [BM]
                    total = own_attention + neighbour_weight(
                        similarities, attention_words, threshold, last, num_tiles, BLOCK_M, BLOCK_N
                    )
                    # Scaled before it is inverted: of a subnormal total the inverse is infinite.
                    row_scale, _ = power_of_two_scale(total)
                    is_weightless = total == 0
                    inverse = tl.where(is_weightless, 0.0, 1.0 / (total * row_scale))
                    own_share = own_attention * row_scale * inverse
                    own_share = tl.where(is_weightless, 1.0, own_share)
                    own_weight = tl.where(is_centre, own_share, 0.0)
                    row_unscale = tl.where(is_centre, inverse, supplement_unscale)
                store_weights(
                    weights, similarities, attention_words, left, threshold, last, row_scale,
                    is_centre, is_supplement, supplement_scale, num_tiles, BLOCK_M, BLOCK_N,
                )  # fmt: skip
            tl.debug_barrier()
            own_rows = patches + own.to(tl.int64) * STRIDE_YN  # [BM]
            for start in range(0, D, BLOCK_OUT):
                channels = start + tl.arange(0, BLOCK_OUT)  # [BO]
                sums = weighted_rows(
                    weights, patches, start, num_tiles,
                    STRIDE_YN, STRIDE_YC, N, D, BLOCK_M, BLOCK_N, BLOCK_OUT, PRECISION,
                )  # fmt: skip
                inside = (channels < D)[None, :]
                own_ptrs = own_rows[:, None] + channel_offsets(channels, STRIDE_YC)[None, :]
                kept_rows = tl.load(own_ptrs, mask=inside & is_centre[:, None], other=0.0)
                kept_rows = kept_rows.to(tl.float32) * own_weight[:, None]  # [BM, BO]
                sums *= row_unscale[:, None]
                if MERGE == "none":
                    merged = tl.where(is_centre[:, None], kept_rows, sums)
                else:
                    merged = kept_rows + sums
                merged = tl.where((rows < length)[:, None], merged, 0.0)
                tl.store(
                    out_rows + channels[None, :],
                    merged.to(tokens.dtype.element_ty),
                    mask=inside & (rows < capacity)[:, None],
                )
            # The next tile writes the scratch that slower warps may still be reading.
            tl.debug_barrier()
        else:
            for start in range(0, D, BLOCK_OUT):
                channels = start + tl.arange(0, BLOCK_OUT)  # [BO]
                tl.store(
                    out_rows + channels[None, :],
                    tl.zeros((BLOCK_M, BLOCK_OUT), tokens.dtype.element_ty),
                    mask=(channels < D)[None, :] & (rows < capacity)[:, None],
                )


def prune_merge(
    query: Tensor | None,
    keys: Tensor,
    hidden: Tensor,
    attention: Tensor | None = None,
    *,
    launch: LaunchConfig,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Reduce the patch tokens of B images, in one launch on the current device.

    Args:
        query: [B, C], float16, bfloat16 or float32; any strides, as of the next two. None: scores
            are given, and there is no class token.
        keys: [B, 1+N, C], or [B, N, C] without a class token.
        hidden: [B, 1+N, D] or [B, N, D].
        attention: The scores [B, N] float32, contiguous, in place of a query.
        launch: How to cut the work.
        options: See `launch_arguments`.

    Returns:
        Tokens [B, capacity, D] with zeros past an image's length, lengths [B] int32, kept
        [B, capacity] int32, attention [B, N] float32.
    """
    outputs, positional, named = launch_arguments(
        query, keys, hidden, attention, launch=launch, **options
    )
    batch = keys.shape[0]
    if batch > 0:
        prune_merge_kernel[(batch, launch.splits)](*positional, **named)
    return outputs


def launch_arguments(
    query: Tensor | None,
    keys: Tensor,
    hidden: Tensor,
    attention_in: Tensor | None = None,
    *,
    budget: int | None,
    plus: bool,
    neighbours: int,
    fence: float,
    merge: str,
    supplement: bool,
    raster: bool,
    launch: LaunchConfig,
) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], tuple[Any, ...], dict[str, Any]]:
    """The outputs, not yet filled, and all that the kernel takes.

    Args:
        query: As in `prune_merge`, like the next three.
        keys: There.
        hidden: There.
        attention_in: There.
        budget: Centres an image; `None`: its outliers.
        plus: PruMerge+.
        neighbours: Tokens that merge into each centre; clipped to N - 1.
        fence: Interquartile ranges above the third quartile from where a token is an outlier.
        merge: `"sum"`, `"average"` or `"none"`.
        supplement: Whether a last row sums what is left.
        raster: Centres by index, not by attention.
        launch: How to cut the work.
    """
    batch, rows, channels = keys.shape
    width = hidden.shape[2]
    num_patches = rows - (query is not None)
    capacity = (num_patches if budget is None else budget) + supplement
    tokens = hidden.new_empty(batch, capacity, width)
    lengths = hidden.new_empty(batch, dtype=torch.int32)
    kept = hidden.new_empty(batch, capacity, dtype=torch.int32)
    attention = hidden.new_empty(batch, num_patches, dtype=torch.float32)

    scratch_words = launch.scratch_words(num_patches)
    scratch = hidden.new_empty(batch * launch.splits, scratch_words, dtype=torch.float32)
    num_spatial = budget // 2 if plus and budget is not None else 0
    num_attended = 0 if budget is None else budget - num_spatial
    neighbours = min(neighbours, num_patches - 1)
    positional = (
        query, keys, hidden, attention_in,
        *((0, 0) if query is None else query.stride()), keys.stride(0), hidden.stride(0),
        *keys.stride()[1:], *hidden.stride()[1:],
        tokens, lengths, kept, attention,
        scratch,
        capacity,
        1 / math.sqrt(channels),
        *_percentile(0.25, num_patches), *_percentile(0.75, num_patches), fence,
        num_attended, num_spatial, neighbours,
    )  # fmt: skip
    named = {
        "N": num_patches,
        "C": channels,
        "D": width,
        "HAS_BUDGET": budget is not None,
        "PLUS": plus,
        "RASTER": raster,
        "MERGE": merge if neighbours > 0 else "none",
        "SUPPLEMENT": supplement,
        "N_PAD": launch.vector(num_patches),
        "C_PAD": launch.vector(channels),
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_C": launch.block_c,
        "BLOCK_SCORE": launch.block_score,
        "BLOCK_OUT": launch.block_out,
        "PRECISION": launch.precision,
        "TENSOR_CORES": keys.dtype != torch.float32,
        "SCRATCH_WORDS": scratch_words,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    if launch.max_registers is not None:
        named["maxnreg"] = launch.max_registers
    return (tokens, lengths, kept, attention), positional, named


def _percentile(share: float, count: int) -> tuple[int, float]:
    """Where a percentile lies: rank (from 1, largest first) of the value below, and weight of
    the value above."""
    position = share * (count - 1)
    return count - math.floor(position), position - math.floor(position)
