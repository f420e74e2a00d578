"""`patch` on the original LLaVA package (llava-torch 1.2.2): its models and its bare vision tower.

Runs where that package is installed, as docs/original-llava.md says; `.ci/run` does so.
"""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

pytest.importorskip(
    "llava", reason="llava-torch is not installed; it needs an environment of its own"
)
from llava.constants import IGNORE_INDEX
from llava.constants import IMAGE_TOKEN_INDEX as IMAGE
from llava.mm_utils import process_images, select_best_resolution, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.language_model.llava_mistral import LlavaMistralConfig, LlavaMistralForCausalLM
from llava.model.language_model.llava_mpt import LlavaMptConfig, LlavaMptForCausalLM
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from sentencepiece import SentencePieceTrainer
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaTokenizer,
    MptForCausalLM,
)
from transformers.generation.streamers import BaseStreamer

import prumerge_fast
from prumerge_fast import PruMergeConfig, UnsupportedModelError
from prumerge_fast.reduction.dispatch import prune_merge

SIDE, PIXELS, WIDTH, VOCAB = 5, 30, 64, 90  # 5 x 5 patches of 6 pixels
HEADS = 4  # of the tower
PINPOINTS = [[30, 60], [60, 30], [60, 60], [90, 30], [30, 90]]
EVERYTHING = {"keep": 1.0, "merge": "none", "supplement": False, "order": "raster"}
ANYRES = {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS}


@pytest.fixture(scope="module")
def tower_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP tower of 4 layers x 64 with its image processor, as a checkpoint."""
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("clip"))
    config = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=HEADS,
        image_size=PIXELS,
        patch_size=PIXELS // SIDE,
    )
    tower = CLIPVisionModel(config)
    with torch.no_grad():
        for name, parameter in tower.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(6)  # attention with outliers, so that images keep unequal numbers
    tower.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=PIXELS).save_pretrained(folder)
    return folder


class RepairedMpt(LlavaMptForCausalLM):
    """The package's MPT passes too few arguments to `prepare_inputs_labels_for_multimodal`."""

    model = property(LlavaMptForCausalLM.get_model)  # where the package looks for `image_newline`

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        past_key_values: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        images: Any = None,
        image_sizes: Any = None,
        **kwargs: Any,
    ) -> Any:
        arguments = (input_ids, None, attention_mask, past_key_values)
        if inputs_embeds is None:
            *arguments, inputs_embeds, labels = self.prepare_inputs_labels_for_multimodal(
                *arguments, labels, images, image_sizes
            )
        input_ids, _, attention_mask, past_key_values = arguments
        return MptForCausalLM.forward(
            self,
            input_ids,
            past_key_values,
            attention_mask,
            inputs_embeds,
            labels,
            **kwargs,
        )

    @torch.no_grad()
    def generate(
        self, inputs: Tensor, images: Any, image_sizes: Any = None, **options: Any
    ) -> Tensor:
        _, _, mask, _, embeds, _ = self.prepare_inputs_labels_for_multimodal(
            inputs, None, options.pop("attention_mask", None), None, None, images, image_sizes
        )
        mask = torch.ones(embeds.shape[:2]) if mask is None else mask
        return super().generate(inputs_embeds=embeds, attention_mask=mask, **options)


def config_of(kind: type, tower_path: str, **options: Any) -> Any:
    vision = {
        "mm_vision_tower": tower_path,
        "mm_vision_select_layer": -2,
        "mm_hidden_size": WIDTH,
        "mm_projector_type": "mlp2x_gelu",
        "vocab_size": VOCAB,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **options,
    }
    if issubclass(kind, LlavaMptForCausalLM):
        return LlavaMptConfig(d_model=WIDTH, n_heads=4, n_layers=2, max_seq_len=512, **vision)
    make = LlavaConfig if issubclass(kind, LlavaLlamaForCausalLM) else LlavaMistralConfig
    return make(
        hidden_size=WIDTH,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **vision,
    )


def tiny(tower_path: str, kind: type = LlavaLlamaForCausalLM, load: bool = True, **options: Any):
    """A model with random weights, in eval mode, the same for the same options."""
    torch.manual_seed(0)
    model = kind(config_of(kind, tower_path, **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # far-apart logits, so that answers depend on all of the prompt
        if hasattr(model.get_model(), "image_newline"):
            model.get_model().image_newline.normal_()
    if load:
        model.get_vision_tower().load_model()
    return model.eval()


def picture(width: int, height: int, seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


PICTURES = [picture(40, 31, 0), picture(29, 70, 1), picture(64, 64, 2), picture(100, 7, 3)]
SIZES = [image.size for image in PICTURES]
# One image, two, one; padded on the right, as the package does. No row is without an image.
PROMPTS = [[1, 5, IMAGE, 6, 7, 8], [1, IMAGE, 9, IMAGE, 10], [1, 11, 12, IMAGE]]


def prompts() -> dict[str, Tensor]:
    width = max(map(len, PROMPTS))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in PROMPTS])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in PROMPTS])
    return {"input_ids": ids, "attention_mask": mask.bool()}


def images_for(model: Any) -> Any:
    """The pictures as the package prepares them, by the model's `image_aspect_ratio`."""
    return process_images(PICTURES, model.get_vision_tower().image_processor, model.config)


@torch.no_grad()
def reduced(model: Any, crop: Tensor, config: PruMergeConfig, valid: Tensor | None = None) -> Any:
    """The projected tokens of a crop [3, S, S] and the patch of each, by the reference."""
    clip = model.get_vision_tower().vision_tower
    hidden = clip(crop[None], output_hidden_states=True).hidden_states[-2]  # [1, 1+N, C]
    reader = clip.vision_model.encoder.layers[-1]
    normed = reader.layer_norm1(hidden)
    query, keys = reader.self_attn.q_proj(normed), reader.self_attn.k_proj(normed)
    patches = torch.arange(SIDE**2) if valid is None else valid.nonzero()[:, 0]
    if not len(patches):
        return torch.empty(0, WIDTH), []
    rows = torch.cat([torch.zeros(1, dtype=torch.long), patches + 1])
    if isinstance(config.keep, int):
        config = config.replace(keep=min(config.keep, len(patches)))
    inputs = (one[:, rows] for one in (query, keys, hidden))
    merged = prune_merge(*inputs, config, num_heads=HEADS, backend="reference")
    (tokens,) = merged.split()
    kept = [-1 if p < 0 else int(patches[p]) for p in merged.kept[0, : len(tokens)]]
    return model.get_model().mm_projector(tokens), kept


@torch.no_grad()
def spliced(model: Any, ids: list[int], features: list[Tensor]) -> Tensor:
    """[1, S, D]: embeddings of a prompt with the features in place of its images."""
    features = list(features)
    table = model.get_input_embeddings()
    parts = [features.pop(0) if i == IMAGE else table(torch.tensor([i])) for i in ids]
    assert not features
    return torch.cat(parts)[None]


def split_by_prompt(features: list[Tensor]) -> list[list[Tensor]]:
    features = list(features)
    return [[features.pop(0) for token in row if token == IMAGE] for row in PROMPTS]


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


