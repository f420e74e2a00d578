"""Properties that hold for every input, found false by Hypothesis or not at all."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from merge_cases import TOLERANCES, grid_inputs, smooth_inputs

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge

CLOSE = TOLERANCES[torch.float64]

backends = st.sampled_from(["reference", "torch"])
seeds = st.integers(0, 10_000)
patch_counts = st.integers(1, 40)
configs = st.builds(
    PruMergeConfig,
    variant=st.sampled_from(["prumerge", "prumerge+"]),
    keep=st.none() | st.floats(0.01, 1.0),
    neighbours=st.integers(1, 50),
    fence=st.floats(0.0, 3.0),
    merge=st.sampled_from(["sum", "average", "none"]),
    supplement=st.booleans(),
    order=st.sampled_from(["attention", "raster"]),
)

examples = settings(max_examples=60, deadline=None, derandomize=True)


@examples
@given(configs, patch_counts, st.integers(0, 4), seeds, backends)
def test_rows_lengths_and_padding(config, patches, batch, seed, backend):
    inputs = grid_inputs(batch, patches, seed=seed)
    merged = prune_merge(*inputs, config, backend=backend)
    capacity = merged.tokens.shape[1]
    assert merged.tokens.shape == (batch, capacity, 16)
    assert merged.kept.shape == (batch, capacity)
    assert merged.attention.shape == (batch, patches)
    assert capacity <= config.capacity(patches)
    if config.keep is not None:
        assert merged.lengths.tolist() == [config.capacity(patches)] * batch
        assert capacity == config.capacity(patches)
    elif batch:
        assert capacity == merged.lengths.max()
    for tokens, kept, length in zip(
        merged.tokens, merged.kept.tolist(), merged.lengths.tolist(), strict=True
    ):
        centres = kept[: length - config.supplement]
        assert all(0 <= j < patches for j in centres)
        assert len(set(centres)) == len(centres)
        assert kept[len(centres) :] == [-1] * (capacity - len(centres))
        assert (tokens[length:] == 0).all()
        if config.order == "raster":
            assert centres == sorted(centres)


@examples
@given(configs, patch_counts, seeds, backends)
def test_adaptive_centres_are_those_above_the_fence(config, patches, seed, backend):
    config = config.replace(keep=None, variant="prumerge")
    inputs = grid_inputs(2, patches, seed=seed)
    merged = prune_merge(*inputs, config, backend=backend)
    for attention, kept in zip(merged.attention, merged.kept, strict=True):
        q1, q3 = attention.quantile(0.25), attention.quantile(0.75)
        fence = (q3 + config.fence * (q3 - q1)).item()
        clear = abs(attention - fence) > 1e-6 * fence  # of rounding
        above = set((attention > fence).nonzero().flatten().tolist())
        doubtful = set((~clear).nonzero().flatten().tolist())
        assert set(kept[kept >= 0].tolist()) ^ above <= doubtful


@examples
@given(configs, patch_counts, seeds, backends)
def test_permuting_patches_permutes_kept(config, patches, seed, backend):
    """PruMerge+ places its additional tokens by position, so only PruMerge has this property."""
    config = config.replace(variant="prumerge", order="attention")
    query, keys, hidden = smooth_inputs(2, patches, 8, seed=seed)
    permutation = torch.randperm(patches, generator=torch.Generator().manual_seed(seed))
    rows = torch.cat((torch.zeros(1, dtype=torch.int64), 1 + permutation))
    plain = prune_merge(query, keys, hidden, config, backend=backend)
    permuted = prune_merge(query, keys[:, rows], hidden[:, rows], config, backend=backend)
    assert permuted.lengths.tolist() == plain.lengths.tolist()
    centre = permuted.kept >= 0
    assert torch.equal(permutation[permuted.kept[centre].long()], plain.kept[centre].long())
    torch.testing.assert_close(permuted.tokens, plain.tokens, **CLOSE)


@examples
@given(configs, st.integers(1, 16), seeds, backends)
def test_weights_account_for_every_token(config, patches, seed, backend):
    """With unit vectors for tokens, each output row shows the weight of every token in it."""
    config = config.replace(supplement=True)
    query, keys, _ = grid_inputs(1, patches, seed=seed)
    query, keys = query.double(), keys.double()
    hidden = torch.zeros(1, 1 + patches, 16, dtype=torch.float64)
    hidden[0, 1:] = torch.eye(16)[:patches]
    merged = prune_merge(query, keys, hidden, config, backend=backend)
    attention = merged.attention[0]
    kept = merged.kept[0, :-1].tolist()
    weights, supplement = merged.tokens[0, :-1, :patches], merged.tokens[0, -1, :patches]

    # What is not kept is in the supplement with its attention, what is kept is not.
    left = torch.ones(patches, dtype=torch.bool)
    left[kept] = False
    torch.testing.assert_close(supplement, attention * left, **CLOSE)
    for p, row in zip(kept, weights, strict=True):
        neighbours = set(row.nonzero().flatten().tolist()) - {p}
        if config.merge == "none":
            assert not neighbours
            assert row[p] == 1
            continue
        assert len(neighbours) == min(config.neighbours, patches - 1)
        expected = torch.zeros_like(row)
        expected[list(neighbours)] = attention[list(neighbours)]
        if config.merge == "average":
            expected[p] = attention[p]
            expected /= expected.sum()
        else:
            expected[p] = 1
        torch.testing.assert_close(row, expected, **CLOSE)


@examples
@given(configs, st.integers(2, 40), seeds, backends)
def test_neighbours_are_at_least_as_similar_as_the_rest(config, patches, seed, backend):
    """By weights read off unit vectors, against cosines computed here."""
    config = config.replace(merge="sum", neighbours=min(config.neighbours, patches - 1), keep=0.5)
    query, keys, _ = smooth_inputs(1, patches, 64, seed=seed)
    hidden = torch.zeros(1, 1 + patches, 64, dtype=torch.float64)
    hidden[0, 1:] = torch.eye(64)[:patches]
    merged = prune_merge(query, keys, hidden, config, backend=backend)
    centres = merged.kept[0][merged.kept[0] >= 0].tolist()
    for p, row in zip(centres, merged.tokens[0, :, :patches], strict=False):
        cosine = torch.cosine_similarity(keys[0, 1:], keys[0, 1 + p], dim=1)  # [N]
        cosine[p] = -2  # not its own neighbour
        used = (row != 0).index_fill(0, torch.tensor(p), False)
        unused = (row == 0).index_fill(0, torch.tensor(p), False)
        assert used.sum() == config.neighbours
        if unused.any():
            assert cosine[used].min() > cosine[unused].max()


@examples
@given(configs, patch_counts, seeds, backends, st.sampled_from([0.25, 0.5, 2.0]))
def test_scaling_the_query_preserves_the_order_of_attention(config, patches, seed, backend, factor):
    """A power of two leaves the scores exact: a fixed budget keeps the same tokens."""
    config = config.replace(keep=config.keep or 0.3)
    query, keys, hidden = grid_inputs(2, patches, seed=seed)
    plain = prune_merge(query, keys, hidden, config, backend=backend)
    scaled = prune_merge(factor * query, keys, hidden, config, backend=backend)
    assert scaled.kept.tolist() == plain.kept.tolist()
    rank = plain.attention.sort(1, descending=True).indices
    assert (scaled.attention.gather(1, rank).diff(dim=1) <= 0).all()


@examples
@given(configs, patch_counts, seeds, backends)
def test_linear_in_hidden(config, patches, seed, backend):
    query, keys, hidden = grid_inputs(2, patches, seed=seed)
    plain = prune_merge(query, keys, hidden, config, backend=backend)
    scaled = prune_merge(query, keys, -2 * hidden, config, backend=backend)
    assert torch.equal(scaled.tokens, -2 * plain.tokens)


@examples
@given(configs, patch_counts, st.integers(0, 4), seeds)
def test_backends_agree(config, patches, batch, seed):
    inputs = grid_inputs(batch, patches, seed=seed)
    actual, expected = (
        prune_merge(*inputs, config, backend=backend) for backend in ("torch", "reference")
    )
    assert actual.kept.tolist() == expected.kept.tolist()
    assert actual.lengths.tolist() == expected.lengths.tolist()
    torch.testing.assert_close(actual.tokens, expected.tokens, **TOLERANCES[torch.float32])
