"""Vectorised `prune_merge` against the reference loop, at CLIP ViT-L/14-336's shape.

pytest bench/bench_prune_merge.py --benchmark-json=bench/results/prune-merge-cpu.json
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge

FEATURES = Path(__file__).parents[1] / "tests" / "golden" / "heavy_tailed_0.npz"

CONFIGS = {"adaptive": PruMergeConfig(), "keep=72": PruMergeConfig(keep=72)}


def features(
    batch: int, dtype: torch.dtype, num_patches: int = 576, channels: int = 1024
) -> tuple[Tensor, Tensor, Tensor]:
    """Features with the heavy-tailed class attention of a ViT, a different image for each row.

    Other shapes than the golden image's repeat or leave out its patches and channels.
    """
    generator = torch.Generator().manual_seed(0)
    with np.load(FEATURES) as file:
        query, keys, hidden = (
            torch.from_numpy(file[k]).float() for k in ("q_cls", "keys", "hidden")
        )
    orders = [1 + torch.randperm(len(keys) - 1, generator=generator) for _ in range(batch)]
    patches = torch.arange(num_patches) % (len(keys) - 1)
    rows = torch.stack([torch.cat((torch.zeros(1, dtype=torch.int64), o[patches])) for o in orders])
    columns = torch.arange(channels) % keys.shape[1]
    query, keys, hidden = query[columns], keys[:, columns], hidden[:, columns]
    noise = 0.1 * torch.randn(batch, 1 + num_patches, channels, generator=generator)
    return (
        query.expand(batch, -1).to(dtype),  # [B, C]
        (keys[rows] + noise * keys.std()).to(dtype),  # [B, 1+N, C]
        hidden[rows].to(dtype),  # [B, 1+N, C]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
@pytest.mark.parametrize("batch", [1, 8, 32])
@torch.inference_mode()
def test_torch_against_reference(against, batch, config, dtype):
    inputs = features(batch, dtype)
    centres = prune_merge(*inputs, config).lengths.float().mean().item() - 1
    against(
        lambda: prune_merge(*inputs, config, backend="reference"),
        lambda: prune_merge(*inputs, config, backend="torch"),
        rounds=max(7, 30 // batch),
        batch=batch,
        dtype=str(dtype),
        centres_per_image=centres,
    )
