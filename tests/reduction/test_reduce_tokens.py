"""`reduce_tokens`: the reduction by scores that are given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import ptxemu
import pytest
import torch
from kernel_cases import CONFIGS, TOLERANCE, relative_error
from merge_cases import TOLERANCES, assert_same, grid_inputs, smooth_inputs
from torch import Tensor

import prumerge_fast
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge, reduce_tokens

BACKENDS = ("torch", "reference")


def scored(
    batch: int, patches: int, channels: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores [B, N] with ties, keys [B, N, C] of exact cosines, and features [B, N, D]."""
    generator = torch.Generator().manual_seed(patches + width)
    attention = torch.randint(0, 40, (batch, patches), generator=generator) ** 3 / 2**16
    _, keys, _ = grid_inputs(batch, patches, channels, dtype, seed=1)
    hidden = torch.randn(batch, patches, width, generator=generator)
    return attention, keys[:, 1:], hidden.to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", ["prumerge", "prumerge+"])
def test_prune_merge_is_it_with_class_attention(variant: str, backend: str) -> None:
    query, keys, hidden = smooth_inputs(3, 50, 16)
    config = PruMergeConfig(variant=variant)
    whole = prune_merge(query, keys, hidden, config, backend=backend)
    found = reduce_tokens(whole.attention, keys[:, 1:], hidden[:, 1:], config, backend=backend)
    assert_same(found, whole)


@pytest.mark.parametrize(
    ("variant", "keep", "merge", "order"),
    list(
        itertools.product(
            ["prumerge", "prumerge+"],
            [None, 1, 9, 0.4, 36],
            ["sum", "average", "none"],
            ["attention", "raster"],
        )
    ),
)
@pytest.mark.parametrize("width", [5, 16, 40])
def test_features_of_any_width(variant: str, keep: Any, merge: str, order: str, width: int) -> None:
    config = PruMergeConfig(variant=variant, keep=keep, merge=merge, order=order, neighbours=4)
    inputs = scored(3, 36, 16, width)
    found, expected = (reduce_tokens(*inputs, config, backend=name) for name in BACKENDS)
    assert_same(found, expected)
    assert found.tokens.shape[2] == width


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    attention, keys, hidden = scored(2, 49, 64, 24, dtype)
    for scores in (attention, attention.double(), attention.bfloat16().float()):
        found, expected = (
            reduce_tokens(scores, keys, hidden, PruMergeConfig(), backend=name) for name in BACKENDS
        )
        assert_same(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_that_are_none_rank_as_zero(backend: str) -> None:
    attention, keys, hidden = scored(1, 12, 16, 8)
    attention[0] = torch.tensor([0, 1, -5, 0, torch.nan, 3, -0.0, 0, 2, 0, -1, 0])
    for keep, kept in ((3, [5, 8, 1]), (6, [5, 8, 1, 0, 2, 3])):
        config = PruMergeConfig(keep=keep, supplement=False)
        found = reduce_tokens(attention, keys, hidden, config, backend=backend)
        assert found.kept[0].tolist() == kept
    torch.testing.assert_close(found.attention, attention, equal_nan=True)
    plain = PruMergeConfig(supplement=False, merge="none")
    found = reduce_tokens(attention, keys, hidden, plain, backend=backend)
    assert found.kept[0].tolist() == [5, 8, 1]  # quartiles 0 and 0.25: a fence of 0.625


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("merge", ["sum", "average", "none"])
def test_gradients(merge: str, backend: str) -> None:
    """Of scores and features; keys only choose."""
    config = PruMergeConfig(keep=4, neighbours=3, merge=merge)
    attention, keys, hidden = scored(2, 9, 16, 5, torch.float64)
    attention = (attention.double() + torch.arange(9) / 100).requires_grad_()
    hidden.requires_grad_()
    keys.requires_grad_()

    def reduce(attention: Tensor, hidden: Tensor) -> Tensor:
        return reduce_tokens(attention, keys, hidden, config, backend=backend).tokens

    assert torch.autograd.gradcheck(reduce, (attention, hidden))
    reduce(attention, hidden).sum().backward()
    assert keys.grad is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_images(backend: str) -> None:
    for config in (PruMergeConfig(), PruMergeConfig(keep=3)):
        found = reduce_tokens(*(one[:0] for one in scored(2, 9, 4, 6)), config, backend=backend)
        assert found.tokens.shape[::2] == (0, 6)
        assert len(found) == 0


def bad(**changes: Any) -> dict[str, Any]:
    names = ("attention", "keys", "hidden")
    return dict(zip(names, scored(2, 9, 4, 6), strict=True)) | changes


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (bad(attention=[1]), TypeError, "attention: expected a torch.Tensor, got list"),
        (bad(attention=torch.ones(2, 9).int()), TypeError, "attention: expected dtype"),
        (bad(attention=torch.ones(2, 10)), ValueError, r"attention: expected shape \[2, 9\]"),
        (bad(attention=torch.ones(9)), ValueError, "attention: expected shape"),
        (bad(keys=torch.ones(2, 9)), ValueError, r"keys: expected shape \[B, N, C\]"),
        (bad(keys=torch.ones(2, 0, 4)), ValueError, "at least one token"),
        (bad(hidden=torch.ones(2, 10, 6)), ValueError, r"hidden: expected shape \[2, 9, D\]"),
        (bad(hidden=torch.ones(2, 9, 0)), ValueError, "D >= 1"),
        (bad(hidden=torch.ones(2, 9, 6).half()), TypeError, "hidden: expected the dtype of keys"),
        (bad(hidden=torch.ones(2, 9, 6, device="meta")), ValueError, "the device of keys"),
        (bad(config={"keep": 3}), TypeError, "config: expected a PruMergeConfig"),
        (bad(config=PruMergeConfig(keep=10)), ValueError, "keep: expected at most N = 9"),
        (bad(backend="cuda"), ValueError, "backend: expected one of"),
    ],
)
def test_errors(arguments: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        prumerge_fast.reduce_tokens(**arguments)


@pytest.fixture
def emulator() -> Iterator[ptxemu.Emulator]:
    with ptxemu.install(80, schedule="lockstep") as installed:
        yield installed


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "width"), [(torch.float32, 10), (torch.float16, 24), (torch.bfloat16, 40)], ids=str
)
def test_kernel(emulator: ptxemu.Emulator, name: str, dtype: torch.dtype, width: int) -> None:
    attention, keys, hidden = scored(2, 20, 16, width, dtype)
    attention[0, 3], attention[1, 5] = torch.nan, -1.0
    attention[0, 4] = torch.nan
    config = CONFIGS[name]
    expected = reduce_tokens(
        attention.double(), keys.double(), hidden.double(), config, backend="torch"
    )
    found = reduce_tokens(attention, keys, hidden, config, backend="triton")
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.kept, expected.kept)
    torch.testing.assert_close(found.attention, attention, equal_nan=True)
    finite = expected.tokens.isfinite()
    assert torch.equal(found.tokens.isfinite(), finite)
    assert relative_error(found.tokens[finite], expected.tokens[finite]) < TOLERANCE[dtype]


