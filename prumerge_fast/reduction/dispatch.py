"""`prune_merge` and `reduce_tokens`: check their arguments, choose a backend and run it."""

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
from prumerge_fast.reduction.config import PruMergeConfig, Scoring
from prumerge_fast.reduction.output import MergedTokens
from prumerge_fast.reduction.received import received_attention
from prumerge_fast.reduction.reference import prune_merge_reference, reduce_tokens_reference
from prumerge_fast.reduction.torch_backend import (
    class_attention_by_head,
    prune_merge_torch,
    reduce_tokens_torch,
)
from prumerge_fast.reduction.triton_backend import prune_merge_triton, reduce_tokens_triton

_DEFAULT_CONFIG = PruMergeConfig()
_Implementation = Callable[[Tensor, Tensor, Tensor, PruMergeConfig], MergedTokens]
# By backend: with a query [B, C] and rows of the class token, and with scores [B, N] and none; the
# arguments are checked.
_IMPLEMENTATIONS: dict[str, tuple[_Implementation, _Implementation]] = {
    "torch": (prune_merge_torch, reduce_tokens_torch),
    "reference": (prune_merge_reference, reduce_tokens_reference),
    "triton": (prune_merge_triton, reduce_tokens_triton),
}


def prune_merge(
    query: Tensor,
    keys: Tensor,
    hidden: Tensor,
    config: PruMergeConfig | None = None,
    *,
    num_heads: int | None = None,
    backend: str = "auto",
) -> MergedTokens:
    """Reduce the patch tokens of B images (LLaVA-PruMerge, arXiv 2403.15388, Algorithm 1).

    Scores, similarities and sums are computed in float32 (float64 for float64 input), autocast or
    not; on a GPU, the torch and reference backends follow `torch.set_float32_matmul_precision`.
    Row 0 of every input is the class token. With `keep` given, shapes are static and nothing waits
    for the device; without it, the number of rows is read once.

    Differentiable in `query`, `keys` and `hidden`; the selection is held constant.

    Values that are not finite stay in their image and never hang or index out of bounds. An
    image whose scores hold a NaN or +inf has NaN attention throughout: no token is an outlier,
    a `keep` of n takes the n tokens of lowest index, and rows that attention weighs are NaN. A
    similarity that is NaN (from an infinite key) ranks below every other. A token of `hidden`
    that is not finite makes the rows that use it not finite, and, in the torch and Triton backends,
    may do so to every merged row of its image. A key that is zero has similarity 0 to all.

    Args:
        query: [B, C] or [B, 1+N, C]; queries of the layer that reads `hidden`. All rows are used
            with `scores="received"`, else row 0.
        keys: [B, 1+N, C]; keys of that layer.
        hidden: [B, 1+N, C]; the features to reduce. Or [B, 1+N, S * C], several layers' side by
            side, as ViP-LLaVA has them.
        config: What to keep and how to merge; `None` for the defaults.
        num_heads: The layer's heads; only where the config scores by separate heads.
        backend: `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    All three tensors share one device and one dtype of float16, bfloat16, float32 or float64.

    Returns:
        The reduced tokens, in the dtype of `hidden`. `capacity` is the number of rows of the
        longest image, which is `config.capacity(N)` at most and exactly that with `keep` given.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together, N is 0, `keep` is larger than N, there
            is no such backend, or what the config scores by needs `num_heads` or all queries.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    config = _checked(config)
    _check_tensors(query, keys, hidden)
    num_patches = keys.shape[1] - 1
    resolved = resolve_backend(backend, keys.device, keys.dtype, num_patches)
    scoring = config.scoring()
    if scoring.received or scoring.separate:
        config.budget(num_patches)  # raises, before there is work
        attention = _attention(query, keys, scoring, num_heads, backend)
        return reduce_tokens(attention, keys[:, 1:], hidden[:, 1:], config, backend=backend)
    implementation, _ = _IMPLEMENTATIONS[resolved.name]
    if query.ndim == 3:
        query = query[:, 0]  # [B, C]
    with without_autocast(keys.device.type):
        return implementation(query, keys, hidden, config)


def reduce_tokens(
    attention: Tensor,
    keys: Tensor,
    hidden: Tensor,
    config: PruMergeConfig | None = None,
    *,
    backend: str = "auto",
) -> MergedTokens:
    """Reduce the tokens of B images by scores of any kind: all of Algorithm 1 but its attention.

    `prune_merge` is this with the class token's attention as the scores. Here is no class token,
    and the features need not be those that the keys are of: tokens may be pruned behind a
    projector, or where tower and features have different widths.

    Computed as `prune_merge` is, in float32 (float64 for float64 `hidden`). Differentiable in
    `attention` and `hidden`; keys only choose neighbours, which are held constant.

    Args:
        attention: [B, N], how much each token matters, not negative; float16, bfloat16, float32 or
            float64. A negative score, or NaN, ranks as 0 and is weighed as it is.
        keys: [B, N, C], whose cosines say which tokens are similar.
        hidden: [B, N, D], the features to reduce.
        config: What to keep and how to merge; `None` for the defaults. Its `scores` and `heads`
            have no effect: the scores are given.
        backend: `"auto"`, `"triton"`, `"torch"` or `"reference"`.

    `keys` and `hidden` share one dtype of float16, bfloat16, float32 or float64; all are on one
    device.

    Returns:
        As `prune_merge`; `attention` is the one given, in float32 (float64 for float64 `hidden`).

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: Shapes or devices do not fit together, N is 0, `keep` is larger than N, or
            there is no such backend.
        BackendUnavailableError: The backend was asked for by name and cannot run.
    """
    config = _checked(config)
    tensors = {"attention": attention, "keys": keys, "hidden": hidden}
    check_types(tensors)
    if keys.ndim != 3 or 0 in keys.shape[1:]:
        raise ValueError(
            "keys: expected shape [B, N, C] with at least one token (N >= 1) and one channel, got "
            f"{list(keys.shape)}"
        )
    batch, num_patches, _ = keys.shape
    if hidden.ndim != 3 or hidden.shape[:2] != keys.shape[:2] or hidden.shape[2] < 1:
        raise ValueError(
            f"hidden: expected shape [{batch}, {num_patches}, D] to go with keys, D >= 1, got "
            f"{list(hidden.shape)}"
        )
    if attention.shape != (batch, num_patches):
        raise ValueError(
            f"attention: expected shape {[batch, num_patches]} to go with keys, got "
            f"{list(attention.shape)}"
        )
    check_alike({"hidden": hidden}, keys)
    check_device({"attention": attention, "hidden": hidden}, keys)
    resolved = resolve_backend(backend, keys.device, keys.dtype, num_patches)
    _, implementation = _IMPLEMENTATIONS[resolved.name]
    with without_autocast(keys.device.type):
        return implementation(attention, keys, hidden, config)


def _attention(
    query: Tensor, keys: Tensor, scoring: Scoring, num_heads: int | None, backend: str
) -> Tensor:
    """Scores [B, N] that are not the joint attention of the class token."""
    heads = check_num_heads(num_heads, keys.shape[2]) if scoring.separate else 1
    if scoring.received:
        if query.ndim != 3:
            raise ValueError(
                "query: expected those of all patches, shape "
                f"{list(keys.shape)}, for scores='received', got {list(query.shape)}"
            )
        return received_attention(query, keys, num_heads=heads, class_token=True, backend=backend)
    if query.ndim == 3:
        query = query[:, 0]  # [B, C]
    with without_autocast(keys.device.type):
        return class_attention_by_head(query, keys, heads)


def _checked(config: PruMergeConfig | None) -> PruMergeConfig:
    if config is None:
        return _DEFAULT_CONFIG
    if not isinstance(config, PruMergeConfig):
        raise TypeError(f"config: expected a PruMergeConfig or None, got {type(config).__name__}")
    return config


def _check_tensors(query: Tensor, keys: Tensor, hidden: Tensor) -> None:
    check_types({"query": query, "keys": keys, "hidden": hidden})
    if keys.ndim != 3:
        raise ValueError(f"keys: expected shape [B, 1+N, C], got {list(keys.shape)}")
    batch, rows, channels = keys.shape
    if rows < 2 or channels < 1:
        raise ValueError(
            "keys: expected shape [B, 1+N, C] with at least one patch token (N >= 1) and one "
            f"channel, got {list(keys.shape)}"
        )
    width = hidden.shape[-1] if hidden.ndim == 3 else 0
    if hidden.shape[:-1] != keys.shape[:-1] or width < channels or width % channels:
        raise ValueError(
            f"hidden: expected the shape of keys, {list(keys.shape)}, or a multiple of its "
            f"channels, got {list(hidden.shape)}"
        )
    if query.shape not in ((batch, channels), (batch, rows, channels)):
        raise ValueError(
            f"query: expected shape {[batch, channels]} or {[batch, rows, channels]} to go with "
            f"keys, got {list(query.shape)}"
        )
    check_alike({"query": query, "hidden": hidden}, keys)
    check_device({"query": query, "hidden": hidden}, keys)
