"""`PruMergeConfig`: what it accepts, what it refuses, and the counts derived from it."""

import dataclasses

import numpy as np
import pytest
import torch

from prumerge_fast.reduction.config import PruMergeConfig


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variant", "PruMerge"),
        ("merge", "mean"),
        ("order", "random"),
        ("positions", "raster"),
        ("supplement", "crop"),
        ("keep", 0),
        ("keep", -3),
        ("keep", 0.0),
        ("keep", 1.5),
        ("keep", float("nan")),
        ("neighbours", 0),
        ("fence", -0.1),
        ("fence", float("inf")),
        ("fence", float("nan")),
    ],
)
def test_values_out_of_range_name_the_field_and_the_value(name, value):
    with pytest.raises(ValueError, match=f"^{name}: expected .* got {value!r}"):
        PruMergeConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("variant", None),
        ("merge", 1),
        ("order", True),
        ("positions", None),
        ("keep", True),
        ("keep", "72"),
        ("keep", 1j),
        ("keep", torch.tensor(3)),
        ("neighbours", True),
        ("neighbours", 3.0),
        ("neighbours", None),
        ("fence", True),
        ("fence", "1.5"),
        ("supplement", 1),
        ("supplement", None),
    ],
)
def test_wrong_types_name_the_field_and_the_type(name, value):
    with pytest.raises(TypeError, match=f"^{name}: expected .*{type(value).__name__}"):
        PruMergeConfig(**{name: value})


def test_numpy_numbers_become_python_numbers():
    config = PruMergeConfig(keep=np.int64(9), neighbours=np.int32(4), fence=np.float32(2))
    assert config == PruMergeConfig(keep=9, neighbours=4, fence=2.0)
    assert (type(config.keep), type(config.neighbours), type(config.fence)) == (int, int, float)
    assert type(PruMergeConfig(keep=np.float32(0.5)).keep) is float


def test_frozen_and_hashable():
    config = PruMergeConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.keep = 3
    assert len({config, PruMergeConfig()}) == 1


@pytest.mark.parametrize(
    ("keep", "num_patches", "budget"),
    [
        (None, 576, None),
        (72, 576, 72),
        (1, 576, 1),
        (1.0, 576, 576),
        (0.125, 576, 72),
        (0.125, 20, 3),  # 2.5, halves up
        (0.11, 21, 2),
        (0.01, 7, 1),
        (7, 7, 7),
    ],
)
def test_budget_and_capacity(keep, num_patches, budget):
    config = PruMergeConfig(keep=keep)
    assert config.budget(num_patches) == budget
    centres = num_patches if budget is None else budget
    assert config.capacity(num_patches) == centres + 1
    assert config.replace(supplement=False).capacity(num_patches) == centres
    assert config.replace(supplement="image").capacity(num_patches) == centres + 1


def test_keep_larger_than_the_image_names_both_numbers():
    with pytest.raises(ValueError, match=r"^keep: expected at most N = 576.*got 1000"):
        PruMergeConfig(keep=1000).budget(576)


def test_replace():
    config = PruMergeConfig(keep=9).replace(variant="prumerge+", neighbours=5)
    assert config == PruMergeConfig(variant="prumerge+", keep=9, neighbours=5)
    with pytest.raises(TypeError, match=r"no option 'kep'; its options are variant, keep, "):
        config.replace(kep=3)
    with pytest.raises(ValueError, match=r"^merge: "):
        config.replace(merge="max")
