"""Which tokens are of one sequence, where positions with gaps would tell transformers otherwise.

Without a mask, a row whose positions do not go up one by one counts as several sequences packed
together, which do not attend to each other; for FlashAttention a single row does with a mask, too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prumerge_fast.families.base import inner_model
from prumerge_fast.versions import cache_of


def packed_sequences(position_ids: Tensor) -> Tensor:
    """Which sequence of its row each column [B, L] is of, as transformers tells packed ones."""
    breaks = position_ids.diff(dim=1) != 1
    return torch.nn.functional.pad(breaks, (1, 0)).cumsum(1)


def tell_sequences(model: Any, arguments: dict[str, Any], sequence: Tensor | None = None) -> None:
    """Say in other arguments of a `forward` what its positions [B, S], with gaps, do not say.

    Args:
        model: Patched.
        arguments: Of a call behind nothing. Are changed in place.
        sequence: [B, S], the sequence of its row that each token is of; `None`: rows are whole.

    Raises:
        ValueError: Rows are packed, and the language model attends to no more than a window.
    """
    positions, mask = arguments["position_ids"], arguments.get("attention_mask")
    rows, length = positions.shape
    config = inner_model(model).language_model.config
    if "flash" in config._attn_implementation:
        is_padded = mask is not None and (mask.ndim != 2 or not bool(mask.all()))
        if rows == 1 and not is_padded:  # of several rows, it takes none for packed
            whole = torch.zeros_like(positions)
            arguments.update(_lengths(whole if sequence is None else sequence))
        return
    if mask is not None:
        return
    if sequence is None or _keeps_cache(model, arguments):  # where transformers tells none apart
        arguments["attention_mask"] = torch.ones_like(positions)
        return
    window = getattr(config, "sliding_window", None)
    if window is not None and window < length:
        raise ValueError(
            "position_ids: expected one sequence a row where positions='original' and the language "
            f"model attends to {window} tokens, got packed rows of {length}"
        )
    sequence = sequence.to(positions.device)
    sees = (sequence[:, :, None] == sequence[:, None]).tril()  # [B, S, S]
    dtype = arguments["inputs_embeds"].dtype
    bias = torch.zeros_like(sees, dtype=dtype).masked_fill(~sees, torch.finfo(dtype).min)
    arguments["attention_mask"] = bias[:, None]  # [B, 1, S, S], added to scores


def _keeps_cache(model: Any, arguments: dict[str, Any]) -> bool:
    """Whether the language model will have a KV cache, given or made."""
    language_model = inner_model(model).language_model
    use_cache = arguments.get("use_cache")
    if use_cache is None:
        use_cache = getattr(language_model.config, "use_cache", False)
    if language_model.training and getattr(language_model, "gradient_checkpointing", False):
        use_cache = False
    return bool(use_cache) or cache_of(arguments) is not None


def _lengths(sequence: Tensor) -> dict[str, Any]:
    """FlashAttention's arguments for a row [1, S] of sequences."""
    starts = torch.nn.functional.pad(sequence[0].diff() != 0, (1, 0), value=True).nonzero()[:, 0]
    ends = torch.nn.functional.pad(starts, (0, 1), value=sequence.shape[1])  # [sequences + 1]
    bounds, longest = ends.int(), int(ends.diff().max())
    return {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }
