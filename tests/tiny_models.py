"""Tiny LLaVAs with random weights, prompts for them, and an oracle independent of `patch`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from prumerge_fast.families.base import inner_model
from prumerge_fast.reduction.config import PruMergeConfig
from prumerge_fast.reduction.dispatch import prune_merge
from prumerge_fast.towers.wrappers import unwrapped
from prumerge_fast.versions import cache_argument

IMAGE, VIDEO, PAD, BOS, EOS, VOCAB = 90, 88, 89, 1, 2, 91
CACHE = cache_argument()
PATCHES = 25  # 5 x 5 patches of 6 pixels


def tiny_llava(
    seed: int = 0, attention: str = "sdpa", feature_layer: Any = -2, **options: Any
) -> LlavaForConditionalGeneration:
    """A LLaVA with a CLIP tower of 4 layers x 64 and a Llama of 2 layers x 64, in eval mode."""
    options = {"vision_feature_layer": feature_layer, "image_seq_length": PATCHES, **options}
    return tiny_model(LlavaForConditionalGeneration, LlavaConfig, seed, attention, **options)


def tiny_model(
    model_class: Any,
    config_class: Any,
    seed: int = 0,
    attention: str = "sdpa",
    feed_forward: int = 96,
    image_size: int = 30,
    vision: Any = CLIPVisionConfig,
    vision_options: Any = None,
    **options: Any,
) -> Any:
    """A model of a family, of that size, with weights under which answers depend on everything.

    Args:
        model_class: Of transformers.
        config_class: Of transformers.
        seed: Of the weights.
        attention: As transformers calls its implementations.
        feed_forward: Width of the language model's MLP.
        image_size: Pixels along a side.
        vision: Class of the tower's configuration.
        vision_options: Of the tower's configuration.
        options: Of the model's configuration.
    """
    torch.manual_seed(seed)
    vision = vision(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=6,
        **(vision_options or {}),
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=feed_forward,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    token = "image_token_id" if config_class.model_type == "internvl" else "image_token_index"
    config = config_class(vision_config=vision, text_config=text, **{token: IMAGE}, **options)
    model = model_class._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "_tower" in name and ("q_proj" in name or "k_proj" in name):
                parameter.mul_(6)  # attention with outliers, so that images keep unequal numbers
            if "lm_head" in name or "language_model" in name or "projector.linear" in name:
                parameter.mul_(4)  # far-apart logits, so that answers depend on all of the prompt
        model.lm_head.weight[[IMAGE, VIDEO]] = 0  # so that they are never the answer
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = EOS
    return model.eval()


def images(count: int, seed: int = 0) -> Tensor:
    """[count, 3, 30, 30]"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 30, 30, generator=generator)


def prompt(*parts: list[int] | str) -> list[int]:
    """Token ids of a prompt; the part `"image"` becomes the placeholders of one."""
    ids = [BOS]
    for part in parts:
        ids += [IMAGE] * PATCHES if part == "image" else list(part)
    return ids


def batch(prompts: list[list[int]], side: str = "left") -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, padded as a processor does."""
    width = max(map(len, prompts))
    ids, mask = [], []
    for row in prompts:
        pad, ones = width - len(row), [1] * len(row)
        left, right = (pad, 0) if side == "left" else (0, pad)
        ids.append([*[PAD] * left, *row, *[PAD] * right])
        mask.append([*[0] * left, *ones, *[0] * right])
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def tower_outputs(
    tower: Any, pixel_values: Tensor, *feature_layers: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and features [B, R, C], from all hidden states of the whole tower.

    Of the layer that reads the deepest features, or else of the last layer, from what it reads.
    """
    states = tower(pixel_values, output_hidden_states=True).hidden_states
    layers = getattr(tower, "vision_model", tower).encoder.layers
    deepest = min(max(layer % len(states) for layer in feature_layers), len(layers) - 1)
    normed = layers[deepest].layer_norm1(states[deepest])
    hidden = torch.cat([states[layer] for layer in feature_layers], -1)
    attention = layers[deepest].self_attn
    return attention.q_proj(normed), attention.k_proj(normed), hidden


def features_of(outputs: Any, kind: str = "image") -> Tensor:
    """The visual tokens [sum of lengths, D] that `forward` returned: 5.24 has them one by one."""
    features = outputs.get(f"{kind}_hidden_states")
    if features is None:
        features = torch.cat(
            [one.flatten(0, -2) for one in outputs[f"{kind}_outputs"].pooler_output]
        )
    return features.flatten(0, -2)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Class and attributes of every module."""
    return {name: (type(module), dict(vars(module))) for name, module in model.named_modules()}


def same(before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether two snapshots hold the very same objects."""
    return before.keys() == after.keys() and all(
        kind is after[name][0]
        and attributes.keys() == after[name][1].keys()
        and all(value is after[name][1][key] for key, value in attributes.items())
        for name, (kind, attributes) in before.items()
    )