def test_kernel_takes_any_strides(emulator: ptxemu.Emulator) -> None:
    attention, keys, hidden = scored(2, 20, 16, 12)
    strided = (
        attention.t().contiguous().t(),
        keys.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat((hidden, hidden), 2)[:, :, 6:18],
    )
    expected = reduce_tokens(*(one.contiguous() for one in strided), backend="torch")
    found = reduce_tokens(*strided, backend="triton")
    assert torch.equal(found.kept, expected.kept)
    assert relative_error(found.tokens, expected.tokens) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", ["default", "plus-budget", "budget-average"])
def test_operator_is_sound(emulator: ptxemu.Emulator, name: str) -> None:
    config = CONFIGS[name]
    attention, keys, hidden = scored(2, 20, 16, 12)
    attention = (attention + torch.arange(20) / 100).requires_grad_()
    hidden.requires_grad_()
    budget = config.budget(20)
    options = (config.variant, config.neighbours, config.fence, config.merge, config.supplement)
    torch.library.opcheck(
        torch.ops.prumerge_fast.reduce_tokens.default,
        (attention, keys, hidden, -1 if budget is None else budget, *options, config.order),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_gradients_of_the_operator(emulator: ptxemu.Emulator, name: str) -> None:
    inputs = scored(2, 20, 16, 12)
    gradients = []
    for backend in ("triton", "torch"):
        attention, keys, hidden = (one.clone().requires_grad_() for one in inputs)
        merged = reduce_tokens(attention, keys, hidden, CONFIGS[name], backend=backend)
        (merged.tokens.square().sum() + (merged.attention * 3).sum()).backward()
        gradients.append((attention.grad, hidden.grad))
    for found, expected in zip(*gradients, strict=True):
        assert relative_error(found, expected) < 1e-5
