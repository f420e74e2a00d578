"""What `prune_merge` returns: padded tokens with their lengths, and their unpadded forms."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class MergedTokens:
    """The reduced tokens of B images, padded to the longest.

    Args:
        tokens: [B, capacity, D], dtype of the features; rows past an image's length are zero.
        lengths: [B] int32, rows of each image that count (centres, then the supplement).
        kept: [B, capacity] int32, patch index (0 .. N-1) of each row; -1 for the supplement and
            for padding.
        attention: [B, N], the score of every patch token; float32 (float64 for float64 input).
    """

    tokens: Tensor
    lengths: Tensor
    kept: Tensor
    attention: Tensor

    def __len__(self) -> int:
        """Number of images."""
        return self.tokens.shape[0]

    def split(self) -> list[Tensor]:
        """The tokens of each image without padding: a list of B views [m_b, D]."""
        return [
            rows[:length] for rows, length in zip(self.tokens, self.lengths.tolist(), strict=True)
        ]

    def packed(self) -> tuple[Tensor, Tensor]:
        """All tokens in one tensor without padding, as variable-length attention takes them.

        Returns:
            The tokens [sum of m_b, D], and `cu_seqlens` [B + 1] int32: image b has the rows
            `cu_seqlens[b]` to `cu_seqlens[b + 1]`.
        """
        rows = torch.arange(self.tokens.shape[1], device=self.lengths.device)  # [capacity]
        ends = self.lengths.cumsum(0, dtype=torch.int32)  # [B]
        cu_seqlens = torch.nn.functional.pad(ends, (1, 0))  # [B + 1]
        return self.tokens[rows < self.lengths[:, None]], cu_seqlens
