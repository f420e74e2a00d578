"""Which modules of a LLaVA bitsandbytes is to quantise: the language model, and nothing else.

PruMerge ranks patches by the tower's own attention, and tower and projector are a few per cent of
a LLaVA's weights, so that they stay as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_KEPT_WHOLE = ("vision_tower", "image_tower", "video_tower", "multi_modal_projector")


def quantisation_config(bits: int = 4, dtype: torch.dtype = torch.float16) -> BitsAndBytesConfig:
    """The `quantization_config` of `from_pretrained` for a quantised language model.

    Args:
        bits: 4 (NF4, Dettmers et al. 2023, arXiv 2305.14314) or 8 (LLM.int8(), Dettmers et al.
            2022, arXiv 2208.07339).
        dtype: What the language model computes in, with 4 bits.

    Raises:
        ValueError: `bits` is neither 4 nor 8.
        TypeError: `dtype` is no `torch.dtype`.
        ImportError: bitsandbytes is not installed (extra: int4).
    """
    if bits not in (4, 8):
        raise ValueError(f"bits: expected 4 or 8, got {bits!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype: expected a torch.dtype, got {dtype!r}")
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=bits == 4,
        load_in_8bit=bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        # Without `model.`, transformers 5 quantises them all the same, and silently.
        llm_int8_skip_modules=[
            *_KEPT_WHOLE,
            *(f"model.{name}" for name in _KEPT_WHOLE),
            "lm_head",
        ],
    )
