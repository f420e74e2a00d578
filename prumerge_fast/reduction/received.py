"""`received_attention`: how much the other patches attend to a patch, for towers of any kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from prumerge_fast.reduction.arguments import (
    check_alike,
    check_device,
    check_num_heads,
    check_types,
)
from prumerge_fast.reduction.autocast import without_autocast
from prumerge_fast.reduction.backends import resolve_backend
from prumerge_fast.reduction.received_torch import received_attention_torch
from prumerge_fast.reduction.received_triton import received_attention_triton
from prumerge_fast.reduction.reference import received_attention_reference

_IMPLEMENTATIONS: dict[str, Callable[[Tensor, Tensor, int, bool], Tensor]] = {
    "torch": received_attention_torch,
    "reference": received_attention_reference,
    "triton": received_attention_triton,
}


def received_attention(
    query: Tensor,
    keys: Tensor,
    *,
    num_heads: int,
    class_token: bool = False,
    backend: str = "auto",
) -> Tensor:
    """How much attention each patch receives, a score for `reduce_tokens` without a class token.

    `a_j` is the mean over heads and patch queries i of `softmax_j(q_i · k_j / sqrt(d))`, d the
    channels of a head; the softmax is over all keys. Computed in float32 (float64 for float64
    input), autocast or not. The N x N attention is never in memory as a whole: Triton goes through
    it twice, in a fixed order and without atomics, PyTorch in chunks that take 256 MiB at
    most, where the keys of one image leave room.

    Differentiable in `query` and `keys`.

    Args:
        query: [B, N, C], of the layer that reads the features; [B, 1+N, C] with a class token.
        keys: [B, N, C] of that layer, [B, 1+N, C] with a class token; after rotation, where the
            layer has rotary positions.
        num_heads: Heads, of C / num_heads channels each; 1 for one head over the full width.
        class_token: Whether row 0 is a class token's: its query is not asked, and its column is
            dropped after the softmax.
        backend: `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    Both tensors share one device and one dtype of float16, bfloat16, float32 or float64.

    Returns:
        [B, N] float32 (float64 for float64 input); without a class token each row sums to 1.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together, C is no multiple of `num_heads`, N is 0,
            or there is no such backend.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    tensors = {"query": query, "keys": keys}
    check_types(tensors)
    if not isinstance(class_token, bool):
        raise TypeError(f"class_token: expected True or False, got {type(class_token).__name__}")
    least = 1 + class_token
    if keys.ndim != 3 or keys.shape[1] < least or keys.shape[2] < 1:
        raise ValueError(
            f"keys: expected shape [B, {'1+N' if class_token else 'N'}, C] with N >= 1 and C >= 1, "
            f"got {list(keys.shape)}"
        )
    if query.shape != keys.shape:
        raise ValueError(
            f"query: expected the shape of keys, {list(keys.shape)}, got {list(query.shape)}"
        )
    num_heads = check_num_heads(num_heads, keys.shape[2])
    check_alike({"query": query}, keys)
    check_device({"query": query}, keys)
    resolved = resolve_backend(backend, keys.device, keys.dtype)
    with without_autocast(keys.device.type):
        return _IMPLEMENTATIONS[resolved.name](query, keys, num_heads, class_token)