KINDS = [LlavaLlamaForCausalLM, LlavaMistralForCausalLM, RepairedMpt]
LAYOUTS = {
    "square": {},
    "pad": {"image_aspect_ratio": "pad"},
    "anyres-flat": ANYRES,
    "anyres-spatial": {**ANYRES, "mm_patch_merge_type": "spatial"},
    "anyres-unpad": {**ANYRES, "mm_patch_merge_type": "spatial_unpad"},
    "pad-unpad": {"image_aspect_ratio": "pad", "mm_patch_merge_type": "spatial_unpad"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.no_grad()
def test_keeping_everything_changes_nothing(tower_path: str, kind: type, layout: str) -> None:
    model = tiny(tower_path, kind, **LAYOUTS[layout])
    images = images_for(model)
    if layout == "pad-unpad":
        images = list(images)  # a list of single images goes the way of crops
    labels = prompts()["input_ids"].clamp(min=0)
    call = {**prompts(), "labels": labels, "images": images, "image_sizes": SIZES}
    answer = {"do_sample": False, "max_new_tokens": 5, "images": images, "image_sizes": SIZES}
    ids, mask = prompts().values()
    expected = model(**call)
    expected_ids = model.generate(ids, attention_mask=mask, **answer)
    prumerge_fast.patch(model, **EVERYTHING)
    actual = model(**call)
    assert actual.logits.shape == expected.logits.shape
    close(actual.logits, expected.logits)
    close(actual.loss, expected.loss)
    assert torch.equal(model.generate(ids, attention_mask=mask, **answer), expected_ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["tensor", "list", "five dimensions"])
@torch.no_grad()
def test_batches_equal_single_prompts(tower_path: str, kind: type, form: str) -> None:
    model = tiny(tower_path, kind, image_aspect_ratio="pad")
    pixels = images_for(model)
    features = [reduced(model, image, PruMergeConfig())[0] for image in pixels]
    lengths = list(map(len, features))
    assert len(set(lengths)) > 1
    images = {"tensor": pixels, "list": list(pixels), "five dimensions": pixels[:, None]}[form]
    prumerge_fast.patch(model)
    logits = model(**prompts(), images=images).logits
    assert list(model.prumerge.last_lengths) == lengths
    for row, ids, own in zip(logits, PROMPTS, split_by_prompt(features), strict=True):
        expected = model(inputs_embeds=spliced(model, ids, own)).logits[0]
        close(row[: len(expected)], expected)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generate(tower_path: str, kind: type) -> None:
    model = tiny(tower_path, kind)
    image = images_for(model)[:1]
    (features,) = [reduced(model, image[0], PruMergeConfig(keep=4))[0]]
    embeds, answer = spliced(model, PROMPTS[0], [features]), []
    while len(answer) < 6 and 2 not in answer:
        answer.append(int(model(inputs_embeds=embeds).logits[0, -1].argmax()))
        embeds = torch.cat([embeds, model.get_input_embeddings()(torch.tensor([answer[-1:]]))], 1)
    prumerge_fast.patch(model, keep=4)
    ids = torch.tensor(PROMPTS[:1])
    out = model.generate(ids, images=image, do_sample=False, max_new_tokens=6)
    assert out[0, -len(answer) :].tolist() == answer  # no prompt: the package returns none
    assert out.shape[1] <= len(answer) + 1


@torch.no_grad()
def test_beams_and_streamer(tower_path: str) -> None:
    model, ids = tiny(tower_path), torch.tensor(PROMPTS[:1])
    image = images_for(model)[:1]
    features, _ = reduced(model, image[0], PruMergeConfig(keep=4))
    embeds = spliced(model, PROMPTS[0], [features])
    beams = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 5, "do_sample": False}
    expected = LlamaForCausalLM.generate(model, inputs_embeds=embeds, **beams)
    prumerge_fast.patch(model, keep=4)
    assert torch.equal(model.generate(ids, images=image, **beams), expected)

    class Recorder(BaseStreamer):
        values: ClassVar[list[int]] = []

        def put(self, value: torch.Tensor) -> None:
            self.values.extend(value.flatten().tolist())

        def end(self) -> None:
            self.values.append(-1)

    answer = model.generate(
        ids, images=image, max_new_tokens=4, do_sample=False, streamer=Recorder()
    )
    assert Recorder.values == [*answer[0].tolist(), -1]


def test_forward_of_mpt_is_as_the_package_has_it(tower_path: str) -> None:
    """Broken in the package itself; when that changes, `RepairedMpt` and its notes can go."""
    model = tiny(tower_path, LlavaMptForCausalLM)
    for _ in range(2):
        with pytest.raises(TypeError, match=r"missing .* required .*argument: 'images'"):
            model(torch.tensor(PROMPTS[:1]))
        prumerge_fast.patch(model)


def padding_of(model: Any, index: int, crops: int) -> list[Tensor]:
    """Of each crop, the patches [N] that hold a part of the picture, by the package's rounding."""
    width, height = SIZES[index]
    across, down = (
        side // PIXELS * SIDE for side in select_best_resolution(SIZES[index], PINPOINTS)
    )
    if width / height > across / down:
        cut_x, cut_y = 0, (down - int(height * across / width)) // 2
    else:
        cut_x, cut_y = (across - int(width * down / height)) // 2, 0
    valid = [torch.ones(SIDE**2, dtype=torch.bool)]
    for crop in range(crops - 1):
        top, left = crop // (across // SIDE) * SIDE, crop % (across // SIDE) * SIDE
        inside = [
            cut_y <= top + p // SIDE < down - cut_y and cut_x <= left + p % SIDE < across - cut_x
            for p in range(SIDE**2)
        ]
        valid.append(torch.tensor(inside))
    return valid


def arranged(model: Any, index: int, crops: Tensor, config: PruMergeConfig) -> Tensor:
    """What an anyres image is to become, [m, D], patch by patch."""
    kind = getattr(model.config, "mm_patch_merge_type", "flat")
    unpads = "unpad" in kind
    valid = padding_of(model, index, len(crops)) if unpads else [None] * len(crops)
    parts = [reduced(model, crop, config, v) for crop, v in zip(crops, valid, strict=True)]
    newline = [model.get_model().image_newline[None]] if unpads else []
    if kind == "flat" or config.order == "attention":
        return torch.cat([*(tokens for tokens, _ in parts), *newline])
    out, tail = [parts[0][0]], []
    columns, rows = (side // PIXELS for side in select_best_resolution(SIZES[index], PINPOINTS))
    for y in range(rows * SIDE):
        row = []
        for x in range(columns * SIDE):
            tokens, kept = parts[1 + y // SIDE * columns + x // SIDE]
            patch = y % SIDE * SIDE + x % SIDE
            row += [tokens[kept.index(patch)][None]] if patch in kept else []
        out += [*row, *newline] if row else []
    for tokens, kept in parts[1:]:
        tail += [tokens[kept.index(-1)][None]] if -1 in kept else []
    return torch.cat([*out, *tail])


@pytest.mark.parametrize("order", ["attention", "raster"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep": 7},
        {"variant": "prumerge+", "keep": 0.4},
        {"keep": 7, "scores": "received"},
        {"keep": 7, "heads": "separate"},
    ],
    ids=str,
)
@pytest.mark.parametrize("merge_type", ["flat", "spatial", "spatial_unpad"])
@torch.no_grad()
def test_crops(tower_path: str, merge_type: str, options: dict[str, Any], order: str) -> None:
    model = tiny(tower_path, **ANYRES, mm_patch_merge_type=merge_type)
    images = images_for(model)
    assert [len(crops) for crops in images] == [5, 4, 5, 4]
    config = PruMergeConfig(order=order, **options)
    expected = [arranged(model, i, crops, config) for i, crops in enumerate(images)]
    prumerge_fast.patch(model, config)
    logits = model(**prompts(), images=images, image_sizes=SIZES).logits
    assert list(model.prumerge.last_lengths) == list(map(len, expected))
    for row, ids, own in zip(logits, PROMPTS, split_by_prompt(expected), strict=True):
        alone = model(inputs_embeds=spliced(model, ids, own)).logits[0]
        close(row[: len(alone)], alone)


@torch.no_grad()
def test_padding_is_not_seen(tower_path: str) -> None:
    model = tiny(tower_path, **ANYRES, mm_patch_merge_type="spatial_unpad")
    crops = images_for(model)[3]  # 100 x 7 pixels in 90 x 30: a row of patches, and padding
    inside = sum(int(v.sum()) for v in padding_of(model, 3, len(crops)))
    assert SIDE**2 < inside < len(crops) * SIDE**2
    prumerge_fast.patch(model, **{**EVERYTHING, "keep": SIDE**2})  # clipped to what is no padding
    ids = torch.tensor([[1, IMAGE, 5]])
    model(ids, images=[crops], image_sizes=SIZES[3:])
    rows = (inside - SIDE**2) // (3 * SIDE)
    assert model.prumerge.last_lengths == (inside + rows,)
    # So thin that the package cuts away all of its crops: the whole image is what remains.
    image = picture(400, 1, 0)
    prepared = process_images([image], model.get_vision_tower().image_processor, model.config)
    prumerge_fast.patch(model, PruMergeConfig(keep=3))
    model(ids, images=list(prepared), image_sizes=[image.size])
    assert model.prumerge.last_lengths == (4 + 1,)


@torch.no_grad()
def test_labels(tower_path: str) -> None:
    model = prumerge_fast.patch(tiny(tower_path), keep=3)
    ids = torch.tensor(PROMPTS[:1])
    labels = ids.clone()
    *_, embeds, shrunk = model.prepare_inputs_labels_for_multimodal(
        ids, None, None, None, labels, images_for(model)[:1]
    )
    assert shrunk.tolist() == [[1, 5, *[IGNORE_INDEX] * 4, 6, 7, 8]]
    assert embeds.shape == (1, 9, WIDTH)


def test_gradients(tower_path: str) -> None:
    model = prumerge_fast.patch(
        tiny(tower_path, **ANYRES, mm_patch_merge_type="spatial_unpad"), order="raster"
    )
    model.get_vision_tower().requires_grad_(True)
    labels = prompts()["input_ids"].clamp(min=0)
    model(**prompts(), labels=labels, images=images_for(model), image_sizes=SIZES).loss.backward()
    projector = model.get_model().mm_projector[0].weight
    for parameter in (projector, model.get_model().image_newline):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    # As in the package, whose tower runs under `no_grad`.
    assert all(p.grad is None for p in model.get_vision_tower().parameters())


@torch.no_grad()
def test_dtypes(tower_path: str) -> None:
    model = prumerge_fast.patch(tiny(tower_path).to(torch.bfloat16), keep=3)
    pixels = images_for(model)
    model.get_vision_tower().float()
    (features, *_) = model.encode_images(pixels.to(torch.bfloat16))
    assert features.dtype == torch.bfloat16
    tower = prumerge_fast.patch(model.get_vision_tower(), keep=3)
    assert tower(pixels).dtype == torch.float32  # as without the patch, that of the images


# The bare tower


@torch.no_grad()
def test_tower(tower_path: str) -> None:
    model = tiny(tower_path)
    model.get_model().mm_projector = nn.Identity()
    tower, pixels = model.get_vision_tower(), images_for(model)
    plain, plain_list = tower(pixels), tower(list(pixels))
    expected = [reduced(model, image, PruMergeConfig())[0] for image in pixels]
    prumerge_fast.patch(tower)
    for image, tokens, listed in zip(pixels, expected, tower(list(pixels)), strict=True):
        close(listed, tokens[None])
        close(tower(image[None]), tokens[None])
    assert tower.prumerge.last_lengths == (len(expected[-1]),)
    assert tower([]) == []
    with pytest.raises(ValueError, match="images: expected a list, one image, or keep=n"):
        tower(pixels)
    prumerge_fast.patch(tower, keep=4)
    assert tower(images=pixels).shape == (4, 5, WIDTH)
    prumerge_fast.patch(tower, **EVERYTHING)
    close(tower(pixels), plain)
    for kept, whole in zip(tower(list(pixels)), plain_list, strict=True):
        close(kept, whole)
    prumerge_fast.unpatch(tower)
    assert type(tower) is CLIPVisionTower
    assert torch.equal(tower(pixels), plain)


@pytest.mark.parametrize(
    "options", [{}, {"scores": "received"}, {"heads": "separate"}], ids=["", "received", "heads"]
)
@torch.no_grad()
def test_tower_of_a_model(tower_path: str, options: dict[str, Any]) -> None:
    model = tiny(tower_path)
    pixels = images_for(model)
    expected = prumerge_fast.patch(model, keep=4, **options).encode_images(pixels)
    prumerge_fast.unpatch(model)
    prumerge_fast.patch(model.get_vision_tower(), keep=4, **options)
    close(model.encode_images(pixels), torch.stack(expected))
    prumerge_fast.patch(model, keep=4, **options)  # both: reduced once
    close(torch.stack(model.encode_images(pixels)), torch.stack(expected))


@torch.no_grad()
def test_before_loading(tower_path: str) -> None:
    expected = prumerge_fast.patch(tiny(tower_path)).encode_images
    model = prumerge_fast.patch(tiny(tower_path, load=False))
    tower = prumerge_fast.patch(CLIPVisionTower(tower_path, model.config, delay_load=True))
    assert not tower.is_loaded
    model.get_vision_tower().load_model()
    tower.load_model()
    pixels = images_for(model)
    for actual, tokens in zip(model.encode_images(pixels), expected(pixels), strict=True):
        assert torch.equal(actual, tokens)
    assert [t.shape[1] for t in tower(list(pixels))] == list(model.prumerge.last_lengths)


# On and off


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


@pytest.mark.parametrize("kind", [*KINDS, LlavaMptForCausalLM, CLIPVisionTower])
def test_leaves_no_trace(tower_path: str, kind: type) -> None:
    model = (
        tiny(tower_path).get_vision_tower() if kind is CLIPVisionTower else tiny(tower_path, kind)
    )
    before, of_class = snapshot(model), dict(vars(kind))
    with prumerge_fast.patched(model, keep=3) as inside:
        assert inside is model
        assert prumerge_fast.is_patched(model)
        assert prumerge_fast.patch(model, order="raster").prumerge.config.keep == 3
        assert type(model).__name__ == kind.__name__
        assert isinstance(model, kind)
    assert snapshot(model) == before
    assert dict(vars(kind)) == of_class
    assert not prumerge_fast.is_patched(model)


@pytest.mark.parametrize("kind", [LlavaLlamaForCausalLM, CLIPVisionTower])
def test_positions_are_the_packages(tower_path: str, kind: Any) -> None:
    """It makes them itself, from one placeholder an image."""
    model = (
        tiny(tower_path).get_vision_tower() if kind is CLIPVisionTower else tiny(tower_path, kind)
    )
    with pytest.raises(ValueError, match=r"^positions: expected 'compact' for .*got 'original'"):
        prumerge_fast.patch(model, positions="original")
    assert not prumerge_fast.is_patched(model)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@torch.no_grad()
def test_copies(tower_path: str, duplicate: Any) -> None:
    model = prumerge_fast.patch(tiny(tower_path), keep=3)
    twin = prumerge_fast.patch(duplicate(model), keep=5)
    pixels = images_for(model)[:1]
    assert [len(m.encode_images(pixels)[0]) for m in (model, twin)] == [4, 6]
    prumerge_fast.unpatch(model)
    assert prumerge_fast.is_patched(twin)


def test_saves_the_plain_model(tower_path: str, tmp_path: Path) -> None:
    model = prumerge_fast.patch(tiny(tower_path))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [
        "LlavaLlamaForCausalLM"
    ]
    again = LlavaLlamaForCausalLM.from_pretrained(tmp_path)
    assert not prumerge_fast.is_patched(again)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


# What cannot be


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature: expected 'patch'"),
        ({"mm_vision_select_layer": 9}, "mm_vision_select_layer: expected one int from -5 to 4"),
    ],
    ids=str,
)
@pytest.mark.parametrize("load", [True, False])
def test_unsupported_options(
    tower_path: str, options: dict[str, Any], reason: str, load: bool
) -> None:
    model = tiny(tower_path, load=load, **options)
    for part in (model, model.get_vision_tower()):
        with pytest.raises(UnsupportedModelError, match=reason):
            prumerge_fast.patch(part)
        assert not prumerge_fast.is_patched(part)


def test_unsupported_towers(tower_path: str) -> None:
    model = tiny(tower_path)
    siglip = type("SigLipVisionTower", (nn.Module,), {})()
    several = CLIPVisionTower(tower_path, model.config)
    several.__class__ = type("CLIPVisionTowerS2", (CLIPVisionTower,), {"forward": lambda self: 0})
    for tower, reason in [
        (siglip, "expected a CLIPVisionTower, got SigLipVisionTower, which is not known"),
        (several, "got a CLIPVisionTowerS2, whose forward computes others"),
    ]:
        model.get_model().vision_tower = tower
        with pytest.raises(UnsupportedModelError, match=reason):
            prumerge_fast.patch(model)
    with pytest.raises(UnsupportedModelError, match="CLIPVisionTower"):
        prumerge_fast.patch(siglip)
    with pytest.raises(UnsupportedModelError, match="whose forward computes others"):
        prumerge_fast.patch(several)
    del model.get_model().vision_tower
    with pytest.raises(UnsupportedModelError, match="expected one with a vision tower"):
        prumerge_fast.patch(model)


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, {"images": torch.zeros(4, 3, 24, 24)}, r"images: expected .*3, 30, 30.*24, 24"),
        ({}, {"images": [torch.zeros(3, 24, 24)] * 4}, r"images: expected .*3, 30, 30.*24, 24"),
        (
            {"mm_patch_merge_type": "spatial"},
            {"images": [torch.zeros(2, 3, 30, 30)] * 4},
            "images: expected one crop an image, .* got 2 of image 0",
        ),
        (
            {**ANYRES, "mm_patch_merge_type": "spatial_unpad"},
            {"image_sizes": None},
            "image_sizes: expected .* got None",
        ),
        (
            {**ANYRES, "mm_patch_merge_type": "spatial_unpad"},
            {"image_sizes": SIZES[:1]},
            "image_sizes: expected .* got 1 of them",
        ),
        (
            {**ANYRES, "mm_patch_merge_type": "spatial"},
            {"images": [torch.zeros(3, 3, 30, 30)] * 4},
            r"images: expected 1 \+ 2 x 2 crops of image 0 of 40 x 31 pixels, got 3",
        ),
        (
            {"mm_patch_merge_type": "round"},
            {"images": [torch.zeros(3, 30, 30)] * 4},
            "mm_patch_merge_type: expected .* got 'round'",
        ),
    ],
)
def test_bad_images(
    tower_path: str, options: dict[str, Any], change: dict[str, Any], message: str
) -> None:
    model = prumerge_fast.patch(tiny(tower_path, **options))
    call = {**prompts(), "images": images_for(model), "image_sizes": SIZES, **change}
    with pytest.raises(ValueError, match=message):
        model(**call)


