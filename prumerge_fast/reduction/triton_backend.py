"""The Triton backend: the fused kernel as a PyTorch operator, `prumerge_fast::prune_merge`.

One operator for the whole reduction, because each costs about 10 µs of host time; with scores that
are given, `prumerge_fast::reduce_tokens`. Shapes are static (rows padded to `config.capacity(N)`),
so that it traces and does not wait for the device.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.reduction.autocast import without_autocast
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.gradients import prune_merge_gradients, reduce_tokens_gradients
from prumerge_fast.reduction.output import MergedTokens

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_PATCHES = 16384  # counts of two searches share 32 bits
_AUTOTUNE = "PRUMERGE_FAST_AUTOTUNE"  # environment variable
_NO_BUDGET = -1  # operators take the budget as a plain `int`


def prune_merge_triton(
    query: Tensor, keys: Tensor, hidden: Tensor, config: PruMergeConfig
) -> MergedTokens:
    """Reduce the patch tokens of B images in one kernel launch.

    Args:
        query: [B, C], the class token's query.
        keys: [B, 1+N, C].
        hidden: [B, 1+N, D].
        config: What to keep and how to merge.

    Returns:
        Rows padded to the longest image, in the dtype of `hidden`; computed in float32.
    """
    budget, options = _options(config, keys.shape[1] - 1)
    outputs = torch.ops.prumerge_fast.prune_merge(query, keys, hidden, *options)
    return _merged(outputs, budget, config)


def reduce_tokens_triton(
    attention: Tensor, keys: Tensor, hidden: Tensor, config: PruMergeConfig
) -> MergedTokens:
    """Reduce the tokens of B images by scores that are given, in one kernel launch.

    Args:
        attention: [B, N].
        keys: [B, N, C].
        hidden: [B, N, D].
        config: What to keep and how to merge.

    Returns:
        As `prune_merge_triton`.
    """
    budget, options = _options(config, keys.shape[1])
    outputs = torch.ops.prumerge_fast.reduce_tokens(attention.float(), keys, hidden, *options)
    return _merged(outputs, budget, config)


def _options(config: PruMergeConfig, num_patches: int) -> tuple[int | None, tuple[Any, ...]]:
    """The budget, and a config as the operators take it."""
    budget = config.budget(num_patches)
    return budget, (
        _NO_BUDGET if budget is None else budget,
        config.variant,
        config.neighbours,
        config.fence,
        config.merge,
        bool(config.supplement),
        config.order,
    )


def _merged(
    outputs: tuple[Tensor, ...], budget: int | None, config: PruMergeConfig
) -> MergedTokens:
    """What an operator returned, its rows cut to the longest image's."""
    tokens, lengths, kept, attention = outputs
    if budget is None:
        longest = int(lengths.max()) if len(lengths) else int(bool(config.supplement))
        tokens, kept = tokens[:, :longest], kept[:, :longest]
    return MergedTokens(tokens, lengths, kept, attention)


def triton_obstacle(
    device: torch.device, dtype: torch.dtype | None = None, num_patches: int | None = None
) -> str | None:
    """Why the kernel cannot run for such tensors, in words for a person; `None` when it can."""
    if dtype is not None and dtype not in _DTYPES:
        return f"the Triton kernel takes float16, bfloat16 or float32, not {dtype}"
    if num_patches is not None and num_patches > _MOST_PATCHES:
        return f"the Triton kernel takes at most {_MOST_PATCHES} patch tokens, not {num_patches}"
    return _device_obstacle(device)


@torch.compiler.assume_constant_result  # it asks for modules and drivers, which cannot be traced
def _device_obstacle(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install triton; it exists for Linux)"
    if device.type == "cpu":
        if _interprets() or getattr(_active_driver(), "accepts_cpu_tensors", False):
            return None
        return (
            "the tensors are on the CPU; move them to a GPU, or set TRITON_INTERPRET=1 before "
            "Triton is imported to run the kernel in Triton's interpreter (slow)"
        )
    if device.type != "cuda":
        return f"there is no Triton kernel for devices of type '{device.type}'"
    from prumerge_fast.kernels.launch_config import target_obstacle

    return target_obstacle(_gpu_name(device))


def _interprets() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _active_driver() -> Any:
    """Triton's active driver, or `None` where there is no GPU to drive."""
    from triton.runtime import driver

    try:
        return driver.active
    except RuntimeError:  # "0 active drivers"
        return None


def _gpu_name(device: torch.device) -> str:
    """`"sm_80"` or `"gfx942"`."""
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def launch_target(device: torch.device) -> str:
    """What the kernel is compiled for when the tensors are on `device`."""
    if device.type == "cuda":
        return _gpu_name(device)
    if _interprets():
        return "sm_80"
    target = _active_driver().get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]


