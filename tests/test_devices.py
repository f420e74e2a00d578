"""A vision tower and a language model of different dtypes and modes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import EVERYTHING, PIXELS, PROMPTS, batch, tiny_llava

from prumerge_fast.patching import patch, unpatch

INPUTS: dict[str, Any] = {**batch(PROMPTS), "pixel_values": PIXELS}
KEPT = INPUTS["attention_mask"].bool()


def mixed(vision: torch.dtype, language: torch.dtype) -> Any:
    model = tiny_llava().to(language)
    for module in (model.model.vision_tower, model.model.multi_modal_projector):
        module.to(vision)
    return model


@torch.no_grad()
@pytest.mark.parametrize("pixels", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("vision", "language"),
    [
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=str,
)
def test_tower_and_language_model_of_two_dtypes(
    vision: torch.dtype, language: torch.dtype, pixels: torch.dtype
) -> None:
    model = mixed(vision, language)
    inputs = {**INPUTS, "pixel_values": PIXELS.to(pixels)}
    expected = model(**inputs).logits
    found = patch(model, **EVERYTHING)(**inputs).logits
    assert found.dtype == expected.dtype == language
    torch.testing.assert_close(found[KEPT], expected[KEPT], rtol=2e-2, atol=2e-2)
    patch(model, keep=5, order="attention")
    answers = model.generate(**inputs, max_new_tokens=3)
    assert torch.equal(answers[:, :-3], inputs["input_ids"])
    features = model.get_image_features(PIXELS.to(pixels))
    projected = getattr(features, "pooler_output", features)
    assert {feature.dtype for feature in projected} == {vision}


def test_mode_is_the_models_own() -> None:
    """Dropout follows `train()` and `eval()`, which patching leaves alone."""
    model = tiny_llava()
    for module in model.modules():
        for name in ("dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.5)
    with torch.no_grad():
        expected = patch(model, keep=5)(**INPUTS).logits
        assert not any(module.training for module in model.modules())
        model.train()
        unpatch(model)
        assert all(module.training for module in model.modules())
        patch(model, keep=5)
        assert all(module.training for module in model.modules())
        assert not torch.allclose(model(**INPUTS).logits, expected)
        assert all(module.training for module in model.modules())
        assert torch.equal(model.eval()(**INPUTS).logits, expected)
