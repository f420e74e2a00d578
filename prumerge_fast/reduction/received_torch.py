"""Attention received in PyTorch, a chunk of queries at a time, and its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.reduction.autocast import without_autocast

MOST_BYTES = 256 * 2**20
"""What it may hold at once beside inputs and outputs, where the keys of one image leave room."""


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
        for images, chunks in _chunks(keys, num_heads, queries):
            k = _by_head(keys[images], num_heads, compute)  # [b, H, R, d]
            for chunk in chunks:
                q = _by_head(query[images, first:][:, chunk], num_heads, compute)  # [b, H, q, d]
                received[images] += _shares(q, k).sum((1, 2))
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
    """Gradients of `query` and `keys` [B, R, C], in their dtype, from that of the output [B, N].

    Autocast or not: it may be on where `backward` is called, or where a compiled forward pass was,
    of which this is traced with it off.
    """
    first = int(class_token)
    queries = keys.shape[1] - first
    compute = torch.promote_types(keys.dtype, torch.float32)
    grad_query, grad_keys = torch.zeros_like(query), torch.zeros_like(keys)
    grad = torch.nn.functional.pad(grad.to(compute), (first, 0)) / (num_heads * queries)  # [B, R]
    with without_autocast(keys.device.type, even_if_off=True):
        for images, chunks in _chunks(keys, num_heads, queries):
            k = _by_head(keys[images], num_heads, compute)  # [b, H, R, d]
            of_keys = torch.zeros_like(k)
            for chunk in chunks:
                q = _by_head(query[images, first:][:, chunk], num_heads, compute)  # [b, H, q, d]
                shares = _shares(q, k)
                weighed = shares * grad[images, None, None]  # [b, H, q, R]
                scores = weighed - shares * weighed.sum(3, keepdim=True)
                scores = scores / math.sqrt(q.shape[3])
                grad_query[images, first:][:, chunk] = (scores @ k).transpose(1, 2).flatten(2)
                of_keys = of_keys + scores.transpose(2, 3) @ q
            grad_keys[images] = of_keys.transpose(1, 2).flatten(2)
    return grad_query, grad_keys


def _by_head(tokens: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    """[b, n, C] -> [b, H, n, d], contiguous."""
    return tokens.to(dtype).unflatten(2, (num_heads, -1)).transpose(1, 2).contiguous()


def _shares(q: Tensor, k: Tensor) -> Tensor:
    """Softmax of each query [b, H, q, d] over all keys [b, H, R, d]: [b, H, q, R]."""
    return (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(3)


def _chunks(keys: Tensor, num_heads: int, queries: int) -> Iterator[tuple[slice, list[slice]]]:
    """Images that are worked on at once, and queries of theirs that are."""
    batch, rows, channels = keys.shape
    item = max(4, keys.element_size())
    # Keys, their gradient and a copy by head; then, a query, its own rows and four of shares.
    of_image = 4 * rows * channels * item
    of_query = (4 * num_heads * rows + 3 * channels) * item
    # Where one image's keys leave next to nothing, an eighth more.
    count = max(MOST_BYTES - of_image, MOST_BYTES // 8) // of_query
    count = max(1, min(queries, count))
    images = max(1, MOST_BYTES // (of_image + count * of_query))
    chunks = [slice(first, first + count) for first in range(0, queries, count)]
    for start in range(0, batch, images):
        yield slice(start, start + images), chunks
