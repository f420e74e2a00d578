"""PEFT: patched through the wrapper, trained under the patch, saved, loaded, merged."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, TaskType, get_peft_model
from tiny_models import EVERYTHING, PIXELS, PROMPTS, batch, lengths_seen, tiny_llava
from transformers import LlavaForConditionalGeneration

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.encode import encode
from prumerge_fast.patching.patch import is_patched, patch, patched, unpatch
from prumerge_fast.reduction.config import PruMergeConfig

INPUTS: dict[str, Any] = {**batch(PROMPTS), "pixel_values": PIXELS}


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(
        r=4, target_modules=r".*(language_model|vision_tower).*\.[qv]_proj", **options
    )


def filled(model: PeftModel) -> PeftModel:
    """With adapters that change something, as trained ones do."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(**INPUTS).logits


def train(model: PeftModel, steps: int = 4) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = INPUTS["input_ids"].masked_fill(INPUTS["attention_mask"] == 0, -100)
    losses = []
    for _ in range(steps):
        loss = model(**INPUTS, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("task", [None, TaskType.CAUSAL_LM])
@pytest.mark.parametrize("first", ["wrap", "patch"])
def test_through_the_wrapper(task: TaskType | None, first: str) -> None:
    model = tiny_llava()
    if first == "patch":
        patch(model, keep=3)
    wrapped = filled(get_peft_model(model, lora(task_type=task)))
    if first == "wrap":
        plain = logits(wrapped)
        assert not is_patched(wrapped)
        assert patch(wrapped, keep=3) is wrapped
    assert is_patched(wrapped)
    assert is_patched(model)
    assert wrapped.prumerge is model.prumerge
    pruned = logits(wrapped)
    assert torch.equal(pruned, logits(model))
    assert model.prumerge.last_lengths == (4,) * 4
    answers = wrapped.generate(**INPUTS, max_new_tokens=3)
    assert torch.equal(answers[:, :-3], INPUTS["input_ids"])
    patch(wrapped, neighbours=2)
    assert model.prumerge.config == PruMergeConfig(keep=3, neighbours=2)
    with wrapped.disable_adapter():
        assert not torch.allclose(logits(wrapped), pruned)
    assert unpatch(wrapped) is wrapped
    assert type(model) is LlavaForConditionalGeneration
    assert not is_patched(wrapped)
    assert not hasattr(wrapped, "prumerge")
    if first == "wrap":
        assert torch.equal(logits(wrapped), plain)
    with pytest.raises(ValueError, match="expected a patched model, got a plain Llava"):
        unpatch(wrapped)


def test_through_the_wrapper_of_several_kinds() -> None:
    wrapped = get_peft_model(tiny_llava(), lora(), mixed=True)
    assert patch(wrapped, keep=3) is wrapped
    assert is_patched(wrapped)
    torch.testing.assert_close(logits(wrapped), logits(patch(tiny_llava(), keep=3)))
    assert wrapped.prumerge.last_lengths == (4,) * 4
    assert not is_patched(unpatch(wrapped))


def test_prompt_learning_is_refused() -> None:
    """Its tokens stand in front of prompts whose layout they would shift."""
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    with pytest.raises(UnsupportedModelError, match="such as LoRA, got PromptTuningConfig"):
        patch(get_peft_model(tiny_llava(), config))
    wrapped = get_peft_model(patch(tiny_llava()), config)
    with pytest.raises(UnsupportedModelError, match="such as LoRA, got PromptTuningConfig"):
        wrapped.generate(**INPUTS, max_new_tokens=2)


def test_a_tower_that_is_trained_as_a_whole() -> None:
    wrapped = get_peft_model(tiny_llava(), lora(modules_to_save=["vision_tower"]))
    with torch.no_grad():
        for parameter in wrapped.get_base_model().model.vision_tower.parameters():
            parameter += 0.1 * parameter.requires_grad  # its copy, without the original
    plain = logits(wrapped.eval())
    kept = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(logits(patch(wrapped, **EVERYTHING))[kept], plain[kept])
    with wrapped.disable_adapter():
        original = logits(patch(tiny_llava(), **EVERYTHING))
        torch.testing.assert_close(logits(wrapped), original)
    assert not torch.allclose(original[kept], plain[kept])


def test_patched_through_the_wrapper() -> None:
    wrapped = filled(get_peft_model(tiny_llava(), lora()))
    plain = logits(wrapped)
    with patched(wrapped, keep=2) as inside:
        assert inside is wrapped
        seen = lengths_seen(wrapped)
        logits(wrapped)
        [length] = seen
        assert length < plain.shape[1]
    assert torch.equal(logits(wrapped), plain)
    state = patch(wrapped, keep=5).prumerge
    with patched(wrapped, keep=2):
        logits(wrapped)
    assert wrapped.prumerge is state


def test_everything_kept_equals_the_adapted_model() -> None:
    wrapped = filled(get_peft_model(tiny_llava(), lora()))
    plain = logits(wrapped)
    kept = INPUTS["attention_mask"].bool()
    torch.testing.assert_close(logits(patch(wrapped, **EVERYTHING))[kept], plain[kept])


def test_encode_sees_the_towers_adapter() -> None:
    wrapped = filled(get_peft_model(tiny_llava(), lora()))
    adapted = encode(wrapped, PIXELS)[:3]
    with wrapped.disable_adapter():
        for with_lora, without in zip(adapted, encode(wrapped, PIXELS)[:3], strict=True):
            assert not torch.allclose(with_lora, without)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_saving_loading_merging(tmp_path: Path, checkpointing: bool) -> None:
    wrapped = patch(get_peft_model(tiny_llava(), lora()), keep=5).train()
    if checkpointing:
        wrapped.enable_input_require_grads()
        wrapped.gradient_checkpointing_enable({"use_reentrant": False})
    losses = train(wrapped)
    assert losses[-1] < 0.9 * losses[0]
    expected = logits(wrapped.eval())

    wrapped.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_llava(), str(tmp_path))
    assert not is_patched(loaded)
    torch.testing.assert_close(logits(patch(loaded, keep=5)), expected)
    onto_patched = PeftModel.from_pretrained(patch(tiny_llava(), keep=5), str(tmp_path))
    torch.testing.assert_close(logits(onto_patched), expected)

    merged = wrapped.merge_and_unload()
    assert is_patched(merged)
    assert merged.prumerge.config.keep == 5
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert type(unpatch(merged)) is LlavaForConditionalGeneration
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(again), logits(merged))


