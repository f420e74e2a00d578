"""InternVL's tower: normalised queries and keys, and what follows the last layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, V5
from tiny_models import EVERYTHING
from torch import Tensor, nn

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families import adapter_for
from prumerge_fast.patching.patch import patch
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.internvit import TOWER

NAMES = ["InternVL", "InternVL with normed keys"]
LAYERS, PATCHES = 4, 36


def pixels_of(family: Any) -> Tensor:
    return torch.stack([family.pixels("image", number) for number in range(3)])


def states_of(tower: Any, pixel_values: Tensor, feature_layer: int) -> list[Tensor]:
    """What each layer reads, and at the end what the last one writes: of layer -1, normed."""
    state = tower.embeddings(pixel_values)
    states = [state[0] if isinstance(state, tuple) else state]
    for layer in tower.encoder.layer:
        states.append(layer(states[-1]))
    if feature_layer == -1:
        states[-1] = tower(pixel_values).last_hidden_state
    return states


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("feature_layer", [-1, -2, 0, 3, 4])
@torch.no_grad()
def test_equals_the_whole_tower(name: str, attention: str, feature_layer: int) -> None:
    family: Any = FAMILIES[name]
    tower = family.model(attention=attention).model.vision_tower
    pixel_values, seen = pixels_of(family), {}
    reader = tower.encoder.layer[min(feature_layer % (LAYERS + 1), LAYERS - 1)].attention
    hooks = [
        getattr(reader, part).register_forward_hook(
            lambda _module, _args, output, part=part: seen.__setitem__(part, output)
        )
        for part in ("q_norm", "k_norm")
    ]
    states = states_of(tower, pixel_values, feature_layer)
    for hook in hooks:
        hook.remove()
    reading = TOWER.read(tower, pixel_values, feature_layer, every_query=True)
    assert torch.equal(reading.hidden, states[feature_layer])
    assert torch.equal(reading.keys, seen["k_norm"])
    assert torch.equal(reading.query, seen["q_norm"])
    of_class = TOWER.read(tower, pixel_values, feature_layer)
    torch.testing.assert_close(of_class.query, reading.query[:, 0])
    assert reading.features.shape == (3, PATCHES, 64)
    assert TOWER.num_patches(tower) == PATCHES


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_scores_are_the_towers_own_attention(name: str) -> None:
    """The mean of what patches give each other, over heads, and over the four of a group."""
    family: Any = FAMILIES[name]
    model = family.model(attention="eager")
    pixel_values, shares = pixels_of(family), []
    own = model.model.vision_tower.encoder.layer[-1].attention
    hook = own.register_forward_hook(lambda _module, _args, output: shares.append(output[1]))
    model.model.vision_tower(pixel_values)
    hook.remove()
    received = shares[0][:, :, 1:, 1:].mean((1, 2)).view(3, 6, 6)
    expected = torch.stack(
        [
            torch.stack([received[:, y + i, x + j] for i in (0, 1) for j in (0, 1)]).mean(0)
            for y in (0, 2, 4)
            for x in (0, 2, 4)
        ],
        dim=1,
    )
    given = {"pixel_values": pixel_values}
    views = adapter_for(model).views(model, "image", given, PruMergeConfig(), "torch")
    found: Any = views.patches
    torch.testing.assert_close(found.attention, expected, atol=1e-5, rtol=1e-5)
    features = model.get_image_features(pixel_values)
    plain = features.pooler_output if V5 else features
    assert torch.equal(found.features, plain)
    assert adapter_for(model).num_patches(model) == 9


@pytest.mark.skipif(not V5, reason="the plain model reads the last layer only")
def test_skips_the_rest_of_the_reading_layer() -> None:
    family: Any = FAMILIES["InternVL with normed keys"]
    model = patch(family.model(vision_feature_layer=-2))
    tower = model.model.vision_tower
    last = tower.encoder.layer[-1]

    def refuse(module: nn.Module, _args: object) -> None:
        raise AssertionError(f"{type(module).__name__} was called")

    own = last.attention
    for module in (last, own, own.v_proj, own.projection_layer, last.mlp, last.layernorm_after):
        module.register_forward_pre_hook(refuse)
    tower.layernorm.register_forward_pre_hook(refuse)
    inputs = family.inputs(family.prompts())
    model(**inputs)
    with pytest.raises(AssertionError, match="was called"):
        tower(pixels_of(family))


@pytest.mark.parametrize("place", ["", "encoder"])
@torch.no_grad()
def test_runs_as_a_whole_under_hooks(place: str) -> None:
    family: Any = FAMILIES["InternVL with normed keys"]
    model = patch(family.model())
    inputs = family.inputs(family.prompts())
    expected, seen = model(**inputs).logits, []
    module = model.model.vision_tower.get_submodule(place)
    module.register_forward_hook(lambda *_: seen.append(place))
    assert torch.equal(model(**inputs).logits, expected)
    assert seen == [place]


@pytest.mark.parametrize("size", [(36, 24), (30, 30)])
def test_grids_that_do_not_join(size: tuple[int, int]) -> None:
    """The plain model's own error, of what is no square and what is odd."""
    family: Any = FAMILIES["InternVL"]
    model, messages = family.model(), []
    ids = torch.tensor([[1, *[90] * 9, 5]])
    for _ in range(2):
        with pytest.raises(RuntimeError, match="shape") as error:
            model(input_ids=ids, pixel_values=torch.zeros(1, 3, *size))
        messages.append(str(error.value))
        patch(model)
    assert messages[0] == messages[1]


