"""`PruMergeConfig.scores` and `heads` in `prune_merge`, on every backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import ptxemu
import pytest
import torch
from kernel_cases import TOLERANCE, relative_error
from merge_cases import smooth_inputs
from torch import Tensor

from prumerge_fast.errors import BackendUnavailableError
from prumerge_fast.reduction import dispatch
from prumerge_fast.reduction.config import PruMergeConfig, Scoring
from prumerge_fast.reduction.dispatch import prune_merge, reduce_tokens

HEADS = 4


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all rows, keys and hidden [2, 1+20, 16]."""
    _, keys, hidden = smooth_inputs(2, 20, 16, seed=1)
    _, query, _ = smooth_inputs(2, 20, 16, seed=2)
    return (2 * query).to(dtype), keys.to(dtype), hidden.to(dtype)


def attention_of(query: Tensor, keys: Tensor, scores: str, heads: int) -> Tensor:
    """[B, N], by hand."""
    q, k = (one.unflatten(2, (heads, -1)).transpose(1, 2) for one in (query, keys))
    shares = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5).softmax(3)
    asking = shares[:, :, 1:] if scores == "received" else shares[:, :, :1]
    return asking.mean((1, 2))[:, 1:]


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize(
    ("scores", "heads", "by"),
    [
        ("class", "joint", ("class", 1)),
        ("class", "auto", ("class", 1)),
        ("auto", "auto", ("class", 1)),
        ("auto", "separate", ("class", HEADS)),
        ("received", "auto", ("received", HEADS)),
        ("received", "joint", ("received", 1)),
    ],
)
def test_scores(scores: str, heads: str, by: tuple[str, int], backend: str) -> None:
    query, keys, hidden = inputs()
    config = PruMergeConfig(keep=7, scores=scores, heads=heads)
    attention = attention_of(query, keys, *by)
    expected = reduce_tokens(attention, keys[:, 1:], hidden[:, 1:], config, backend="reference")
    found = prune_merge(query, keys, hidden, config, num_heads=HEADS, backend=backend)
    torch.testing.assert_close(found.attention, attention)
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.tokens, expected.tokens)
    if by[0] == "class":  # one row of queries is enough
        alone = prune_merge(query[:, 0], keys, hidden, config, num_heads=HEADS, backend=backend)
        assert torch.equal(alone.tokens, found.tokens)


@pytest.mark.parametrize(("scores", "heads"), [("class", "separate"), ("received", "auto")])
def test_gradients(scores: str, heads: str) -> None:
    config = PruMergeConfig(keep=4, scores=scores, heads=heads)
    tensors = tuple(one.requires_grad_() for one in inputs())

    def reduce(*tensors: Tensor) -> Tensor:
        return prune_merge(*tensors, config, num_heads=HEADS).tokens

    assert torch.autograd.gradcheck(reduce, tensors)
    assert torch.autograd.gradgradcheck(reduce, tensors)


@pytest.fixture
def emulator() -> Iterator[ptxemu.Emulator]:
    with ptxemu.install(80, schedule="lockstep") as installed:
        yield installed


@pytest.mark.parametrize(
    ("scores", "heads"), [("class", "separate"), ("received", "auto"), ("received", "joint")]
)
def test_kernels(emulator: ptxemu.Emulator, scores: str, heads: str) -> None:
    config = PruMergeConfig(keep=7, scores=scores, heads=heads)
    expected = prune_merge(*inputs(), config, num_heads=HEADS)
    given = inputs(torch.float32)
    found = prune_merge(*given, config, num_heads=HEADS, backend="triton")
    assert torch.equal(found.kept, expected.kept)
    assert relative_error(found.tokens, expected.tokens) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("scores", "heads"), [("class", "separate"), ("received", "auto")])
def test_heads_counted_by_numpy(scores: str, heads: str) -> None:
    config = PruMergeConfig(keep=7, scores=scores, heads=heads)
    found = prune_merge(*inputs(), config, num_heads=np.int64(HEADS))  # type: ignore[arg-type]
    assert torch.equal(found.tokens, prune_merge(*inputs(), config, num_heads=HEADS).tokens)


def test_what_is_missing_is_named() -> None:
    query, keys, hidden = inputs()
    received = PruMergeConfig(scores="received")
    with pytest.raises(ValueError, match="num_heads: expected the layer's number of heads, got No"):
        prune_merge(query, keys, hidden, received)
    with pytest.raises(ValueError, match=r"num_heads: expected a divisor of C = 16, .* got 3"):
        prune_merge(query, keys, hidden, received, num_heads=3)
    with pytest.raises(ValueError, match=r"query: expected those of all patches, .* got \[2, 16\]"):
        prune_merge(query[:, 0], keys, hidden, received, num_heads=HEADS)
    with pytest.raises(ValueError, match="num_heads"):
        prune_merge(query, keys, hidden, PruMergeConfig(heads="separate"))


@pytest.mark.parametrize(("scores", "heads"), [("class", "separate"), ("received", "auto")])
def test_errors_come_before_scores(
    scores: str, heads: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("scores were computed")

    for name in ("received_attention", "class_attention_by_head"):
        monkeypatch.setattr(dispatch, name, refuse)
    config = PruMergeConfig(keep=21, scores=scores, heads=heads)
    with pytest.raises(ValueError, match="keep: expected at most N = 20"):
        prune_merge(*inputs(), config, num_heads=HEADS)
    with pytest.raises(BackendUnavailableError, match=r"not torch\.float64"):
        prune_merge(*inputs(), config.replace(keep=7), num_heads=HEADS, backend="triton")


def test_without_a_class_token() -> None:
    assert PruMergeConfig().scoring() == Scoring(received=False, separate=False)
    assert PruMergeConfig().scoring(class_token=False) == Scoring(received=True, separate=True)
    with pytest.raises(
        ValueError, match="scores: expected 'auto' or 'received' for a vision tower"
    ):
        PruMergeConfig(scores="class").scoring(class_token=False)
