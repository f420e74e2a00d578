"""LoRA on the language model beside PruMerge: each is right, and the tower is left alone."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch
from engines import Prompt, engine, said
from transformers import AutoProcessor, LlavaForConditionalGeneration
from vllm.lora.request import LoRARequest

from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.demo.items import items_from_demo
from prumerge_fast.patching.patch import patched

SCALE, RANK = 2.0, 8


def test_adapters_of_the_language_model(tmp_path: Path) -> None:
    items = items_from_demo(12)
    prompts: list[Prompt] = [
        (f"USER: <image>\n{item.text} ASSISTANT:", [item.load()]) for item in items
    ]
    model = LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype=torch.float32)
    generator, adapter = torch.Generator().manual_seed(0), {}
    for name, module in model.model.language_model.named_modules():
        if name.endswith("self_attn.q_proj"):
            down = torch.randn(RANK, module.in_features, generator=generator) / 20
            up = torch.randn(module.out_features, RANK, generator=generator) / 20
            module.weight.data += SCALE * up @ down
            where = f"base_model.model.model.language_model.{name}"
            adapter |= {f"{where}.lora_A.weight": down, f"{where}.lora_B.weight": up}
    safetensors.torch.save_file(adapter, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": SCALE * RANK}
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["q_proj"], "base_model_name_or_path": None})
    )

    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    answers = []
    with patched(model, keep=32), torch.inference_mode():
        for text, images in prompts:
            inputs = processor(text=text, images=images, return_tensors="pt")
            out = model.generate(**inputs, do_sample=False, max_new_tokens=8)
            new = out[0, inputs["input_ids"].shape[1] :]
            answers.append(processor.decode(new, skip_special_tokens=True).strip())
    request = LoRARequest("adapter", 1, str(tmp_path))
    with engine(MODEL_DIR, {"keep": 32}, enable_lora=True, max_lora_rank=RANK) as llm:
        plain = said(llm, prompts)
        adapted = said(llm, prompts, lora_request=request)
    assert [answer for answer, _ in adapted] == answers
    assert adapted != plain