def labels_of(ids: Tensor) -> Tensor:
    """Text but the first token, which left padding would have to predict."""
    return ids.masked_fill(torch.isin(ids, torch.tensor([IMAGE, VIDEO, PAD, BOS])), -100)


def lengths_seen(model: Any) -> list[int]:
    """A list that gets the length of everything that the language model is given from now on."""
    lengths: list[int] = []
    language_model = inner_model(unwrapped(model)).language_model
    language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: lengths.append(kwargs["inputs_embeds"].shape[1]),
        with_kwargs=True,
    )
    return lengths


def rows_of(is_text: list[bool], placeholders: list[int], lengths: list[int]) -> list[int]:
    """The position in the shrunk prompt that each of the caller's columns shows.

    Args:
        is_text: Of each column; the others are placeholders.
        placeholders: How many each image has.
        lengths: How many tokens.
    """
    rows: list[int] = []
    position, column, images = -1, 0, zip(placeholders, lengths, strict=True)
    while column < len(is_text):
        if is_text[column]:
            position += 1
            rows.append(position)
            column += 1
        else:
            count, length = next(images)
            shown = [min(place, length) for place in range(1, count)]
            rows += [position + place for place in (*shown, length)]
            position += length
            column += count
    return rows


class Oracle:
    """Runs a model that is not patched on prompts pruned by hand, one prompt at a time."""

    def __init__(self, model: LlavaForConditionalGeneration, config: PruMergeConfig) -> None:
        self.model, self.config = model, config

    @torch.no_grad()
    def features(self, pixel_values: Tensor, feature_layer: int = -2) -> list[Tensor]:
        """The reduced, projected tokens of each image."""
        inputs = tower_outputs(self.model.model.vision_tower, pixel_values, feature_layer)
        merged = prune_merge(*inputs, self.config, backend="reference")
        return [self.model.model.multi_modal_projector(tokens) for tokens in merged.split()]

    @torch.no_grad()
    def embeds(self, ids: list[int], pixel_values: Tensor | None) -> Tensor:
        """[1, S, D], and the caller's ids with as many placeholders as are left."""
        table = self.model.get_input_embeddings()
        pieces, column = [], 0
        features = [] if pixel_values is None else self.features(pixel_values)
        while column < len(ids):
            if ids[column] == IMAGE:
                pieces.append(features.pop(0))
                column += PATCHES
            else:
                pieces.append(table(torch.tensor(ids[column : column + 1])))
                column += 1
        assert not features
        return torch.cat(pieces)[None]

    @torch.no_grad()
    def rows(self, ids: list[int], pixel_values: Tensor | None) -> list[int]:
        """Which row of `logits` each of the caller's columns shows, by hand."""
        lengths = [] if pixel_values is None else list(map(len, self.features(pixel_values)))
        return rows_of([token != IMAGE for token in ids], [PATCHES] * len(lengths), lengths)

    @torch.no_grad()
    def logits(self, ids: list[int], pixel_values: Tensor | None) -> Tensor:
        """[S, V]"""
        embeds = self.embeds(ids, pixel_values)
        return self.model(inputs_embeds=embeds, **self.placed(ids, embeds.shape[1])).logits[0]

    def placed(self, ids: list[int], length: int) -> dict[str, Tensor]:
        """Where so many tokens stand, for the model; nothing where it is to count them itself."""
        assert self.config.positions == "compact"
        return {}

    @torch.no_grad()
    def answer(self, ids: list[int], pixel_values: Tensor | None, count: int) -> list[int]:
        """Greedy, without a cache, until EOS."""
        embeds, answer = self.embeds(ids, pixel_values), []
        while len(answer) < count and (not answer or answer[-1] != EOS):
            placed = self.placed(ids, embeds.shape[1])
            outputs = self.model(inputs_embeds=embeds, use_cache=False, **placed)
            token = int(outputs.logits[0, -1].argmax())
            answer.append(token)
            embeds = torch.cat(
                [embeds, self.model.get_input_embeddings()(torch.tensor([[token]]))], 1
            )
        return answer


# A batch that has everything: one image, two, none, and prompts of unequal length.
PROMPTS = [
    prompt([30], "image", [31] * 11),
    prompt([5, 6, 7], "image", [8, 9]),
    prompt("image", [11, 12, 13], "image", [14]),
    prompt([20, 21, 22]),
]
PIXELS = images(4)
OF_PROMPT = [PIXELS[:1], PIXELS[1:2], PIXELS[2:], None]
# Options under which a patched model is to equal the plain one.
EVERYTHING = {"keep": 1.0, "merge": "none", "supplement": False, "order": "raster"}