@torch.library.custom_op("prumerge_fast::prune_merge", mutates_args=())
def _prune_merge(
    query: Tensor,
    keys: Tensor,
    hidden: Tensor,
    budget: int,
    variant: str,
    neighbours: int,
    fence: float,
    merge: str,
    supplement: bool,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (budget, variant, neighbours, fence, merge, supplement, order)
    return _launch((query, keys, hidden), keys.shape[1] - 1, *options)


@torch.library.custom_op("prumerge_fast::reduce_tokens", mutates_args=())
def _reduce_tokens(
    attention: Tensor,
    keys: Tensor,
    hidden: Tensor,
    budget: int,
    variant: str,
    neighbours: int,
    fence: float,
    merge: str,
    supplement: bool,
    order: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = (budget, variant, neighbours, fence, merge, supplement, order)
    return _launch((None, keys, hidden, attention.contiguous()), keys.shape[1], *options)


def _launch(
    inputs: tuple[Any, ...],
    num_patches: int,
    budget: int,
    variant: str,
    neighbours: int,
    fence: float,
    merge: str,
    supplement: bool,
    order: str,
) -> _Outputs:
    """Runs the kernel on the inputs that it takes."""
    from prumerge_fast.kernels import launch_config
    from prumerge_fast.kernels.prune_merge import prune_merge

    keys, hidden = inputs[1:3]
    batch, _, channels = keys.shape
    plus = variant == "prumerge+"
    # Heavy-tailed attention keeps an eleventh to a seventh of the tokens, with PruMerge+ about
    # half. Guess low: a program too many repeats the scoring of every image, one too few takes a
    # second tile in those that keep more.
    typical = num_patches // (2 if plus else 11) if budget == _NO_BUDGET else budget
    options = {
        "budget": None if budget == _NO_BUDGET else budget,
        "plus": plus,
        "neighbours": neighbours,
        "fence": fence,
        "merge": merge,
        "supplement": supplement,
        "raster": order == "raster",
    }

    def run(launch: Any) -> _Outputs:
        return prune_merge(*inputs, launch=launch, **options)

    target = launch_target(keys.device)
    shape = (
        *(batch, num_patches, channels, typical + supplement, keys.dtype, target),
        hidden.shape[2],
    )
    # Triton launches, times and captures on the current device, which need not be the tensors'.
    with torch.cuda.device_of(keys):
        if _autotunes() and batch > 0 and not _is_capturing(keys.device):
            from prumerge_fast.kernels.autotune import fastest

            key = (len(inputs), *shape, keys.device, *options.values())
            return run(fastest(key, launch_config.launch_candidates(*shape), run))
        return run(launch_config.choose_launch(*shape))


def _autotunes() -> bool:
    value = os.environ.get(_AUTOTUNE, "0")
    if value not in ("0", "1"):
        raise ValueError(f"{_AUTOTUNE}: expected 0 or 1, got {value!r}")
    return value == "1"


def _is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph records what runs; nothing can be timed then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@_prune_merge.register_fake
def _(query: Tensor, keys: Tensor, hidden: Tensor, budget: int, *options: Any) -> _Outputs:
    return _empty(keys.shape[1] - 1, hidden, budget, *options)


@_reduce_tokens.register_fake
def _(attention: Tensor, keys: Tensor, hidden: Tensor, budget: int, *options: Any) -> _Outputs:
    return _empty(keys.shape[1], hidden, budget, *options)


def _empty(num_patches: int, hidden: Tensor, budget: int, *options: Any) -> _Outputs:
    """Outputs of the right shapes."""
    supplement = options[4]
    batch, _, width = hidden.shape
    capacity = (num_patches if budget == _NO_BUDGET else budget) + int(supplement)
    return (
        hidden.new_empty(batch, capacity, width),
        hidden.new_empty(batch, dtype=torch.int32),
        hidden.new_empty(batch, capacity, dtype=torch.int32),
        hidden.new_empty(batch, num_patches, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    first, keys, hidden, _, _, neighbours, _, merge, supplement, _ = inputs
    _, lengths, kept, _ = output
    ctx.save_for_backward(first, keys, hidden, lengths, kept)
    ctx.options = {"neighbours": neighbours, "merge": merge, "supplement": supplement}


def _backward(ctx: Any, grad_tokens: Tensor, _l: Any, _k: Any, grad_attention: Tensor) -> Any:
    # Autocast may be on where `backward` is called, or where a compiled forward pass was.
    with without_autocast(grad_tokens.device.type):
        gradients = prune_merge_gradients(
            grad_tokens, grad_attention, *ctx.saved_tensors, **ctx.options
        )
    return (*gradients, *(None,) * 7)


def _backward_of_scores(
    ctx: Any, grad_tokens: Tensor, _l: Any, _k: Any, grad_attention: Tensor
) -> Any:
    with without_autocast(grad_tokens.device.type):
        grad_scores, grad_hidden = reduce_tokens_gradients(
            grad_tokens, grad_attention, *ctx.saved_tensors, **ctx.options
        )
    return (grad_scores, None, grad_hidden, *(None,) * 7)


_prune_merge.register_autograd(_backward, setup_context=_setup_context)
_reduce_tokens.register_autograd(_backward_of_scores, setup_context=_setup_context)
