"""The compiled kernel against the torch backend, run by the emulator: real layouts, rounding to
bfloat16, every access in bounds, no data race, whatever the order of programs and warps."""

from __future__ import annotations

from collections.abc import Iterator

import ptxemu
import pytest
import torch
from kernel_cases import (
    CHANNELS,
    CONFIGS,
    GOLDEN,
    IMAGES,
    TOKENS,
    assert_like_golden,
    assert_like_torch,
    assert_like_torch_but_not_finite,
    assert_same_neighbours,
    far_apart,
    poison_new_memory,
    random_inputs,
    tied_inputs,
)

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture
def emulator() -> Iterator[ptxemu.Emulator]:
    poison_new_memory()
    with ptxemu.install(80, schedule="interleave", check_races="raise") as installed:
        yield installed
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_option(emulator: ptxemu.Emulator, name: str, dtype: torch.dtype) -> None:
    assert_like_torch(random_inputs(2, 20, 40, dtype), CONFIGS[name], dtype)
    assert emulator.last is not None
    assert emulator.last.races == []


@pytest.mark.parametrize("capability", [80, 89, 120])
@pytest.mark.parametrize("schedule", ["interleave", "shuffle"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.slow
def test_every_schedule(
    emulator: ptxemu.Emulator, capability: int, schedule: str, seed: int, dtype: torch.dtype
) -> None:
    emulator.capability, emulator.schedule, emulator.seed = capability, schedule, seed
    inputs = random_inputs(3, 70, 72, dtype, seed)
    for config in (CONFIGS["default"], CONFIGS["plus"]):
        assert_like_torch(inputs, config, dtype)


@pytest.mark.parametrize(
    ("num_patches", "channels"), [(1, 64), (2, 16), (16, 65), (49, 64), (65, 24)]
)
def test_odd_shapes(emulator: ptxemu.Emulator, num_patches: int, channels: int) -> None:
    emulator.schedule = "shuffle"
    inputs = random_inputs(1, num_patches, channels, torch.float16)
    assert_like_torch(inputs, CONFIGS["default"], torch.float16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_patches", "channels"),
    [
        (256, 768),
        (16, 64),
        (49, 384),
        (196, 192),
        (576, 1024),
        (577, 1000),
        (729, 1152),
        (1024, 1664),
    ],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes_of_real_towers(
    emulator: ptxemu.Emulator, num_patches: int, channels: int, dtype: torch.dtype
) -> None:
    emulator.schedule, emulator.check_races = "lockstep", False
    assert_like_torch(
        random_inputs(1, num_patches, channels, dtype), PruMergeConfig(fence=2.5), dtype
    )


def test_strides(emulator: ptxemu.Emulator) -> None:
    query, keys, hidden = random_inputs(2, 20, 40, torch.float16)
    apart = torch.stack((query, query), 2)[:, :, 0]  # [B, C], every second element
    transposed = keys.transpose(1, 2).contiguous().transpose(1, 2)
    sliced = torch.cat((hidden, hidden), 2)[:, :, :40]
    inputs = (apart, transposed, sliced)
    assert not any(tensor.is_contiguous() for tensor in inputs)
    assert_like_torch(inputs, CONFIGS["default"], torch.float16)


@pytest.mark.parametrize(
    ("where", "strides"),
    [(0, (IMAGES, CHANNELS)), (1, (IMAGES, TOKENS, CHANNELS)), (2, (IMAGES, TOKENS, CHANNELS))],
    ids=["query", "keys", "hidden"],
)
def test_offsets_past_32_bits(
    emulator: ptxemu.Emulator, where: int, strides: tuple[int, ...]
) -> None:
    emulator.schedule, emulator.check_races = "lockstep", False
    inputs = random_inputs(2, 20, 40, torch.float16)
    for axis, stride in enumerate(strides):
        moved = list(inputs)
        moved[where] = far_apart(inputs[where], axis, stride)
        assert_like_torch((moved[0], moved[1], moved[2]), CONFIGS["default"], torch.float16)


def test_no_images(emulator: ptxemu.Emulator) -> None:
    merged = prune_merge(*random_inputs(0, 20, 40, torch.float16), backend="triton")
    assert merged.tokens.shape[0] == merged.kept.shape[0] == 0


def test_lengths_differ_within_a_batch(emulator: ptxemu.Emulator) -> None:
    query, keys, hidden = random_inputs(3, 40, 32, torch.float16)
    query[1] = 0  # all attention equal: no outlier
    query[2] *= 4
    found = assert_like_torch((query, keys, hidden), CONFIGS["default"], torch.float16)
    assert len(set(found.lengths.tolist())) == 3
    assert found.lengths[1] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_ties_go_to_the_lower_index(emulator: ptxemu.Emulator, dtype: torch.dtype) -> None:
    query, keys, hidden = tied_inputs(dtype)
    for config in (
        PruMergeConfig(keep=11, neighbours=5),
        PruMergeConfig(keep=6, neighbours=3, merge="average"),
    ):
        assert_like_torch((query, keys, hidden), config, dtype)
    keys[:] = keys[:, :1]
    assert_like_torch((query, keys, hidden), PruMergeConfig(keep=5, neighbours=7), dtype)
    assert_like_torch((query, torch.zeros_like(keys), hidden), PruMergeConfig(keep=5), dtype)


@pytest.mark.parametrize("merge", ["sum", "average"])
def test_one_token_takes_all_attention(emulator: ptxemu.Emulator, merge: str) -> None:
    query, keys, hidden = random_inputs(1, 40, 64, torch.float16)
    keys[:, 5] = (query * 3).half()
    config = PruMergeConfig(keep=10, neighbours=4, merge=merge)  # type: ignore[arg-type]
    found = assert_like_torch((query, keys, hidden), config, torch.float16)
    assert found.attention.max() > 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_average_of_subnormal_weights(emulator: ptxemu.Emulator, dtype: torch.dtype) -> None:
    """The class token attends to itself, and what is left over has no inverse in float32."""
    query, keys, hidden = random_inputs(1, 24, 64, torch.float32)
    query[:], keys[:, :, 0] = 0, -91
    query[:, 0], keys[:, 0] = 8, 0  # scores: one 0, all others -91
    config = PruMergeConfig(keep=24, neighbours=3, merge="average", supplement=False)
    inputs = (query.to(dtype), (keys * 8).to(dtype), hidden.to(dtype))
    inputs[1][:, :, 0] /= 8
    found = assert_like_torch(inputs, config, dtype)
    assert 0 < found.attention.max() < 1e-38


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["query", "keys", "hidden", "key of one patch"])
def test_values_that_are_not_finite(emulator: ptxemu.Emulator, value: float, where: str) -> None:
    emulator.schedule, emulator.max_instructions = "lockstep", 3_000_000
    query, keys, hidden = inputs = random_inputs(2, 20, 32, torch.float16)
    if where == "key of one patch":
        # One of the infinities makes its score -inf: attention stays finite, similarities do not.
        keys[0, 7, 3] = value
    else:
        {"query": query, "keys": keys, "hidden": hidden}[where][0, ..., 3] = value
    for config in (CONFIGS["default"], CONFIGS["budget-average"], CONFIGS["plus-budget"]):
        assert_like_torch_but_not_finite(inputs, config)


@pytest.mark.parametrize("batch", [150, pytest.param(2000, marks=pytest.mark.slow)])
def test_many_images(emulator: ptxemu.Emulator, batch: int) -> None:
    emulator.schedule, emulator.check_races = "lockstep", False
    inputs = random_inputs(batch, 2, 8, torch.float16)
    assert_like_torch(inputs, PruMergeConfig(keep=1, neighbours=1), torch.float16)
    assert emulator.last is not None
    assert emulator.last.grid == (batch, 1, 1)


@pytest.mark.parametrize("name", GOLDEN)
@pytest.mark.parametrize(
    ("config", "suffix"),
    [
        (PruMergeConfig(), ""),
        pytest.param(PruMergeConfig(variant="prumerge+"), "_plus", marks=pytest.mark.slow),
        pytest.param(PruMergeConfig(keep=72), "_top72", marks=pytest.mark.slow),
    ],
    ids=["prumerge", "plus", "top72"],
)
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.bfloat16)),
    ],
    ids=str,
)
def test_golden(
    emulator: ptxemu.Emulator, name: str, config: PruMergeConfig, suffix: str, dtype: torch.dtype
) -> None:
    emulator.schedule, emulator.check_races = "lockstep", False
    assert_like_golden(name, config, suffix, dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("photo_chelsea", torch.float16),
        pytest.param("photo_chelsea", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("heavy_tailed_0", torch.float16, marks=pytest.mark.slow),
        pytest.param("heavy_tailed_0", torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("heavy_tailed_0", torch.float32, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_neighbours_are_the_same_tokens(
    emulator: ptxemu.Emulator, name: str, dtype: torch.dtype
) -> None:
    emulator.schedule, emulator.check_races = "lockstep", False
    assert_same_neighbours(name, dtype)
