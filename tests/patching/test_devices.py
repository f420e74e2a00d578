"""A vision tower and a language model of different dtypes and modes, or sharded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tiny_models import EVERYTHING, PIXELS, PROMPTS, batch, tiny_llava

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.patching.patch import patch, unpatch
from prumerge_fast.versions import vision_transformer

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


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """Of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("first", ["patch", "shard"])
def test_sharded_language_models(first: str) -> None:
    """FSDP2, layer by layer; a sharded tower, which patching runs in parts, is refused."""
    from torch.distributed.fsdp import fully_shard

    def sharded(of_tower: bool) -> Any:
        model = tiny_llava()
        if first == "patch":
            patch(model)
        layers = vision_transformer(model.model.vision_tower).encoder.layers if of_tower else []
        for layer in (*layers, *model.model.language_model.layers):
            fully_shard(layer)
        fully_shard(model)
        return model if first == "patch" else patch(model)

    labels = INPUTS["input_ids"].masked_fill(~KEPT, -100)
    expected = patch(tiny_llava())(**INPUTS, labels=labels)
    model = sharded(of_tower=False)
    actual = model(**INPUTS, labels=labels)
    torch.testing.assert_close(actual.logits, expected.logits)
    actual.loss.backward()
    expected.loss.backward()
    weight = vision_transformer(model.model.vision_tower).encoder.layers[0].mlp.fc1.weight
    assert weight.grad.full_tensor().any()
    with pytest.raises(UnsupportedModelError, match="vision tower: expected layer 3 whole, got it"):
        sharded(of_tower=True)(**INPUTS)

    model = patch(tiny_llava())
    attention = vision_transformer(model.model.vision_tower).encoder.layers[3].self_attn
    for projection in (attention.q_proj, attention.k_proj):  # which gather themselves
        fully_shard(projection)
    torch.testing.assert_close(model(**INPUTS).logits, expected.logits)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_towers_that_are_sharded_inside(feature_layer: int) -> None:
    """FSDP's first form around the layers, which gathers where it is called itself."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = patch(tiny_llava(feature_layer=feature_layer))
    transformer = vision_transformer(model.model.vision_tower)
    transformer.encoder = FullyShardedDataParallel(
        transformer.encoder, device_id=torch.device("cpu")
    )
    with pytest.raises(UnsupportedModelError, match="vision tower: expected layer 3 whole, got it"):
        model(**INPUTS)