def test_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointing in (False, True):
        wrapped = patch(filled(get_peft_model(tiny_llava(), lora())), keep=5).train()
        if checkpointing:
            wrapped.enable_input_require_grads()
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
        wrapped(**INPUTS, labels=INPUTS["input_ids"]).loss.backward()
        gradients.append([p.grad for p in wrapped.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


def test_adapter_of_the_model_itself(tmp_path: Path) -> None:
    """`add_adapter` and `load_adapter` of transformers need no wrapper."""
    wrapped = filled(get_peft_model(tiny_llava(), lora()))
    wrapped.save_pretrained(str(tmp_path))
    model = patch(tiny_llava(), keep=5)
    model.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(model), logits(patch(wrapped, keep=5)))
    assert is_patched(model)


def test_dropout_follows_the_mode() -> None:
    wrapped = filled(get_peft_model(patch(tiny_llava(), keep=5), lora(lora_dropout=0.5)))
    expected = logits(wrapped)
    wrapped.train()
    assert wrapped.get_base_model().training
    assert not torch.allclose(logits(wrapped), expected)
    assert torch.equal(logits(wrapped.eval()), expected)


def test_copies_of_the_wrapper() -> None:
    wrapped = patch(filled(get_peft_model(tiny_llava(), lora())), keep=3)
    expected = logits(wrapped)
    twin = copy.deepcopy(wrapped)
    patch(twin, keep=7)
    assert wrapped.prumerge.config.keep == 3
    unpatch(wrapped)
    torch.testing.assert_close(logits(patch(twin, keep=3)), expected)
