"""The kernel in Triton's interpreter; `test_kernel_interpreter.py` runs this with it switched on.

No bfloat16: the interpreter computes it wrongly (ptxemu does not).
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    CONFIGS,
    GOLDEN,
    TOLERANCE,
    assert_generates_like_torch,
    assert_like_golden,
    assert_like_torch,
    random_inputs,
    relative_error,
)

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge, reduce_tokens
from prumerge_fast.reduction.received import received_attention

slow = pytest.mark.slow


@pytest.fixture(params=[torch.float32, torch.float16], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.mark.parametrize("name", CONFIGS)
def test_every_option(name: str, dtype: torch.dtype) -> None:
    assert_like_torch(random_inputs(2, 23, 40, dtype), CONFIGS[name], dtype)


@pytest.mark.parametrize(
    ("num_patches", "channels"),
    [
        (16, 64),
        (49, 384),
        (196, 192),
        pytest.param(256, 768, marks=slow),
        pytest.param(577, 1000, marks=slow),
        pytest.param(729, 1152, marks=slow),
        pytest.param(1024, 1664, marks=slow),
    ],
)
def test_shapes(num_patches: int, channels: int, dtype: torch.dtype) -> None:
    inputs = random_inputs(1, num_patches, channels, dtype)
    assert_like_torch(inputs, PruMergeConfig(fence=2.5), dtype)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    ("config", "suffix"),
    [
        (PruMergeConfig(), ""),
        pytest.param(PruMergeConfig(variant="prumerge+"), "_plus", marks=slow),
        pytest.param(PruMergeConfig(keep=72), "_top72", marks=slow),
    ],
    ids=["prumerge", "plus", "top72"],
)
def test_golden(name: str, config: PruMergeConfig, suffix: str, dtype: torch.dtype) -> None:
    assert_like_golden(name, config, suffix, dtype)


def test_feature_layers_side_by_side(dtype: torch.dtype) -> None:
    query, keys, hidden = random_inputs(2, 23, 40, dtype)
    layers = torch.cat((hidden, keys), 2)  # [B, 1+N, 2 * C]
    assert_like_torch((query, keys, layers), CONFIGS["default"], dtype)


@pytest.mark.parametrize("class_token", [False, True])
def test_received_attention(dtype: torch.dtype, class_token: bool) -> None:
    _, query, keys = random_inputs(2, 70, 72, dtype)
    options = {"num_heads": 3, "class_token": class_token}
    expected = received_attention(query.double(), keys.double(), **options)
    found = received_attention(query, keys, **options, backend="triton")
    assert relative_error(found, expected) < (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_scores_that_are_given(name: str, dtype: torch.dtype) -> None:
    query, keys, hidden = random_inputs(2, 23, 40, dtype)
    attention = prune_merge(query, keys, hidden, backend="torch").attention
    inputs = (attention, keys[:, 1:], torch.cat((hidden, hidden), 2)[:, 1:, 30:])
    expected = reduce_tokens(*inputs, CONFIGS[name], backend="torch")
    found = reduce_tokens(*inputs, CONFIGS[name], backend="triton")
    assert torch.equal(found.kept, expected.kept)
    assert relative_error(found.tokens, expected.tokens) < TOLERANCE[dtype]


def test_patched_generate() -> None:
    assert_generates_like_torch()
