"""Attention received as one PyTorch operator on the Triton kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prumerge_fast.reduction.received_torch import received_attention_gradients
from prumerge_fast.reduction.triton_backend import launch_target


def received_attention_triton(
    query: Tensor, keys: Tensor, num_heads: int, class_token: bool
) -> Tensor:
    """As `received_attention_torch`, in two kernel launches."""
    return torch.ops.prumerge_fast.received_attention(query, keys, num_heads, class_token)


@torch.library.custom_op("prumerge_fast::received_attention", mutates_args=())
def _received_attention(query: Tensor, keys: Tensor, num_heads: int, class_token: bool) -> Tensor:
    from prumerge_fast.kernels.received_attention import choose_tiles, received_attention

    tiles = choose_tiles(keys.shape[2] // num_heads, keys.dtype, launch_target(keys.device))
    # Triton launches on the current device, which need not be the tensors'.
    with torch.cuda.device_of(keys):
        return received_attention(query, keys, num_heads, tiles=tiles, class_token=class_token)


@_received_attention.register_fake
def _(query: Tensor, keys: Tensor, num_heads: int, class_token: bool) -> Tensor:
    batch, rows, _ = keys.shape
    return keys.new_empty(batch, rows - int(class_token), dtype=torch.float32)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, keys, ctx.num_heads, ctx.class_token = inputs
    ctx.save_for_backward(query, keys)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    query, keys = ctx.saved_tensors
    gradients = received_attention_gradients(grad, query, keys, ctx.num_heads, ctx.class_token)
    return (*gradients, None, None)


_received_attention.register_autograd(_backward, setup_context=_setup_context)