@pytest.mark.parametrize("name", ["encode_images", "prepare_inputs_labels_for_multimodal"])
def test_methods_replaced_on_the_instance_are_refused(tower_path: str, name: str) -> None:
    model = tiny(tower_path)
    setattr(model, name, getattr(model, name))
    with pytest.raises(UnsupportedModelError, match=f"expected the `{name}` of its class"):
        prumerge_fast.patch(model)


def test_keep_is_checked_before_loading(tower_path: str) -> None:
    model = tiny(tower_path, load=False)
    with pytest.raises(ValueError, match="keep: expected at most N = 25"):
        prumerge_fast.patch(model, keep=26)
    assert not prumerge_fast.is_patched(model)


@torch.no_grad()
def test_prompts_without_images(tower_path: str) -> None:
    model = tiny(tower_path)
    ids = torch.tensor([[1, 5, 6, 7]])
    expected = model(ids).logits
    prumerge_fast.patch(model)
    assert torch.equal(model(ids).logits, expected)
    assert model.prumerge.last_lengths is None
    model.generate(ids, max_new_tokens=2)
    # A prompt of one token is a step of decoding, for which the package takes no images.
    step = model(ids[:, :1], images=images_for(model)).logits
    close(step, expected[:, :1])
    assert model.prumerge.last_lengths is None


