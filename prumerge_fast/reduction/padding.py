"""Reduction of images of which some patches are padding: these neither count nor remain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.reading import Patches, reduce_patches


def reduce_unpadded(
    patches: Patches,
    valid: Tensor,
    config: PruMergeConfig,
    backend: str,
    reduce: Callable[[Patches, PruMergeConfig, str], MergedTokens] = reduce_patches,
) -> list[tuple[Tensor, Tensor]]:
    """`reduce_patches` of each image as if it had its valid patches only.

    A `keep` of more than an image's valid patches keeps them all; a share is one of them.

    Args:
        patches: K images of N patches.
        valid: [K, N] bool, on any device; False for padding.
        config: What to keep and how to merge.
        backend: As in `prune_merge`.
        reduce: Called as `reduce_patches` is, in its place, for the images of as many patches.

    Returns:
        For each image its tokens [m, D] and the patch index [m] of each, -1 for the supplement;
        m = 0 for an image that is all padding.
    """
    features = patches.features
    counts = valid.sum(dim=1)  # [K]
    nothing = features[0, :0], torch.empty(0, dtype=torch.int32, device=features.device)
    results = [nothing] * len(valid)
    for count in counts[counts > 0].unique().tolist():  # images of as many patches in one batch
        images = torch.where(counts == count)[0]  # [k]
        index = valid[images].nonzero()[:, 1].view(-1, count).to(features.device)  # [k, n]
        chosen = patches.chosen(images.to(features.device), index)
        merged = reduce(chosen, within_budget(config, count), backend)
        # Column 0 stands for none, so that -1 and patch 0 stay apart.
        names = torch.nn.functional.pad(index, (1, 0), value=-1)  # [k, 1+n]
        kept = names.gather(1, merged.kept.long() + 1).int()  # [k, capacity]
        for image, tokens, patch in zip(images.tolist(), merged.split(), kept, strict=True):
            results[image] = tokens, patch[: len(tokens)]
    return results


def within_budget(config: PruMergeConfig, patches: int) -> PruMergeConfig:
    """`config` for fewer patches than the tower's, of which `keep` may ask for more."""
    if isinstance(config.keep, int):
        return config.replace(keep=min(config.keep, patches))
    return config
