"""The vectorised backend against the reference, and both against cases worked out by hand."""

import itertools

import numpy as np
import pytest
import torch
from merge_cases import TOLERANCES, assert_same, grid_inputs, smooth_inputs

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.reference import percentile
from prumerge_fast.reduction.torch_backend import _percentile

BACKENDS = ["reference", "torch"]
DTYPES = list(TOLERANCES)


def both(inputs, config):
    return (prune_merge(*inputs, config, backend=backend) for backend in ("torch", "reference"))


@pytest.mark.parametrize(
    ("variant", "keep", "merge", "supplement", "order"),
    list(
        itertools.product(
            ["prumerge", "prumerge+"],
            [None, 1, 8, 0.3, 49],
            ["sum", "average", "none"],
            [True, False],
            ["attention", "raster"],
        )
    ),
)
def test_every_option(variant, keep, merge, supplement, order):
    config = PruMergeConfig(
        variant=variant, keep=keep, merge=merge, supplement=supplement, order=order, neighbours=5
    )
    assert_same(*both(grid_inputs(3, 49, seed=4), config))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patches", [1, 2, 7, 49, 63, 100, 577])
def test_shapes_and_dtypes(patches, dtype):
    inputs = grid_inputs(2, patches, channels=64, dtype=dtype, seed=patches)
    for config in (PruMergeConfig(), PruMergeConfig(variant="prumerge+", keep=min(patches, 33))):
        assert_same(*both(inputs, config))


@pytest.mark.parametrize("seed", range(6))
def test_values_without_ties(seed):
    """Unequal norms of keys, so that cosine and dot product rank differently."""
    inputs = smooth_inputs(3, 100, 24, seed=seed)
    for variant in ("prumerge", "prumerge+"):
        assert_same(*both(inputs, PruMergeConfig(variant=variant)))


def test_counts_differ_within_a_batch():
    inputs = grid_inputs(8, 100, seed=1)
    actual, expected = both(inputs, PruMergeConfig())
    assert len(set(expected.lengths.tolist())) > 3
    assert_same(actual, expected)


def test_an_image_in_a_batch_is_what_it_is_alone():
    inputs = smooth_inputs(5, 63, 16, seed=3)
    together = prune_merge(*inputs, PruMergeConfig(variant="prumerge+", fence=2.0))
    for b, rows in enumerate(together.split()):
        alone = prune_merge(
            *(tensor[b : b + 1] for tensor in inputs),
            PruMergeConfig(variant="prumerge+", fence=2.0),
        )
        assert alone.kept[0].tolist() == together.kept[b, : len(rows)].tolist()
        torch.testing.assert_close(rows, alone.tokens[0], **TOLERANCES[torch.float64])


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend, keep):
    inputs = grid_inputs(0, 9)
    merged = prune_merge(*inputs, PruMergeConfig(keep=keep), backend=backend)
    assert merged.tokens.shape == (0, 4 if keep else 1, 16)
    assert merged.kept.shape == merged.tokens.shape[:2]
    assert merged.lengths.shape == (0,)
    assert merged.attention.shape == (0, 9)


@pytest.mark.parametrize("neighbours", [1, 5, 6, 7, 1000])
def test_more_neighbours_than_tokens(neighbours):
    """k > N - 1: every other token is a neighbour."""
    inputs = smooth_inputs(2, 6, 8)
    config = PruMergeConfig(keep=2, neighbours=neighbours, supplement=False)
    actual, expected = both(inputs, config)
    assert_same(actual, expected)
    if neighbours >= 5:
        weighed = actual.attention[:, None] @ inputs[2][:, 1:]  # [B, 1, C]
        own = actual.attention.gather(1, actual.kept.long())[:, :, None]
        hidden = inputs[2][:, 1:].gather(1, actual.kept.long()[:, :, None].expand(-1, -1, 8))
        torch.testing.assert_close(actual.tokens, hidden * (1 - own) + weighed)


