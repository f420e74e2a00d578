"""LLaVA-PruMerge in vectorised PyTorch: every image and every centre at once, on any device.

A merged row is a weighted sum of the image's tokens, so choosing centres and neighbours means
filling a weight matrix, and the merge is one batched product with the tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens


def prune_merge_torch(
    query: Tensor, keys: Tensor, hidden: Tensor, config: PruMergeConfig
) -> MergedTokens:
    """Reduce the patch tokens of B images.

    With `keep` given, shapes are static and the device is never waited for. Otherwise the largest
    number of centres is read once, because work on M centres an image costs far less than on N.

    Args:
        query: [B, C], the class token's query.
        keys: [B, 1+N, C].
        hidden: [B, 1+N, S * C].
        config: What to keep and how to merge.

    Returns:
        Rows padded to the longest image, in the dtype of `hidden`; computed in float32, or
        float64 for float64 input.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    keys = keys.to(compute)
    attention = class_attention(query.to(compute), keys)  # [B, N]
    return reduce_tokens_torch(attention, keys[:, 1:], hidden[:, 1:], config)


def reduce_tokens_torch(
    attention: Tensor, keys: Tensor, hidden: Tensor, config: PruMergeConfig
) -> MergedTokens:
    """Reduce the tokens of B images by scores that are given.

    Args:
        attention: [B, N].
        keys: [B, N, C].
        hidden: [B, N, D].
        config: What to keep and how to merge.

    Returns:
        As `prune_merge_torch`.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    attention, keys = attention.to(compute), keys.to(compute)
    patches = hidden.to(compute)  # [B, N, D]

    is_centre, order = _select(attention.detach(), config)  # [B, N] each
    counts = is_centre.sum(1)  # [B]
    budget = config.budget(patches.shape[1])
    most = _largest_count(counts) if budget is None else budget  # M
    centres = order[:, :most]  # [B, M]

    if config.merge == "none":
        merged = _rows(patches, centres)  # [B, M, D]
        if config.supplement:
            left = _supplement_weights(attention, is_centre)  # [B, 1, N]
            merged = torch.cat((merged, left @ patches), 1)  # [B, M + 1, D]
    else:
        neighbours = neighbour_mask(keys.detach(), centres, config.neighbours)  # [B, M, N]
        weights = _centre_weights(attention, centres, neighbours, config)  # [B, M, N]
        if config.supplement:
            weights = torch.cat((weights, _supplement_weights(attention, is_centre)), 1)
        merged = weights @ patches  # [B, M (+ 1), D]

    slots = torch.arange(merged.shape[1], device=hidden.device)  # [M (+ 1)]
    is_centre_row = slots < counts[:, None]  # [B, M (+ 1)]
    kept = torch.full(is_centre_row.shape, -1, device=hidden.device)
    kept[:, :most] = centres
    kept = kept.masked_fill(~is_centre_row, -1)
    if budget is None:
        merged = _close_gaps(merged, slots, counts, bool(config.supplement))
    lengths = counts + bool(config.supplement)  # [B]
    return MergedTokens(merged.to(hidden.dtype), lengths.int(), kept.int(), attention)


def class_attention_by_head(query: Tensor, keys: Tensor, num_heads: int) -> Tensor:
    """Mean over the heads of the class token's attention: query [B, C], keys [B, 1+N, C] -> [B, N].

    In float32, or float64 for float64 input.
    """
    compute = torch.promote_types(keys.dtype, torch.float32)
    heads = torch.stack(
        [
            class_attention(q.to(compute), k.to(compute))  # [B, N]
            for q, k in zip(query.chunk(num_heads, 1), keys.chunk(num_heads, 2), strict=True)
        ]
    )
    return heads.mean(0)


def class_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Step 1: query [B, C], keys [B, 1+N, C] -> [B, N]."""
    # This way round: keys @ query is eight times slower on a CPU for many images.
    scores = (query[:, None] @ keys.transpose(1, 2)).squeeze(1)  # [B, 1+N]
    return (scores / math.sqrt(query.shape[1])).softmax(1)[:, 1:]


def _select(attention: Tensor, config: PruMergeConfig) -> tuple[Tensor, Tensor]:
    """Step 2: which patches are centres [B, N] bool, and all patches, centres first in output
    order [B, N] int64."""
    batch, num_patches = attention.shape
    # NaN ranks as 0, and so does a negative score, which may be given.
    attention = torch.where(attention > 0, attention, 0.0)
    values, by_attention = attention.sort(dim=1, descending=True, stable=True)  # [B, N] each
    index = torch.arange(num_patches, device=attention.device)  # [N]
    rank = torch.empty_like(by_attention).scatter_(1, by_attention, index.expand(batch, -1))

    budget = config.budget(num_patches)
    plus = config.variant == "prumerge+"
    if budget is None:
        q1, q3 = _percentile(values, 0.25), _percentile(values, 0.75)  # [B, 1] each
        attended = attention > q3 + config.fence * (q3 - q1)  # [B, N]
        spatial = _grid(attended) if plus else torch.zeros_like(attended)  # [B, N]
    else:
        num_spatial = budget // 2 if plus else 0
        attended = rank < budget - num_spatial  # [B, N]
        spatial = _evenly_spaced(~attended, num_patches - budget + num_spatial, num_spatial)

    is_centre = attended | spatial  # [B, N]
    if config.order == "raster":
        place = torch.where(is_centre, index, index + num_patches)  # [B, N]
    else:
        place = torch.where(spatial, index + num_patches, index + 2 * num_patches)
        place = torch.where(attended, rank, place)  # [B, N]
    return is_centre, place.argsort(1)


