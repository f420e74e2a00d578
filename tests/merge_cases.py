"""Inputs, tolerances and comparisons that the tests of `prune_merge` share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prumerge_fast.reduction.output import MergedTokens

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.npz"))

# Sums are rounded in float32 in whatever order, then once to the dtype: at most one step of it.
TOLERANCES = {
    torch.float16: {"rtol": torch.finfo(torch.float16).eps, "atol": 2e-6},
    torch.bfloat16: {"rtol": torch.finfo(torch.bfloat16).eps, "atol": 2e-6},
    torch.float32: {"rtol": 2e-6, "atol": 2e-6},
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
}


def smooth_inputs(
    batch: int, patches: int, channels: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Normal queries, keys and hidden; in float64, no two scores or similarities are near."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    rows = 1 + patches
    return (
        2 * normal(batch, channels),
        normal(batch, rows, channels),
        normal(batch, rows, channels),
    )


def grid_inputs(
    batch: int, patches: int, channels: int = 16, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose scores and cosines are exact in float32, so that ties are frequent and exact.

    Keys are ±1/2, ±1 or ±2 throughout a token and queries are multiples of 1/8; with `channels` a
    power of 4, every product, norm and quotient is then exact in any order of summation.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = 1 + patches
    signs = torch.randint(0, 2, (batch, rows, channels), generator=generator) * 2 - 1
    scale = torch.randint(-1, 2, (batch, rows, 1), generator=generator)
    query = torch.randint(-16, 17, (batch, channels), generator=generator) / 8
    hidden = torch.randn(batch, rows, channels, generator=generator)
    return query.to(dtype), (signs * 2.0**scale).to(dtype), hidden.to(dtype)


def golden_inputs(golden: dict[str, np.ndarray]) -> tuple[Tensor, Tensor, Tensor]:
    """Query, keys and hidden of a golden file in float32, as a batch of one."""
    query, keys, hidden = (
        torch.from_numpy(golden[name]).float()[None] for name in ("q_cls", "keys", "hidden")
    )
    return query, keys, hidden


def assert_same(actual: MergedTokens, expected: MergedTokens, *, equal_nan: bool = False) -> None:
    """Indices and lengths exactly, values within `TOLERANCES`."""
    dtype = expected.tokens.dtype
    assert actual.tokens.dtype == dtype
    assert actual.attention.dtype == expected.attention.dtype
    assert actual.kept.dtype == actual.lengths.dtype == torch.int32
    assert actual.lengths.tolist() == expected.lengths.tolist()
    assert actual.kept.tolist() == expected.kept.tolist()
    torch.testing.assert_close(
        actual.attention,
        expected.attention,
        **TOLERANCES[expected.attention.dtype],
        equal_nan=equal_nan,
    )
    torch.testing.assert_close(
        actual.tokens, expected.tokens, **TOLERANCES[dtype], equal_nan=equal_nan
    )
