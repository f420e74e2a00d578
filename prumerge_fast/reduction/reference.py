"""LLaVA-PruMerge by the letter (arXiv 2403.15388, Algorithm 1): one image, one centre at a time.

The definition that every other backend is tested against, written to be read beside the paper.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.output import MergedTokens


def prune_merge_reference(
    query: Tensor, keys: Tensor, hidden: Tensor, config: PruMergeConfig
) -> MergedTokens:
    """Reduce the patch tokens of B images, image by image.

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
    attention = hidden.new_zeros(len(hidden), hidden.shape[1] - 1, dtype=compute)  # [B, N]
    if len(hidden):
        pairs = zip(query.to(compute), keys.to(compute), strict=True)
        attention = torch.stack([class_attention(q, k) for q, k in pairs])
    return reduce_tokens_reference(attention, keys[:, 1:], hidden[:, 1:], config)


def reduce_tokens_reference(
    attention: Tensor, keys: Tensor, hidden: Tensor, config: PruMergeConfig
) -> MergedTokens:
    """Reduce the tokens of B images by scores that are given, image by image.

    Args:
        attention: [B, N].
        keys: [B, N, C].
        hidden: [B, N, D].
        config: What to keep and how to merge.

    Returns:
        As `prune_merge_reference`.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    batch, num_patches, channels = hidden.shape
    attention = attention.to(compute)
    images = []
    for a, k, y in zip(attention, keys.to(compute), hidden.to(compute), strict=True):
        centres = select_centres(a.detach(), config)  # m indices
        images.append((centres, merge_rows(a, k, y, centres, config)))

    if config.keep is None:
        capacity = max((len(tokens) for _, tokens in images), default=int(bool(config.supplement)))
    else:
        capacity = config.capacity(num_patches)
    tokens = hidden.new_zeros(batch, capacity, channels)
    lengths = torch.zeros(batch, dtype=torch.int32)
    kept = torch.full((batch, capacity), -1, dtype=torch.int32)
    for b, (centres, merged) in enumerate(images):
        tokens[b, : len(merged)] = merged.to(hidden.dtype)
        lengths[b] = len(merged)
        kept[b, : len(centres)] = torch.tensor(centres, dtype=torch.int32)
    return MergedTokens(tokens, lengths.to(hidden.device), kept.to(hidden.device), attention)


def class_attention(query: Tensor, keys: Tensor) -> Tensor:
    """Attention of the class token to each patch: query [C], keys [1+N, C] -> [N].

    One head over the full width; the softmax includes the class token's own key, whose column is
    then dropped.
    """
    scores = keys @ query / math.sqrt(len(query))  # [1+N]
    return scores.softmax(0)[1:]


def received_attention_reference(
    query: Tensor, keys: Tensor, num_heads: int, class_token: bool
) -> Tensor:
    """Attention that each patch receives, image by image and head by head.

    Args:
        query: [B, R, C].
        keys: [B, R, C].
        num_heads: H.
        class_token: Whether row 0 is the class token's.

    Returns:
        [B, N], N = R - 1 with a class token, else R.
    """
    compute = torch.promote_types(keys.dtype, torch.float32)
    first = int(class_token)
    images = []
    for q, k in zip(query.to(compute), keys.to(compute), strict=True):
        heads = [
            (one @ other.T / math.sqrt(one.shape[1])).softmax(1)  # [R - first, R]
            for one, other in zip(q[first:].chunk(num_heads, 1), k.chunk(num_heads, 1), strict=True)
        ]
        images.append(torch.stack(heads).mean((0, 1))[first:])  # [N]
    return torch.stack(images) if images else keys.new_zeros(0, keys.shape[1] - first).to(compute)


def select_centres(attention: Tensor, config: PruMergeConfig) -> list[int]:
    """Patch indices of the centres, in output order: attention [N] -> m distinct indices."""
    num_patches = len(attention)
    attention = torch.where(attention > 0, attention, 0.0)  # NaN ranks as 0, and what is negative
    values = attention.tolist()
    by_attention = sorted(range(num_patches), key=lambda j: (-values[j], j))
    budget = config.budget(num_patches)
    if budget is None:
        q1, q3 = percentile(attention, 0.25), percentile(attention, 0.75)
        fence = float(q3 + config.fence * (q3 - q1))
        centres = [j for j in by_attention if values[j] > fence]
        if config.variant == "prumerge+":
            stride = max(1, int(int(num_patches / max(1, len(centres))) / 3))
            centres += [j for j in range(0, num_patches - 1, stride) if j not in centres]
    elif config.variant == "prumerge":
        centres = by_attention[:budget]
    else:
        spatial = budget // 2
        centres = by_attention[: budget - spatial]
        remaining = [j for j in range(num_patches) if j not in centres]
        centres += [remaining[i * len(remaining) // spatial] for i in range(spatial)]
    return sorted(centres) if config.order == "raster" else centres


def percentile(values: Tensor, share: float) -> Tensor:
    """The value below which a share of `values` [N] lies, by linear interpolation."""
    ascending = values.sort().values
    position = share * (len(values) - 1)
    low, high = ascending[math.floor(position)], ascending[math.ceil(position)]
    weight = position - math.floor(position)
    # From the nearer end: rounds as NumPy does, whose percentile the authors use.
    if weight < 0.5:
        return low + (high - low) * weight
    return high - (high - low) * (1 - weight)


def merge_rows(
    attention: Tensor, keys: Tensor, hidden: Tensor, centres: list[int], config: PruMergeConfig
) -> Tensor:
    """The output rows of one image: attention [N], keys and hidden [N, C] -> [m (+ 1), C]."""
    unit_keys = normalize(keys.detach(), dim=-1)  # [N, C]
    rows = []
    for p in centres:
        if config.merge == "none":
            rows.append(hidden[p])
            continue
        neighbours = nearest(unit_keys, p, config.neighbours)  # k indices
        weighed = attention[neighbours] @ hidden[neighbours]  # [C]
        if config.merge == "sum":
            rows.append(hidden[p] + weighed)
            continue
        total = attention[p] + attention[neighbours].sum()
        mean = (attention[p] * hidden[p] + weighed) / total
        rows.append(hidden[p] if total == 0 else mean)
    if config.supplement:
        others = [j for j in range(len(attention)) if j not in centres]
        rows.append(attention[others] @ hidden[others])
    return torch.stack(rows) if rows else hidden[:0]


def nearest(unit_keys: Tensor, centre: int, count: int) -> list[int]:
    """The `count` tokens most similar to a centre, among all others: unit_keys [N, C]."""
    others = [j for j in range(len(unit_keys)) if j != centre]
    similarity = (unit_keys[others] @ unit_keys[centre]).tolist()  # N - 1 cosines
    ranked = sorted(
        zip(similarity, others, strict=True), key=lambda s: (-_nan_as_least(s[0]), s[1])
    )
    return [j for _, j in ranked[:count]]


def _nan_as_least(value: float) -> float:
    return -math.inf if math.isnan(value) else value
