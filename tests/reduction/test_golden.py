"""Both backends against the outputs of the authors' own implementation, on real features."""

import numpy as np
import pytest
import torch
from merge_cases import GOLDEN, golden_inputs

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge

ROUNDING = {"rtol": 2e-6, "atol": 4e-6}  # float32, sums of up to 576 terms of size up to 10


@pytest.fixture(params=GOLDEN, ids=lambda path: path.stem, scope="module")
def golden(request):
    with np.load(request.param) as file:
        return dict(file)


@pytest.fixture(params=["reference", "torch"])
def backend(request):
    return request.param


def test_the_golden_files_are_there():
    assert len(GOLDEN) == 3


def test_attention(golden, backend):
    merged = prune_merge(*golden_inputs(golden), backend=backend)
    expected = torch.from_numpy(golden["attention"])
    torch.testing.assert_close(merged.attention[0], expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "suffix"),
    [
        (PruMergeConfig(), ""),
        (PruMergeConfig(variant="prumerge+"), "_plus"),
        (PruMergeConfig(keep=72), "_top72"),
        (PruMergeConfig(keep=0.125), "_top72"),
    ],
    ids=["adaptive", "plus", "top72", "share"],
)
def test_indices_and_tokens(golden, backend, config, suffix):
    merged = prune_merge(*golden_inputs(golden), config, backend=backend)
    tokens = torch.from_numpy(golden["tokens" + suffix])
    assert merged.lengths.tolist() == [len(tokens)]
    torch.testing.assert_close(merged.tokens[0], tokens, **ROUNDING)
    if "top72" in suffix:
        kept = np.argsort(-golden["attention"], kind="stable")[:72]
    else:
        kept = golden["kept" + suffix]
    assert merged.kept[0].tolist() == [*kept.tolist(), -1]


def test_a_ragged_batch_of_all_photographs(backend):
    """Images of one shape together give each image what it gives alone."""
    files = [dict(np.load(path)) for path in GOLDEN if path.stem.startswith("photo")]
    inputs = [torch.cat(parts) for parts in zip(*map(golden_inputs, files), strict=True)]
    merged = prune_merge(*inputs, backend=backend)
    assert len(merged) == 2
    assert merged.lengths.tolist() == [len(file["tokens"]) for file in files]
    for rows, file in zip(merged.split(), files, strict=True):
        torch.testing.assert_close(rows, torch.from_numpy(file["tokens"]), **ROUNDING)
