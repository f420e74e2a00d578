"""What the models share: the tower's reading layer, its weights' names, and its batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.models.utils import StageMissingLayer, WeightsMapper, maybe_prefix

from prumerge_fast.reduction.reading import Reading
from prumerge_fast.serving.vllm.checks import num_patches, reading_layer
from prumerge_fast.serving.vllm.settings import settings

logger = init_logger("vllm.prumerge_fast")  # vLLM prints what loggers below its own say

SHORT_NAMES = WeightsMapper(
    orig_to_new_prefix={
        f"vision_tower.{part}.": f"vision_tower.vision_model.{part}."
        for part in ("embeddings", "encoder", "pre_layrnorm", "post_layernorm")
    }
)
"""transformers 5 saves CLIP towers without the `vision_model.` that vLLM's tower has."""

_READER = "prumerge_reader"
_PARTS = ("layer_norm1", "self_attn.q_proj", "self_attn.k_proj")


class Reader(nn.Module):
    """Queries and keys of the layer that reads the features, which vLLM's tower drops.

    Its projections are whole on every rank of a tensor-parallel group, because PruMerge's
    attention is of one head over the full width; they are two of an encoder layer's six.
    """

    def __init__(self, vision_config: Any, quant_config: Any, prefix: str) -> None:
        super().__init__()
        width = vision_config.hidden_size
        self.layer_norm1 = nn.LayerNorm(width, eps=vision_config.layer_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                name: ReplicatedLinear(
                    width, width, quant_config=quant_config, prefix=f"{prefix}.self_attn.{name}"
                )
                for name in ("q_proj", "k_proj")
            }
        )

    def forward(self, hidden: Tensor, every_query: bool) -> tuple[Tensor, Tensor]:
        """Of features [B, 1+N, C], the class token's query [B, C], or those of all patches
        [B, 1+N, C], and the keys [B, 1+N, C]."""
        normed = self.layer_norm1(hidden)  # [B, 1+N, C]
        keys, _ = self.self_attn["k_proj"](normed)
        query, _ = self.self_attn["q_proj"](normed if every_query else normed[:, 0])
        return query, keys


class PrunedModel:
    """What a model of vLLM has besides with PruMerge; without the setting, nothing.

    `prumerge` is the setting, or `None`; `tower_batch` how many images or crops the tower sees at
    once.
    """

    config: Any
    hf_to_vllm_mapper: WeightsMapper
    vision_tower: Any

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.prumerge = settings(self.config)
        if self.prumerge is None or isinstance(self.vision_tower, StageMissingLayer):
            return  # a tower that is missing takes embeddings only
        layer = reading_layer(self.config)
        name = f"vision_tower.vision_model.encoder.layers.{layer}"
        self.vision_tower.add_module(
            _READER,
            Reader(self.config.vision_config, vllm_config.quant_config, maybe_prefix(prefix, name)),
        )
        self.hf_to_vllm_mapper = self.hf_to_vllm_mapper | WeightsMapper(
            orig_to_new_prefix={
                f"{name}.{part}.": f"vision_tower.{_READER}.{part}." for part in _PARTS
            }
        )
        patches = num_patches(self.config)
        # vLLM's budget counts the rows that come out of the encoder; these are what goes in.
        budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.tower_batch = max(1, budget // (1 + patches))
        unit = "a crop" if self.config.model_type == "llava_next" else "an image"
        logger.info_once(
            "prumerge: %d -> %d tokens %s, %s",
            patches,
            self.prumerge.capacity(patches),
            unit,
            self.prumerge,
            scope="global",
        )

    def read(self, pixel_values: Tensor) -> Reading:
        """What the tower reads of images or crops [K, 3, H, W]."""
        every_query = self.prumerge is not None and self.prumerge.scoring().received
        hidden = self.vision_tower(pixel_values, feature_select_strategy="full")  # [K, 1+N, C]
        query, keys = getattr(self.vision_tower, _READER)(hidden, every_query)
        heads = self.config.vision_config.num_attention_heads
        return Reading(query, keys, hidden, heads, class_token=True)

    def batches(self, crops: Sequence[int]) -> Iterator[slice]:
        """Images that the tower sees at once, of which each has so many crops."""
        start = total = 0
        for image, count in enumerate(crops):
            if image > start and total + count > self.tower_batch:
                yield slice(start, image)
                start, total = image, 0
            total += count
        if crops:
            yield slice(start, len(crops))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)  # type: ignore[misc]
        parameters = dict(self.vision_tower.named_parameters(prefix="vision_tower"))
        expected = {name for name in parameters if f".{_READER}." in name}
        # Trainers bring a model's new weights a few at a time; a checkpoint has all of these.
        whole = {name for name in parameters.keys() - expected if "norm" in name}
        if whole <= loaded and (missing := expected - loaded):
            raise ValueError(
                "prumerge: expected a checkpoint with the whole vision tower, got one without "
                f"the layer that reads the features ({', '.join(sorted(missing))})"
            )
        return loaded
