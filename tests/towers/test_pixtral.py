"""Pixtral's tower: images of their own sizes in one sequence, scored after rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, FamilyOracle
from torch import Tensor, nn

from prumerge_fast.errors import UnsupportedModelError
from prumerge_fast.families import adapter_for
from prumerge_fast.families.encode import encode
from prumerge_fast.patching.patch import patch
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.towers.pixtral import TOWER

FAMILY: Any = FAMILIES["LLaVA with Pixtral"]
LAYERS, WIDTH = 4, 64
NUMBERS = [0, 1, 2, 3]


def images() -> tuple[Tensor, Tensor]:
    """Padded pixels [4, 3, 48, 36], and the size of each image."""
    pixel_values, sizes = FAMILY.arguments("image", NUMBERS).values()
    return pixel_values, sizes


def there() -> Tensor:
    """[4, 8 * 6] bool, by hand: which patches of padded images are of the images."""
    found = torch.zeros(4, 8, 6, dtype=torch.bool)
    for image, (rows, columns) in zip(found, FAMILY.grids, strict=True):
        image[:rows, :columns] = True
    return found.flatten(1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("feature_layer", [-1, -2, -5, 0, 3, 4])
def test_equals_the_whole_tower(attention: str, feature_layer: int) -> None:
    tower = FAMILY.model(attention=attention).model.vision_tower
    pixel_values, sizes = images()
    index = min(feature_layer % (LAYERS + 1), LAYERS - 1)
    reader, seen = tower.transformer.layers[index].attention, {}
    hook = reader.k_proj.register_forward_hook(lambda _m, _a, output: seen.update(keys=output))
    with torch.no_grad():
        whole = tower(pixel_values, image_sizes=sizes, output_hidden_states=True)
        hook.remove()
        reading = TOWER.read(tower, pixel_values, feature_layer, image_sizes=sizes)
    present = there()
    assert torch.equal(TOWER.present(tower, pixel_values, sizes), present)
    assert torch.equal(reading.hidden[present], whole.hidden_states[feature_layer][0])
    assert torch.equal(reading.similar[present], seen["keys"][0])  # type: ignore[index]
    assert not any(part[~present].any() for part in (reading.query, reading.keys, reading.hidden))


@pytest.mark.parametrize("feature_layer", [-1, -2])
@torch.no_grad()
def test_scores_are_the_towers_own_attention(feature_layer: int) -> None:
    """The mean of what it gives each patch, over heads and the queries of the same image."""
    model = FAMILY.model(attention="eager", vision_feature_layer=feature_layer)
    pixel_values, sizes = images()
    shares = model.model.vision_tower(pixel_values, image_sizes=sizes, output_attentions=True)
    expected = torch.zeros(4, 8 * 6)
    start = 0
    for image, present in zip(expected, there(), strict=True):
        end = start + int(present.sum())
        of_image = shares.attentions[-1][0, :, start:end]  # of the last layer: it reads -2, too
        assert not of_image[..., :start].any()
        assert not of_image[..., end:].any()
        image[present] = of_image[..., start:end].mean((0, 1))
        start = end
    views = adapter_for(model).views(
        model,
        "image",
        {"pixel_values": pixel_values, "image_sizes": sizes},
        PruMergeConfig(),
        "torch",
    )
    for number, present in enumerate(there()):
        assert torch.equal(views.valid[number], present)
        chosen = views.patches.chosen(torch.tensor([number]), present.nonzero().T)
        found = chosen.scored(PruMergeConfig()).attention[0]
        torch.testing.assert_close(found, expected[number][present], atol=1e-5, rtol=1e-5)


def test_skips_the_rest_of_the_reading_layer() -> None:
    model = patch(FAMILY.model(vision_feature_layer=-2))
    last = model.model.vision_tower.transformer.layers[-1]

    def refuse(module: nn.Module, _args: object) -> None:
        raise AssertionError(f"{type(module).__name__} was called")

    attention = last.attention
    for module in (last, attention, attention.v_proj, attention.o_proj, last.feed_forward):
        module.register_forward_pre_hook(refuse)
    last.ffn_norm.register_forward_pre_hook(refuse)
    inputs = FAMILY.inputs(FAMILY.prompts())
    model(**inputs)
    model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(AssertionError, match="was called"):
        model.model.vision_tower(images()[0])


@pytest.mark.parametrize("feature_layer", [-1, -2])
@pytest.mark.parametrize("place", ["", "transformer"])
@torch.no_grad()
def test_runs_as_a_whole_under_hooks(feature_layer: int, place: str) -> None:
    model = patch(FAMILY.model(vision_feature_layer=feature_layer))
    inputs = FAMILY.inputs(FAMILY.prompts())
    expected = model(**inputs).logits
    seen: list[Any] = []
    embedded: list[Any] = []
    tower = model.model.vision_tower
    module = tower.get_submodule(place)
    module.register_forward_hook(lambda _m, _a, output: seen.append(output.last_hidden_state))
    tower.patch_conv.register_forward_hook(lambda *_: embedded.append(place))
    assert torch.equal(model(**inputs).logits, expected)
    assert embedded == [place]  # once, as in the plain model
    [state] = seen
    pixel_values, sizes = images()
    assert torch.equal(state, tower(pixel_values, image_sizes=sizes).last_hidden_state)


@torch.no_grad()
def test_images_without_sizes_are_whole() -> None:
    model = FAMILY.model()
    pixels = FAMILY.pixels("image", 0)[None]
    ids = torch.tensor([[1, *FAMILY.picture("image", 0), 5]])
    expected = model(
        input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[30, 24]])
    ).logits
    assert torch.equal(model(input_ids=ids, pixel_values=pixels).logits, expected)
    patch(model, keep=5)
    sized = model(input_ids=ids, pixel_values=pixels, image_sizes=torch.tensor([[30, 24]])).logits
    assert torch.equal(model(input_ids=ids, pixel_values=[pixels[0]]).logits, sized)
    assert encode(model, pixels).keys.shape == (1, 20, WIDTH)


@pytest.mark.parametrize(
    "sizes",
    [
        torch.tensor([[30, 24]]),
        torch.tensor([[30, 24]] * 3 + [[54, 24]]),
        torch.tensor([[30, 24]] * 3 + [[30, 3]]),
        torch.tensor([30, 24, 30, 24]),
        torch.tensor([[30, 24, 3]] * 4),
        torch.tensor([[30.0, 24.0]] * 4),
        [[30, 24]] * 3 + [[30]],
        "30 x 24",
    ],
)
def test_sizes_that_do_not_fit(sizes: Any) -> None:
    tower = FAMILY.model().model.vision_tower
    with pytest.raises(
        ValueError, match="image_sizes: expected height and width of each of 4 images"
    ):
        TOWER.read(tower, images()[0], -1, image_sizes=sizes)


@pytest.mark.parametrize("order", ["attention", "raster"])
@torch.no_grad()
def test_prompts_without_breaks(order: str) -> None:
    """As LLaVA's own processor writes them: nothing but placeholders goes."""
    model = FAMILY.model()
    config = PruMergeConfig(keep=3, order=order)
    tokens = FamilyOracle(FAMILY, model, config).tokens(("image", 1))
    arguments = FAMILY.arguments("image", [1])
    ids = torch.tensor([[1, *[90] * 18, 5, 6]])
    table = model.get_input_embeddings()
    embeds = torch.cat([table(ids[0, :1]), tokens, table(ids[0, -2:])])[None]
    expected = model(inputs_embeds=embeds).logits
    found = patch(model, config, outputs="shrunk")(input_ids=ids, **arguments).logits
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-4)