# The authors' LoRA checkpoints


@pytest.fixture(scope="module")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model with its tokenizer, in place of vicuna-7b-v1.5."""
    folder = tmp_path_factory.mktemp("vicuna")
    SentencePieceTrainer.train(
        sentence_iterator=iter(["USER : what is in the picture ? ASSISTANT : a cat"] * 9),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=40,
        model_type="bpe",
        minloglevel=2,
    )
    tokenizer = LlamaTokenizer(str(folder / "tokenizer.model"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    config = config_of(LlavaLlamaForCausalLM, "", vocab_size=len(tokenizer)).to_dict()
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    return folder


@pytest.fixture(params=[True, False], ids=["safetensors", "bin"])
def lora_path(
    request: pytest.FixtureRequest, base_path: Path, tower_path: str, tmp_path: Path
) -> Path:
    """A checkpoint as the package's training script leaves it, with random weights."""
    folder = tmp_path / "llava-v1.5-7b-lora-prunemerge"
    base = LlamaForCausalLM.from_pretrained(base_path)
    model = tiny(
        tower_path, vocab_size=base.config.vocab_size, mm_use_im_patch_token=False, load=False
    )
    model.load_state_dict(base.state_dict(), strict=False)
    projections = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    peft_model = get_peft_model(
        model,
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=projections,
            init_lora_weights=False,
            task_type="CAUSAL_LM",
        ),
    )
    peft_model.base_model.model.config._name_or_path = str(base_path)
    peft_model.base_model.model.config.save_pretrained(folder)
    peft_model.save_pretrained(folder, safe_serialization=request.param)
    projector = {n: p for n, p in peft_model.named_parameters() if "mm_projector" in n}
    assert "base_model.model.model.mm_projector.0.weight" in projector
    torch.save(projector, folder / "non_lora_trainables.bin")
    return folder


