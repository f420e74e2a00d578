"""The Triton backend: the fused kernel as one PyTorch operator, `prumerge_fast::prune_merge`.

One operator for the whole reduction, because each costs about 10 µs of host time. Its shapes are
static (rows padded to `config.capacity(N)`), so that it traces and neither waits for the device.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from prumerge_fast.reduction.autocast import without_autocast
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.gradients import prune_merge_gradients
from prumerge_fast.reduction.output import MergedTokens

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MOST_PATCHES = 16384  # counts of two searches share 32 bits
_AUTOTUNE = "PRUMERGE_FAST_AUTOTUNE"  # environment variable
_NO_BUDGET = -1  # operators take the budget as a plain `int`


def prune_merge_triton(
    query: Tensor, keys: Tensor, hidden: Tensor, config: PruMergeConfig
) -> MergedTokens:
    """Reduce the patch tokens of B images in one kernel launch for each feature layer.

    Args:
        query: [B, C], the class token's query.
        keys: [B, 1+N, C].
        hidden: [B, 1+N, S * C]; the kernel takes C channels, so that it runs S times.
        config: What to keep and how to merge.

    Returns:
        Rows padded to the longest image, in the dtype of `hidden`; computed in float32.
    """
    budget = config.budget(keys.shape[1] - 1)
    launches = [
        torch.ops.prumerge_fast.prune_merge(
            query,
            keys,
            layer,
            _NO_BUDGET if budget is None else budget,
            config.variant,
            config.neighbours,
            config.fence,
            config.merge,
            config.supplement,
            config.order,
        )
        for layer in hidden.split(keys.shape[2], dim=2)  # [B, 1+N, C] each
    ]
    tokens, lengths, kept, attention = launches[0]
    if len(launches) > 1:  # all selected the same tokens
        tokens = torch.cat([launch[0] for launch in launches], dim=2)
    if budget is None:
        longest = int(lengths.max()) if len(lengths) else int(config.supplement)
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
    from prumerge_fast.kernels import launch_config
    from prumerge_fast.kernels.prune_merge import prune_merge

    batch, rows, channels = keys.shape
    plus = variant == "prumerge+"
    # Heavy-tailed attention keeps an eleventh to a seventh of the tokens, with PruMerge+ about
    # half. Guess low: a program too many repeats the scoring of every image, one too few takes a
    # second tile in those that keep more.
    typical = (rows - 1) // (2 if plus else 11) if budget == _NO_BUDGET else budget
    options = {
        "budget": None if budget == _NO_BUDGET else budget,
        "plus": plus,
        "neighbours": neighbours,
        "fence": fence,
        "merge": merge,
        "supplement": supplement,
        "raster": order == "raster",
    }

    def run(launch: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return prune_merge(query, keys, hidden, launch=launch, **options)

    target = launch_target(keys.device)
    shape = (batch, rows - 1, channels, typical + supplement, keys.dtype, target)
    # Triton launches, times and captures on the current device, which need not be the tensors'.
    with torch.cuda.device_of(keys):
        if _autotunes() and batch > 0 and not _is_capturing(keys.device):
            from prumerge_fast.kernels.autotune import fastest

            key = (*shape, keys.device, *options.values())
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
def _(
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
    batch, rows, channels = keys.shape
    capacity = (rows - 1 if budget == _NO_BUDGET else budget) + int(supplement)
    return (
        hidden.new_empty(batch, capacity, channels),
        hidden.new_empty(batch, dtype=torch.int32),
        hidden.new_empty(batch, capacity, dtype=torch.int32),
        hidden.new_empty(batch, rows - 1, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    query, keys, hidden, _, _, neighbours, _, merge, supplement, _ = inputs
    _, lengths, kept, _ = output
    ctx.save_for_backward(query, keys, hidden, lengths, kept)
    ctx.options = {"neighbours": neighbours, "merge": merge, "supplement": supplement}


def _backward(ctx: Any, grad_tokens: Tensor, _l: Any, _k: Any, grad_attention: Tensor) -> Any:
    # Autocast may be on where `backward` is called, or where a compiled forward pass was.
    with without_autocast(grad_tokens.device.type):
        gradients = prune_merge_gradients(
            grad_tokens, grad_attention, *ctx.saved_tensors, **ctx.options
        )
    return (*gradients, *(None,) * 7)


_prune_merge.register_autograd(_backward, setup_context=_setup_context)