def _percentile(descending: Tensor, share: float) -> Tensor:
    """The value below which a share of each row lies, by linear interpolation: -> [B, 1]."""
    last = descending.shape[1] - 1
    position = share * last
    low = descending[:, last - math.floor(position), None]
    high = descending[:, last - math.ceil(position), None]
    weight = position - math.floor(position)
    # From the nearer end: rounds as NumPy does, whose percentile the authors use.
    if weight < 0.5:
        return low + (high - low) * weight
    return high - (high - low) * (1 - weight)


def _grid(attended: Tensor) -> Tensor:
    """PruMerge+ without a budget: every stride-th patch not yet chosen, [B, N] -> [B, N]."""
    num_patches = attended.shape[1]
    index = torch.arange(num_patches, device=attended.device)  # [N]
    outliers = attended.sum(1, keepdim=True).clamp(min=1)  # [B, 1]
    stride = (num_patches // outliers // 3).clamp(min=1)  # [B, 1]
    # The authors' range(0, N - 1, stride) leaves the last patch out.
    return (index % stride == 0) & (index < num_patches - 1) & ~attended


def _evenly_spaced(free: Tensor, num_free: int, count: int) -> Tensor:
    """PruMerge+ with a budget: of the free patches, those at floor(i * num_free / count)."""
    if count == 0:
        return torch.zeros_like(free)
    # Position p is some floor(i * num_free / count) just where ceil(p * count / num_free) steps.
    after = free.cumsum(1) * count  # [B, N], (p + 1) * count for a free patch at position p
    steps = (after - 1) // num_free > (after - count - 1) // num_free
    return steps & free


def neighbour_mask(keys: Tensor, centres: Tensor, count: int) -> Tensor:
    """Step 3: the tokens most similar to each centre, ties to the lower index.

    keys [B, N, C], centres [B, M] -> [B, M, N] bool, `count` (at most N - 1) set in each row.
    """
    num_patches = keys.shape[1]
    # Scaling N columns costs less than a normalised copy of the keys; a zero key stays zero.
    norms = keys.norm(dim=2).clamp(min=1e-12)  # [B, N]
    own = _rows(keys, centres) / norms.gather(1, centres)[:, :, None]  # [B, M, C]
    similarity = own @ keys.transpose(1, 2) / norms[:, None]  # [B, M, N]
    similarity.nan_to_num_(nan=-2.0)  # below every cosine
    similarity.scatter_(2, centres[:, :, None], -math.inf)  # a centre is not its own neighbour
    count = min(count, num_patches - 1)
    if count == 0:
        return torch.zeros_like(similarity, dtype=torch.bool)
    # Not topk's indices: which of several equal values it returns is unspecified.
    least = similarity.topk(count, dim=2, sorted=False).values.amin(2, keepdim=True)  # [B, M, 1]
    above, tied = similarity > least, similarity == least  # [B, M, N] each
    room = count - above.sum(2, keepdim=True)  # [B, M, 1]
    return above | (tied & (tied.cumsum(2, dtype=torch.int32) <= room))


def _centre_weights(
    attention: Tensor, centres: Tensor, neighbours: Tensor, config: PruMergeConfig
) -> Tensor:
    """Weight of each token in each centre's row: [B, M, N]."""
    own = centres[:, :, None]  # [B, M, 1]
    # Not a product: NaN stays with the rows that weigh it.
    weights = torch.where(neighbours, attention[:, None], 0.0)  # [B, M, N]
    if config.merge == "sum":
        return weights.scatter(2, own, 1.0)
    weights = weights.scatter(2, own, attention.gather(1, centres)[:, :, None])
    total = weights.sum(2, keepdim=True)  # [B, M, 1]
    weightless = total == 0
    weights = weights / total.masked_fill(weightless, 1.0)
    return weights.scatter_add(2, own, weightless.to(weights.dtype))


def _supplement_weights(attention: Tensor, is_centre: Tensor) -> Tensor:
    """Step 4: weight of each token in the supplementary row, [B, 1, N]."""
    return attention.masked_fill(is_centre, 0.0)[:, None]


def _close_gaps(merged: Tensor, slots: Tensor, counts: Tensor, supplement: bool) -> Tensor:
    """Rows past an image's centres to zero, its supplement moved up behind its last centre.

    merged [B, M (+ 1), C], slots [M (+ 1)], counts [B] -> [B, M (+ 1), C].
    """
    closed = merged.masked_fill((slots >= counts[:, None])[:, :, None], 0.0)
    if not supplement:
        return closed
    is_supplement = (slots == counts[:, None])[:, :, None]  # [B, M + 1, 1]
    return torch.where(is_supplement, merged[:, -1:], closed)


def _rows(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, C], index [B, M] -> [B, M, C]."""
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def _largest_count(counts: Tensor) -> int:
    return int(counts.max()) if len(counts) else 0
