"""Orders as integers: bit patterns that compare like the values they stand for."""

import triton
import triton.language as tl


@triton.jit
def ordered_bits(values):
    """float32 -> int32 in the same order (-0.0 just below 0.0)."""
    bits = values.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def from_ordered_bits(bits):
    """The inverse of `ordered_bits`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def pack(bits, index):
    """Non-negative int32 bits and indices -> int64 that order by bits, then by lower index."""
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - index).to(tl.int64)


@triton.jit
def packed_index(packed):
    """The index that `pack` put in."""
    return 0x7FFFFFFF - (packed & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def next_probe(low, high, share, turn):
    """Where to look next between two ordered integers: `share` of the way, each third time halfway.

    The thirds end the search whatever the values are. `high - low` must not overflow.
    """
    width = high - low
    ahead = tl.minimum(tl.maximum(share, 0.0), 1.0) * width.to(tl.float32)
    # A float32 may round up past the end.
    step = tl.where(turn % 3 == 0, width >> 1, tl.minimum(ahead, 1.0e9).to(tl.int32))
    return low + tl.minimum(tl.maximum(step, 1), tl.maximum(width - 1, 1))


@triton.jit
def nth_largest(bits, first, second, N: tl.constexpr):
    """The `first`-th and the `second`-th largest (from 1) of N bits >= 0; padding is -1.

    A bracket for each shrinks; both counts share a word. It is done early when exactly n values
    reach its lower end: the n-th largest is the least of those.
    """
    least = tl.min(tl.where(bits >= 0, bits, 0x7FFFFFFF), 0)
    end = tl.max(bits, 0) + 1
    low_a, high_a, low_b, high_b = least, end, least, end
    low_count_a = tl.full((), N, tl.int32)
    high_count_a = tl.full((), 0, tl.int32)
    low_count_b, high_count_b = low_count_a, high_count_a
    turn = tl.full((), 0, tl.int32)
    open_a = (low_count_a > first) & (high_a - low_a > 1)
    open_b = (low_count_b > second) & (high_b - low_b > 1)
    while open_a | open_b:
        turn += 1
        share_a = (low_count_a - first).to(tl.float32) / (low_count_a - high_count_a)
        share_b = (low_count_b - second).to(tl.float32) / (low_count_b - high_count_b)
        probe_a = next_probe(low_a, high_a, share_a, turn)
        probe_b = next_probe(low_b, high_b, share_b, turn)
        reach_a = (bits >= probe_a).to(tl.int32)  # [N_PAD]
        reach_b = (bits >= probe_b).to(tl.int32)  # [N_PAD]
        counts = tl.sum(reach_a + (reach_b << 16), 0)
        count_a = counts & 0xFFFF
        count_b = counts >> 16
        enough_a = open_a & (count_a >= first)
        short_a = open_a & (count_a < first)
        enough_b = open_b & (count_b >= second)
        short_b = open_b & (count_b < second)
        low_a = tl.where(enough_a, probe_a, low_a)
        low_count_a = tl.where(enough_a, count_a, low_count_a)
        high_a = tl.where(short_a, probe_a, high_a)
        high_count_a = tl.where(short_a, count_a, high_count_a)
        low_b = tl.where(enough_b, probe_b, low_b)
        low_count_b = tl.where(enough_b, count_b, low_count_b)
        high_b = tl.where(short_b, probe_b, high_b)
        high_count_b = tl.where(short_b, count_b, high_count_b)
        open_a = (low_count_a > first) & (high_a - low_a > 1)
        open_b = (low_count_b > second) & (high_b - low_b > 1)
    value_a = tl.min(tl.where(bits >= low_a, bits, 0x7FFFFFFF), 0)
    value_b = tl.min(tl.where(bits >= low_b, bits, 0x7FFFFFFF), 0)
    return value_a, value_b
