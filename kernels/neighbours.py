"""Step 3, first half: the k tokens most similar to each centre, as a threshold a row.

Similarities of one tile of centres go to scratch, tile by tile of tokens; the k-th largest of each
row is found by counting, in as few rounds as the rows need, and nothing is sorted.
"""

import triton
import triton.language as tl

from .ordering import from_ordered_bits, next_probe, ordered_bits
from .tiles import tile_rows

# Cosines lie in [-1, 1] up to rounding. One that is NaN ranks below them all; a token is no
# neighbour of itself.
_NAN_RANK = tl.constexpr(-1.5)
_LIMIT = tl.constexpr(1.5)


@triton.jit
def store_similarities(
    centres, patch_keys, inverse_norms, similarities, guesses, num_tiles,
    STRIDE_N: tl.constexpr, STRIDE_C: tl.constexpr, N: tl.constexpr, C: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cosine of every centre [BM] to every token, to scratch [tiles, BM, BN].

    To scratch as well goes a first guess at the k-th largest of each row [BM]. (Returned instead,
    it would carry the tensor-core layout into the counting, and a conversion into each of its
    steps.)
    """
    channels = tl.arange(0, BLOCK_C)  # [BC]
    own_rows = patch_keys + centres.to(tl.int64) * STRIDE_N  # [BM]
    own_norms = tl.load(inverse_norms + centres)  # [BM]
    best = tl.full((BLOCK_M, BLOCK_N), -_LIMIT, tl.float32)
    for tile in range(num_tiles):
        tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        own_ptrs = own_rows[:, None] + channels[None, :] * STRIDE_C  # [BM, BC]
        key_ptrs = tile_rows(patch_keys, tile, tl.arange(0, BLOCK_N), STRIDE_N, N, BLOCK_N)[None, :]
        key_ptrs += channels[:, None] * STRIDE_C  # [BC, BN]
        dots = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for start in range(0, C, BLOCK_C):
            if C % BLOCK_C:
                mask = start + channels < C
                own = tl.load(own_ptrs, mask=mask[None, :], other=0.0)  # [BM, BC]
                keys = tl.load(key_ptrs, mask=mask[:, None], other=0.0)  # [BC, BN]
            else:
                own = tl.load(own_ptrs)  # [BM, BC]
                keys = tl.load(key_ptrs)  # [BC, BN]
            dots = tl.dot(own, keys, dots, input_precision=PRECISION)
            own_ptrs += BLOCK_C * STRIDE_C
            key_ptrs += BLOCK_C * STRIDE_C
        norms = tl.load(inverse_norms + tokens)  # [BN]
        cosines = dots * own_norms[:, None] * norms[None, :]  # [BM, BN]
        cosines = tl.where(cosines == cosines, tl.minimum(cosines, _LIMIT), _NAN_RANK)
        others = (tokens[None, :] != centres[:, None]) & (tokens < N)[None, :]
        cosines = tl.where(others, cosines, -float("inf"))
        best = tl.maximum(best, cosines)
        places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(similarities + tile * BLOCK_M * BLOCK_N + places, cosines)
    # With nine tokens in each of 64 groups, about 40 exceed the mean of the groups' largest.
    tl.store(guesses + tl.arange(0, BLOCK_M), tl.sum(best, 1) / BLOCK_N)


@triton.jit
def count_at_least(
    similarities, threshold, is_open, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """How many similarities of each row reach its threshold: -> [BM]. Reads the open rows only."""
    places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    counts = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for tile in range(num_tiles):
        cosine_ptrs = similarities + tile * BLOCK_M * BLOCK_N + places
        cosines = tl.load(cosine_ptrs, mask=is_open[:, None], other=0.0)  # [BM, BN]
        counts += (cosines >= threshold[:, None]).to(tl.int32)
    return tl.sum(counts, 1)


@triton.jit
def kth_largest(
    similarities, guesses, is_row, count, num_tiles,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A threshold for each row that `count` similarities or, with ties at it, more reach.

    similarities: scratch [tiles, BM, BN]; guesses: first probes [BM], scratch; is_row:
    rows that matter [BM].
    Returns the threshold and how many reach it, [BM] each.

    A bracket of bit patterns shrinks to one value; a row that `count` similarities reach exactly
    is done early. Probes interpolate the logarithm of the count, which falls evenly in the tail of
    a distribution; each third halves the bracket, so that it ends whatever the distribution.
    """
    low = ordered_bits(tl.full((BLOCK_M,), _NAN_RANK, tl.float32))  # reached by all
    high = ordered_bits(tl.full((BLOCK_M,), _LIMIT, tl.float32)) + 1  # reached by none
    low_count = tl.full((BLOCK_M,), N - 1, tl.int32)
    high_count = tl.zeros((BLOCK_M,), tl.int32)
    is_open = is_row & (low_count > count)
    num_open = tl.sum(is_open.to(tl.int32), 0)
    probe = ordered_bits(tl.load(guesses + tl.arange(0, BLOCK_M)))  # [BM]
    probe = tl.minimum(tl.maximum(probe, low + 1), high - 1)
    turn = tl.zeros((), tl.int32)
    while num_open > 0:
        reached = count_at_least(
            similarities, from_ordered_bits(probe), is_open, num_tiles, BLOCK_M, BLOCK_N
        )
        is_enough = is_open & (reached >= count)
        is_short = is_open & (reached < count)
        low = tl.where(is_enough, probe, low)
        low_count = tl.where(is_enough, reached, low_count)
        high = tl.where(is_short, probe, high)
        high_count = tl.where(is_short, reached, high_count)
        is_open = is_row & (low_count > count) & (high - low > 1)
        num_open = tl.sum(is_open.to(tl.int32), 0)

        turn += 1
        log_low = tl.log2(low_count.to(tl.float32))
        log_high = tl.log2(tl.maximum(high_count.to(tl.float32), 0.5))
        share = (log_low - tl.log2(count.to(tl.float32))) / tl.maximum(log_low - log_high, 1e-3)
        probe = next_probe(low, high, share, turn)
    return from_ordered_bits(low), low_count


@triton.jit
def neighbour_mask(cosines, tokens, threshold, last):
    """Which tokens of a tile are merged into which centre: -> [BM, BN]."""
    tied = (cosines == threshold[:, None]) & (tokens[None, :] <= last[:, None])
    return (cosines > threshold[:, None]) | tied


@triton.jit
def last_tied(
    similarities, threshold, reached, is_row, count, num_tiles,
    N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Of the tokens at the threshold, the highest index that still counts: -> [BM].

    Ties go to the lower index, so it is where exactly `count` similarities of the row are taken.
    """
    places = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    low = tl.full((BLOCK_M,), -1, tl.int32)  # too few are taken
    high = tl.full((BLOCK_M,), N - 1, tl.int32)  # enough are taken
    is_open = is_row & (reached > count)
    num_open = tl.sum(is_open.to(tl.int32), 0)
    while num_open > 0:
        middle = (low + high) >> 1  # [BM]
        counts = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
        for tile in range(num_tiles):
            tokens = tile * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
            cosines = tl.load(similarities + tile * BLOCK_M * BLOCK_N + places)  # [BM, BN]
            counts += neighbour_mask(cosines, tokens, threshold, middle).to(tl.int32)
        is_enough = tl.sum(counts, 1) >= count
        high = tl.where(is_open & is_enough, middle, high)
        low = tl.where(is_open & (is_enough == 0), middle, low)
        is_open = is_open & (high - low > 1)
        num_open = tl.sum(is_open.to(tl.int32), 0)
    return high
