"""Accelerate: models spread over devices, with weights on the CPU or the disk; mixed precision."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import peft
import pytest
import torch
from tiny_models import EVERYTHING, PIXELS, PROMPTS, batch, tiny_llava
from transformers import LlavaForConditionalGeneration

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families import adapter_for
from prumerge_fast.patching.patch import patch, unpatch
from prumerge_fast.versions import vision_transformer

INPUTS: dict[str, Any] = {**batch(PROMPTS), "pixel_values": PIXELS}
CPU = torch.device("cpu")
MAP = {
    "model.vision_tower": "disk",
    "model.multi_modal_projector": "cpu",
    "model.language_model.embed_tokens": "cpu",
    "model.language_model.layers.0": "disk",
    "model.language_model.layers.1": "cpu",
    "model.language_model.norm": "cpu",
    "model.language_model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


def on_the_cpu(model: Any, folder: Path) -> Any:
    return accelerate.cpu_offload(model, CPU)


def on_the_disk(model: Any, folder: Path) -> Any:
    return accelerate.disk_offload(model, str(folder), CPU)


def dispatched(model: Any, folder: Path) -> Any:
    return accelerate.dispatch_model(model, MAP, main_device="cpu", offload_dir=str(folder))


def loaded(model: Any, folder: Path) -> Any:
    model.save_pretrained(folder / "model")
    return LlavaForConditionalGeneration.from_pretrained(
        folder / "model", device_map=MAP, offload_folder=folder, dtype=torch.float32
    )


def away(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.is_meta}


@torch.no_grad()
def outputs(model: Any) -> list[torch.Tensor]:
    answers = model.generate(**INPUTS, max_new_tokens=3)
    return [
        model(**INPUTS).logits,
        answers,
        model.generate(**INPUTS, max_new_tokens=2, num_beams=2),
    ]


@pytest.fixture(scope="module")
def plain() -> list[torch.Tensor]:
    return outputs(tiny_llava())


@pytest.fixture(scope="module")
def pruned() -> list[torch.Tensor]:
    return outputs(patch(tiny_llava(), keep=5))


@pytest.mark.parametrize("options", [{"scores": "received"}, {"heads": "separate"}], ids=str)
@torch.no_grad()
def test_scores_of_an_offloaded_tower(options: dict[str, Any], tmp_path: Path) -> None:
    model = patch(on_the_disk(tiny_llava(), tmp_path), keep=5, **options)
    expected = patch(tiny_llava(), keep=5, **options)(**INPUTS).logits
    torch.testing.assert_close(model(**INPUTS).logits, expected)


@pytest.mark.parametrize("offload", [on_the_cpu, on_the_disk, dispatched, loaded])
def test_offloaded_models_answer_alike(
    offload: Callable[..., Any], plain: Any, pruned: Any, tmp_path: Path
) -> None:
    model = offload(tiny_llava(), tmp_path)
    gone = away(model)
    assert any("vision_tower" in name for name in gone)
    torch.testing.assert_close(outputs(patch(model, keep=5)), pruned)
    assert away(model) == gone
    torch.testing.assert_close(outputs(unpatch(model)), plain)


@pytest.mark.parametrize("offload", [on_the_cpu, on_the_disk, dispatched])
def test_patched_models_are_offloaded(
    offload: Callable[..., Any], plain: Any, pruned: Any, tmp_path: Path
) -> None:
    model = offload(patch(tiny_llava(), keep=5), tmp_path)
    assert adapter_for(model).device(model) == CPU
    torch.testing.assert_close(outputs(model), pruned)
    torch.testing.assert_close(outputs(unpatch(model)), plain)


WHOLE = ["CLIPVisionModel", "CLIPEncoder", "CLIPEncoderLayer", "CLIPAttention", "LlamaDecoderLayer"]


@pytest.mark.parametrize("whole", WHOLE)
def test_layers_offloaded_as_a_whole(whole: str, pruned: Any) -> None:
    """Of the layer that reads the features only a part is run, past the hook of the layer."""
    model = accelerate.cpu_offload(tiny_llava(), CPU, preload_module_classes=[whole])
    gone = away(model)
    torch.testing.assert_close(outputs(patch(model, keep=5)), pruned)
    assert away(model) == gone


@pytest.mark.parametrize("offload", [on_the_cpu, on_the_disk])
def test_adapters_of_the_tower_are_offloaded(offload: Callable[..., Any], tmp_path: Path) -> None:
    """The layers that LoRA wraps have hooks inside of them."""
    targets = r".*vision_tower.*\.[qkv]_proj"
    wrapped = peft.get_peft_model(tiny_llava(), peft.LoraConfig(r=2, target_modules=targets))
    expected = outputs(patch(wrapped, keep=5))
    torch.testing.assert_close(outputs(offload(wrapped, tmp_path)), expected)


def test_weights_are_put_away_after_an_error() -> None:
    model = accelerate.cpu_offload(tiny_llava(), CPU, preload_module_classes=["CLIPEncoderLayer"])
    gone = away(patch(model))
    reader = vision_transformer(model.model.vision_tower).encoder.layers[3]

    def fail(module: Any, args: Any) -> None:
        assert not away(reader)
        raise KeyError

    reader.self_attn.q_proj.register_forward_pre_hook(fail)
    with pytest.raises(KeyError):
        model(**INPUTS)
    assert away(model) == gone


@pytest.mark.parametrize("feature_layer", [-2, -1])
def test_a_module_around_the_tower_is_refused(feature_layer: int) -> None:
    model = tiny_llava(feature_layer=feature_layer)
    accelerate.cpu_offload(model, CPU, preload_module_classes=["LlavaModel"])
    with pytest.raises(UnsupportedModelError, match="offloaded together with a module around it"):
        outputs(patch(model))


@torch.no_grad()
def test_everything_kept_equals_the_offloaded_model(tmp_path: Path) -> None:
    model = dispatched(tiny_llava(), tmp_path)
    expected = model(**INPUTS).logits
    kept = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(patch(model, **EVERYTHING)(**INPUTS).logits[kept], expected[kept])


@torch.no_grad()
def test_what_hooks_rebuilt_comes_back_as_encoded_images(pruned: Any) -> None:
    """The outputs of `forward` from transformers 5.24 on, which accelerate takes apart."""
    model = accelerate.cpu_offload(patch(tiny_llava(), keep=5), CPU)
    outputs = model(**INPUTS)
    if "image_outputs" in outputs:
        text = {name: value for name, value in INPUTS.items() if name != "pixel_values"}
        again = model(**text, mm_encoder_outputs={"image": outputs.image_outputs})
        torch.testing.assert_close(again.logits, pruned[0])


@torch.no_grad()
def test_mixed_precision_and_back(plain: Any, pruned: Any) -> None:
    model = patch(tiny_llava(), keep=5)
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    try:
        prepared = accelerator.prepare(model)
        assert prepared(**INPUTS).logits.shape == pruned[0].shape
        unwrapped = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    finally:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert unwrapped is model
    torch.testing.assert_close(outputs(model), pruned)
    torch.testing.assert_close(outputs(unpatch(model)), plain)
