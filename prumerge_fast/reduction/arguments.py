"""Checks of tensors at the public functions; each error names the argument."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_types(tensors: dict[str, Tensor]) -> None:
    """Raise `TypeError` unless all are tensors of a dtype that can be reduced."""
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(
                f"{name}: expected dtype {', '.join(map(str, DTYPES))}, got {tensor.dtype}"
            )


def check_alike(tensors: dict[str, Tensor], keys: Tensor) -> None:
    """Raise `TypeError` unless all have the dtype of `keys`."""
    for name, tensor in tensors.items():
        if tensor.dtype != keys.dtype:
            raise TypeError(f"{name}: expected the dtype of keys, {keys.dtype}, got {tensor.dtype}")


def check_device(tensors: dict[str, Tensor], keys: Tensor) -> None:
    """Raise `ValueError` unless all are on the device of `keys`."""
    for name, tensor in tensors.items():
        if tensor.device != keys.device:
            raise ValueError(
                f"{name}: expected the device of keys, {keys.device}, got {tensor.device}"
            )


def check_num_heads(num_heads: int | None, channels: int) -> int:
    """The number of heads, or an error unless it divides the channels."""
    if isinstance(num_heads, bool) or not isinstance(num_heads, numbers.Integral):
        if num_heads is None:
            raise ValueError("num_heads: expected the layer's number of heads, got None")
        raise TypeError(f"num_heads: expected an int, got {type(num_heads).__name__}")
    if num_heads < 1 or channels % num_heads:
        raise ValueError(
            f"num_heads: expected a divisor of C = {channels}, the channels of keys, got "
            f"{num_heads}"
        )
    return int(num_heads)  # NumPy's too
