"""Inputs for the kernel's tests, and what its results are held against."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import prumerge_fast
from prumerge_fast.demo import PROMPT, load_demo
from prumerge_fast.demo.scenes import benchmark
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.output import MergedTokens

# Largest error relative to the largest value of the tokens.
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 2e-5}
# Of the largest attention. Scores of about 10 are float32 sums of C products, right to about 1e-5,
# and softmax turns an absolute error of a score into the same relative error of attention.
ATTENTION_TOLERANCE = 3e-5

CONFIGS = {
    "default": PruMergeConfig(neighbours=8),
    "plus": PruMergeConfig(variant="prumerge+", neighbours=5, fence=0.5),
    "budget-average": PruMergeConfig(keep=7, neighbours=6, merge="average", order="raster"),
    "plus-budget": PruMergeConfig(variant="prumerge+", keep=9, neighbours=1, supplement=False),
    "none": PruMergeConfig(merge="none", fence=0.25),
    # Two tiles of rows in one program: the second must wait for the first.
    "plus-none": PruMergeConfig(variant="prumerge+", merge="none", fence=0.25),
    "everything": PruMergeConfig(keep=1.0, neighbours=1000, merge="average"),
}

Inputs = tuple[Tensor, Tensor, Tensor]


def random_inputs(
    batch: int, num_patches: int, channels: int, dtype: torch.dtype, seed: int = 0
) -> Inputs:
    """Query [B, C], keys and hidden [B, 1+N, C] with some outliers of attention."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    query = 2 * normal(batch, channels)
    keys = normal(batch, 1 + num_patches, channels)
    keys[:, 1::7] += 0.5 * query[:, None]
    hidden = normal(batch, 1 + num_patches, channels)
    return query.to(dtype), keys.to(dtype), hidden.to(dtype)


def tied_inputs(dtype: torch.dtype) -> Inputs:
    """Keys of small integers, every product and sum exact, so that equal keys tie exactly."""
    query, keys, hidden = random_inputs(1, 24, 32, dtype)
    keys = (keys.float() * 2).round().to(dtype)
    keys[:, 9:17] = keys[:, 1:9]
    return query, keys, hidden


