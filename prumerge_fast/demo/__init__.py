"""The embedded default: a small LLaVA that has really been trained, and the pictures it knows."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration

MODEL_DIR = Path(__file__).parent / "tiny-llava"
IMAGE_TOKEN = "<image>"
PREFIX = f"USER: {IMAGE_TOKEN}"
SUFFIX = "\n{question} ASSISTANT:"
PROMPT = PREFIX + SUFFIX


def load_demo(
    dtype: torch.dtype | None = None, device: str | torch.device = "cpu", **options: Any
) -> tuple[LlavaForConditionalGeneration, Any]:
    """Loads the demo model and its processor from the installed package; needs no network.

    Args:
        dtype: of the weights; float32 unless given (the file holds bfloat16).
        device: where the model goes.
        options: passed to `LlavaForConditionalGeneration.from_pretrained`.
    """
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    options.setdefault("dtype", dtype or torch.float32)
    model: Any = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, **options)
    return model.to(device).eval(), AutoProcessor.from_pretrained(MODEL_DIR)
