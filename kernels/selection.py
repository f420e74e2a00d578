"""Step 2: which tokens are centres, and in which order."""

import triton
import triton.language as tl

from .ordering import nth_largest, pack, packed_index


@triton.jit
def class_attention(scores, own_score, in_range):
    """Softmax over the patch scores [N] and the class token's own, whose share is dropped.

    NaN throughout where a score is NaN or +inf.
    """
    scores = tl.where(in_range, scores, -float("inf"))
    top = tl.maximum(tl.max(scores, 0), own_score)
    exponentials = tl.exp(scores - top)  # [N]
    return exponentials / (tl.sum(exponentials, 0) + tl.exp(own_score - top))


@triton.jit
def interpolate(bits, low, rank, weight):
    """The percentile between `low`, the `rank`-th largest of bits [N], and the next value up."""
    above = bits > low  # [N]
    next_up = tl.min(tl.where(above, bits, 0x7FFFFFFF), 0)
    is_next = (tl.sum(above.to(tl.int32), 0) == rank - 1) & (rank > 1)
    low_value = low.to(tl.float32, bitcast=True)
    high_value = tl.where(is_next, next_up, low).to(tl.float32, bitcast=True)
    step = high_value - low_value
    # From the nearer end, as NumPy does: the percentile of equal values is that value exactly.
    return tl.where(weight < 0.5, low_value + step * weight, high_value - step * (1 - weight))


@triton.jit
def above_fence(
    attention, bits, q1_rank, q1_weight, q3_rank, q3_weight, fence, N: tl.constexpr
):  # fmt: skip
    """Outliers of the attention [N]: above the third quartile by `fence` interquartile ranges."""
    low1, low3 = nth_largest(bits, q1_rank, q3_rank, N)
    q1 = interpolate(bits, low1, q1_rank, q1_weight)
    q3 = interpolate(bits, low3, q3_rank, q3_weight)
    return attention > q3 + fence * (q3 - q1)


@triton.jit
def most_attended(bits, count, N: tl.constexpr):
    """The `count` largest of bits [N], ties to the lower index."""
    least, _ = nth_largest(bits, count, count, N)
    above = bits > least
    tied = (bits == least).to(tl.int32)
    room = count - tl.sum(above.to(tl.int32), 0)
    return above | ((tied > 0) & (tl.cumsum(tied, 0) <= room))


@triton.jit
def on_grid(index, attended, N: tl.constexpr):
    """PruMerge+ without a budget: every stride-th token [N] that is not yet chosen."""
    outliers = tl.maximum(tl.sum(attended.to(tl.int32), 0), 1)
    stride = tl.maximum(N // outliers // 3, 1)
    # The authors' range(0, N - 1, stride) leaves the last patch out.
    return (index % stride == 0) & (index < N - 1) & (attended == 0)


@triton.jit
def evenly_spaced(free, num_free, count):
    """PruMerge+ with a budget: of the free tokens [N], those at floor(i * num_free / count)."""
    # Position p is some floor(i * num_free / count) just where ceil(p * count / num_free) steps.
    after = tl.cumsum(free.to(tl.int32), 0) * count  # [N], (p + 1) * count
    steps = (after + num_free - 1) // num_free > (after - count + num_free - 1) // num_free
    return steps & free


@triton.jit
def store_centres(
    centres, packed, attended, spatial, bits, index,
    PLUS: tl.constexpr, RASTER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes the centres' indices in output order, and returns their number.

    centres: [N] int32 scratch; packed: [N] int64 scratch; the masks, bits and index: [N].
    """
    num_attended = tl.sum(attended.to(tl.int32), 0)
    num_centres = num_attended
    if PLUS:
        num_centres += tl.sum(spatial.to(tl.int32), 0)
    if RASTER:
        is_centre = attended | spatial
        tl.store(centres + tl.cumsum(is_centre.to(tl.int32), 0) - 1, index, mask=is_centre)
    else:
        # Only the few attended tokens are ranked, each by how many come before it.
        slots = tl.cumsum(attended.to(tl.int32), 0) - 1  # [N]
        tl.store(packed + slots, pack(bits, index), mask=attended)
        if PLUS:
            slots = num_attended + tl.cumsum(spatial.to(tl.int32), 0) - 1  # [N]
            tl.store(centres + slots, index, mask=spatial)
        tl.debug_barrier()
        for first in range(0, num_attended, BLOCK):
            places = first + tl.arange(0, BLOCK)  # [BLOCK]
            own = tl.load(packed + places, mask=places < num_attended, other=-1)
            rank = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, num_attended, BLOCK):
                others = start + tl.arange(0, BLOCK)  # [BLOCK]
                theirs = tl.load(packed + others, mask=others < num_attended, other=-1)
                rank += tl.sum((theirs[None, :] > own[:, None]).to(tl.int32), 1)
            tl.store(centres + rank, packed_index(own), mask=places < num_attended)
    return num_centres
