"""`MergedTokens`: the views without padding."""

import dataclasses

import pytest
import torch

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.output import MergedTokens


@pytest.fixture
def merged():
    tokens = torch.arange(24.0).reshape(3, 4, 2)
    lengths = torch.tensor([2, 4, 0], dtype=torch.int32)
    return MergedTokens(tokens, lengths, torch.zeros(3, 4, dtype=torch.int32), torch.zeros(3, 9))


def test_split(merged):
    rows = merged.split()
    assert [r.tolist() for r in rows] == [[[0, 1], [2, 3]], merged.tokens[1].tolist(), []]


def test_packed(merged):
    tokens, cu_seqlens = merged.packed()
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 2, 6, 6]
    assert torch.equal(tokens, torch.cat(merged.split()))


def test_len_and_frozen(merged):
    assert len(merged) == 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        merged.tokens = None


def test_no_images():
    empty = prune_merge(torch.ones(0, 4), torch.ones(0, 6, 4), torch.ones(0, 6, 4))
    assert len(empty) == 0
    assert empty.split() == []
    tokens, cu_seqlens = empty.packed()
    assert tokens.shape == (0, 4)
    assert cu_seqlens.tolist() == [0]


def test_packed_keeps_gradients():
    hidden = torch.randn(2, 10, 4, requires_grad=True)
    merged = prune_merge(torch.randn(2, 4), torch.randn(2, 10, 4), hidden, PruMergeConfig(keep=3))
    merged.packed()[0].sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[:, 1:].abs().sum() > 0
    assert (hidden.grad[:, 0] == 0).all()  # the class token itself is not merged
