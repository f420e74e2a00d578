"""What a vLLM server takes as an `image_embeds` content part."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from torch import Tensor


def to_base64(embedding: Tensor) -> str:
    """An image's embedding as a vLLM server takes it: base64 of a `.npy` file.

    `{"type": "image_embeds", "image_embeds": to_base64(embedding)}` is a content part of a chat
    message. vLLM also takes what `torch.save` writes; a `.npy` file cannot hold code.

    Args:
        embedding: [n, D], of a floating-point dtype; bfloat16, which NumPy has none of, is sent as
            float32, the same values in twice the bytes.

    Raises:
        TypeError: It is no tensor of floating-point numbers.
        ValueError: It has another number of dimensions.
    """
    if not isinstance(embedding, Tensor) or not embedding.is_floating_point():
        got = getattr(embedding, "dtype", type(embedding).__name__)
        raise TypeError(f"embedding: expected a floating-point tensor, got {got}")
    if embedding.ndim != 2:
        raise ValueError(f"embedding: expected [n, D], got {list(embedding.shape)}")
    values = embedding.detach().cpu()
    if values.dtype == torch.bfloat16:
        values = values.float()
    with io.BytesIO() as file:
        np.save(file, values.numpy(), allow_pickle=False)
        return base64.b64encode(file.getvalue()).decode("ascii")
