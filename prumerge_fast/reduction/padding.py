"""`prune_merge` on images of which some patches are padding: these neither count nor remain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.reduction.output import MergedTokens


def prune_merge_unpadded(
    query: Tensor,
    keys: Tensor,
    hidden: Tensor,
    valid: Tensor,
    config: PruMergeConfig,
    backend: str,
    reduce: Callable[..., MergedTokens] = prune_merge,
) -> list[tuple[Tensor, Tensor]]:
    """`prune_merge` of each image as if it had its valid patches only.

    A `keep` of more than an image's valid patches keeps them all; a share is one of them.

    Args:
        query: [B, C] or [B, 1+N, C].
        keys: [B, 1+N, C].
        hidden: [B, 1+N, S * C].
        valid: [B, N] bool, on any device; False for padding.
        config: What to keep and how to merge.
        backend: As in `prune_merge`.
        reduce: Called as `prune_merge` is, in its place, for the images of as many patches.

    Returns:
        For each image its tokens [m, C] and the patch index [m] of each, -1 for the supplement;
        m = 0 for an image that is all padding.
    """
    counts = valid.sum(dim=1)  # [B]
    nothing = hidden[0, :0], torch.empty(0, dtype=torch.int32, device=hidden.device)
    results = [nothing] * len(valid)
    for count in counts[counts > 0].unique().tolist():  # images of as many patches in one batch
        images = torch.where(counts == count)[0]  # [b]
        patches = valid[images].nonzero()[:, 1].view(-1, count)  # [b, n]
        rows = torch.nn.functional.pad(patches + 1, (1, 0)).to(hidden.device)  # [b, 1+n]
        chosen = images.to(hidden.device)  # [b]
        merged = reduce(
            query[chosen] if query.ndim == 2 else query[chosen[:, None], rows],
            keys[chosen[:, None], rows],  # [b, 1+n, C]
            hidden[chosen[:, None], rows],  # [b, 1+n, C]
            within_budget(config, count),
            backend=backend,
        )
        # Column 0 of `rows` is the class token, so that -1 and patch 0 stay apart.
        kept = rows.gather(1, merged.kept.long() + 1).int() - 1  # [b, capacity]
        for image, tokens, index in zip(images.tolist(), merged.split(), kept, strict=True):
            results[image] = tokens, index[: len(tokens)]
    return results


def within_budget(config: PruMergeConfig, patches: int) -> PruMergeConfig:
    """`config` for fewer patches than the tower's, of which `keep` may ask for more."""
    if isinstance(config.keep, int):
        return config.replace(keep=min(config.keep, patches))
    return config
