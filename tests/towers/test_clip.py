"""The tower: features, keys and queries of the full model, without running the rest of it."""

from __future__ import annotations

import pytest
import torch
from tiny_models import PATCHES, images, prompt, tiny_llava
from torch import nn

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families.encode import encode
from prumerge_fast.patching.patch import patch
from prumerge_fast.towers.clip import TOWER
from prumerge_fast.towers.kinds import tower_kind
from prumerge_fast.versions import vision_transformer

LAYERS = 4


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("feature_layer", [-1, -2, -4, -5, 0, 2, 3, 4])
def test_equals_the_whole_tower(attention: str, feature_layer: int) -> None:
    tower = tiny_llava(attention=attention).model.vision_tower
    pixel_values = images(3)
    reader = vision_transformer(tower).encoder.layers[
        min(feature_layer % (LAYERS + 1), LAYERS - 1)  # where none reads, the one that writes
    ]
    seen = {}
    hooks = [
        getattr(reader.self_attn, name).register_forward_hook(
            lambda _module, _args, output, name=name: seen.__setitem__(name, output)
        )
        for name in ("q_proj", "k_proj")
    ]
    with torch.no_grad():
        states = tower(pixel_values, output_hidden_states=True).hidden_states
        for hook in hooks:
            hook.remove()
        query, keys, hidden, *_ = TOWER.read(tower, pixel_values, feature_layer)
    assert hidden.shape == (3, 1 + PATCHES, 64)
    assert torch.equal(hidden, states[feature_layer])
    assert torch.equal(keys, seen["k_proj"])
    torch.testing.assert_close(query, seen["q_proj"][:, 0])  # one row: another matrix product


def test_several_feature_layers() -> None:
    """Side by side as given; the deepest decides what reads them."""
    tower, pixel_values, layers = tiny_llava().model.vision_tower, images(3), [-3, 0, 3, 1]
    with torch.no_grad():
        states = tower(pixel_values, output_hidden_states=True).hidden_states
        query, keys, hidden, *_ = TOWER.read(tower, pixel_values, layers)
        of_the_deepest = TOWER.read(tower, pixel_values, 3)
    assert torch.equal(hidden, torch.cat([states[layer] for layer in layers], -1))
    assert torch.equal(query, of_the_deepest[0])
    assert torch.equal(keys, of_the_deepest[1])


def test_skips_the_rest_of_the_reading_layer() -> None:
    model = patch(tiny_llava())
    tower = vision_transformer(model.model.vision_tower)
    last = tower.encoder.layers[-1]

    def refuse(module: nn.Module, _args: object) -> None:
        raise AssertionError(f"{type(module).__name__} was called")

    attention = last.self_attn
    for module in (last, attention, attention.v_proj, attention.out_proj, last.mlp, last.mlp.fc1):
        module.register_forward_pre_hook(refuse)
    last.layer_norm2.register_forward_pre_hook(refuse)
    tower.post_layernorm.register_forward_pre_hook(refuse)
    ids = torch.tensor([prompt("image", [5])])
    model(input_ids=ids, pixel_values=images(1))
    model.generate(input_ids=ids, pixel_values=images(1), max_new_tokens=2)
    with pytest.raises(AssertionError, match="was called"):
        model.model.vision_tower(images(1))


def test_calls_projections_as_modules() -> None:
    """Adapters such as LoRA replace the projections."""

    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module, shift: float) -> None:
            super().__init__()
            self.inner, self.shift = inner, shift

        def forward(self, values: torch.Tensor) -> torch.Tensor:
            return self.inner(values) + self.shift

    model = tiny_llava()
    before = encode(model, images(1))
    attention = vision_transformer(model.model.vision_tower).encoder.layers[-1].self_attn
    attention.q_proj, attention.k_proj = Shifted(attention.q_proj, 1), Shifted(attention.k_proj, 2)
    after = encode(model, images(1))
    torch.testing.assert_close(after[0], before[0] + 1)
    torch.testing.assert_close(after[1], before[1] + 2)
    assert torch.equal(after[2], before[2])


def test_num_patches() -> None:
    assert TOWER.num_patches(tiny_llava().model.vision_tower) == PATCHES


@pytest.mark.parametrize(
    ("feature_layer", "reason"),
    [
        (5, "from -5 to 4"),
        (-6, "from -5 to 4"),
        ([-2, 7], "from -5 to 4"),
        ([], r"an int or several, got \[\]"),
        ([-2, True], r"\[1\]: expected one int"),
        (True, "one int"),
        ("last", "one int"),
    ],
)
def test_feature_layer_that_is_not_there(feature_layer: object, reason: str) -> None:
    tower = tiny_llava().model.vision_tower
    with pytest.raises(UnsupportedModelError, match=f"vision_feature_layer.*{reason}"):
        TOWER.deepest(tower, feature_layer)


def test_unknown_tower() -> None:
    with pytest.raises(UnsupportedModelError, match="Linear, which is not known"):
        tower_kind(nn.Linear(2, 2))
