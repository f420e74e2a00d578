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
def nth_largest(bits, first, second):
    """The `first`-th and the `second`-th largest (from 1) of bits [N], each below 2**30.

    One bit of both results a round, from the most significant; both counts share a word.
    """
    low = tl.zeros((), tl.int32)
    high = tl.zeros((), tl.int32)
    for position in range(30):
        bit = 1 << (29 - position)
        at_least_low = (bits >= (low | bit)).to(tl.int32)  # [N]
        at_least_high = (bits >= (high | bit)).to(tl.int32)  # [N]
        counts = tl.sum(at_least_low + (at_least_high << 16), 0)
        low = tl.where((counts & 0xFFFF) >= first, low | bit, low)
        high = tl.where((counts >> 16) >= second, high | bit, high)
    return low, high
