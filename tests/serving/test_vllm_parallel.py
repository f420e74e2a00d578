"""A model over two processes: the scores are of the whole tower on each."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engines import Prompt, engine, expected, said
from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration

from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.reduction.config import PruMergeConfig


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["prumerge", "prumerge+"])
def test_tensor_parallel(tmp_path: Path, variant: str) -> None:
    """The demo's tower, and a decoder of random weights whose heads divide by two."""
    demo = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    options = demo.config.to_dict()
    options["text_config"] |= {
        "hidden_size": 128,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
    }
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(LlavaConfig(**options))
    model.model.vision_tower.load_state_dict(demo.model.vision_tower.state_dict())
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(MODEL_DIR).save_pretrained(tmp_path)
    prompts: list[Prompt] = [
        (f"USER: <image>\n{item.text} ASSISTANT:", [item.load()]) for item in items_from_demo(12)
    ]
    setting = {"variant": variant, "keep": 32}
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(tmp_path, setting, **ranks) as llm:
        found = said(llm, prompts)
    answers = [_whole(one) for one in expected(tmp_path, prompts, PruMergeConfig(**setting))]
    assert [_whole(answer) for answer, _ in found] == answers
    assert len(set(answers)) > 6  # they depend on the picture and the question


def _whole(answer: str) -> str:
    """Without the beginning of a character at its end, which vLLM keeps back."""
    return answer.rstrip("\N{REPLACEMENT CHARACTER}")