@torch.no_grad()
def test_other_sizes() -> None:
    """Of which positions are interpolated, as the model itself does."""
    family: Any = FAMILIES["InternVL"]
    model = family.model()
    pixel_values = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, *[90] * 16, 5]])
    expected = model(input_ids=ids, pixel_values=pixel_values).logits
    found = patch(model, **EVERYTHING)(input_ids=ids, pixel_values=pixel_values).logits
    assert torch.equal(found, expected)


@pytest.mark.skipif(not V5, reason="the plain model reads the last layer only")
@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize("feature_layer", [LAYERS, -1, -2])
@torch.no_grad()
def test_layers_are_the_plain_models(feature_layer: int, watched: bool) -> None:
    """The last one by its number is in front of the norm that -1 is behind."""
    family: Any = FAMILIES["InternVL with normed keys"]
    model, inputs = (
        family.model(vision_feature_layer=feature_layer),
        family.inputs(family.prompts()),
    )
    expected = model(**inputs).logits
    if watched:
        model.model.vision_tower.register_forward_hook(lambda *_: None)
    assert torch.equal(patch(model, **EVERYTHING)(**inputs).logits, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_pixels_of_another_dtype(dtype: torch.dtype) -> None:
    """As processors give them; the plain model takes them, in transformers 4 as well."""
    family: Any = FAMILIES["InternVL"]
    model, inputs = family.model().to(dtype), family.inputs(family.prompts())
    assert inputs["pixel_values"].dtype == torch.float32
    expected = model(**inputs).logits
    assert torch.equal(patch(model, **EVERYTHING)(**inputs).logits, expected)
    model.generate(**inputs, max_new_tokens=2)


def test_layers_that_the_model_does_not_read() -> None:
    """Neither of the configuration nor of a call."""
    family: Any = FAMILIES["InternVL"]
    model, inputs = patch(family.model()), family.inputs(family.prompts())
    for layer in ([-1, -2],) if V5 else ([-1, -2], -2):
        with pytest.raises(UnsupportedModelError, match="vision_feature_layer: expected"):
            model(**inputs, vision_feature_layer=layer)
        with pytest.raises(UnsupportedModelError, match="vision_feature_layer: expected"):
            patch(family.model(vision_feature_layer=layer))