@torch.no_grad()
def test_an_image_smaller_than_keep_keeps_all() -> None:
    """While others of its batch keep as many; their patches are 20, 18, 8 and 20."""
    model = patch(FAMILY.model(), keep=10)
    model(**FAMILY.inputs(FAMILY.prompts()))
    assert model.prumerge.last_lengths == (11, 11, 9, 11)
    patch(model, keep=0.5, supplement=False)(**FAMILY.inputs(FAMILY.prompts()))
    assert model.prumerge.last_lengths == (10, 9, 4, 10)


@torch.no_grad()
def test_rows_that_are_ended_otherwise_lose_nothing() -> None:
    """Another token in one of the breaks' places: nobody knows which of them are breaks."""
    model = patch(FAMILY.model(), keep=1, supplement=False, outputs="shrunk")
    picture, arguments = FAMILY.picture("image", 0), FAMILY.arguments("image", [0])
    lengths = []
    for tokens in (picture, [*picture[:4], 7, *picture[5:]]):
        ids = torch.tensor([[1, *tokens]])
        lengths.append(model(input_ids=ids, **arguments).logits.shape[1])
    assert lengths[0] in (1 + 1 + 1, 1 + 1 + 2)  # the token in the last row, or in front of a break
    assert lengths[1] == 1 + 1 + 5


def test_other_families_refuse_it() -> None:
    model = FAMILIES["LLaVA-NeXT with SigLIP"].model()
    model.model.vision_tower = FAMILY.model().model.vision_tower
    with pytest.raises(UnsupportedModelError, match="one for images of one size, got a Pixtral"):
        patch(model)
