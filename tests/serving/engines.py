"""Engines of vLLM in this process, on a CPU, and what a patched model of transformers answers."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image

from prumerge_fast.demo import MODEL_DIR
from prumerge_fast.harness.models import load
from prumerge_fast.patching.patch import patched
from prumerge_fast.reduction.config import PruMergeConfig

if importlib.util.find_spec("vllm") is None:
    pytest.skip("vLLM is not installed; CI has it in a step of its own", allow_module_level=True)
# Before vLLM is imported: it reads some of them then.
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
import vllm

Prompt = tuple[str, Sequence[Image.Image]]


@contextlib.contextmanager
def engine(model: Path, prumerge: dict[str, Any] | None = None, **options: Any) -> Iterator[Any]:
    """`vllm.LLM` of a saved model; `prumerge` is the setting."""
    options = {
        "dtype": "float32",
        "distributed_executor_backend": "uni",
        "enforce_eager": True,
        "max_model_len": 512,
        "hf_overrides": {} if prumerge is None else {"prumerge": prumerge},
        "limit_mm_per_prompt": {"image": 3},
        **options,
    }
    llm = vllm.LLM(str(model), **options)
    try:
        yield llm
    finally:
        shut_down(llm)


def shut_down(llm: Any) -> None:
    """So that another engine can start in this process."""
    llm.llm_engine.engine_core.shutdown()
    vllm.distributed.cleanup_dist_env_and_memory()


def requests(prompts: Sequence[Prompt]) -> list[Any]:
    """As vLLM takes them."""
    return [
        {"prompt": text, "multi_modal_data": {"image": list(images)}} if images else text
        for text, images in prompts
    ]


def said(llm: Any, prompts: Sequence[Prompt], **options: Any) -> list[tuple[str, int]]:
    """Greedy answers, and the number of tokens of each prompt."""
    parameters = vllm.SamplingParams(temperature=0, max_tokens=8)
    outputs = llm.generate(requests(prompts), parameters, use_tqdm=False, **options)
    return [(out.outputs[0].text.strip(), len(out.prompt_token_ids)) for out in outputs]


def logprobs(llm: Any, prompts: Sequence[Prompt]) -> list[list[Any]]:
    """Of each prompt the greedy answer, the number of tokens, and the answer's log-probability."""
    parameters = vllm.SamplingParams(temperature=0, max_tokens=8, logprobs=1)
    outputs = llm.generate(requests(prompts), parameters, use_tqdm=False)
    return [
        [out.outputs[0].text, len(out.prompt_token_ids), out.outputs[0].cumulative_logprob]
        for out in outputs
    ]


def expected(
    model: Path,
    prompts: Sequence[Prompt],
    config: PruMergeConfig | None,
    dtype: str = "float32",
) -> list[str]:
    """What transformers answers, patched with `config`, one prompt after the other."""
    loaded = load(model, device="cpu", dtype=dtype)
    around = contextlib.nullcontext() if config is None else patched(loaded.model, config)
    answers = []
    with around, torch.inference_mode():
        for text, images in prompts:
            inputs = loaded.processor(
                text=text, images=list(images) or None, return_tensors="pt"
            ).to(loaded.model.dtype)
            out = loaded.model.generate(**inputs, do_sample=False, max_new_tokens=8)
            answer = out[0, inputs["input_ids"].shape[1] :]
            answers.append(loaded.processor.decode(answer, skip_special_tokens=True).strip())
    return answers


def saved_demo(path: Path, family: str = "Llava", **changes: Any) -> Path:
    """The demo model as transformers 5 saves a model that it made itself, in this family.

    As a LLaVA-NeXT it reads crops, if not well.
    """
    from transformers import AutoProcessor, AutoTokenizer

    plain = transformers.LlavaForConditionalGeneration.from_pretrained(MODEL_DIR, dtype="float32")
    options = plain.config.to_dict()
    for name in ("model_type", "architectures", "dtype"):
        options.pop(name)
    weights = plain.state_dict()
    side, text = options["vision_config"]["image_size"], options["text_config"]
    if family == "LlavaNext":
        changes["image_grid_pinpoints"] = [
            [rows * side, columns * side] for rows, columns in ((1, 2), (2, 1), (2, 2), (3, 1))
        ]
        text["max_position_embeddings"] = 4096
        generator = torch.Generator().manual_seed(0)
        newline = torch.randn(text["hidden_size"], generator=generator)
        weights["model.image_newline"] = newline / len(newline) ** 0.5
    config = getattr(transformers, f"{family}Config")(**(options | changes))
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    model.load_state_dict(weights)
    model.save_pretrained(path)
    processor = AutoProcessor.from_pretrained(MODEL_DIR)
    if family == "LlavaNext":
        processor = transformers.LlavaNextProcessor(
            image_processor=transformers.LlavaNextImageProcessor(
                size={"shortest_edge": side},
                crop_size={"height": side, "width": side},
                image_grid_pinpoints=changes["image_grid_pinpoints"],
            ),
            tokenizer=AutoTokenizer.from_pretrained(MODEL_DIR),
            patch_size=options["vision_config"]["patch_size"],
            vision_feature_select_strategy="default",
            num_additional_image_tokens=1,
        )
    processor.save_pretrained(path)
    return path


def model_of(llm: Any) -> Any:
    """The model that an engine in this process runs."""
    return llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