def golden(name: str) -> tuple[Inputs, dict[str, np.ndarray]]:
    """A batch of one golden image, and the authors' results for it."""
    with np.load(Path(__file__).parent / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    query, keys, hidden = (
        torch.from_numpy(arrays[key])[None] for key in ("q_cls", "keys", "hidden")
    )
    return (query, keys, hidden), arrays


GOLDEN = ("heavy_tailed_0", "photo_chelsea", "photo_china")


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest expected value."""
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp(min=1e-30))


def poison_new_memory() -> None:
    """`torch.empty` gives NaN or the largest integer from now on: what is not written shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True


def assert_like_torch(inputs: Inputs, config: PruMergeConfig, dtype: torch.dtype) -> MergedTokens:
    """Runs the kernel and holds it against the torch backend in float64."""
    expected = prune_merge(*(tensor.double() for tensor in inputs), config, backend="torch")
    found = prune_merge(*inputs, config, backend="triton")
    assert torch.equal(found.lengths, expected.lengths)
    assert torch.equal(found.kept, expected.kept)
    assert found.tokens.dtype == dtype
    assert relative_error(found.attention, expected.attention) < ATTENTION_TOLERANCE
    assert relative_error(found.tokens, expected.tokens) < TOLERANCE[dtype]
    for tokens, length in zip(found.tokens, found.lengths.tolist(), strict=True):
        assert not tokens[length:].any()
    return found


def assert_like_golden(name: str, config: PruMergeConfig, suffix: str, dtype: torch.dtype) -> None:
    """Runs the kernel on a golden image and holds it against the authors' results.

    Those are of float16 inputs, which bfloat16 cannot hold: then it is the torch backend's, of
    the rounded inputs. Indices are compared exactly in every dtype.
    """
    inputs, expected = golden(name)
    query, keys, hidden = (tensor.to(dtype) for tensor in inputs)
    if dtype == torch.bfloat16:
        assert_like_torch((query, keys, hidden), config, dtype)
        return
    merged = prune_merge(query, keys, hidden, config, backend="triton")
    if suffix == "_top72":
        kept = np.argsort(-expected["attention"], kind="stable")[:72]
    else:
        kept = expected[f"kept{suffix}"]
    assert merged.kept[0].tolist() == [*kept.tolist(), -1]
    attention = torch.from_numpy(expected["attention"])
    assert relative_error(merged.attention[0], attention) < ATTENTION_TOLERANCE
    tokens = torch.from_numpy(expected[f"tokens{suffix}"])
    assert merged.tokens.shape[1] == len(tokens)
    assert relative_error(merged.tokens[0], tokens) < TOLERANCE[dtype]


def assert_same_neighbours(name: str, dtype: torch.dtype) -> None:
    """Which tokens merge into which centre of a golden image, index by index.

    A neighbour of little attention changes a row by less than half precision's tolerance. With the
    identity for tokens the rows are the weights, of which exactly those of neighbours are not zero.
    """
    (query, keys, _), _ = golden(name)
    num_patches, channels = keys.shape[1] - 1, keys.shape[2]
    width = -(-num_patches // channels) * channels
    hidden = torch.eye(1 + num_patches, 1 + width)[None, :, 1:]  # row 0 is the class token's
    inputs = query.to(dtype), keys.to(dtype), hidden.to(dtype)
    found = prune_merge(*inputs, backend="triton")
    expected = prune_merge(*(tensor.double() for tensor in inputs), backend="torch")
    assert torch.equal(found.kept, expected.kept)
    assert torch.equal(found.tokens != 0, expected.tokens != 0)


def assert_like_torch_but_not_finite(inputs: Inputs, config: PruMergeConfig) -> None:
    """`assert_like_torch` for a batch of two float16 images of which the first is not finite."""
    expected = prune_merge(*(tensor.float() for tensor in inputs), config, backend="torch")
    found = prune_merge(*inputs, config, backend="triton")
    assert torch.equal(found.kept, expected.kept)
    assert torch.equal(found.attention.isnan(), expected.attention.isnan())
    assert relative_error(found.tokens[1], expected.tokens[1]) < TOLERANCE[torch.float16]
    if inputs[2].isfinite().all():  # else backends may differ in which rows of it are finite
        is_nan = expected.tokens[0].isnan()
        assert torch.equal(found.tokens[0].isnan(), is_nan)
        theirs = expected.tokens[0].masked_fill(is_nan, 0.0)
        ours = found.tokens[0].masked_fill(is_nan, 0.0)
        assert relative_error(ours, theirs) < TOLERANCE[torch.float16]
    for tokens, length in zip(found.tokens, found.lengths.tolist(), strict=True):
        assert not tokens[length:].any()  # NaN counts as any


@torch.no_grad()
def assert_generates_like_torch() -> None:
    """The patched demo model answers with the kernel as it does with the torch backend."""
    model, processor = load_demo()
    scenes = benchmark("validation", 2)
    inputs = processor(
        images=[scene.render() for scene, _ in scenes],
        text=[PROMPT.format(question=question.text) for _, question in scenes],
        padding=True,
        return_tensors="pt",
    )
    outputs = {}
    for backend in ("torch", "triton"):
        with prumerge_fast.patched(model, backend=backend):
            ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)
            outputs[backend] = ids.tolist(), model.prumerge.last_lengths
    assert outputs["triton"] == outputs["torch"]


IMAGES, TOKENS, CHANNELS = 2**31 + 8, 2**27 + 8, 2**26 + 8  # strides


def far_apart(tensor: Tensor, axis: int, stride: int) -> Tensor:
    """The same values, with 2**31 elements or more between the ends of an axis.

    Most of the memory behind them is never touched, so none is taken.
    """
    shape = list(tensor.shape)
    strides = list(tensor.contiguous().stride())
    strides[axis] = stride
    size = 1 + sum((n - 1) * step for n, step in zip(shape, strides, strict=True))
    assert size > 2**31
    # Not `torch.empty`, which poisoning would fill.
    storage = torch.from_numpy(np.empty(size, np.float16))
    return storage.as_strided(shape, strides).copy_(tensor)
