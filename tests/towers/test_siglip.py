"""Towers without a class token: features, keys and queries of a layer that reads or writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import PATCHES, images, prompt, tiny_llava
from transformers import Siglip2VisionConfig, Siglip2VisionModel, SiglipVisionConfig

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.patching.patch import patch
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.kinds import tower_kind
from prumerge_fast.towers.siglip import TOWER
from prumerge_fast.versions import vision_transformer

LAYERS = 4
PIXELS = images(3)


def llava(feature_layer: Any = -1, **options: Any) -> Any:
    return tiny_llava(
        feature_layer=feature_layer,
        vision=SiglipVisionConfig,
        vision_feature_select_strategy="full",
        **options,
    )


def layer_of(tower: Any, feature_layer: int) -> Any:
    """The one that reads the features; of the last layer's, the last."""
    layers = vision_transformer(tower).encoder.layers
    return layers[min(feature_layer % (LAYERS + 1), LAYERS - 1)]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("feature_layer", [-1, 4, -2, 0])
@torch.no_grad()
def test_equals_the_whole_tower(attention: str, feature_layer: int) -> None:
    tower, seen = llava(attention=attention).model.vision_tower, {}
    hooks = [
        getattr(layer_of(tower, feature_layer).self_attn, name).register_forward_hook(
            lambda _module, _args, output, name=name: seen.__setitem__(name, output)
        )
        for name in ("q_proj", "k_proj")
    ]
    states = tower(PIXELS, output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    reading = tower_kind(tower).read(tower, PIXELS, feature_layer)
    assert reading.hidden.shape == (3, PATCHES, 64)
    assert torch.equal(reading.hidden, states[feature_layer])
    assert torch.equal(reading.query, seen["q_proj"])
    assert torch.equal(reading.keys, seen["k_proj"])
    assert (reading.num_heads, reading.class_token, reading.similar) == (4, False, None)


@pytest.mark.parametrize("feature_layer", [-1, -2, 1])
@torch.no_grad()
def test_scores_are_what_the_model_itself_attends_to(feature_layer: int) -> None:
    tower = llava(attention="eager").model.vision_tower
    attentions = tower(PIXELS, output_attentions=True).attentions  # of each layer [B, H, N, N]
    expected = attentions[min(feature_layer % (LAYERS + 1), LAYERS - 1)].mean((1, 2))  # [B, N]
    scored = TOWER.read(tower, PIXELS, feature_layer).scored(PruMergeConfig())
    torch.testing.assert_close(scored.attention, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scored.attention.sum(1), torch.ones(3))


@pytest.mark.parametrize("watched", [False, True])
@torch.no_grad()
def test_the_last_layers_products_are_not_computed_twice(watched: bool) -> None:
    model = patch(llava())
    tower, calls = model.model.vision_tower, []
    for name in ("q_proj", "k_proj"):
        layer_of(tower, -1).self_attn.get_submodule(name).register_forward_hook(
            lambda *_, name=name: calls.append(name)
        )
    if watched:
        tower.register_forward_hook(lambda *_: calls.append("tower"))
    ids = torch.tensor([prompt("image", [5])])
    model(input_ids=ids, pixel_values=images(1))
    assert sorted(calls) == ["k_proj", "q_proj", *["tower"] * watched]


@torch.no_grad()
def test_compiled_layers_that_call_no_hooks() -> None:
    torch.compiler.reset()
    tower = llava().model.vision_tower
    expected = TOWER.read(tower, PIXELS, -1)
    layer_of(tower, -1).compile(backend="eager")
    tower(PIXELS)  # compiled without the hooks that catch projections
    actual = TOWER.read(tower, PIXELS, -1)
    for one, other in zip(actual[:3], expected[:3], strict=True):
        torch.testing.assert_close(one, other)


@torch.no_grad()
def test_in_one_graph() -> None:
    torch.compiler.reset()
    tower = llava().model.vision_tower
    compiled = torch.compile(
        lambda pixels: TOWER.read(tower, pixels, -1)[:3], fullgraph=True, backend="aot_eager"
    )
    for one, other in zip(compiled(PIXELS), TOWER.read(tower, PIXELS, -1)[:3], strict=True):
        torch.testing.assert_close(one, other)


def test_several_layers_with_the_last() -> None:
    """Scored by the layer that writes the deepest."""
    tower = llava().model.vision_tower
    with torch.no_grad():
        reading = TOWER.read(tower, PIXELS, [-1, 0, -2])
        last = TOWER.read(tower, PIXELS, -1)
        states = tower(PIXELS, output_hidden_states=True).hidden_states
    assert torch.equal(reading.hidden, torch.cat([states[-1], states[0], states[-2]], -1))
    assert torch.equal(reading.keys, last.keys)


def test_pixels_of_another_size() -> None:
    tower = llava().model.vision_tower
    with pytest.raises(ValueError, match=r"pixel_values: expected the size .* 30\*30, .* 48\*36"):
        TOWER.read(tower, torch.zeros(1, 3, 48, 36), -1)
    reading = TOWER.read(tower, torch.zeros(1, 3, 48, 36), -1, interpolate_pos_encoding=True)
    assert reading.hidden.shape == (1, 48, 64)


def test_towers_of_varying_resolution_are_refused() -> None:
    """SigLIP 2's NaFlex: images of any shape, with masks."""
    config = Siglip2VisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="Siglip2VisionModel, which is not known"):
        tower_kind(Siglip2VisionModel(config))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_checkpointing_changes_no_gradient(feature_layer: int, reentrant: bool) -> None:
    """Reentrant, it runs layers without gradients first, and their products with them."""
    gradients = []
    for checkpointing in (False, True):
        model = patch(llava(feature_layer)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        pixels = PIXELS[:1].clone().requires_grad_()  # reentrant, it asks its inputs for that
        ids = torch.tensor([prompt("image", [5, 6])])
        model(input_ids=ids, pixel_values=pixels).logits.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.model.vision_tower.named_parameters()})
    torch.testing.assert_close(*gradients, atol=1e-3, rtol=1e-3)
    attention = f"encoder.layers.{LAYERS - 1}.self_attn"
    for path in (f"{attention}.q_proj.weight", f"{attention}.k_proj.weight"):
        [found] = [grad for name, grad in gradients[1].items() if name.endswith(path)]
        assert found is not None, path
        assert found.abs().max() > 0