@pytest.mark.parametrize("backend", BACKENDS)
def test_ties_take_the_lower_index(backend):
    """All tokens alike: attention, fence and similarity are all ties."""
    query, keys = torch.ones(1, 4), torch.ones(1, 7, 4)
    hidden = torch.zeros(1, 7, 4)
    hidden[0, 1:, 0] = 2.0 ** torch.arange(6)
    config = PruMergeConfig(keep=3, neighbours=2, supplement=False)
    merged = prune_merge(query, keys, hidden, config, backend=backend)
    assert merged.kept.tolist() == [[0, 1, 2]]
    sevenths = [(2 + 4) / 7 + 1, (1 + 4) / 7 + 2, (1 + 2) / 7 + 4]
    torch.testing.assert_close(merged.tokens[0, :, 0], torch.tensor(sevenths))


@pytest.mark.parametrize("patches", [1, 2, 7, 49, 576, 577])
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_percentiles_equal_numpys_bit_for_bit(patches, share):
    """The authors' fence comes from NumPy; one rounding more could move a token across it."""
    attention = (2 * smooth_inputs(20, 1, patches)[0]).float().softmax(1)  # [20, patches]
    expected = np.percentile(attention.numpy(), 100 * share, axis=1).tolist()
    assert [percentile(row, share).item() for row in attention] == expected
    descending = attention.sort(dim=1, descending=True).values
    assert _percentile(descending, share)[:, 0].tolist() == expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_constant_attention_has_no_outlier(backend):
    hidden = torch.randn(2, 50, 4)
    merged = prune_merge(torch.zeros(2, 4), torch.randn(2, 50, 4), hidden, backend=backend)
    assert merged.lengths.tolist() == [1, 1]
    assert merged.kept.tolist() == [[-1], [-1]]
    torch.testing.assert_close(merged.tokens, hidden[:, 1:].sum(1, keepdim=True) / 50)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_outlier_and_no_supplement_is_no_token(backend):
    inputs = (torch.zeros(2, 4), torch.ones(2, 10, 4), torch.ones(2, 10, 4))
    merged = prune_merge(*inputs, PruMergeConfig(supplement=False), backend=backend)
    assert merged.tokens.shape == (2, 0, 4)
    assert merged.lengths.tolist() == [0, 0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_plus_without_outliers_counts_one_for_the_stride(backend):
    """N = 49 and m = 0: stride int(int(49 / 1) / 3) = 16."""
    inputs = (torch.zeros(1, 4), torch.randn(1, 50, 4), torch.randn(1, 50, 4))
    merged = prune_merge(*inputs, PruMergeConfig(variant="prumerge+"), backend=backend)
    assert merged.kept.tolist() == [[0, 16, 32, -1]]  # 48 = N - 1 is left out


def attention_peaks(patches, *peaks):
    """Inputs whose class attention peaks at the given patches, the first highest."""
    keys = torch.zeros(1, 1 + patches, 4)
    for height, patch in enumerate(reversed(peaks)):
        keys[0, 1 + patch, 0] = 4.0 + height
    keys[0, :, 1] = 1.0
    query = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    return query, keys, torch.randn(1, 1 + patches, 4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_plus_adds_a_grid_without_those_already_chosen(backend):
    """N = 40, m = 3: stride int(int(40 / 3) / 3) = 4; patch 8 is on the grid already."""
    inputs = attention_peaks(40, 17, 8, 30)
    merged = prune_merge(*inputs, PruMergeConfig(variant="prumerge+"), backend=backend)
    assert merged.kept[0].tolist() == [17, 8, 30, 0, 4, 12, 16, 20, 24, 28, 32, 36, -1]
    raster = PruMergeConfig(variant="prumerge+", order="raster")
    merged = prune_merge(*inputs, raster, backend=backend)
    assert merged.kept[0].tolist() == [0, 4, 8, 12, 16, 17, 20, 24, 28, 30, 32, 36, -1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_plus_with_a_budget_spaces_the_rest_evenly(backend):
    """n = 7: 4 by attention, then 3 of the 16 left, at floor(i * 16 / 3) = 0, 5, 10."""
    inputs = attention_peaks(20, 3, 19, 0, 9)
    left = [1, 2, 4, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    config = PruMergeConfig(variant="prumerge+", keep=7, supplement=False)
    merged = prune_merge(*inputs, config, backend=backend)
    assert merged.kept[0].tolist() == [3, 19, 0, 9, left[0], left[5], left[10]]


@pytest.mark.parametrize("patches", [1, 2, 3, 10, 17])
def test_plus_with_every_budget(patches):
    inputs = grid_inputs(2, patches, seed=patches)
    for keep in range(1, patches + 1):
        actual, expected = both(inputs, PruMergeConfig(variant="prumerge+", keep=keep))
        assert all(len(set(row[:-1])) == keep for row in expected.kept.tolist())
        assert_same(actual, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [9, 1.0])
def test_every_token_kept_leaves_a_zero_supplement(backend, keep):
    config = PruMergeConfig(keep=keep, merge="none", order="raster")
    query, keys, hidden = smooth_inputs(2, 9, 4, dtype=torch.bfloat16)
    merged = prune_merge(query, keys, hidden, config, backend=backend)
    assert merged.lengths.tolist() == [10, 10]
    assert torch.equal(merged.tokens[:, :9], hidden[:, 1:])  # bit for bit
    assert (merged.tokens[:, 9] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_average_of_tokens_without_any_attention_is_the_centre(backend):
    """The class token takes all attention; the patches' underflows to zero."""
    keys = torch.ones(1, 6, 4)
    keys[0, 0] = 200.0
    hidden = torch.randn(1, 6, 4, requires_grad=True)
    config = PruMergeConfig(keep=2, merge="average", neighbours=3)
    merged = prune_merge(torch.ones(1, 4), keys, hidden, config, backend=backend)
    assert (merged.attention == 0).all()
    assert torch.equal(merged.tokens[0, :2], hidden[0, 1:3])
    merged.tokens.sum().backward()
    assert hidden.grad[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_zero_key_is_similar_to_none(backend):
    """Similarity 0: after a token that points the same way, before one that points away."""
    keys = torch.zeros(1, 5, 4)
    keys[0, 1, 0], keys[0, 3, 0], keys[0, 4, 0] = 3.0, -1.0, 1.0  # patches 0, 2, 3; patch 1 zero
    hidden = torch.eye(5)[None, :, 1:]  # patch j is the j-th unit vector
    query = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    config = PruMergeConfig(keep=1, neighbours=2, supplement=False)
    merged = prune_merge(query, keys, hidden, config, backend=backend)
    attention = merged.attention[0].tolist()
    torch.testing.assert_close(
        merged.tokens[0, 0], torch.tensor([1.0, attention[1], 0.0, attention[3]])
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("place", ["query", "keys", "hidden"])
@pytest.mark.parametrize("keep", [None, 6])
@pytest.mark.parametrize("variant", ["prumerge", "prumerge+"])
def test_values_that_are_not_finite(value, place, keep, variant):
    """Both backends select the same, and the other image of the batch is untouched."""
    inputs = dict(zip(("query", "keys", "hidden"), grid_inputs(2, 30, seed=2), strict=True))
    config = PruMergeConfig(variant=variant, keep=keep, neighbours=3)
    clean = prune_merge(**inputs, config=config)
    if place == "query":
        inputs["query"][0, 3] = value
    else:
        inputs[place][0, 5, 3] = value
    actual, expected = both(inputs.values(), config)
    assert actual.kept.tolist() == expected.kept.tolist()
    assert actual.lengths.tolist() == expected.lengths.tolist()
    length = int(clean.lengths[1])
    for merged in (actual, expected):
        assert merged.kept[1, :length].tolist() == clean.kept[1, :length].tolist()
        rows = merged.tokens[1, :length]
        torch.testing.assert_close(rows, clean.tokens[1, :length], **TOLERANCES[torch.float32])
        assert (merged.tokens[0, int(merged.lengths[0]) :] == 0).all()
    if place != "hidden":
        torch.testing.assert_close(actual.tokens, expected.tokens, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_image_of_nan_attention(backend):
    query, keys, hidden = grid_inputs(1, 30)
    query[:] = float("nan")
    adaptive = prune_merge(query, keys, hidden, backend=backend)
    assert adaptive.attention.isnan().all()
    assert adaptive.kept.tolist() == [[-1]]
    fixed = prune_merge(query, keys, hidden, PruMergeConfig(keep=3), backend=backend)
    assert fixed.kept.tolist() == [[0, 1, 2, -1]]


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinite_key_is_the_least_similar(backend):
    """-inf against a positive query: attention 0 for that token, the image stays finite."""
    query, keys = torch.ones(1, 6), torch.ones(1, 6, 6)
    keys[0, 2:5, 1:] = -1.0
    keys[0, 3] = -float("inf")  # patch 2
    hidden = torch.eye(6)[None]  # patch j is unit vector j + 1
    config = PruMergeConfig(keep=1, neighbours=3, supplement=False)
    merged = prune_merge(query, keys, hidden, config, backend=backend)
    assert merged.attention[0, 2] == 0
    assert merged.attention.isfinite().all()
    assert merged.kept.tolist() == [[0]]
    expected = torch.cat([torch.zeros(1), merged.attention[0]])  # patches 1, 3 and 4 are merged
    expected[1] = 1.0
    torch.testing.assert_close(merged.tokens[0, 0], expected)
    assert (expected[[2, 4, 5]] > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep", [None, 4])
def test_several_layers_of_features(backend, keep):
    """Side by side, each layer's as if it were alone."""
    query, keys, hidden = grid_inputs(3, 30)
    config = PruMergeConfig(variant="prumerge+", keep=keep, neighbours=5)
    layers = [hidden, keys * 2, hidden.flip(0)]
    wide = prune_merge(query, keys, torch.cat(layers, 2), config, backend=backend)
    for layer, tokens in zip(layers, wide.tokens.chunk(3, 2), strict=True):
        alone = prune_merge(query, keys, layer, config, backend=backend)
        assert torch.equal(wide.kept, alone.kept)
        torch.testing.assert_close(tokens, alone.tokens, **TOLERANCES[hidden.dtype])


@pytest.mark.parametrize("merge", ["sum", "average", "none"])
@pytest.mark.parametrize("keep", [None, 4])
def test_gradients_equal_the_references(merge, keep):
    config = PruMergeConfig(merge=merge, keep=keep, neighbours=5)
    gradients = []
    for backend in BACKENDS:
        inputs = [tensor.requires_grad_() for tensor in smooth_inputs(3, 30, 8, seed=5)]
        merged = prune_merge(*inputs, config, backend=backend)
        target = torch.linspace(-1, 1, merged.tokens.numel(), dtype=torch.float64)
        loss = (merged.tokens.flatten() * target).sum() + merged.attention.square().sum()
        gradients.append(torch.autograd.grad(loss, inputs))
    for actual, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 0
        torch.testing.assert_close(actual, expected, **TOLERANCES[torch.float64])


@pytest.mark.parametrize(
    "config",
    [
        PruMergeConfig(keep=3, neighbours=2),
        PruMergeConfig(keep=3, neighbours=2, merge="average"),
        PruMergeConfig(keep=3, merge="none"),
        PruMergeConfig(variant="prumerge+", fence=0.5, neighbours=2),
    ],
    ids=["sum", "average", "none", "plus"],
)
def test_gradcheck(config):
    inputs = [tensor.requires_grad_() for tensor in smooth_inputs(2, 7, 4, seed=1)]
    assert torch.autograd.gradcheck(lambda *args: prune_merge(*args, config).tokens, inputs)
