"""Attention received in PyTorch, a chunk of queries at a time, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

MOST_BYTES = 256 * 2**20
"""What it may hold at once beside inputs and outputs."""


def received_attention_torch(
    query: Tensor, keys: Tensor, num_heads: int, class_token: bool
) -> Tensor:
    """Mean share of each token in the attention of all patch queries and heads.

    Args:
        query: [B, R, C].
        keys: [B, R, C].
        num_heads: H.
        class_token: Whether row 0 is the class token's; N = R - 1 then, else N = R.

    Returns:
        [B, N] float32 (float64 for float64 input).
    """
    return _Received.apply(query, keys, num_heads, class_token)


class _Received(torch.autograd.Function):
    """Keeps no N x N for the backward pass, which computes it again."""

    @staticmethod
    def forward(query: Tensor, keys: Tensor, num_heads: int, class_token: bool) -> Tensor:
        compute = torch.promote_types(keys.dtype, torch.float32)
        first = int(class_token)
        batch, rows, _ = keys.shape
        queries = rows - first
        received = keys.new_zeros(batch, rows, dtype=compute)
        for images, chunk in _chunks(keys, num_heads, queries):
            shares, _, _ = _shares(query[images, first:][:, chunk], keys[images], num_heads)
            received[images] += shares.sum((1, 2))
        return received[:, first:] / (num_heads * queries)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, keys, ctx.num_heads, ctx.class_token = inputs
        ctx.save_for_backward(query, keys)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, keys = ctx.saved_tensors
        gradients = received_attention_gradients(grad, query, keys, ctx.num_heads, ctx.class_token)
        return (*gradients, None, None)


def received_attention_gradients(
    grad: Tensor, query: Tensor, keys: Tensor, num_heads: int, class_token: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `query` and `keys` [B, R, C], in their dtype, from that of the output [B, N]."""
    first = int(class_token)
    queries = keys.shape[1] - first
    compute = torch.promote_types(keys.dtype, torch.float32)
    grad_query = torch.zeros_like(query, dtype=compute)
    grad_keys = torch.zeros_like(keys, dtype=compute)
    grad = torch.nn.functional.pad(grad.to(compute), (first, 0)) / (num_heads * queries)  # [B, R]
    for images, chunk in _chunks(keys, num_heads, queries):
        shares, q, k = _shares(query[images, first:][:, chunk], keys[images], num_heads)
        weighed = shares * grad[images, None, None]  # [b, H, q, R]
        scores = weighed - shares * weighed.sum(3, keepdim=True)
        scores *= 1 / math.sqrt(q.shape[3])
        grad_query[images, first:][:, chunk] += (scores @ k).transpose(1, 2).flatten(2)
        grad_keys[images] += (scores.transpose(2, 3) @ q).transpose(1, 2).flatten(2)
    return grad_query.to(query.dtype), grad_keys.to(keys.dtype)


def _shares(query: Tensor, keys: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax of each query [b, q, C] over all keys [b, R, C], by head: [b, H, q, R]; and both by
    head, [b, H, q, d] and [b, H, R, d]."""
    compute = torch.promote_types(keys.dtype, torch.float32)
    q, k = (one.to(compute).unflatten(2, (num_heads, -1)).transpose(1, 2) for one in (query, keys))
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3), q, k


def _chunks(keys: Tensor, num_heads: int, queries: int) -> Iterator[tuple[slice, slice]]:
    """Images and queries of theirs that are worked on at once."""
    batch, rows, channels = keys.shape
    item = max(4, keys.element_size())
    # Keys, their gradient and a copy by head; then, a query, its own rows and four of shares.
    of_image = 4 * rows * channels * item
    of_query = (4 * num_heads * rows + 3 * channels) * item
    count = max(1, min(queries, (MOST_BYTES - of_image) // of_query))
    images = max(1, MOST_BYTES // (of_image + count * of_query))
    for start in range(0, batch, images):
        for first in range(0, queries, count):
            yield slice(start, start + images), slice(first, first + count)