@torch.no_grad()
def test_lora_checkpoint(lora_path: Path, base_path: Path) -> None:
    (weights,) = lora_path.glob("adapter_model.*")
    adapter = load_file(weights) if weights.suffix == ".safetensors" else torch.load(weights)
    name = "model.layers.1.mlp.up_proj"
    a, b = (adapter[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
    plain = LlamaForCausalLM.from_pretrained(base_path).get_submodule(name).weight

    tokenizer, model, processor, _ = load_pretrained_model(
        str(lora_path), str(base_path), lora_path.name, device="cpu", device_map="cpu"
    )
    half = {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(model.get_submodule(name).weight.float(), plain + 2 * b @ a, **half)
    trained = torch.load(lora_path / "non_lora_trainables.bin")
    (weight,) = [w for n, w in trained.items() if n.endswith("mm_projector.2.weight")]
    torch.testing.assert_close(model.get_model().mm_projector[2].weight.float(), weight, **half)

    model = model.float()
    prumerge_fast.patch(model)
    pixels = process_images(PICTURES[:1], processor, model.config)
    text = "USER : <image> what is in the picture ? ASSISTANT :"
    ids = tokenizer_image_token(text, tokenizer, return_tensors="pt")[None]
    features, _ = reduced(model, pixels[0], PruMergeConfig())
    expected = model(inputs_embeds=spliced(model, ids[0].tolist(), [features])).logits
    close(model(ids, images=pixels).logits, expected)
    out = model.generate(ids, images=pixels, image_sizes=SIZES[:1], max_new_tokens=4)
    assert isinstance(tokenizer.batch_decode(out)[0], str)
