"""What a vision tower read of images, as the reduction takes it from any kind of tower."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from prumerge_fast.reduction.autocast import without_autocast
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge, reduce_tokens
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.received import received_attention
from prumerge_fast.reduction.torch_backend import class_attention_by_head


class Scored(NamedTuple):
    """The arguments of `reduce_tokens` for K images, crops or frames of n patches each.

    Args:
        attention: [K, n], how much each patch matters.
        keys: [K, n, C], whose cosines say which patches are similar.
        features: [K, n, D], what is reduced.
    """

    attention: Tensor
    keys: Tensor
    features: Tensor

    def chosen(self, images: Tensor, patches: Tensor) -> Scored:
        """Of images [k], the patches [k, n]."""
        index = images[:, None], patches
        return Scored(self.attention[index], self.keys[index], self.features[index])


class Reading(NamedTuple):
    """K images, crops or frames as a tower read them, R tokens each: the patches and, where the
    tower has one, a class token first.

    Args:
        query: [K, C] of the class token, or [K, R, C] of all.
        keys: [K, R, C], which queries are multiplied with.
        hidden: [K, R, D], the features.
        num_heads: Of the layer that queries and keys are of.
        class_token: Whether row 0 is one.
        similar: [K, R, C], the keys whose cosines say which patches are similar; `None`: `keys`.
    """

    query: Tensor
    keys: Tensor
    hidden: Tensor
    num_heads: int
    class_token: bool
    similar: Tensor | None = None

    @property
    def features(self) -> Tensor:
        """[K, n, D], those of the patches."""
        return self.hidden[:, int(self.class_token) :]

    def chosen(self, images: Tensor, patches: Tensor) -> Reading:
        """Of images [k], the patches [k, n], and the class token."""
        rows = patches
        if self.class_token:
            rows = torch.nn.functional.pad(patches + 1, (1, 0))  # [k, 1+n]
        index = images[:, None], rows
        return self._replace(
            query=self.query[images] if self.query.ndim == 2 else self.query[index],
            keys=self.keys[index],
            hidden=self.hidden[index],
            similar=None if self.similar is None else self.similar[index],
        )

    def scored(self, config: PruMergeConfig, backend: str = "auto") -> Scored:
        """With the scores that `config` asks for, as specified for towers of either kind.

        Raises:
            ValueError: It asks for the class token's attention, and there is none, or for that of
                all patches, and their queries are not there.
        """
        scoring = config.scoring(class_token=self.class_token)
        heads = self.num_heads if scoring.separate else 1
        first = int(self.class_token)
        if scoring.received:
            if self.query.ndim != 3:
                raise ValueError(
                    "query: expected those of all patches, [K, R, C], for scores='received', got "
                    f"{list(self.query.shape)}"
                )
            attention = received_attention(
                self.query,
                self.keys,
                num_heads=heads,
                class_token=self.class_token,
                backend=backend,
            )
        else:
            query = self.query if self.query.ndim == 2 else self.query[:, 0]  # [K, C]
            with without_autocast(self.keys.device.type):
                attention = class_attention_by_head(query, self.keys, heads)
        similar = self.keys if self.similar is None else self.similar
        return Scored(attention, similar[:, first:], self.features)


Patches = Reading | Scored
"""What `reduce_patches` takes."""


def reduce_patches(patches: Patches, config: PruMergeConfig, backend: str = "auto") -> MergedTokens:
    """`prune_merge` or `reduce_tokens`, as what was read asks for; their errors."""
    if isinstance(patches, Reading):
        if patches.class_token and patches.similar is None:  # one launch, scores and all
            query, keys, hidden, heads, *_ = patches
            return prune_merge(query, keys, hidden, config, num_heads=heads, backend=backend)
        config.budget(patches.features.shape[1])  # raises, before there is work
        patches = patches.scored(config, backend)
    attention, keys, features = patches
    # Behind a projector, autocast gives features another dtype than the tower gave keys.
    return reduce_tokens(attention, keys.to(features), features, config, backend=backend)
