"""Gradients of the reduction with the selection held constant, in vectorised PyTorch.

Given the centres and their neighbours, a merged row is a weighted sum of the image's tokens, with
weights that depend on the class attention alone: out = W(a)·Y.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from prumerge_fast.reduction.torch_backend import neighbour_mask


def prune_merge_gradients(
    grad_tokens: Tensor,
    grad_attention: Tensor,
    query: Tensor,
    keys: Tensor,
    hidden: Tensor,
    lengths: Tensor,
    kept: Tensor,
    *,
    neighbours: int,
    merge: str,
    supplement: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `query` [B, C], `keys` [B, 1+N, C] and `hidden` [B, 1+N, D], in their dtype.

    Args:
        grad_tokens: [B, capacity, D].
        grad_attention: [B, N].
        query: The input [B, C].
        keys: The input [B, 1+N, C].
        hidden: The input [B, 1+N, D].
        lengths: The output [B].
        kept: The output [B, capacity].
        neighbours: As in `PruMergeConfig`, like the next two.
        merge: How neighbours were merged.
        supplement: Whether there is a supplementary row.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    scale = 1 / math.sqrt(query.shape[1])
    q, k = query.to(compute), keys.to(compute)
    scores = (k @ q[:, :, None]).squeeze(2) * scale  # [B, 1+N]
    shares = scores.softmax(1)  # [B, 1+N]
    grad_a, grad_patches = reduce_tokens_gradients(
        grad_tokens,
        grad_attention,
        shares[:, 1:],
        k[:, 1:],
        hidden[:, 1:],
        lengths,
        kept,
        neighbours=neighbours,
        merge=merge,
        supplement=supplement,
    )
    pad = torch.nn.functional.pad
    grad_a = pad(grad_a, (1, 0))  # [B, 1+N]
    grad_scores = shares * (grad_a - (shares * grad_a).sum(1, keepdim=True)) * scale
    grad_query = (grad_scores[:, None] @ k).squeeze(1)  # [B, C]
    grad_keys = grad_scores[:, :, None] * q[:, None]  # [B, 1+N, C]
    grad_hidden = pad(grad_patches, (0, 0, 1, 0))  # [B, 1+N, D]
    return grad_query.to(query.dtype), grad_keys.to(keys.dtype), grad_hidden


def reduce_tokens_gradients(
    grad_tokens: Tensor,
    grad_attention: Tensor,
    attention: Tensor,
    keys: Tensor,
    hidden: Tensor,
    lengths: Tensor,
    kept: Tensor,
    *,
    neighbours: int,
    merge: str,
    supplement: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `attention` [B, N] and `hidden` [B, N, D], in their dtype.

    Keys choose the neighbours and do nothing else, so that they have none.

    Args:
        grad_tokens: [B, capacity, D].
        grad_attention: Of the output [B, N].
        attention: The input [B, N].
        keys: The input [B, N, C].
        hidden: The input [B, N, D].
        lengths: The output [B].
        kept: The output [B, capacity].
        neighbours: As in `PruMergeConfig`, like the next two.
        merge: How neighbours were merged.
        supplement: Whether there is a supplementary row.
    """
    compute = torch.promote_types(hidden.dtype, torch.float32)
    weigh, patches = attention.to(compute), hidden.to(compute)  # [B, N] and [B, N, D]

    is_centre_row = (kept >= 0)[:, :, None]  # [B, R, 1]
    centres = kept.clamp(min=0).long()  # [B, R]
    one_hot = torch.nn.functional.one_hot(centres, patches.shape[1])  # [B, R, N]
    own = (one_hot.bool() & is_centre_row).to(compute)  # [B, R, N]
    if merge == "none":
        merged = torch.zeros_like(own)
    else:
        merged = (neighbour_mask(keys.to(compute), centres, neighbours) & is_centre_row).to(compute)

    grad = grad_tokens.to(compute)
    live = torch.arange(kept.shape[1], device=kept.device) < lengths[:, None]  # [B, R]
    grad = grad.masked_fill(~live[:, :, None], 0.0)
    grad_weights = grad @ patches.transpose(1, 2)  # [B, R, N]

    if merge == "average":
        taking_part = merged + own  # [B, R, N]
        unscaled = weigh[:, None] * taking_part
        total = unscaled.sum(2, keepdim=True)  # [B, R, 1]
        weightless = total == 0
        total = total.masked_fill(weightless, 1.0)
        weights = torch.where(weightless, own, unscaled / total)
        mean = (grad_weights * weights).sum(2, keepdim=True)  # [B, R, 1]
        grad_unscaled = ((grad_weights - mean) / total).masked_fill(weightless, 0.0)
        grad_a = (grad_unscaled * taking_part).sum(1)  # [B, N]
    else:
        weights = weigh[:, None] * merged + own  # [B, R, N]
        grad_a = (grad_weights * merged).sum(1)  # [B, N]
    if supplement:
        is_last = live & (kept < 0)  # [B, R]
        left = is_last[:, :, None] * (own.sum(1, keepdim=True) == 0)  # [B, R, N]
        weights = weights + weigh[:, None] * left
        grad_a = grad_a + (grad_weights * left).sum(1)

    grad_hidden = weights.transpose(1, 2) @ grad  # [B, N, D]
    grad_attention = grad_a + grad_attention.to(compute)  # [B, N]
    return grad_attention.to(attention.dtype), grad_hidden.to(hidden.dtype)
